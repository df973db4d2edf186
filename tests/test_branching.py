"""Rollouts along a plan: shared work changes no number, and is done once."""

import functools

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig
from test_step_schedules import plans
from tiny_pipelines import WAN_LIKE, wan

from vidtrl.diffusion.flow import dpm_solver_step, x0_from_velocity
from vidtrl.diffusion.step_schedules import branch_plan, chain_plan, compress_tail, granular_plan, tree_plan
from vidtrl.diffusion.transitions import Transition, flow_sde, transition
from vidtrl.models import VideoModel
from vidtrl.rollout.branching import rollout
from vidtrl.rollout.sampling import sample
from vidtrl.trainer.draws import draw_seed


T, G = 6, 4
PROMPTS = ["a red circle moves left", "the cat moves up slowly"]


@functools.cache
def setup():
    """A tiny Wan whose denoiser counts the samples it evaluates, two prompts, and the negative one."""
    model = VideoModel(wan()[0])
    size = {k: v for k, v in WAN_LIKE.items() if k != "max_sequence_length"}
    with torch.no_grad():
        condition = model.condition(PROMPTS, **size, max_sequence_length=16)
        negative = model.condition("", **size, max_sequence_length=16, negative=True)
    counter = []
    model.denoisers["transformer"].register_forward_pre_hook(
        lambda module, args, kwargs: counter.append(len(kwargs["hidden_states"])), with_kwargs=True
    )
    return model, condition, negative, counter


def run(
    plan, members=None, plans=None, guidance_scale=3.0, num_steps=T, kernel="flow-sde", seed=0, model=None, **options
):
    """The rollout of a plan for both prompts (or of one plan each), and the evaluations that the denoiser saw."""
    own, condition, negative, counter = setup()
    model = own if model is None else model
    grid = model.sigmas(num_steps, condition.latent_shape)
    plans = [plan] * 2 if plans is None else plans

    def draw(*key):
        return torch.randn(condition.latent_shape, generator=torch.Generator().manual_seed(draw_seed(seed, *key)))

    def step(x, velocity, sigma, sigma_next):
        return transition(kernel, x, velocity, sigma, sigma_next, noise_level=0.7, sigma_max=float(grid[1]))

    del counter[:]
    with torch.no_grad():
        result = rollout(
            model,
            plans,
            [range(p.num_members) for p in plans] if members is None else members,
            condition,
            negative,
            sigmas=grid,
            transition=step,
            draw=draw,
            guidance_scale=guidance_scale,
            **options,
        )
    return result, sum(counter)


def log_probs(result):
    """{(group, step, member): log-probability of what the member drew}."""
    return {
        (d.group, d.step, member): log_prob
        for d in result.decisions
        for child, log_prob in zip(d.children, d.old_log_prob.tolist(), strict=True)
        for member in child
    }


def distance(a, b):
    return max(float((x - y).abs().max()) for x, y in zip(a.latents, b.latents, strict=True))


def assert_same(a, b, limit=1e-6):
    # float32 matrix products differ in the last bits with the batch they are part of
    scale = max(float(x.abs().max()) for x in a.latents)
    assert distance(a, b) <= limit * max(1.0, scale)
    mine, other = log_probs(a), log_probs(b)
    assert mine.keys() == other.keys()
    assert all(abs(mine[key] - other[key]) <= limit * max(1.0, abs(mine[key])) for key in mine)


KINDS = {
    "own latents": chain_plan(T, G, [1]),
    "single": chain_plan(T, G, [2], num_latents=1),
    "window": chain_plan(T, G, [1, 2], num_latents=1),
    "all": chain_plan(T, G, range(T - 1), num_latents=1),
    "seed groups": chain_plan(T, G, [2], num_latents=2),
    "merged": chain_plan(T, G, [1], num_latents=1, merged=[(1, 3)]),
    "branch": branch_plan(T, [1, 3], num_latents=2, num_branches=2),
    "tree": tree_plan(T, [0, 2, 4]),
    "granular": granular_plan(T, 1, num_branches=2, granularities=(1, 2, 3)),
    "compressed": compress_tail(chain_plan(T, G, [1], num_latents=1), 0.5),
}


# ---- Sharing ----


@pytest.mark.parametrize("kind", KINDS)
def test_shared_equals_unshared_and_costs_what_the_plan_says(kind):
    plan = KINDS[kind]
    shared, evaluated = run(plan, batch_guidance=kind != "tree")
    unshared, evaluated_unshared = run(plan, share=False)
    assert_same(shared, unshared)
    assert evaluated == shared.num_evaluations == 2 * 2 * plan.num_evaluations()
    assert evaluated_unshared == unshared.num_evaluations == 2 * 2 * int(plan.active().sum())
    assert (evaluated < evaluated_unshared) == (kind != "own latents")
    other, _ = run(plan, seed=1)
    assert distance(shared, other) > 0.1  # control: other noise, other latents
    assert [[d.step, d.node, d.children] for d in shared.decisions if d.group == 1] == [
        list(decision) for decision in plan.decisions()
    ]


@settings(max_examples=15, deadline=None)
@given(plan=plans(), data=st.data())
def test_any_plan_shared_equals_unshared(plan, data):
    batch_size = data.draw(st.sampled_from([None, 1, 3]))
    options = dict(num_steps=plan.num_steps, guidance_scale=1.0, kernel="cps")
    shared, evaluated = run(plan, batch_size=batch_size, **options)
    unshared, _ = run(plan, share=False, **options)
    assert_same(shared, unshared, limit=3e-6)
    assert evaluated == 2 * plan.num_evaluations()


def test_prompts_may_follow_different_plans():
    """Iso-temporal grouping: each prompt has its own step."""
    mixed, evaluated = run(None, plans=[KINDS["single"], KINDS["merged"]])
    alone, _ = run(KINDS["single"])
    assert torch.allclose(mixed.latents[0], alone.latents[0], atol=1e-5)
    assert not torch.allclose(mixed.latents[1], alone.latents[1], atol=1e-2)
    assert evaluated == 2 * (KINDS["single"].num_evaluations() + KINDS["merged"].num_evaluations())


@pytest.mark.parametrize("kind", ["single", "tree", "granular", "branch"])
def test_members_split_over_two_processes(kind):
    """Each process samples some members, with nothing exchanged: the same latents, each decision's children in parts."""
    plan = KINDS[kind]
    whole, _ = run(plan)
    cut = plan.num_members // 2 + 1
    first, _ = run(plan, members=[range(plan.num_members), range(cut)])
    second, _ = run(plan, members=[range(1), range(cut, plan.num_members)])
    assert torch.allclose(torch.cat([first.latents[1], second.latents[1]]), whole.latents[1], atol=3e-6)
    together = log_probs(second) | log_probs(first)
    assert together.keys() == log_probs(whole).keys()
    assert all(abs(together[key] - value) < 3e-6 for key, value in log_probs(whole).items())
    wrong, _ = run(plan, members=[range(1), range(cut - 1, plan.num_members - 1)])
    assert not torch.allclose(wrong.latents[1], second.latents[1], atol=1e-2)  # control: other members


def test_batches_of_latents_and_guidance_change_nothing():
    reference, evaluated = run(KINDS["window"], batch_guidance=False)
    for options in (dict(batch_size=1), dict(batch_size=3), dict(batch_size=3, batch_guidance=False)):
        result, count = run(KINDS["window"], **options)
        assert_same(reference, result, limit=3e-6)
        assert count == evaluated
    unguided, count = run(KINDS["window"], guidance_scale=1.0)
    assert count * 2 == evaluated and distance(reference, unguided) > 1e-2


def test_without_noise_it_is_the_plain_sampler():
    model, condition, negative, _ = setup()
    result, _ = run(chain_plan(T, 1, []))
    noise = [
        torch.randn(condition.latent_shape, generator=torch.Generator().manual_seed(draw_seed(0, g, 0, 0)))
        for g in (0, 1)
    ]
    plain = sample(model, condition, negative, guidance_scale=3.0, num_inference_steps=T, latents=torch.stack(noise))
    assert torch.allclose(torch.cat(result.latents), plain, atol=3e-6)


# ---- What is drawn ----


@pytest.mark.parametrize("kind", ["single", "seed groups", "tree"])
def test_antithetic_pairs_draw_opposite_noise(kind):
    for antithetic in (True, False):
        result, _ = run(KINDS[kind], antithetic=antithetic)
        for d in result.decisions:
            moves = d.next_latents - d.old_mean
            first, second = moves[0::2], moves[1::2]
            opposite = float((first + second).abs().max())
            assert opposite < 1e-6 if antithetic else opposite > 0.1
            if antithetic and len(first) > 1:
                assert float((first[0] - first[1]).abs().max()) > 0.1  # pairs differ from each other


def test_children_are_scored_as_their_step_says():
    """The log-probability of each child, from the decision alone; every decision draws its own noise."""
    result, _ = run(KINDS["tree"])
    grid = setup()[0].sigmas(T, setup()[1].latent_shape)
    units = []
    for d in result.decisions:
        std = 0.7 * ((d.sigma / (1 - min(d.sigma, float(grid[1])))) * (d.sigma - d.sigma_next)) ** 0.5
        unit = (d.next_latents - d.old_mean) / std
        units += list(unit)
        expected = -unit.square().flatten(1).mean(1) / 2 - torch.log(torch.tensor(std)) - 0.918938533
        assert torch.allclose(d.old_log_prob, expected, atol=1e-5)
    gram = torch.stack(units).flatten(1)
    correlation = gram @ gram.T / gram.shape[1] - torch.eye(len(gram))
    assert float(correlation.abs().max()) < 0.35  # 192 coordinates: no two draws are the same


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_what_is_stored_is_what_was_scored(dtype):
    """Samples are rounded before their log-probability is taken: the update's ratio is exactly 1."""
    result, _ = run(KINDS["window"], storage_dtype=dtype)
    grid = setup()[0].sigmas(T, setup()[1].latent_shape)
    for d in result.decisions:
        stored = d.next_latents.to(dtype).float()
        assert torch.equal(stored, d.next_latents)
        std = flow_sde(d.latents[None], d.latents[None], d.sigma, d.sigma_next, sigma_max=float(grid[1])).std
        step = Transition(d.old_mean[None], std)
        ratio = torch.exp(step[torch.zeros(len(stored), dtype=torch.long)].log_prob(stored) - d.old_log_prob)
        assert torch.equal(ratio, torch.ones_like(ratio))
    exact, _ = run(KINDS["window"])  # control: rounded afterwards, the ratio is off
    d = exact.decisions[0]
    off = Transition(d.old_mean[None], std).log_prob(d.next_latents[:1].to(dtype).float()) - d.old_log_prob[:1]
    assert float(off.abs()) > 1e-6


# ---- Tails ----


def test_granular_tails_are_strided_samplers():
    """The member of stride g of each branch arrives where an Euler sampler does that skips to every g-th sigma."""
    model, condition, negative, _ = setup()
    plan = KINDS["granular"]
    result, _ = run(plan, guidance_scale=1.0)
    grid = model.sigmas(T, condition.latent_shape).tolist()
    (d,) = [d for d in result.decisions if d.group == 0]
    for branch in range(2):
        ends = []
        for column, stride in enumerate((1, 2, 3)):
            x, i = d.next_latents[branch][None], d.step + 1
            while i < T:
                j = min(i + stride, T)
                with torch.no_grad():
                    x = x + (grid[j] - grid[i]) * model.velocity(x, grid[i], condition[[0]])
                i = j
            ends.append(x)
            assert torch.allclose(result.latents[0][3 * branch + column], x[0], atol=3e-6)
        assert float((ends[0] - ends[2]).abs().max()) > 1e-3


def gaussian_velocity(x, sigma, mean=1.0, std=0.5):
    """The exact velocity of one-dimensional Gaussian data, whose flow is x = (1 - s) mean + scale(s) z."""
    variance = (1 - sigma) ** 2 * std**2 + sigma**2
    centred = x - (1 - sigma) * mean
    return -mean + centred * (sigma - (1 - sigma) * std**2) / variance


def gaussian_error(num_steps, second_order):
    sigmas = torch.linspace(0.95, 0.05, num_steps + 1, dtype=torch.float64).tolist()

    def exact(sigma):
        return (1 - sigma) + ((1 - sigma) ** 2 * 0.25 + sigma**2) ** 0.5 * 1.3

    x, previous = torch.tensor([exact(sigmas[0])], dtype=torch.float64), None
    for s, s_next in zip(sigmas[:-1], sigmas[1:], strict=True):
        velocity = gaussian_velocity(x, s)
        x0 = x - s * velocity
        x, previous = dpm_solver_step(x, x0, s, s_next, previous if second_order else None), (x0, s)
    return abs(float(x) - exact(sigmas[-1]))


def test_dpm_solver_is_of_second_order():
    """Half the step, a quarter of the error; without the step before it is Euler: half the error."""
    second = [gaussian_error(n, True) for n in (40, 80, 160)]
    first = [gaussian_error(n, False) for n in (40, 80, 160)]
    for a, b in zip(second[:-1], second[1:], strict=True):
        assert 3.5 < a / b < 4.6
    for a, b in zip(first[:-1], first[1:], strict=True):
        assert 1.8 < a / b < 2.2
    assert second[-1] < first[-1] / 10


def test_first_order_dpm_solver_is_euler():
    x, velocity = torch.randn(2, 3), torch.randn(2, 3)
    step = dpm_solver_step(x, x0_from_velocity(x, velocity, 0.8), 0.8, 0.3)
    assert torch.allclose(step, x - 0.5 * velocity, atol=1e-6)


@pytest.mark.parametrize("ratio", [0.5, 1.0])
def test_accelerated_tail_is_diffusers_own(ratio):
    """The steps behind the stochastic one agree with `DPMSolverMultistepScheduler`, and Euler's do not."""
    model, condition, _, _ = setup()
    total = 10
    plan = chain_plan(total, 2, [2], num_latents=1)
    plan = compress_tail(plan, ratio)
    result, _ = run(plan, num_steps=total, guidance_scale=1.0, tail_solver="dpm-solver++")
    euler, _ = run(plan, num_steps=total, guidance_scale=1.0)
    grid = model.sigmas(total, condition.latent_shape)
    kept = [i for i in range(3, total) if bool(plan.active()[i, 0])]

    scheduler = DPMSolverMultistepScheduler(
        use_flow_sigmas=True, prediction_type="flow_prediction", final_sigmas_type="zero", flow_shift=3.0
    )
    (d,) = [d for d in result.decisions if d.group == 0]
    for child in range(2):
        scheduler.set_timesteps(len(kept))
        scheduler.sigmas = torch.cat([grid[kept], torch.zeros(1)]).float()
        scheduler.timesteps = scheduler.sigmas[:-1] * 1000
        x = d.next_latents[child][None]
        for i, t in zip(kept, scheduler.timesteps, strict=True):
            with torch.no_grad():
                velocity = model.velocity(x, float(grid[i]), condition[[0]])
            x = scheduler.step(velocity, t, x, return_dict=False)[0]
        assert torch.allclose(result.latents[0][child], x[0], atol=1e-5)
        assert not torch.allclose(euler.latents[0][child], x[0], atol=1e-3)


# ---- Keeping graphs ----


@pytest.mark.parametrize("bf16", [False, True])
def test_kept_graphs_give_the_gradient_of_a_second_forward(bf16):
    """Also under autocast, whose cache of cast weights comes from the steps without gradient before."""
    pipe = wan()[0]
    pipe.transformer.requires_grad_(False)
    pipe.transformer.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False))
    model = VideoModel(pipe)
    adapter = [p for p in pipe.transformer.parameters() if p.requires_grad]
    _, condition, _, _ = setup()
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        result, _ = run(KINDS["single"], guidance_scale=1.0, keep_graph=True, model=model)
    decisions = result.decisions
    kept = torch.stack([d.velocity for d in decisions])
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        again = model.velocity(torch.stack([d.latents for d in decisions]), decisions[0].sigma, condition)
    assert torch.equal(kept.detach(), again.detach())
    gradients = [torch.autograd.grad(v.square().sum(), adapter) for v in (kept, again)]
    assert all(float(g.abs().max()) > 0 for g in gradients[1])
    for mine, expected in zip(*gradients, strict=True):
        assert torch.allclose(mine, expected, rtol=1e-5, atol=1e-7)
    assert not any(x.requires_grad for x in result.latents)
    without, _ = run(KINDS["single"], guidance_scale=1.0, model=model)
    assert all(d.velocity is None for d in without.decisions)
