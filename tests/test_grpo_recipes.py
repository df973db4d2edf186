"""Every recipe trains, and does what its paper says: who shares what, which steps are stochastic, what each one weighs."""

import math

import pytest
import torch
from grpo_setup import Watching, history, make_args, make_trainer
from sft_setup import trained_weights

from vidtrl import VideoGRPOConfig
from vidtrl.diffusion.step_schedules import ODE
from vidtrl.trainer.grpo_recipes import DEFAULTS, RECIPES


T = 6
SMALL = {  # what has to fit a schedule of six steps
    "mix-grpo": dict(sde_steps=2, window_interval=1),
    "mix-grpo-flash": dict(sde_steps=2, window_interval=1),
    "tempflow-grpo": dict(num_generations=6, num_latents=2),
    "g2rpo": dict(num_generations=6),
    "branch-grpo": dict(tree_splits=[0, 3]),
}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A trainer after two updates of a recipe; each is trained once."""
    done = {}

    def run(recipe, **config):
        key = recipe, tuple(sorted(config.items()))
        if key not in done:
            config = {"num_generations": 4, "num_inference_steps": T, **SMALL.get(recipe, {}), **config}
            config["per_device_train_batch_size"] = 2 * config["num_generations"]
            trainer = make_trainer(tmp_path_factory.mktemp(recipe), cls=Watching, recipe=recipe, **config)
            trainer.before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
            trainer.train()
            done[key] = trainer
        return done[key]

    return run


def decisions(generation, group=None):
    found = [item.decision for item in generation["items"]]
    return [d for d in found if group is None or d.group == group]


def stochastic_steps(plan):
    return (plan.branch != ODE).any(1).nonzero().flatten().tolist()


def grid(trainer):
    return trainer.grid.double().tolist()


def normalised(values, scale=None):
    values = torch.as_tensor(values, dtype=torch.float64)
    std = values.std(unbiased=False) if scale is None else scale
    return ((values - values.mean()) / (std + 1e-4)).tolist()


# ---- All of them ----


@pytest.mark.parametrize("recipe", RECIPES)
def test_two_updates(run, recipe):
    trainer = run(recipe)
    assert trainer.state.global_step == 2 and len(trainer.generations) == 2
    assert all(math.isfinite(loss) for loss in history(trainer, "loss")) and len(history(trainer, "loss")) == 2
    for name, parameter in trainer.model.named_parameters():
        assert torch.equal(parameter, trainer.before[name]) != parameter.requires_grad, name
    assert history(trainer, "frac_reward_zero_std") == [0.0, 0.0]
    assert history(trainer, "ratio/mean")[0] == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("recipe", RECIPES)
def test_loss_weights_of_an_update_average_the_children(run, recipe):
    generation = run(recipe).generations[0]
    scales, weights = (
        torch.cat([w[i] for i in range(len(w))])
        for w in (generation["scales"], [item.weight for item in generation["items"]])
    )
    counted = scales > 0
    torch.testing.assert_close(weights[counted], scales[counted] / counted.sum(), rtol=1e-5, atol=0)
    if RECIPES[recipe].get("timestep_weighting", "tgr") in ("tgr", "tempflow"):
        assert weights.sum().item() == pytest.approx(1, rel=1e-5)


@pytest.mark.parametrize("recipe", RECIPES)
def test_children_compete_so_their_advantages_cancel(run, recipe):
    generation = run(recipe).generations[0]
    by_step = {}
    for (group, step, _), advantage in generation["advantages"].items():
        by_step.setdefault((group, step), []).append(advantage)
    for values in by_step.values():
        assert sum(values) == pytest.approx(0, abs=1e-4) and max(values) > 0.1


@pytest.mark.parametrize("recipe", RECIPES)
def test_recipe_fills_what_is_unset_and_explicit_fields_win(tmp_path, recipe):
    row = {**DEFAULTS, **RECIPES[recipe]}
    size = dict(per_device_train_batch_size=row["num_generations"], use_cpu=True, report_to=[])
    filled = VideoGRPOConfig(str(tmp_path), recipe=recipe, **size)
    for name, value in row.items():
        assert getattr(filled, name) == value, name
    own = dict(
        learning_rate=7e-7, epsilon=0.5, guidance_scale=2.5, num_inference_steps=19, beta=0.25, weight_decay=0.125
    )
    own |= dict(advantage_clip=1.5, scale_rewards="none", timestep_weighting="guard", ema_decay=0.5, noise_level=0.125)
    chosen = VideoGRPOConfig(str(tmp_path), recipe=recipe, **size, **own)
    for name in row:
        assert getattr(chosen, name) == own.get(name, row[name]), name


def test_recipes_do_not_share_lists(tmp_path):
    make_args(tmp_path).sde_range.append(9.0)
    assert make_args(tmp_path).sde_range == [0.0, 0.5]


def test_unknown_recipe_lists_the_valid_ones(tmp_path):
    with pytest.raises(ValueError, match="flash-grop.*did you mean 'flash-grpo'") as error:
        make_args(tmp_path, recipe="flash-grop")
    assert all(recipe in str(error.value) for recipe in RECIPES)


def test_the_paper_is_the_default(tmp_path):
    args = make_args(tmp_path)
    assert args.recipe == "flash-grpo" and args.beta == 0 and args.sde_schedule == "single" and not args.shared_noise
    assert args.timestep_weighting == "tgr" and args.sde_range == [0.0, 0.5]


# ---- One stochastic step per prompt ----


def test_flash_grpo(run):
    trainer = run("flash-grpo")
    sigmas, chosen = grid(trainer), set()
    for generation in trainer.generations:
        inverse, advantages = {}, generation["advantages"]
        for group, plan in enumerate(generation["plans"]):
            (step,) = stochastic_steps(plan)
            chosen.add(step)
            assert step < T // 2
            assert len(set(plan.seed.tolist())) == 4  # own noise: nothing is shared
            mine = decisions(generation, group)
            assert [(d.step, d.children) for d in mine] == [(step, [[m]]) for m in range(4)]
            assert not torch.equal(mine[0].latents, mine[1].latents)
            d = sigmas[step] - sigmas[step + 1]
            g = sigmas[1] * sigmas[step]
            inverse[group] = 1 / (math.sqrt(d) / g + g * math.sqrt(d) * (1 - sigmas[step]) / (2 * sigmas[step]))
        mean = sum(inverse[group] for group, _, _ in advantages) / len(advantages)
        for item, scale in zip(generation["items"], generation["scales"], strict=True):
            assert scale.item() == pytest.approx(inverse[item.group] / mean, rel=1e-4)
        # the group's mean, the whole batch's standard deviation
        rewards = generation["rewards"][..., 0]
        for group in range(2):
            expected = normalised(rewards[group], rewards.double().std(unbiased=False))
            step = stochastic_steps(generation["plans"][group])[0]
            assert [advantages[group, step, m] for m in range(4)] == pytest.approx(expected, rel=1e-3)
    assert len(chosen) > 1  # not one step for all prompts


def test_longcat(run):
    trainer = run("longcat")
    sigmas, generation = grid(trainer), run("longcat").generations[0]
    rewards = generation["rewards"][..., 0].double()
    largest = rewards.std(1, unbiased=False).max()
    for item, scale in zip(generation["items"], generation["scales"], strict=True):
        d = item.decision
        assert d.children == [[0], [1], [2], [3]]  # shared noise: one latent, one forward for all
        width, s = d.sigma - d.sigma_next, min(sigmas[d.step], sigmas[1])
        std = min(math.sqrt(sigmas[d.step] / (1 - s) * width), 0.45)
        assert scale.tolist() == pytest.approx([std / width] * 4, rel=1e-4)
        assert (item.kl_weight / item.weight).tolist() == pytest.approx([std / width] * 4, rel=1e-4)
        expected = normalised(rewards[d.group], largest)
        assert item.advantages.tolist() == pytest.approx(expected, rel=1e-3)
    assert len(generation["items"]) == 2
    assert trainer.args.transition == "flow-sde-truncated"


# ---- All steps ----


@pytest.mark.parametrize("recipe", ["flow-grpo", "cps", "grpo-guard", "flow-dppo"])
def test_all_steps_but_the_last_with_own_noise(run, recipe):
    trainer = run(recipe)
    sigmas, generation = grid(trainer), run(recipe).generations[0]
    for group, plan in enumerate(generation["plans"]):
        assert stochastic_steps(plan) == list(range(T - 1)) and len(set(plan.seed.tolist())) == 4
        assert len(decisions(generation, group)) == 4 * (T - 1)
        expected = normalised(generation["rewards"][group, :, 0])
        for step in range(T - 1):  # the terminal reward is credited to every step
            got = [generation["advantages"][group, step, m] for m in range(4)]
            assert got == pytest.approx(expected, rel=1e-3)
    for item, scale in zip(generation["items"], generation["scales"], strict=True):
        width = sigmas[item.step] - sigmas[item.step + 1]
        assert scale.item() == pytest.approx(1 / width if recipe == "grpo-guard" else 1.0, rel=1e-4)


def test_cps_scores_by_the_squared_distance(run):
    d = decisions(run("cps").generations[0])[7]
    expected = -(d.next_latents[0] - d.old_mean).square().mean()
    torch.testing.assert_close(d.old_log_prob[0], expected)


def test_grpo_guard_centres_the_ratio(run, tmp_path):
    assert run("grpo-guard").args.ratio_normalization and not run("flow-grpo").args.ratio_normalization
    trainer = make_trainer(tmp_path, cls=Watching, recipe="grpo-guard", num_inference_steps=3, num_iterations=2)
    trainer.train()
    item = trainer.generations[0]["items"][0]
    _, outputs = trainer.compute_loss(trainer.model, [item], return_outputs=True)  # the policy has changed since
    d = item.decision
    with torch.no_grad():
        velocity = trainer._velocity(trainer.model, d.latents[None], torch.tensor([d.sigma]), [d.group])
    step = trainer.transition(d.latents[None], velocity, d.sigma, d.sigma_next)
    noise = (d.next_latents - d.old_mean) / step.std
    expected = torch.exp(((step.mean - d.old_mean) * noise).mean())
    torch.testing.assert_close(outputs["ratio"][0], expected, rtol=1e-5, atol=1e-6)
    assert abs(expected.item() - 1) > 1e-4


def test_flow_dppo_drops_what_moved_too_far_instead_of_clipping(run, tmp_path):
    assert not history(run("flow-dppo"), "clip_ratio/region_mean") and history(run("cps"), "clip_ratio/region_mean")
    config = dict(recipe="flow-dppo", num_inference_steps=3, num_iterations=2)
    trainer = make_trainer(tmp_path, cls=Watching, **config)
    trainer.train()
    items = trainer.generations[0]["items"]
    items[0].advantages = -items[0].advantages  # the update has moved all others further in their direction
    losses = {}
    for threshold in (1e9, 0.0):
        trainer.args.epsilon = threshold
        losses[threshold] = [trainer.compute_loss(trainer.model, [item]).item() for item in items]
    assert all(losses[1e9])
    assert losses[0.0] == [losses[1e9][0]] + [0.0] * (len(items) - 1)


def test_dance_grpo(run):
    generation = run("dance-grpo").generations[0]
    trained = {}
    for item in generation["items"]:
        for child, weight in zip(item.decision.children, item.weight, strict=True):
            if weight > 0:
                trained.setdefault((item.group, child[0]), set()).add(item.step)
    assert {len(steps) for steps in trained.values()} == {round(0.6 * (T - 1))} and len(trained) == 8
    assert len({tuple(steps) for steps in trained.values()}) > 1  # drawn for each video
    for group, plan in enumerate(generation["plans"]):
        assert stochastic_steps(plan) == list(range(T - 1))
        first = decisions(generation, group)[0]
        assert first.step == 0 and len(first.children) == 4  # shared noise


# ---- Windows ----


def test_flow_grpo_fast(run):
    trainer = run("flow-grpo-fast")
    for generation in trainer.generations:
        (window,) = {tuple(stochastic_steps(plan)) for plan in generation["plans"]}  # the same for all prompts
        assert window in ((0, 1), (1, 2))
        for group in range(2):
            shapes = [(d.step, len(d.children)) for d in decisions(generation, group)]
            assert shapes == [(window[0], 4)] + [(window[1], 1)] * 4  # a shared prefix


@pytest.mark.parametrize("recipe", ["mix-grpo", "mix-grpo-flash"])
def test_mix_grpo(run, recipe):
    trainer = run(recipe)
    for number, generation in enumerate(trainer.generations):
        for plan in generation["plans"]:
            assert stochastic_steps(plan) == [number, number + 1] and set(plan.seed.tolist()) == {0}
        tail = T - number - 2
        tail = math.ceil(0.4 * tail) if recipe == "mix-grpo-flash" else tail
        # shared up to the window, then four latents each; two prompts, both branches of guidance
        assert history(trainer, "nfe")[number] == 2 * 2 * ((number + 1) + 4 * (1 + tail))
    assert trainer.args.tail_solver == ("dpm-solver++" if recipe == "mix-grpo-flash" else "euler")


# ---- Branches ----


def test_tempflow_grpo(run):
    trainer = run("tempflow-grpo")
    sigmas = grid(trainer)
    for generation in trainer.generations:
        stds = {}
        for group in range(2):
            first, second = decisions(generation, group)  # two seed groups of three branches
            assert (
                first.step == second.step and first.children == [[0], [1], [2]] and second.children == [[3], [4], [5]]
            )
            assert not torch.equal(first.latents, second.latents)
            rewards = generation["rewards"][group, :, 0]
            got = [generation["advantages"][group, first.step, m] for m in range(6)]
            assert got == pytest.approx(normalised(rewards[:3]) + normalised(rewards[3:]), rel=1e-3)
            s = sigmas[first.step]
            stds[group] = 0.7 * math.sqrt(s / (1 - min(s, sigmas[1])) * (s - sigmas[first.step + 1]))
        mean = sum(stds.values()) / 2
        for item, scale in zip(generation["items"], generation["scales"], strict=True):
            assert scale.tolist() == pytest.approx([stds[item.group] / mean] * 3, rel=1e-4)


def test_g2rpo(run):
    for generation in run("g2rpo").generations:
        for group in range(2):
            (d,) = decisions(generation, group)
            assert d.children == [[0, 1, 2], [3, 4, 5]]
            rewards = generation["rewards"][group, :, 0].view(2, 3)  # branches x granularities
            expected = [0.0, 0.0]
            for tail in range(3):
                for branch, value in enumerate(normalised(rewards[:, tail])):
                    expected[branch] += value
            got = [generation["advantages"][group, d.step, m] for m in (0, 3)]
            assert got == pytest.approx(expected, rel=1e-3)


def test_e_grpo(run):
    trainer = run("e-grpo")
    sigmas = grid(trainer)
    for generation in trainer.generations:
        for plan in generation["plans"]:
            (step,) = stochastic_steps(plan)
            (target,) = set(plan.target[step].tolist())
            s = min(sigmas[step], sigmas[1])
            entropy = s / (1 - s) * (sigmas[step] - sigmas[target])
            assert entropy > 0.2 or target == T // 2
            assert not plan.active()[step + 1 : target].any()
        assert [len(d.children) for d in decisions(generation)] == [4, 4]


def test_e_grpo_merges(run):
    # a threshold that no single step reaches: the first jump covers several
    trainer = run("e-grpo", merge_threshold=1.5)
    jumps = [
        int(plan.target[step, 0]) - step
        for generation in trainer.generations
        for plan in generation["plans"]
        for step in stochastic_steps(plan)
    ]
    assert max(jumps) > 1


def test_branch_grpo(run):
    for generation in run("branch-grpo").generations:
        for group in range(2):
            found = [(d.step, d.children) for d in decisions(generation, group)]
            assert found == [(0, [[0, 1], [2, 3]]), (3, [[0], [1]]), (3, [[2], [3]])]
            rewards = generation["rewards"][group, :, 0]
            inner, leaves = rewards.view(2, 2).mean(1), rewards  # a node is worth the mean of its leaves
            advantages = generation["advantages"]
            assert [advantages[group, 0, m] for m in (0, 2)] == pytest.approx(normalised(inner), rel=1e-3)
            assert [advantages[group, 3, m] for m in range(4)] == pytest.approx(normalised(leaves), rel=1e-3)


# ---- Without stochastic steps ----


def test_diffusion_nft(run):
    trainer = run("diffusion-nft")
    assert history(trainer, "nfe") == [8 * T] * 2  # no guidance
    for generation in trainer.generations:
        assert all(stochastic_steps(plan) == [] for plan in generation["plans"])
        assert len(generation["items"]) == 8 and {s.item() for s in generation["scales"]} == {1.0}
    # the old policy: after generation 1 it keeps 0.001 of itself and takes the rest from the one update so far
    old = trainer.roles["old"].average
    for name, present in trained_weights(trainer).items():
        assert not torch.equal(old[name], trainer.before[name]) or "lora_A" in name
        assert not torch.equal(old[name], present)


def test_awm(run):
    generation = run("awm").generations[0]
    items = generation["items"]
    assert len(items) == 8 * 6
    for video in range(8):
        sigmas = torch.tensor([item.sigma for item in items[6 * video : 6 * video + 6]], dtype=torch.float64)
        u = sigmas / (3 - 2 * sigmas)  # the scheduler's shift is 3
        assert (u * 6).floor().tolist() == list(range(6))  # one level in each sixth
    assert len({item.sigma for item in items}) == len(items)
