"""Transition kernels against numbers of the methods' original implementations, closed forms and diffusers' DDIM.

tests/data/transitions.safetensors holds what those implementations give, in float32, on a seeded 10-step trajectory.
"""

import math
from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from vidtrl.diffusion import flow
from vidtrl.diffusion import transitions as tr
from vidtrl.diffusion.policy_losses import guard_log_ratio


VECTORS = load_file(Path(__file__).parent / "data" / "transitions.safetensors")
SIGMAS = VECTORS["sigmas"]
GRID_MAX = SIGMAS[1].item()
ORIGINALS = {  # key in the file -> name, noise_level
    "flow_sde.noise_level=0.7": ("flow-sde", 0.7),
    "flow_sde.noise_level=1.0": ("flow-sde", 1.0),
    "flow_sde_clipped.noise_level=1.0.clip=0.45": ("flow-sde-truncated", 1.0),
    "flash_sde": ("wan-linear", 0.0),
    "cps.noise_level=0.7": ("cps", 0.7),
    "cps.noise_level=0.9": ("cps", 0.9),
    "dance_sde.eta=0.25": ("dance", 0.25),
    "dance_sde.eta=0.3": ("dance", 0.3),
}
LEVELS = {  # every stochastic kernel with a usual level
    "flow-sde": 0.7,
    "flow-sde-truncated": 1.0,
    "wan-linear": 0.0,
    "dance": 0.3,
    "cps": 0.7,
    "ma-sde": 0.7,
    "ddim": 1.0,
}
GAUSSIAN = [name for name in LEVELS if name != "cps"]
SDE = [name for name in GAUSSIAN if name != "ddim"]


def scaled_error(ours, theirs):
    """Largest difference in units of the largest number."""
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


def state(seed=0, batch=2):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(batch, 4, 2, 3, 3, generator=generator) for _ in range(3)]


def replay(key, level_offset=0.0):
    """Largest error of mean, std, next sample and log-probability over the steps that `key` covers."""
    name, level = ORIGINALS[key]
    errors = []
    for row, i in enumerate(VECTORS[f"{key}.steps"].tolist()):
        step = tr.transition(
            name,
            VECTORS["sample"][i],
            VECTORS["velocity"][i],
            SIGMAS[i],
            SIGMAS[i + 1],
            noise_level=level + level_offset,
            sigma_max=GRID_MAX,
        )
        theirs = VECTORS[f"{key}.prev_sample"][row]
        pairs = {
            "mean": step.mean,
            "std": step.std,
            "prev_sample": step.sample(noise=VECTORS["noise"][i]),
            "log_prob": step.log_prob(theirs),
        }
        errors.append([scaled_error(ours, VECTORS[f"{key}.{what}"][row]) for what, ours in pairs.items()])
    return torch.tensor(errors).amax(0)


@pytest.mark.parametrize("key", ORIGINALS)
def test_agrees_with_the_original_implementation(key):
    assert replay(key).max() < 1e-5


@pytest.mark.parametrize("key", [key for key in ORIGINALS if key != "flash_sde"])
def test_the_comparison_would_see_another_noise_level(key):
    assert replay(key, level_offset=-0.01).max() > 1e-4


def test_golden_scalars():
    x, v, noise = torch.ones(1, 1), torch.full((1, 1), -0.5), torch.full((1, 1), 0.3)
    step = tr.flow_sde(x, v, 0.9, 0.8, noise_level=0.7)
    drawn = step.sample(noise=noise)
    numbers = [step.mean, step.std, drawn, step.log_prob(drawn)]
    assert [round(n.item(), 6) for n in numbers] == pytest.approx(
        [0.81725, 0.66407831, 1.01647349, -0.55458333], abs=2e-6
    )
    step = tr.dance_sde(x, v, 0.9, 0.8, eta=0.3)
    numbers = [step.mean, step.std, step.log_prob(step.sample(noise=noise))]
    assert [n.item() for n in numbers] == pytest.approx([1.04525, 0.09486833, 1.39132682], abs=2e-6)
    step = tr.cps(x, v, 0.9, 0.8, noise_level=0.7)
    assert [step.mean.item(), step.std.item()] == pytest.approx([0.63503278, 0.71280522], abs=2e-6)
    step = tr.wan_linear_sde(x, v, 0.9, 0.8, sigma_max=0.98)
    assert [step.mean.item(), step.std.item()] == pytest.approx([1.00894290, 0.27891289], abs=2e-6)
    step = tr.flow_sde(x, v, 1.0, 0.96, noise_level=0.7, sigma_max=0.96)
    assert [step.mean.item(), step.std.item()] == pytest.approx([0.775, 0.7], abs=2e-6)


# ---- marginals


def gaussian_velocity(x, sigma, mean=1.0, variance=0.25):
    """E[noise - x0 | x_sigma = x] for one-dimensional data N(mean, variance)."""
    keep = 1 - sigma
    return (sigma - keep * variance) / (keep**2 * variance + sigma**2) * (x - keep * mean) - mean


def final_samples(step_of, num_steps=400, num_samples=30_000):
    generator = torch.Generator().manual_seed(0)
    grid = flow.shift_sigma(torch.linspace(1, 0, num_steps + 1, dtype=torch.float64), 3.0).tolist()
    x = torch.randn(num_samples, 1, generator=generator)
    for sigma, sigma_next in zip(grid, grid[1:], strict=False):
        x = step_of(x, gaussian_velocity(x, sigma), sigma, sigma_next, grid[1]).sample(generator=generator)
    return x


@pytest.mark.parametrize("name", ["ode", *GAUSSIAN])
def test_every_kernel_keeps_the_marginals(name):
    def step_of(x, v, sigma, sigma_next, sigma_max):
        # ma-sde diverges at pure noise: its first step is an ODE step
        kernel = "ode" if name == "ma-sde" and sigma == 1 else name
        level = LEVELS.get(name, 0.0)
        return tr.transition(kernel, x, v, sigma, sigma_next, noise_level=level, sigma_max=sigma_max)

    x = final_samples(step_of)
    assert abs(x.std().item() - 0.5) < 0.01
    assert abs(x.mean().item() - 1.0) < 0.02


def test_noise_without_the_score_correction_does_not():
    def step_of(x, v, sigma, sigma_next, sigma_max):
        mean = tr.ode(x, v, sigma, sigma_next).mean
        return tr.Transition(mean, tr.flow_sde(x, v, sigma, sigma_next, 0.7, sigma_max).std)

    assert abs(final_samples(step_of).std().item() - 1.17) < 0.03


# ---- the relations between kernels


@settings(deadline=None)
@given(st.floats(0.02, 0.98), st.floats(0.01, 0.99), st.sampled_from(sorted(LEVELS)))
def test_a_batch_of_times_is_one_time_after_another(sigma, fraction, name):
    x, v, _ = state()
    times = (
        torch.tensor([sigma, 0.5], dtype=torch.float64),
        torch.tensor([sigma * fraction, 0.25], dtype=torch.float64),
    )
    options = dict(noise_level=LEVELS[name], sigma_max=0.99)
    together = tr.transition(name, x, v, *times, **options)
    for i in range(2):
        alone = tr.transition(name, x[i : i + 1], v[i : i + 1], times[0][i].item(), times[1][i].item(), **options)
        torch.testing.assert_close(together[torch.tensor([i])].mean, alone.mean)
        torch.testing.assert_close(together.std[i : i + 1], alone.std)
    assert together.std.shape == (2,) and (together.std > 0).all()


@settings(deadline=None)
@given(st.floats(0.02, 0.98), st.floats(0.0, 0.99))
def test_no_noise_is_the_ode(sigma, fraction):
    x, v, _ = state()
    expected = x - (sigma - sigma * fraction) * v
    for name in ("flow-sde", "flow-sde-truncated", "dance", "cps", "ma-sde", "ddim", "ode"):
        step = tr.transition(name, x, v, sigma, sigma * fraction, noise_level=0.0, sigma_max=None)
        torch.testing.assert_close(step.mean, expected, atol=2e-5, rtol=0)
        assert (step.std == 0).all()


def test_truncation_is_in_the_drift_too():
    x, v, _ = state()
    full, cut = (tr.flow_sde(x, v, 0.95, 0.85, 1.0, max_std=m) for m in (None, 0.45))
    assert full.std[0] > 0.9 and cut.std[0] == pytest.approx(0.45)
    noise_hat = x + 0.05 * v
    torch.testing.assert_close(cut.mean - full.mean, (full.std[0] ** 2 - 0.45**2) / (2 * 0.95) * noise_hat)


def test_the_first_step_just_below_pure_noise_is_bounded_by_sigma_max():
    """Wan's 20-step grid starts at 0.99967, where sigma / (1 - sigma) is 3000."""
    x, v, _ = state()
    grid = flow.shift_sigma(torch.linspace(0.999, 0, 21, dtype=torch.float64), 3.0).tolist()
    assert tr.flow_sde(x, v, grid[0], grid[1], 0.7).std[0] > 4
    assert tr.flow_sde(x, v, grid[0], grid[1], 0.7, sigma_max=grid[1]).std[0] == pytest.approx(0.7, abs=0.01)
    # and no later step is touched
    for i in range(1, 20):
        with_max, without = (tr.flow_sde(x, v, grid[i], grid[i + 1], 0.7, m) for m in (grid[1], None))
        assert torch.equal(with_max.mean, without.mean) and torch.equal(with_max.std, without.std)


def test_ma_sde_is_the_integral_and_flow_sde_its_first_order():
    x, v, _ = state()
    u = torch.linspace(0.6, 0.9, 200_001, dtype=torch.float64)
    integral = torch.trapezoid(u / (1 - u), u).sqrt().item()
    step = tr.ma_sde(x, v, 0.9, 0.6, eta=0.5)
    assert step.std[0].item() == pytest.approx(0.5 * integral, rel=1e-6)
    coarse = tr.flow_sde(x, v, 0.9, 0.6, 0.5)
    assert coarse.std[0] / step.std[0] > 1.3
    fine, fine_flow = tr.ma_sde(x, v, 0.9, 0.8999, 0.5), tr.flow_sde(x, v, 0.9, 0.8999, 0.5)
    torch.testing.assert_close(fine.std, fine_flow.std, rtol=1e-3, atol=0)
    torch.testing.assert_close(fine.mean, fine_flow.mean, rtol=0, atol=1e-5)


@pytest.mark.parametrize("prediction", ["v_prediction", "epsilon"])
@pytest.mark.parametrize("eta", [0.3, 1.0])
def test_ddim_is_diffusers_ddim(prediction, eta):
    """At every step of a VP schedule, starting at pure noise where the prediction type allows it."""
    scheduler = DDIMScheduler(
        prediction_type=prediction,
        clip_sample=False,
        timestep_spacing="trailing",
        rescale_betas_zero_snr=prediction == "v_prediction",
        set_alpha_to_one=True,
    )
    scheduler.set_timesteps(8)
    table = scheduler.alphas_cumprod.double()
    previous = scheduler.timesteps - 1000 // 8
    sigmas = flow.vp_to_flow_sigma(table[scheduler.timesteps])
    sigmas_next = flow.vp_to_flow_sigma(torch.where(previous >= 0, table[previous.clamp(min=0)], 1.0))
    assert (sigmas[0] == 1) == (prediction == "v_prediction")
    for i, t in enumerate(scheduler.timesteps):
        x_vp, output, noise = state(i)
        scale, scale_next = (((1 - s) ** 2 + s**2).sqrt().float() for s in (sigmas[i], sigmas_next[i]))
        x = x_vp * scale
        velocity = flow.vp_output_to_velocity(output, x_vp, sigmas[i], prediction)
        step = tr.ddim(x, velocity, sigmas[i], sigmas_next[i], eta=eta)
        theirs = scheduler.step(output, t, x_vp, eta=eta, variance_noise=noise).prev_sample * scale_next
        if sigmas[i] == 1 and eta == 1:  # all noise is renewed; diffusers takes the root of -1e-8 and returns NaN
            theirs = (1 - sigmas_next[i]).float() * (x - velocity) + sigmas_next[i].float() * noise
        # epsilon at high noise: x0_hat = (x - beta eps) / alpha magnifies rounding
        magnitude = theirs.abs().max().item()
        torch.testing.assert_close(step.sample(noise=noise), theirs, atol=2e-5 * max(magnitude, 1), rtol=0)
        other = tr.ddim(x, velocity, sigmas[i], sigmas_next[i], eta=eta - 0.1).sample(noise=noise)
        if sigmas_next[i] > 0:
            assert (other - theirs).abs().max() > 1e-3
        else:
            assert (step.std == 0).all()


# ---- Transition


@pytest.mark.parametrize("name", GAUSSIAN)
def test_log_prob_and_kl_are_those_of_a_normal(name):
    x, v, other = state()
    options = dict(noise_level=LEVELS[name], sigma_max=0.98)
    step = tr.transition(name, x, v, 0.7, 0.6, **options)
    reference = tr.transition(name, x, v + 0.1 * other, 0.7, 0.6, **options)
    drawn = step.sample(torch.Generator().manual_seed(1))
    normals = [
        torch.distributions.Normal(s.mean.double(), s.std.double().reshape(-1, 1, 1, 1, 1)) for s in (step, reference)
    ]
    expected = normals[0].log_prob(drawn.double()).mean(dim=(1, 2, 3, 4)).float()
    torch.testing.assert_close(step.log_prob(drawn), expected, atol=1e-5, rtol=1e-5)
    kl = torch.distributions.kl_divergence(*normals).mean(dim=(1, 2, 3, 4)).float()
    torch.testing.assert_close(step.kl(reference), kl, rtol=1e-4, atol=0)
    assert (step.kl(step) == 0).all() and (kl > 0).all()


def test_log_prob_is_a_mean_not_a_sum():
    """Twice the coordinates, the same value: a sum would overflow the ratio on a video."""
    step = tr.Transition(torch.zeros(1, 8), torch.tensor([0.5]))
    wide = tr.Transition(torch.zeros(1, 16), torch.tensor([0.5]))
    x = torch.linspace(-1, 1, 8)[None]
    torch.testing.assert_close(step.log_prob(x), wide.log_prob(x.repeat(1, 2)))


def test_cps_log_prob_is_its_authors():
    x, v, noise = state()
    step = tr.cps(x, v, 0.7, 0.6)
    drawn = step.sample(noise=noise)
    expected = -(step.std[0] ** 2) * noise.square().mean(dim=(1, 2, 3, 4))
    torch.testing.assert_close(step.log_prob(drawn), expected)
    torch.testing.assert_close(step[torch.tensor([1])].log_prob(drawn[1:]), expected[1:])  # children keep the form
    assert ((tr.Transition(step.mean, step.std).log_prob(drawn) - expected).abs() > 0.1).all()


def test_children_share_one_mean():
    x, v, _ = state()
    step = tr.flow_sde(x, v, torch.tensor([0.7, 0.6]), torch.tensor([0.6, 0.5]))
    children = step[torch.tensor([0, 0, 0, 1])]
    assert torch.equal(children.mean, step.mean[[0, 0, 0, 1]]) and torch.equal(children.std, step.std[[0, 0, 0, 1]])
    drawn = children.sample(torch.Generator().manual_seed(0))
    assert not torch.equal(drawn[0], drawn[1])
    torch.testing.assert_close(children.log_prob(drawn)[3:], step[torch.tensor([1])].log_prob(drawn[3:]))


def test_sampling_is_seeded_and_reproducible_from_the_noise():
    x, v, noise = state()
    step = tr.flow_sde(x, v, 0.7, 0.6)
    seeded = [step.sample(torch.Generator().manual_seed(seed)) for seed in (3, 3, 4)]
    assert torch.equal(seeded[0], seeded[1]) and not torch.equal(seeded[0], seeded[2])
    torch.testing.assert_close(step.sample(noise=noise), step.mean + step.std[0] * noise)


@pytest.mark.parametrize("name", LEVELS)
def test_arithmetic_is_float32_whatever_the_model(name):
    x, v, noise = (t.bfloat16() for t in state())
    options = dict(noise_level=LEVELS[name], sigma_max=0.98)
    step = tr.transition(name, x, v, 0.7, 0.6, **options)
    exact = tr.transition(name, x.float(), v.float(), 0.7, 0.6, **options)
    drawn = step.sample(noise=noise)
    assert step.mean.dtype == step.std.dtype == drawn.dtype == step.log_prob(drawn).dtype == torch.float32
    assert torch.equal(step.mean, exact.mean)
    # the same sums in bfloat16 move the log-probability by far more than a clip range of 1e-3
    rounded = tr.Transition(step.mean.bfloat16().float(), step.std, step.gaussian)
    if step.std[0] < 0.2:
        assert (rounded.log_prob(drawn) - step.log_prob(drawn)).abs().max() > 1e-5


@pytest.mark.parametrize("name", [*LEVELS, "ode"])
def test_latents_on_another_device_are_never_waited_for(name):
    """A meta tensor has no values: reading one (a device synchronisation) would raise, as would mixing devices."""
    x, v, _ = (t.to("meta") for t in state())
    for times in [(0.7, 0.6), (torch.tensor([0.7, 0.8]), torch.tensor([0.6, 0.7]))]:
        step = tr.transition(name, x, v, *times, noise_level=LEVELS.get(name, 0.0), sigma_max=0.98)
        step = step[torch.tensor([0, 0, 1], device="meta")]
        drawn = step.sample(torch.Generator().manual_seed(0))
        assert drawn.device == step.log_prob(drawn).device == step.kl(step).device == torch.device("meta")
        assert drawn.shape == (3, *x.shape[1:])
        for weighting in ("none", "tgr", "longcat", "guard", "tempflow"):
            assert tr.timestep_weight(weighting, 0.7, 0.6, step.std, 0.7, name).device == torch.device("meta")
    with pytest.raises((RuntimeError, NotImplementedError)):
        step.std.max().item()


# ---- gradients


@pytest.mark.parametrize("name", LEVELS)
def test_log_prob_gradient_is_a_finite_difference(name):
    """log_prob is quadratic in the velocity, so a central difference of any width is exact."""
    x, v, direction = state()
    options = dict(noise_level=LEVELS[name], sigma_max=0.98)
    drawn = tr.transition(name, x, v, 0.7, 0.6, **options).sample(torch.Generator().manual_seed(5))

    def log_prob(velocity):
        return tr.transition(name, x, velocity, 0.7, 0.6, **options).log_prob(drawn)

    velocity = v.clone().requires_grad_()
    gradient = torch.autograd.grad(log_prob(velocity).sum(), velocity)[0]
    analytic = (gradient * direction).sum(dim=(1, 2, 3, 4))
    numeric = (log_prob(v + direction) - log_prob(v - direction)) / 2
    torch.testing.assert_close(analytic, numeric, rtol=1e-3, atol=1e-5)
    assert analytic.abs().min() > 1e-4


def policy_gradient(name, sigma, sigma_next, weighting, level, guard=False):
    """(B,) derivative of the weighted log-ratio by a scalar theta, with velocity = theta * feature."""
    x, feature, noise = state()
    theta = torch.ones(len(x), requires_grad=True)

    def step_of(theta):
        velocity = theta.reshape(-1, 1, 1, 1, 1) * feature
        return tr.transition(name, x, velocity, sigma, sigma_next, noise_level=level, sigma_max=0.98)

    step, old = step_of(theta), step_of(theta.detach())
    drawn = old.sample(noise=noise)
    if guard:
        log_ratio = guard_log_ratio(step.log_prob(drawn), old.log_prob(drawn), step.mean, old.mean, step.std)
    else:
        log_ratio = step.log_prob(drawn)
    weight = tr.timestep_weight(weighting, sigma, sigma_next, step.std, level, name)
    return torch.autograd.grad((weight * log_ratio).sum(), theta)[0]


STEPS = [(0.97, 0.9), (0.8, 0.72), (0.5, 0.37), (0.3, 0.2)]


@pytest.mark.parametrize("name", LEVELS)
def test_rectification_makes_every_step_pull_equally(name):
    x, feature, noise = state()
    expected = (feature * noise).mean(dim=(1, 2, 3, 4)).abs()
    for sigma, sigma_next in STEPS:
        gradient = policy_gradient(name, sigma, sigma_next, "tgr", LEVELS[name]).abs()
        torch.testing.assert_close(gradient, expected, rtol=2e-3, atol=0)
    plain = torch.stack([policy_gradient(name, *step, "none", LEVELS[name]).abs() for step in STEPS])
    assert (plain.amax(0) / plain.amin(0) > 1.2).all()


def test_the_rectification_of_ddim_is_its_own():
    """The SDE's lambda would be off by this much on a coarse grid."""
    x, v, _ = state()
    std = tr.ddim(x, v, 0.9, 0.8).std
    own, sde = (tr.timestep_weight("tgr", 0.9, 0.8, std, 1.0, name) for name in ("ddim", "flow-sde"))
    assert (own / sde - 1).abs().min() > 0.1


@pytest.mark.parametrize("level", [0.7, 1.0])
def test_table_of_weights(level):
    """Flow-SDE: lambda = (1 + a^2 / 2) D / S, and what each weighting leaves of it."""
    x, feature, noise = state()
    unit = -(feature * noise).mean(dim=(1, 2, 3, 4))
    for sigma, sigma_next in STEPS:
        step = sigma - sigma_next
        std = level * math.sqrt(sigma / (1 - sigma) * step)
        gain = 1 + level**2 / 2
        left = {
            "none": gain * step / std,
            "tempflow": gain * step,
            "longcat": gain / level,
            "tgr": 1.0,
        }
        for weighting, factor in left.items():
            gradient = policy_gradient("flow-sde", sigma, sigma_next, weighting, level)
            torch.testing.assert_close(gradient, factor * unit, rtol=2e-3, atol=0)
        gradient = policy_gradient("flow-sde", sigma, sigma_next, "guard", level, guard=True)
        torch.testing.assert_close(gradient, gain * unit, rtol=2e-3, atol=0)
        longcat = tr.timestep_weight("longcat", sigma, sigma_next, torch.tensor([std]), level)
        assert longcat.item() == pytest.approx(math.sqrt(sigma / (step * (1 - sigma))), rel=1e-5)


def test_rectification_on_wans_grid():
    grid = flow.shift_sigma(torch.linspace(0.999, 0, 21, dtype=torch.float64), 3.0)
    published = [7.4770, 7.0414, 6.6112, 6.1867, 5.7682, 5.3559, 4.9502, 4.5513, 4.1596, 3.7754]
    x, v, _ = state(batch=10)
    std = tr.wan_linear_sde(x, v, grid[:10], grid[1:11], sigma_max=grid[1].item()).std
    weights = tr.timestep_weight("tgr", grid[:10], grid[1:11], std, 0.0)
    assert weights.tolist() == pytest.approx(published, abs=1e-4)
    assert tr.rectification(grid[:10], grid[1:11], grid[1] * grid[:10]).tolist() == pytest.approx(published, abs=1e-4)
    # a grid that starts at exactly 1 gives other numbers
    full = flow.shift_sigma(torch.linspace(1, 0, 21, dtype=torch.float64), 3.0)
    assert tr.rectification(full[0], full[1], full[1]).item() == pytest.approx(7.4845, abs=1e-4)


def test_rectification_agrees_with_the_original_implementation():
    ours = tr.rectification(SIGMAS[:-1], SIGMAS[1:], GRID_MAX * SIGMAS[:-1])
    assert scaled_error(ours, VECTORS["flash_sde.rectification"]) < 1e-5
    assert scaled_error(1 / ours, VECTORS["flash_sde.rectification"]) > 0.1


def test_weights_are_float32_of_the_batch():
    std = torch.tensor([0.3, 0.4, 0.5])
    for weighting in ("none", "tgr", "longcat", "guard", "tempflow"):
        for times in [(0.9, 0.8), (torch.full((3,), 0.9), torch.full((3,), 0.8))]:
            weight = tr.timestep_weight(weighting, *times, std, 0.7)
            assert weight.shape == (3,) and weight.dtype == torch.float32 and (weight > 0).all()


# ---- bad input


def test_singular_steps_say_what_to_do():
    x, v, _ = state()
    with pytest.raises(ValueError, match="sigma_max, the second sigma of the grid"):
        tr.flow_sde(x, v, 1.0, 0.96)
    with pytest.raises(ValueError, match="sigma_max"):
        tr.flow_sde(x, v, torch.tensor([0.9, 1.0]), torch.tensor([0.8, 0.96]))
    with pytest.raises(ValueError, match="second step"):
        tr.ma_sde(x, v, 1.0, 0.96)
    with pytest.raises(ValueError, match="needs sigma_max"):
        tr.transition("wan-linear", x, v, 0.9, 0.8, noise_level=0.7, sigma_max=None)
    for name in ("wan-linear", "dance", "cps", "ddim", "ode", "flow-sde", "flow-sde-truncated"):
        step = tr.transition(name, x, v, 1.0, 0.96, noise_level=0.3, sigma_max=0.96)
        assert step.mean.isfinite().all() and step.std.isfinite().all()


def test_names_and_levels_are_checked():
    x, v, _ = state()
    assert set(tr.TRANSITIONS) == {*LEVELS, "ode"}
    with pytest.raises(ValueError, match="'flow-sde'.*'ode', got 'sde'"):
        tr.transition("sde", x, v, 0.9, 0.8, noise_level=0.7, sigma_max=0.98)
    with pytest.raises(ValueError, match="'tgr', got 'mean'"):
        tr.timestep_weight("mean", 0.9, 0.8, torch.ones(2), 0.7)
    for name, level in [("flow-sde", -0.1), ("dance", -0.1), ("ma-sde", -1.0), ("cps", 1.1), ("ddim", 1.1)]:
        with pytest.raises(ValueError, match=f"got {level}"):
            tr.transition(name, x, v, 0.9, 0.8, noise_level=level, sigma_max=0.98)
