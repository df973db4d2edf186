"""Objectives against numbers of the original implementations (tests/data/objectives.safetensors), identities and optima."""

import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from vidtrl.diffusion import flow
from vidtrl.diffusion import transitions as tr
from vidtrl.diffusion.policy_losses import awm_log_prob, clipped_loss, dppo_loss, guard_log_ratio, nft_loss


VECTORS = load_file(Path(__file__).parent / "data" / "objectives.safetensors")
X0, NOISE, SIGMA, X_T, V, V_OLD = (VECTORS[f"nft.{k}"] for k in ("x0", "noise", "t", "xt", "v", "v_old"))
ADVANTAGES = VECTORS["nft.advantages"]
AWM = {"uniform": "Uniform", "t": "t", "t2": "t**2", "huber": "huber", "ghuber": "ghuber"}
LOG_RATIOS = st.floats(-0.02, 0.02)


def scaled_error(ours, theirs):
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


def per_sample(x):
    return x.flatten(1).mean(1)


def gradient(function, at):
    at = at.clone().requires_grad_()
    return torch.autograd.grad(function(at).sum(), at)[0]


# ---- clipped ratio


def test_clipped_loss_agrees_with_the_original_implementation():
    old, new, advantages = VECTORS["clip.log_prob_old"], VECTORS["clip.log_prob"], ADVANTAGES.clamp(-5, 5)
    expected = VECTORS["clip.range=1e-3.loss"].squeeze()
    torch.testing.assert_close(clipped_loss(new, old, advantages, 1e-3).mean(), expected, rtol=1e-5, atol=0)
    assert abs(clipped_loss(new, old, advantages, 1e-4).mean() - expected) > 1e-4


@settings(deadline=None)
@given(LOG_RATIOS, st.floats(-5, 5).filter(lambda a: abs(a) > 1e-3), st.floats(1e-4, 1e-2), st.floats(1e-4, 1e-2))
def test_clipping_stops_the_gradient_only_where_the_ratio_has_gone_far_enough(log_ratio, advantage, low, high):
    new = torch.tensor([log_ratio], dtype=torch.float64)
    advantages = torch.tensor([advantage], dtype=torch.float64)
    ratio = math.exp(log_ratio)

    def loss(log_prob):
        return clipped_loss(log_prob, torch.zeros(1, dtype=torch.float64), advantages, low, high)

    clipped = min(max(ratio, 1 - low), 1 + high)
    assert loss(new).item() == pytest.approx(max(-advantage * ratio, -advantage * clipped), abs=1e-12)
    stopped = ratio > 1 + high if advantage > 0 else ratio < 1 - low
    assert gradient(loss, new).item() == pytest.approx(0 if stopped else -advantage * ratio, abs=1e-12)


def test_epsilon_is_symmetric_unless_told():
    new, old, advantages = torch.tensor([0.5, -0.5]), torch.zeros(2), torch.tensor([1.0, -1.0])
    torch.testing.assert_close(clipped_loss(new, old, advantages, 0.1), torch.tensor([-1.1, 0.9]))
    torch.testing.assert_close(clipped_loss(new, old, advantages, 0.1, 0.3), torch.tensor([-1.3, 0.9]))


def test_a_tiny_clip_range_survives_float32():
    loss = clipped_loss(torch.tensor([1e-3]), torch.zeros(1), torch.ones(1), 1e-5)
    assert loss.item() == pytest.approx(-(1 + 1e-5), abs=1e-7) and loss.item() != -1


# ---- GRPO-Guard


def guard_case(sigma, sigma_next, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x, v, delta, noise = (torch.randn(3, 4, 2, 3, 3, generator=generator, dtype=torch.float64) for _ in range(4))
    old = tr.flow_sde(x, v, sigma, sigma_next)
    new = tr.flow_sde(x, v + 0.1 * delta, sigma, sigma_next)
    # float64, so that the identity is not hidden by rounding
    old, new = (tr.Transition(s.mean.double(), s.std.double()) for s in (old, new))
    drawn = old.mean + old.std.reshape(-1, 1, 1, 1, 1) * noise

    def log_prob(step):
        return -per_sample((drawn - step.mean) ** 2) / (2 * step.std**2) - step.std.log()

    return old, new, noise, log_prob(new), log_prob(old)


@settings(deadline=None)
@given(st.floats(0.1, 0.95), st.floats(0.1, 0.9))
def test_guard_ratio_is_the_noise_projected_on_the_change_of_the_mean(sigma, fraction):
    old, new, noise, log_prob, old_log_prob = guard_case(sigma, sigma * fraction)
    expected = per_sample((new.mean - old.mean) * noise)
    ours = guard_log_ratio(log_prob, old_log_prob, new.mean, old.mean, new.std)
    torch.testing.assert_close(ours, expected, atol=1e-9, rtol=1e-6)
    assert (log_prob - old_log_prob - expected).abs().max() > 1e-6  # the plain ratio is another thing


def test_guard_ratio_is_centred_and_the_plain_one_is_not():
    guarded, plain = [], []
    for seed in range(300):
        old, new, _, log_prob, old_log_prob = guard_case(0.3, 0.25, seed)
        guarded.append(guard_log_ratio(log_prob, old_log_prob, new.mean, old.mean, new.std))
        plain.append(log_prob - old_log_prob)
    for values, centred in ((torch.cat(guarded), True), (torch.cat(plain), False)):
        z = values.mean() / (values.std() / math.sqrt(len(values)))
        assert (abs(z) < 3) == centred


# ---- Flow-DPPO


@pytest.mark.parametrize(
    "log_ratio, advantage, kl, dropped",
    [
        (0.1, 1.0, 2.0, True),
        (-0.1, -1.0, 2.0, True),
        (0.1, -1.0, 2.0, False),  # the gradient leads back
        (-0.1, 1.0, 2.0, False),
        (0.1, 1.0, 0.5, False),  # inside the trust region
        (0.0, 1.0, 2.0, False),
    ],
)
def test_dppo_drops_what_leaves_the_trust_region(log_ratio, advantage, kl, dropped):
    advantages, kl = torch.tensor([advantage]), torch.tensor([kl], requires_grad=True)
    new = torch.tensor([log_ratio])

    def loss(log_prob):
        return dppo_loss(log_prob, torch.zeros(1), kl, advantages, threshold=1.0)

    expected = 0.0 if dropped else -advantage * math.exp(log_ratio)
    assert loss(new).item() == pytest.approx(expected)
    assert gradient(loss, new).item() == pytest.approx(expected)
    assert not loss(new).requires_grad  # the KL decides, it is not optimised


def test_dppo_does_not_clip_the_ratio():
    far, zero = torch.tensor([3.0]), torch.zeros(1)
    assert dppo_loss(far, zero, zero, torch.ones(1), 1.0).item() == pytest.approx(-math.exp(3))
    assert clipped_loss(far, zero, torch.ones(1), 1e-3).item() == pytest.approx(-1.001)


# ---- DiffusionNFT


@pytest.mark.parametrize("beta", [1.0, 0.1])
def test_nft_agrees_with_the_original_implementation(beta):
    def loss(v, beta=beta):
        policy = nft_loss(v, V_OLD, X_T, X0, SIGMA, ADVANTAGES, beta)
        return policy.mean() + 1e-4 * torch.square(v - VECTORS["nft.v_ref"]).mean()

    assert (
        scaled_error(nft_loss(V, V_OLD, X_T, X0, SIGMA, ADVANTAGES, beta), VECTORS[f"nft.beta={beta}.per_sample"])
        < 1e-5
    )
    assert scaled_error(loss(V), VECTORS[f"nft.beta={beta}.loss"]) < 1e-5
    assert scaled_error(gradient(loss, V), VECTORS[f"nft.beta={beta}.grad"]) < 1e-5
    assert scaled_error(gradient(lambda v: loss(v, beta * 1.01), V), VECTORS[f"nft.beta={beta}.grad"]) > 1e-4


@settings(deadline=None)
@given(st.floats(-7, 7), st.sampled_from([1.0, 0.5, 0.1]), st.floats(0.1, 1.0))
def test_nft_optimum_with_the_weights_of_the_start(advantage, beta, sigma):
    """At v = v_old both weights are equal; held there, the loss is quadratic and one Newton step finds its minimum."""
    x_t = flow.add_noise(X0, NOISE, sigma)
    advantages = torch.full((4,), advantage)
    at_old = gradient(lambda v: nft_loss(v, V_OLD, x_t, X0, sigma, advantages, beta), V_OLD)
    error = V_OLD - (NOISE - X0)
    scale = sigma * per_sample(error.abs()).reshape(-1, 1, 1, 1, 1)
    curvature = 2 * sigma**2 * beta * 5.0 / (scale * X0[0].numel())
    r = min(max(advantage / 5, -1), 1) / 2 + 0.5
    optimum = V_OLD + (2 * r - 1) * (NOISE - X0 - V_OLD) / beta
    torch.testing.assert_close(V_OLD - at_old / curvature, optimum, atol=5e-3, rtol=1e-3)


@pytest.mark.parametrize("advantage, sign", [(5.0, 1), (2.0, 1), (-2.0, -1), (-5.0, -1)])
def test_nft_descends_to_the_target_or_its_mirror_image(advantage, sign):
    """The weights follow v, so one sample pulls all the way whatever |A|; beta says how far that is."""
    beta, x0, noise = 0.5, X0[:1], NOISE[:1]
    x_t = flow.add_noise(x0, noise, 0.6)
    end = V_OLD[:1] + sign * (noise - x0 - V_OLD[:1]) / beta
    v = V_OLD[:1].clone()
    for i in range(400):
        v = v - 6.0 * 0.985**i * gradient(
            lambda v: nft_loss(v, V_OLD[:1], x_t, x0, 0.6, torch.tensor([advantage]), beta), v
        )
    assert (v - end).abs().mean() < 0.05 * (end - V_OLD[:1]).abs().mean()


def test_nft_learns_nothing_from_advantage_zero():
    loss = nft_loss(V_OLD, V_OLD, X_T, X0, SIGMA, torch.zeros(4))
    assert (loss > 0).all()
    zero = gradient(lambda v: nft_loss(v, V_OLD, X_T, X0, SIGMA, torch.zeros(4)), V_OLD)
    one = gradient(lambda v: nft_loss(v, V_OLD, X_T, X0, SIGMA, torch.ones(4)), V_OLD)
    assert zero.abs().max() < 1e-4 * one.abs().max()


def test_nft_error_scale_stops_at_1e_minus_5():
    """A perfect estimate costs nothing, and an error below the floor is no longer blown up to the scale of 1."""
    zero = torch.zeros(1, 6)
    for error, scale in [(0.0, 1e-5), (1e-7, 1e-5), (1e-3, 1e-3)]:
        v = torch.full((1, 6), error)  # x_t = x0 = 0 and sigma = 1: the error of x0 is -v
        loss = nft_loss(v, zero, zero, zero, 1.0, torch.tensor([5.0]))
        assert loss.item() == pytest.approx(5 * error**2 / scale, rel=1e-4)


def test_nft_advantages_are_clipped():
    losses = [nft_loss(V, V_OLD, X_T, X0, SIGMA, torch.full((4,), a), advantage_clip=2.0) for a in (2.0, 9.0, 1.0)]
    assert torch.equal(losses[0], losses[1]) and not torch.equal(losses[0], losses[2])


def test_nft_gradient_is_a_finite_difference():
    """With the weights frozen at v, as the loss freezes them, it is quadratic: a central difference is exact."""
    beta, direction = 0.5, torch.randn(V.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    v, v_old, x_t, x0, sigma = (t.double() for t in (V, V_OLD, X_T, X0, SIGMA.reshape(-1, 1, 1, 1, 1)))
    r = (ADVANTAGES.double() / 5).clamp(-1, 1) / 2 + 0.5

    def errors(v):
        return [x_t - sigma * ((1 - b) * v_old + b * v) - x0 for b in (beta, -beta)]

    weights = [per_sample(e.abs()) for e in errors(v)]

    def loss(v):
        plus, minus = (per_sample(e**2) / w for e, w in zip(errors(v), weights, strict=True))
        return (r * plus + (1 - r) * minus) * 5 / beta

    torch.testing.assert_close(
        nft_loss(V, V_OLD, X_T, X0, SIGMA, ADVANTAGES, beta).double(), loss(v), rtol=1e-5, atol=0
    )
    numeric = (loss(v + direction) - loss(v - direction)) / 2
    ours = gradient(lambda v: nft_loss(v, V_OLD, X_T, X0, SIGMA, ADVANTAGES, beta), V).double()
    torch.testing.assert_close((ours * direction).sum(dim=(1, 2, 3, 4)), numeric, rtol=1e-4, atol=1e-6)


def test_nft_is_float32_and_takes_one_time_for_all():
    low = [t.bfloat16() for t in (V, V_OLD, X_T, X0)]
    assert nft_loss(*low, 0.5, ADVANTAGES).dtype == torch.float32
    torch.testing.assert_close(
        nft_loss(V, V_OLD, X_T, X0, 0.5, ADVANTAGES), nft_loss(V, V_OLD, X_T, X0, torch.full((4,), 0.5), ADVANTAGES)
    )
    v_old = V_OLD.clone().requires_grad_()
    assert not nft_loss(V, v_old, X_T, X0, SIGMA, ADVANTAGES).requires_grad


# ---- AWM


@pytest.mark.parametrize("weighting", AWM)
def test_awm_agrees_with_the_original_implementation(weighting):
    def log_prob(v):
        return awm_log_prob(v, NOISE, X0, SIGMA, weighting)

    assert log_prob(V).dtype == torch.float64
    assert scaled_error(log_prob(V), VECTORS[f"awm.{AWM[weighting]}.log_prob"]) < 1e-7
    assert scaled_error(gradient(log_prob, V), VECTORS[f"awm.{AWM[weighting]}.grad"]) < 1e-5
    others = [awm_log_prob(V, NOISE, X0, SIGMA, other) for other in AWM if other != weighting]
    assert min(scaled_error(other, log_prob(V)) for other in others) > 0.01


@pytest.mark.parametrize("weighting", AWM)
def test_awm_gradient_is_a_finite_difference(weighting):
    v = V[:2, :1, :1, :2, :2].double().requires_grad_()
    noise, x0 = NOISE[:2, :1, :1, :2, :2], X0[:2, :1, :1, :2, :2]
    assert torch.autograd.gradcheck(lambda v: awm_log_prob(v, noise, x0, SIGMA[:2], weighting), v)


@pytest.mark.parametrize("weighting", AWM)
def test_awm_is_best_at_the_target(weighting):
    best = awm_log_prob(NOISE - X0, NOISE, X0, SIGMA, weighting)
    assert best.abs().max() < 1e-7
    assert (awm_log_prob(V, NOISE, X0, SIGMA, weighting) < -0.05).all()
    assert gradient(lambda v: awm_log_prob(v, NOISE, X0, SIGMA, weighting), NOISE - X0).isfinite().all()


def test_awm_names_are_checked():
    with pytest.raises(ValueError, match="'huber' or 'ghuber', got 't3'"):
        awm_log_prob(V, NOISE, X0, SIGMA, "t3")
