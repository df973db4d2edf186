"""Distribution matching against numbers of the original implementations (tests/data/objectives.safetensors), and on Gaussians."""

import doctest
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from vidtrl.diffusion import distribution_matching as module
from vidtrl.diffusion import flow
from vidtrl.diffusion.distribution_matching import (
    critic_loss,
    dmd_gradient,
    dmd_loss,
    few_step_sigmas,
    guided,
    score_sigma,
    sid_loss,
    training_weight,
)


VECTORS = load_file(Path(__file__).parent / "data" / "objectives.safetensors")
X, FAKE, COND, UNCOND = (VECTORS[f"dmd.{k}"] for k in ("x", "fake_x0", "real_x0_cond", "real_x0_uncond"))
SHIFTED = 5.0
MEAN, STD = 2.0, 0.5  # the real distribution of the Gaussian tests


def scaled_error(ours, theirs):
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


def gradient(function, at):
    at = at.clone().requires_grad_()
    return torch.autograd.grad(function(at), at)[0]


def draws(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# ---- guidance


@pytest.mark.parametrize("g", [0.0, 3.0])
def test_published_guidance_is_one_less_than_ours(g):
    """The vectors were made with conditional + g (conditional - unconditional)."""
    expected = VECTORS[f"dmd.guidance={g}.grad_direction"]
    assert scaled_error(dmd_gradient(X, FAKE, guided(COND, UNCOND, g + 1)), expected) < 1e-5
    assert scaled_error(dmd_gradient(X, FAKE, guided(COND, UNCOND, g)), expected) > 0.01


def test_guidance_ends_and_precision():
    torch.testing.assert_close(guided(COND, UNCOND, 1.0), COND)
    assert torch.equal(guided(COND, UNCOND, 0.0), UNCOND)
    assert guided(COND.bfloat16(), UNCOND.bfloat16(), 4.0).dtype == torch.float32


# ---- noise levels


def test_few_step_sigmas_agree_with_the_original_implementation():
    ours, theirs = few_step_sigmas([1000, 750, 500, 250], SHIFTED), VECTORS["self_forcing.warped_steps.shift=5.0"]
    torch.testing.assert_close(ours, torch.tensor([1, 0.9375, 5 / 6, 0.625]), rtol=1e-6, atol=0)
    assert scaled_error(1000 * ours, theirs) < 1e-5
    assert scaled_error(1000 * few_step_sigmas([1000, 750, 500, 250]), theirs) > 0.1


@settings(deadline=None)
@given(
    st.lists(st.integers(1, 1000), min_size=1, max_size=8, unique=True),
    st.floats(0.5, 20),
    st.sampled_from([1000, 4000]),
)
def test_few_step_sigmas_decrease_and_undo(steps, shift, num_train_timesteps):
    steps = sorted(steps, reverse=True)
    sigmas = few_step_sigmas(steps, shift, num_train_timesteps)
    assert sigmas.dtype == torch.float32 and len(sigmas) == len(steps)
    assert (sigmas > 0).all() and (sigmas <= 1).all() and (sigmas.diff() < 0).all()
    s = sigmas.double()
    torch.testing.assert_close(
        s / (shift - (shift - 1) * s) * num_train_timesteps, torch.tensor(steps).double(), rtol=1e-4, atol=0
    )


@pytest.mark.parametrize(
    "steps, message",
    [
        ([], "is empty"),
        ([1000, 500, 0], "leave the final 0 out"),
        ([1001, 500], r"lie in \(0, 1000\]"),
        ([float("nan")], "lie in"),
        ([1000, 500, 500], "strictly decreasing"),
        ([250, 500], "sort them"),
    ],
)
def test_few_step_sigmas_names_the_mistake(steps, message):
    with pytest.raises(ValueError, match=message):
        few_step_sigmas(steps)


def test_shift_must_be_positive():
    with pytest.raises(ValueError, match="shift must be positive"):
        few_step_sigmas([1000], shift=0.0)


@settings(deadline=None)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=5), st.floats(0.5, 10))
def test_score_sigma_is_shifted_then_clamped(u, shift):
    sigma = score_sigma(torch.tensor(u), shift)
    expected = [min(max(shift * x / (1 + (shift - 1) * x), 0.02), 0.98) for x in u]
    torch.testing.assert_close(sigma, torch.tensor(expected), rtol=1e-5, atol=1e-6)


def test_score_sigma_clamps_after_the_shift():
    u = torch.tensor([0.97])  # inside the range, but 0.994 after the shift
    assert score_sigma(u, SHIFTED).item() == pytest.approx(0.98)
    assert flow.shift_sigma(u.clamp(0.02, 0.98), SHIFTED).item() > 0.99


def test_training_weight_agrees_with_the_original_implementation():
    sigma = VECTORS["self_forcing.timesteps.shift=5.0"] / 1000
    expected = VECTORS["self_forcing.training_weight.shift=5.0"]
    assert scaled_error(training_weight(sigma, shift=SHIFTED), expected) < 1e-5
    assert scaled_error(training_weight(sigma, shift=4.9), expected) > 1e-3


@pytest.mark.parametrize("shift, steps", [(1.0, 1000), (5.0, 1000), (8.0, 250)])
def test_training_weight_averages_to_one_over_its_grid(shift, steps):
    grid = flow.shift_sigma(torch.arange(1, steps + 1) / steps, shift)
    assert training_weight(grid, steps, shift).mean().item() == pytest.approx(1, rel=1e-5)
    ends = training_weight(torch.tensor([[0.0, 1.0]]), steps, shift)
    assert ends.shape == (1, 2) and ends.abs().max() < 1e-6


# ---- DMD


@pytest.mark.parametrize("g", [0.0, 3.0])
def test_dmd_agrees_with_the_original_implementation(g):
    real = guided(COND, UNCOND, g + 1)
    loss = dmd_loss(X, FAKE, real)
    assert loss.dtype == torch.float64 and loss.ndim == 0
    assert scaled_error(loss, VECTORS[f"dmd.guidance={g}.loss"]) < 1e-5
    ours = gradient(lambda x: dmd_loss(x, FAKE, real), X)
    assert scaled_error(ours, VECTORS[f"dmd.guidance={g}.grad"]) < 1e-5
    assert scaled_error(-ours, VECTORS[f"dmd.guidance={g}.grad"]) > 1  # the sign


def test_dmd_gradient_reaches_x_exactly():
    """512 elements: nothing is rounded on the way."""
    x, fake, real = (draws(4, 4, 2, 4, 4, seed=i) for i in range(3))
    ours = gradient(lambda x: dmd_loss(x, fake, real), x)
    assert torch.equal(ours, dmd_gradient(x, fake, real) / x.numel())
    assert not torch.equal(ours, dmd_gradient(x, real, fake) / x.numel())


def test_dmd_normalises_every_sample_by_itself():
    real = COND.clone()
    real[1:] *= 100
    torch.testing.assert_close(dmd_gradient(X, FAKE, real)[0], dmd_gradient(X[:1], FAKE[:1], COND[:1])[0])
    scales = (X - COND).abs().flatten(1).mean(1)
    torch.testing.assert_close(dmd_gradient(X, FAKE, COND), (FAKE - COND) / scales.reshape(-1, 1, 1, 1, 1))


def test_dmd_mask_takes_the_mean_over_what_counts():
    mask = torch.ones(1, 1, X.shape[2], 1, 1)
    mask[:, :, 0] = 0
    ours = gradient(lambda x: dmd_loss(x, FAKE, COND, mask=mask), X)
    assert not ours[:, :, 0].any()
    counted = X.numel() * (X.shape[2] - 1) / X.shape[2]
    torch.testing.assert_close(ours[:, :, 1:], dmd_gradient(X, FAKE, COND)[:, :, 1:] / counted)
    everything = dmd_loss(X, FAKE, COND, mask=torch.ones(1, dtype=torch.bool))
    torch.testing.assert_close(everything, dmd_loss(X, FAKE, COND))
    assert dmd_loss(X, FAKE, COND, mask=torch.zeros(1)) == 0


def test_dmd_weight_scales_each_sample():
    weight = torch.tensor([0.0, 1.0, 2.0, -1.0])
    ours = gradient(lambda x: dmd_loss(x, FAKE, COND, weight=weight), X)
    plain = gradient(lambda x: dmd_loss(x, FAKE, COND), X)
    torch.testing.assert_close(ours, weight.reshape(-1, 1, 1, 1, 1) * plain)


def test_dmd_survives_a_sample_that_equals_its_estimate():
    fake, real = FAKE.clone(), COND.clone()
    real[0], real[1], fake[1] = X[0], X[1], X[1]  # 1/0 and 0/0
    ours = gradient(lambda x: dmd_loss(x, fake, real), X)
    assert ours.isfinite().all() and not ours[:2].any() and ours[2:].any()


def test_dmd_scores_are_constants():
    fake, real = FAKE.clone().requires_grad_(), COND.clone().requires_grad_()
    assert not dmd_gradient(X.clone().requires_grad_(), fake, real).requires_grad
    assert not dmd_loss(X, fake, real).requires_grad
    assert sid_loss(X, fake, real).requires_grad


# ---- a linear generator on Gaussians


def gaussian_x0(x, sigma, mean, std):
    """E[x0 | x_sigma] of x0 ~ N(mean, std^2)."""
    sigma = sigma.reshape(-1, 1)
    keep = (1 - sigma) * std**2 / ((1 - sigma) ** 2 * std**2 + sigma**2)
    return mean + keep * (x - (1 - sigma) * mean)


def train_generator(loss_of, dim, steps, fake="analytic", critic_steps=5, lr=1e-2, batch=32):
    """x = mean + exp(log_std) z per coordinate, from (0, 1). Returns mean and standard deviation, averaged at the end."""
    generator = torch.Generator().manual_seed(0)
    student = torch.zeros(2, dim, requires_grad=True)
    critic = torch.zeros(2, dim, requires_grad=True)
    optimizer = torch.optim.Adam([student], lr=lr, betas=(0.0, 0.999), foreach=False)
    critic_optimizer = torch.optim.Adam([critic], lr=lr, betas=(0.0, 0.999), foreach=False)
    tail = []

    def rollout():
        return student[0] + student[1].exp() * torch.randn(batch, dim, generator=generator)

    def noised(x):
        sigma = score_sigma(torch.rand(batch, generator=generator))
        noise = torch.randn(batch, dim, generator=generator)
        return sigma, noise, flow.add_noise(x, noise, sigma)

    for step in range(steps):
        if fake == "learned":
            for _ in range(critic_steps):
                x = rollout().detach()
                sigma, noise, x_t = noised(x)
                velocity = (x_t - gaussian_x0(x_t, sigma, critic[0], critic[1].exp())) / sigma.reshape(-1, 1)
                critic_optimizer.zero_grad()
                critic_loss(velocity, x, noise).mean().backward()
                critic_optimizer.step()
        x = rollout()
        sigma, _, x_t = noised(x)
        model = {"analytic": student, "learned": critic, "real": None}[fake]
        moments = (MEAN, STD) if model is None else (model[0].detach(), model[1].detach().exp())
        loss = loss_of(x, gaussian_x0(x_t, sigma, *moments), gaussian_x0(x_t, sigma, MEAN, STD))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step >= 0.8 * steps:
            tail.append(torch.stack([student[0].detach(), student[1].detach().exp()]))
    return torch.stack(tail).mean(dim=(0, 2)).tolist()


def test_dmd_converges_to_the_real_distribution():
    assert train_generator(dmd_loss, 64, 1200) == pytest.approx([MEAN, STD], abs=0.02)


def test_dmd_with_a_learned_fake_score_converges_too():
    assert train_generator(dmd_loss, 64, 800, fake="learned") == pytest.approx([MEAN, STD], abs=0.03)


def test_dmd_needs_many_coordinates():
    """Control: with one, the normaliser is the score difference itself."""
    _, std = train_generator(dmd_loss, 1, 1200)
    assert abs(std - STD) > 0.2


def test_dmd_does_not_move_when_fake_equals_real():
    assert train_generator(dmd_loss, 64, 20, fake="real") == pytest.approx([0.0, 1.0], abs=1e-6)


# ---- SiD


def test_sid_by_hand():
    real, fake = COND.double(), FAKE.double()
    scale = (X - COND).double().abs().flatten(1).mean(1).reshape(-1, 1, 1, 1, 1)
    for alpha in (1.0, 1.2, 0.5):
        expected = ((real - fake) * ((real - X) - alpha * (real - fake)) / scale).mean()
        torch.testing.assert_close(sid_loss(X, FAKE, COND, alpha), expected)


@pytest.mark.parametrize("alpha", [1.0, 1.2])
def test_sid_on_constant_scores_is_dmd(alpha):
    ours = gradient(lambda x: sid_loss(x, FAKE, COND, alpha), X)
    torch.testing.assert_close(ours, gradient(lambda x: dmd_loss(x, FAKE, COND), X))


def test_sid_gradient_flows_through_both_scores():
    x, sigma = draws(8, 64), torch.full((8,), 0.5)
    noise = draws(8, 64, seed=1)

    def loss(x, constant=()):
        x_t = flow.add_noise(x, noise, sigma)
        estimates = {"fake": gaussian_x0(x_t, sigma, 0.0, 1.0), "real": gaussian_x0(x_t, sigma, MEAN, STD)}
        fake, real = (e.detach() if n in constant else e for n, e in estimates.items())
        return sid_loss(x, fake, real)

    full = gradient(loss, x)
    for constant in (["fake"], ["real"], ["fake", "real"]):
        assert scaled_error(gradient(lambda x, c=constant: loss(x, c), x), full) > 0.05


def test_sid_mask_takes_the_mean_over_what_counts():
    mask = torch.ones(1, 1, X.shape[2], 1, 1)
    mask[:, :, 0] = 0
    ours = gradient(lambda x: sid_loss(x, FAKE, COND, mask=mask), X)
    plain = gradient(lambda x: sid_loss(x, FAKE, COND), X)
    assert not ours[:, :, 0].any()
    torch.testing.assert_close(ours[:, :, 1:], plain[:, :, 1:] * X.shape[2] / (X.shape[2] - 1))


def test_sid_converges_to_the_real_distribution():
    assert train_generator(sid_loss, 64, 1200) == pytest.approx([MEAN, STD], abs=0.02)


def sid_expectation(mean, std, alpha, n=4000, dim=64):
    """Value and gradient with respect to (mean, std) of the generator N(mean, std^2), under its own exact fake score."""
    generator = torch.Generator().manual_seed(0)
    moments = torch.tensor([mean, std], requires_grad=True)
    x = moments[0] + moments[1] * torch.randn(n, dim, generator=generator)
    sigma = score_sigma(torch.rand(n, generator=generator))
    x_t = flow.add_noise(x, torch.randn(n, dim, generator=generator), sigma)
    loss = sid_loss(x, gaussian_x0(x_t, sigma, mean, std), gaussian_x0(x_t, sigma, MEAN, STD), alpha)
    return loss.item(), torch.autograd.grad(loss, moments)[0]


def test_sid_rests_where_fake_equals_real_and_its_value_says_nothing():
    _, there = sid_expectation(MEAN, STD, 1.0)
    value, away = sid_expectation(0.0, 1.0, 1.0)
    assert there.abs().max() < 1e-6
    assert away[0] < -0.1 and away[1] > 0.05  # mean up to 2, std down to 0.5
    assert abs(value) < 0.02
    assert sid_expectation(0.0, 1.0, 0.5)[0] > 0.1  # (1 - alpha) E|fake - real|^2 / scale


# ---- the critic


def test_critic_loss_is_flow_matching_per_sample():
    noise = draws(*X.shape)
    loss = critic_loss(COND, X, noise)
    torch.testing.assert_close(loss, torch.square(COND - (noise - X)).mean(dim=(1, 2, 3, 4)))
    assert loss.shape == (4,) and not critic_loss(noise - X, X, noise).any()
    weight = torch.tensor([0.0, 1.0, 2.0, 0.5])
    torch.testing.assert_close(critic_loss(COND, X, noise, weight), weight * loss)
    assert critic_loss(COND.bfloat16(), X.bfloat16(), noise).dtype == torch.float32


def test_critic_loss_does_not_train_the_generator():
    x = X.clone().requires_grad_()
    assert not critic_loss(COND, x, FAKE).requires_grad
    assert critic_loss(COND.clone().requires_grad_(), x, FAKE).requires_grad


def test_the_examples_in_the_docstrings():
    result = doctest.testmod(module)
    assert result.failed == 0 < result.attempted
