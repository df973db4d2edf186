import math

import pytest
import torch
from diffusers import CogVideoXDDIMScheduler, DDIMScheduler
from diffusers.pipelines.mochi.pipeline_mochi import linear_quadratic_schedule
from hypothesis import given
from hypothesis import strategies as st

from vidtrl.diffusion import flow


SIGMA = st.floats(1e-3, 1 - 1e-3)


def pair(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, 3, 4, generator=generator), torch.randn(2, 3, 4, generator=generator)


@given(SIGMA, SIGMA)
def test_noise_and_velocity_are_consistent(a, b):
    x0, noise = pair()
    sigma = torch.tensor([a, b])
    x, v = flow.add_noise(x0, noise, sigma), flow.velocity_target(x0, noise)
    torch.testing.assert_close(flow.x0_from_velocity(x, v, sigma), x0, atol=1e-5, rtol=0)
    torch.testing.assert_close(flow.noise_from_velocity(x, v, sigma), noise, atol=1e-5, rtol=0)
    # per-sample sigma is the same as one at a time
    torch.testing.assert_close(x[1:], flow.add_noise(x0[1:], noise[1:], b))
    # an Euler step of any size stays on the straight path
    torch.testing.assert_close(x + flow._like(b - sigma, x) * v, flow.add_noise(x0, noise, b), atol=1e-5, rtol=0)


def test_everything_is_float32_arithmetic():
    x0, noise = (t.bfloat16() for t in pair())
    assert flow.add_noise(x0, noise, 0.5).dtype == torch.float32
    assert flow.velocity_target(x0, noise).dtype == torch.float32


@given(st.floats(0, 1), st.floats(0.1, 20))
def test_shift_is_a_bijection_with_inverse_shift(u, shift):
    sigma = flow.shift_sigma(u, shift)
    assert 0 <= sigma <= 1 + 1e-12
    assert math.isclose(flow.shift_sigma(sigma, 1 / shift), u, abs_tol=1e-6)


def test_shift_must_be_positive():
    with pytest.raises(ValueError, match="positive"):
        flow.shift_sigma(0.5, 0.0)


@given(SIGMA, st.sampled_from(["v_prediction", "epsilon"]))
def test_vp_prediction_round_trip(sigma, prediction):
    x0, noise = pair()
    alpha, beta = flow.vp_coefficients(sigma)
    assert math.isclose(float(alpha**2 + beta**2), 1, abs_tol=1e-5)
    x = alpha * x0 + beta * noise
    output = alpha * noise - beta * x0 if prediction == "v_prediction" else noise
    velocity = flow.vp_output_to_velocity(output, x, sigma, prediction)
    tolerance = dict(atol=2e-4 / (1 - sigma), rtol=0)  # epsilon divides by alpha
    torch.testing.assert_close(velocity, noise - x0, **tolerance)
    torch.testing.assert_close(flow.velocity_to_vp_output(velocity, x, sigma, prediction), output, atol=1e-4, rtol=0)
    # x_flow = x_vp / (alpha + beta)
    torch.testing.assert_close(x / (alpha + beta), flow.add_noise(x0, noise, sigma), atol=1e-5, rtol=0)


def test_vp_prediction_types_differ():
    x0, noise = pair()
    wrong = flow.vp_output_to_velocity(noise, flow.add_noise(x0, noise, 0.5), 0.5, "v_prediction")
    assert (wrong - (noise - x0)).abs().max() > 0.1


@given(st.floats(1e-4, 1 - 1e-4))
def test_vp_sigma_inverts(ab):
    sigma = flow.vp_to_flow_sigma(torch.tensor(ab))
    alpha, beta = flow.vp_coefficients(sigma)
    assert math.isclose(float(alpha**2), ab, abs_tol=1e-5)


@pytest.mark.parametrize("cls", [DDIMScheduler, CogVideoXDDIMScheduler])
@pytest.mark.parametrize("prediction", ["v_prediction", "epsilon"])
def test_deterministic_ddim_is_euler_in_flow_coordinates(cls, prediction):
    """The change of variables is exact: diffusers' own DDIM step equals our Euler step."""
    scheduler = cls(prediction_type=prediction, clip_sample=False, timestep_spacing="trailing")
    scheduler.set_timesteps(5)
    sigmas = torch.cat([flow.vp_to_flow_sigma(scheduler.alphas_cumprod[scheduler.timesteps]), torch.zeros(1)])
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, generator=generator)
    own = x * ((1 - sigmas[0]) ** 2 + sigmas[0] ** 2).sqrt()
    for i, t in enumerate(scheduler.timesteps):
        output = torch.randn(2, 3, generator=generator) * 0.1
        native = own / ((1 - sigmas[i]) ** 2 + sigmas[i] ** 2).sqrt()
        torch.testing.assert_close(native, x, atol=1e-4, rtol=1e-4)
        own = own + (sigmas[i + 1] - sigmas[i]) * flow.vp_output_to_velocity(output, native, sigmas[i], prediction)
        x = scheduler.step(output, t, x).prev_sample
    torch.testing.assert_close(own, x, atol=1e-4, rtol=1e-4)


@given(SIGMA, st.sampled_from(["v_prediction", "epsilon"]))
def test_native_weight_turns_velocity_loss_into_native_loss(sigma, prediction):
    x0, noise = pair()
    alpha, beta = flow.vp_coefficients(sigma)
    x = alpha * x0 + beta * noise
    target = alpha * noise - beta * x0 if prediction == "v_prediction" else noise
    guess = target + 0.1 * torch.randn(target.shape, generator=torch.Generator().manual_seed(1))
    velocity = flow.vp_output_to_velocity(guess, x, sigma, prediction)
    weight = flow.vp_native_weight(torch.tensor(sigma), prediction)
    native = (guess - target).square().mean()
    torch.testing.assert_close(weight * (velocity - (noise - x0)).square().mean(), native, rtol=2e-2, atol=1e-6)


def distance(u, cdf):
    """Kolmogorov-Smirnov: the largest gap to a distribution function, in units in which 1.95 is exceeded by chance once
    in 1000 times."""
    u = u.double().sort().values
    n = len(u)
    return max((torch.arange(1, n + 1) / n - cdf(u)).max(), (cdf(u) - torch.arange(n) / n).max()).item() * n**0.5


def mode_cdf(u, scale=1.29):
    """The density of SD3's mode sampling is |d f^-1(u) / du| with the falling f of its eq. 20, so P(t < u) = 1 - f^-1(u)."""
    low, high = torch.zeros_like(u), torch.ones_like(u)
    for _ in range(60):
        middle = (low + high) / 2
        below = 1 - middle - scale * ((math.pi / 2 * middle).cos() ** 2 - 1 + middle) > u
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    return 1 - low


CDF = {
    "uniform": lambda u: u,
    "logit_normal": lambda u: torch.special.ndtr(u.logit()),
    "mode": mode_cdf,
}


@pytest.mark.parametrize("drawn", CDF)
@pytest.mark.parametrize("named", CDF)
def test_distributions_of_u_are_what_the_paper_says(drawn, named):
    u = flow.sample_u(drawn, 20_000, torch.Generator().manual_seed(0))
    assert u.dtype == torch.float32 and u.min() >= 0 and u.max() < 1
    assert (distance(u, CDF[named]) < 1.95) == (drawn == named)


def test_parameters_and_seeds_of_u():
    generator = torch.Generator().manual_seed(0)
    u = flow.sample_u("logit_normal", 20_000, generator, logit_mean=0.5, logit_std=0.7)
    assert distance(u, lambda u: torch.special.ndtr((u.logit() - 0.5) / 0.7)) < 1.95
    u = flow.sample_u("mode", 20_000, generator, mode_scale=-0.5)
    assert distance(u, lambda u: mode_cdf(u, -0.5)) < 1.95
    again = flow.sample_u("mode", 5, torch.Generator().manual_seed(3))
    assert torch.equal(again, flow.sample_u("mode", 5, torch.Generator().manual_seed(3)))
    with pytest.raises(ValueError, match="uniform"):
        flow.sample_u("gaussian", 3)


def test_loss_weights():
    sigma = torch.linspace(0, 1, 11)
    assert torch.equal(flow.loss_weight("none", sigma), torch.ones(11))
    grid = torch.linspace(0, 1, 10001)
    assert abs(flow.loss_weight("cosmap", grid).mean() - 1) < 1e-3  # a density over sigma
    snr = ((1 - sigma[1:]) / sigma[1:]) ** 2
    torch.testing.assert_close(flow.loss_weight("min_snr", sigma[1:]), snr.clamp(max=5) * sigma[1:] ** 2)
    with pytest.raises(ValueError, match="cosmap"):
        flow.loss_weight("snr", sigma)


@pytest.mark.parametrize("steps", [2, 3, 10, 64])
def test_linear_quadratic_grid_is_mochis(steps):
    theirs = torch.tensor(linear_quadratic_schedule(steps, 0.025), dtype=torch.float64)
    torch.testing.assert_close(flow.linear_quadratic_sigmas(steps), theirs)


def test_sequence_mu_is_linear():
    assert flow.sequence_mu(256, 256, 4096, 0.5, 1.15) == 0.5
    assert math.isclose(flow.sequence_mu(4096, 256, 4096, 0.5, 1.15), 1.15)
