"""What a condition fixes (the first frame of image-to-video) is in no loss, and no stochastic step moves it."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vidtrl.diffusion import consistency, distribution_matching, flow, policy_losses
from vidtrl.diffusion.transitions import transition


def masked_losses(x, y, z, sigma, free):
    """name -> (B,) or scalar, of latents (B, C, f, h, w)."""
    step = transition("flow-sde", x, y, 0.6, 0.4, noise_level=0.7, sigma_max=None).held(x, free)
    other = transition("flow-sde", x, z, 0.6, 0.4, noise_level=0.7, sigma_max=None).held(x, free)
    log_prob, advantages, t = step.log_prob(z), torch.linspace(-1, 1, len(x)), consistency.trig_time(sigma)
    zero = torch.zeros(len(x))
    return {
        "mean": flow.sample_mean(x, free),
        "log_prob": log_prob,
        "kl": step.kl(other),
        "guard": policy_losses.guard_log_ratio(zero, zero, step.mean, other.mean, step.std, free),
        "nft": policy_losses.nft_loss(y, z, x, z + 1, sigma, advantages, free=free),
        "awm": policy_losses.awm_log_prob(y, z, x, sigma, free=free),
        "dmd": distribution_matching.dmd_loss(x, y, z, free=free),
        "sid": distribution_matching.sid_loss(x, y, z, free=free),
        "critic": distribution_matching.critic_loss(y, x, z, free=free),
        "mse": consistency.consistency_loss(x, y, free=free),
        "huber": consistency.consistency_loss(x, y, "huber", free=free),
        "sum": consistency.consistency_loss(x, y, "sum", free=free),
        "regression": consistency.ode_regression_loss(x, y, sigma, free=free),
        "scm": consistency.scm_loss(x, y, z, x + z, t, free=free),
    }


@given(st.integers(1, 3), st.integers(1, 3), st.integers(2, 4), st.integers(0, 2**16))
@settings(max_examples=10, deadline=None)
def test_losses_count_the_free_frames_alone(batch, channels, frames, seed):
    generator = torch.Generator().manual_seed(seed)
    x, y, z = (torch.randn(batch, channels, frames, 2, 3, generator=generator) for _ in range(3))
    sigma = torch.rand(batch, generator=generator) * 0.8 + 0.1
    free = torch.ones(1, 1, frames, 1, 1)
    free[:, :, 0] = 0
    masked = masked_losses(x, y, z, sigma, free)
    alone = masked_losses(*(t[:, :, 1:] for t in (x, y, z)), sigma, None)
    everything = masked_losses(x, y, z, sigma, None)
    for name in masked:
        torch.testing.assert_close(masked[name], alone[name], rtol=1e-5, atol=1e-6, msg=name)
        assert not torch.allclose(everything[name], alone[name], rtol=1e-5, atol=1e-6), name  # the mask matters


def test_a_held_step_moves_nothing_but_the_free_part():
    x, v, noise = (torch.randn(2, 3, 4, 2, 2, generator=torch.Generator().manual_seed(i)) for i in range(3))
    free = torch.ones(2, 1, 4, 1, 1)
    free[:, :, 0] = 0
    step = transition("dance", x, v, 0.8, 0.6, noise_level=0.3, sigma_max=None)
    held = step.held(x, free)
    after = held.sample(noise=noise)
    assert torch.equal(after[:, :, 0], x[:, :, 0])
    assert torch.equal(after[:, :, 1:], step.sample(noise=noise)[:, :, 1:])
    assert not torch.equal(step.sample(noise=noise)[:, :, 0], x[:, :, 0])
    children = held[torch.tensor([1, 1, 0])]
    assert torch.equal(children.free, free[[1, 1, 0]]) and children.log_prob(after[[1, 1, 0]]).shape == (3,)
