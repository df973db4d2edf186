"""One sampling step sigma -> sigma_next as a probability distribution, for every published kernel.

Sampling with the ODE is deterministic: there is nothing to take the log-probability of. Each kernel here turns a step
into a Gaussian N(mean, std^2) that keeps the marginals of the ODE. With the noise estimate

    noise_hat = sample + (1 - sigma) velocity,      x0_hat = sample - sigma velocity,      D = sigma - sigma_next > 0,

there are only two shapes of mean, and the kernels differ in the size of std alone:

    SDE (first order in D):   mean = sample - velocity D - std^2 / (2 sigma) noise_hat
    exact reverse kernel:     mean = (1 - sigma_next) x0_hat + sqrt(sigma_next^2 - std^2) noise_hat

| name                 | shape | std                                                   | paper |
|----------------------|-------|-------------------------------------------------------|-------|
| "ode"                | both  | 0                                                     | https://huggingface.co/papers/2210.02747 |
| "flow-sde"           | SDE   | noise_level sqrt(D sigma / (1 - sigma))               | https://huggingface.co/papers/2505.05470 |
| "flow-sde-truncated" | SDE   | the same, at most 0.45                                | https://huggingface.co/papers/2510.22200 |
| "wan-linear"         | SDE   | sqrt(D) (sigma_min + (sigma_max - sigma_min) sigma)   | https://huggingface.co/papers/2605.15980 |
| "dance"              | SDE   | eta sqrt(D)                                           | https://huggingface.co/papers/2505.07818 |
| "ma-sde"             | SDE   | eta sqrt(integral of u / (1 - u) over the step)       | https://huggingface.co/papers/2603.21872 |
| "cps"                | exact | sigma_next sin(noise_level pi / 2)                    | https://huggingface.co/papers/2509.05952 |
| "ddim"               | exact | DDIM's eta sigma_t, in flow coordinates               | https://huggingface.co/papers/2010.02502 |

`sigma` and `sigma_next` are floats or tensors of shape (B,). Pass floats or CPU tensors: the few scalars of a step are
computed in float64 where `sigma` lies, and the checks on them then cost no device synchronisation. Everything of the
size of a latent is float32 whatever the model's dtype.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .flow import _like, noise_from_velocity, sample_mean, x0_from_velocity


TRANSITIONS = ("flow-sde", "flow-sde-truncated", "wan-linear", "dance", "cps", "ma-sde", "ddim", "ode")


@dataclass
class Transition:
    """The distribution of the next sample, N(mean, std^2) independently in every coordinate.

    Args:
        mean: (B, ...) float32.
        std: (B,) float32, total standard deviation of the step (sqrt(D) is included); 0 is a deterministic step.
        gaussian: False for a kernel whose authors use -mean((x' - mean)^2) as its log-probability (CPS).
        free: broadcastable to the mean, 1 for coordinates that take the step and 0 for those that a condition fixes,
            which nothing is drawn for and which no average counts (`held`). All take it by default.

    Example:
        >>> step = flow_sde(torch.ones(2, 3), torch.zeros(2, 3), sigma=0.9, sigma_next=0.8)
        >>> next_sample = step.sample(noise=torch.zeros(2, 3))
        >>> step.log_prob(next_sample).shape
        torch.Size([2])
    """

    mean: Tensor
    std: Tensor
    gaussian: bool = True
    free: Tensor | None = None

    def __getitem__(self, index: Tensor) -> "Transition":
        """Rows `index` (LongTensor): several children of one parent share its mean and its single forward pass."""
        free = self.free if self.free is None or len(self.free) == 1 else self.free[index]
        return Transition(self.mean[index], self.std[index], self.gaussian, free)

    def held(self, sample: Tensor, free: Tensor | None) -> "Transition":
        """The same step with all coordinates kept at `sample` (B, ...), where it started, but the `free` ones."""
        if free is None:
            return self
        return Transition(torch.where(free > 0, self.mean, sample.float()), self.std, self.gaussian, free)

    def sample(self, generator: torch.Generator | None = None, noise: Tensor | None = None) -> Tensor:
        """Draw mean + std * noise.

        Args:
            generator: draws the noise, on the generator's own device.
            noise: (B, ...) standard-normal draw, instead of `generator`.

        Returns:
            (B, ...) float32.
        """
        if noise is None:
            device = self.mean.device if generator is None else generator.device
            noise = torch.randn(self.mean.shape, generator=generator, device=device)
        noise = noise.to(self.mean.device, torch.float32)
        return self.mean + _like(self.std, self.mean) * (noise if self.free is None else noise * self.free)

    def log_prob(self, next_sample: Tensor) -> Tensor:
        """Log-density of `next_sample` (B, ...), averaged over the (free) non-batch dimensions; (B,) float32.

        The average, not the sum: a sum over a video's 10^6 coordinates overflows the ratio of two policies. A step with
        std 0 has no density (the result is not finite).
        """
        squared = sample_mean(torch.square(next_sample.float() - self.mean), self.free)
        if not self.gaussian:
            return -squared
        return -squared / (2 * self.std**2) - torch.log(self.std) - 0.5 * math.log(2 * math.pi)

    def kl(self, other: "Transition") -> Tensor:
        """KL(self || other) = mean((mean - other.mean)^2) / (2 std^2) per coordinate, for equal stds; (B,) float32."""
        return sample_mean(torch.square(self.mean - other.mean), self.free) / (2 * self.std**2)


def ode(sample: Tensor, velocity: Tensor, sigma: float | Tensor, sigma_next: float | Tensor) -> Transition:
    """Deterministic Euler step, mean = sample - velocity D and std = 0 (https://huggingface.co/papers/2210.02747).

    Args:
        sample: x_sigma, (B, ...).
        velocity: the model's noise - x0 estimate, (B, ...).
        sigma, sigma_next: 1 >= sigma > sigma_next >= 0, float or (B,).

    Example:
        >>> ode(torch.ones(1, 2), torch.full((1, 2), 2.0), sigma=0.5, sigma_next=0.25).mean.tolist()
        [[0.5, 0.5]]
    """
    sigma, sigma_next = _times(sigma, sigma_next, sample)
    return _sde_step(sample, velocity, sigma, sigma_next, torch.zeros_like(sigma))


def flow_sde(
    sample: Tensor,
    velocity: Tensor,
    sigma: float | Tensor,
    sigma_next: float | Tensor,
    noise_level: float = 0.7,
    sigma_max: float | None = None,
    max_std: float | None = None,
) -> Transition:
    """Flow-GRPO's SDE (https://huggingface.co/papers/2505.05470), optionally truncated as in LongCat-Video.

    std = g sqrt(D) with g = noise_level sqrt(sigma / (1 - sigma)).

    Args:
        sample, velocity, sigma, sigma_next: as in `ode`.
        noise_level: a >= 0; 0.7 is the paper's for images.
        sigma_max: largest sigma inside the denominator 1 - sigma, which vanishes at pure noise: the second sigma of
            the grid, so that it acts on the first step alone. Needed if that starts at sigma = 1, and wanted if it
            starts just below: Wan's grid begins at 0.9997, where the std of a 20-step grid would be 5.
        max_std: largest std of the step; the drift follows the truncated g (https://huggingface.co/papers/2510.22200:
            0.45 with noise_level 1).

    Raises:
        ValueError: sigma is 1 and `sigma_max` is missing.

    Example:
        >>> step = flow_sde(torch.ones(1, 1), torch.full((1, 1), -0.5), 0.9, 0.8, noise_level=0.7)
        >>> round(step.mean.item(), 5), round(step.std.item(), 5)
        (0.81725, 0.66408)
    """
    sigma, sigma_next = _times(sigma, sigma_next, sample)
    _check_level("noise_level", noise_level)
    if sigma_max is None:
        _check_below_one(sigma, "the flow-sde transition", "pass sigma_max, the second sigma of the grid")
        regular = sigma
    else:
        regular = sigma.clamp(max=sigma_max)
    std = noise_level * torch.sqrt(sigma / (1 - regular) * (sigma - sigma_next))
    if max_std is not None:
        std = std.clamp(max=max_std)
    return _sde_step(sample, velocity, sigma, sigma_next, std)


def wan_linear_sde(
    sample: Tensor,
    velocity: Tensor,
    sigma: float | Tensor,
    sigma_next: float | Tensor,
    sigma_max: float,
    sigma_min: float = 0.0,
) -> Transition:
    """Flash-GRPO's SDE for Wan, with g linear in sigma (https://huggingface.co/papers/2605.15980).

    std = g sqrt(D) with g = sigma_min + (sigma_max - sigma_min) sigma; it has no noise level to tune.

    Args:
        sample, velocity, sigma, sigma_next: as in `ode`.
        sigma_max: second sigma of the sampling grid.
        sigma_min: last sigma of the sampling grid.

    Example:
        >>> step = wan_linear_sde(torch.ones(1, 1), torch.full((1, 1), -0.5), 0.9, 0.8, sigma_max=0.98)
        >>> round(step.std.item(), 5)
        0.27891
    """
    sigma, sigma_next = _times(sigma, sigma_next, sample)
    std = (sigma_min + (sigma_max - sigma_min) * sigma) * torch.sqrt(sigma - sigma_next)
    return _sde_step(sample, velocity, sigma, sigma_next, std)


def dance_sde(
    sample: Tensor, velocity: Tensor, sigma: float | Tensor, sigma_next: float | Tensor, eta: float = 0.3
) -> Transition:
    """DanceGRPO's SDE, with constant g = eta and std = eta sqrt(D) (https://huggingface.co/papers/2505.07818).

    Args:
        sample, velocity, sigma, sigma_next: as in `ode`.
        eta: >= 0; 0.25 for HunyuanVideo, 0.3 for Wan, visibly noisy above.

    Example:
        >>> step = dance_sde(torch.ones(1, 1), torch.full((1, 1), -0.5), 0.9, 0.8, eta=0.3)
        >>> round(step.mean.item(), 5), round(step.std.item(), 5)
        (1.04525, 0.09487)
    """
    sigma, sigma_next = _times(sigma, sigma_next, sample)
    _check_level("eta", eta)
    return _sde_step(sample, velocity, sigma, sigma_next, eta * torch.sqrt(sigma - sigma_next))


def ma_sde(
    sample: Tensor, velocity: Tensor, sigma: float | Tensor, sigma_next: float | Tensor, eta: float = 0.7
) -> Transition:
    """SAGE-GRPO's SDE: Flow-SDE whose variance is integrated over the step (https://huggingface.co/papers/2603.21872).

    std^2 = eta^2 integral of u / (1 - u) from sigma_next to sigma
          = eta^2 (log((1 - sigma_next) / (1 - sigma)) - (sigma - sigma_next)).

    Args:
        sample, velocity, sigma, sigma_next: as in `ode`, with sigma < 1: the integral diverges at pure noise.
        eta: >= 0, noise level; equals `flow_sde`'s in the limit of small steps.

    Raises:
        ValueError: sigma is 1.

    Example:
        >>> step = ma_sde(torch.ones(1, 1), torch.full((1, 1), -0.5), 0.9, 0.8, eta=0.7)
        >>> round(step.std.item(), 5)
        0.53911
    """
    sigma, sigma_next = _times(sigma, sigma_next, sample)
    _check_level("eta", eta)
    _check_below_one(sigma, "the ma-sde transition", "start its window at the second step, or use flow-sde there")
    variance = torch.log1p((sigma - sigma_next) / (1 - sigma)) - (sigma - sigma_next)
    return _sde_step(sample, velocity, sigma, sigma_next, eta * torch.sqrt(variance))


def cps(
    sample: Tensor, velocity: Tensor, sigma: float | Tensor, sigma_next: float | Tensor, noise_level: float = 0.7
) -> Transition:
    """Coefficients-preserving sampling (https://huggingface.co/papers/2509.05952): std = sigma_next sin(a pi / 2).

    The step removes exactly as much predicted noise as it adds, so samples stay clean at any noise level. As in the
    paper its log-probability is -mean((x' - mean)^2). A step to sigma_next = 0 is deterministic.

    Args:
        sample, velocity, sigma, sigma_next: as in `ode`.
        noise_level: a in [0, 1].

    Example:
        >>> step = cps(torch.ones(1, 1), torch.full((1, 1), -0.5), 0.9, 0.8, noise_level=0.7)
        >>> round(step.mean.item(), 5), round(step.std.item(), 5)
        (0.63503, 0.71281)
    """
    sigma, sigma_next = _times(sigma, sigma_next, sample)
    _check_level("noise_level", noise_level, most=1.0)
    return _exact_step(
        sample, velocity, sigma, sigma_next, sigma_next * math.sin(noise_level * math.pi / 2), gaussian=False
    )


def ddim(
    sample: Tensor, velocity: Tensor, sigma: float | Tensor, sigma_next: float | Tensor, eta: float = 1.0
) -> Transition:
    """DDIM with eta (https://huggingface.co/papers/2010.02502, eqs. 12 and 16); eta = 1 is DDPM, the kernel of DDPO.

    For VP families (v- or epsilon-prediction). With alpha^2 + beta^2 = 1 and x_vp = (alpha + beta) x_flow, the paper's
    std eta beta' / beta sqrt(1 - alpha^2 / alpha'^2) becomes

        std = eta sigma' sqrt(1 - q^2),      q = (1 - sigma) sigma' / (sigma (1 - sigma')),

    and its mean keeps its form. A step to sigma_next = 0 is deterministic.

    Args:
        sample, velocity, sigma, sigma_next: as in `ode`, all in flow coordinates.
        eta: in [0, 1]; 0 is the ODE.

    Example:
        >>> step = ddim(torch.ones(1, 1), torch.full((1, 1), -0.5), 0.9, 0.8, eta=0.0)
        >>> round(step.mean.item(), 5)
        1.05
    """
    sigma, sigma_next = _times(sigma, sigma_next, sample)
    _check_level("eta", eta, most=1.0)
    q = (1 - sigma) * sigma_next / (sigma * (1 - sigma_next))
    return _exact_step(sample, velocity, sigma, sigma_next, eta * sigma_next * torch.sqrt(1 - q**2))


def transition(
    name: str,
    sample: Tensor,
    velocity: Tensor,
    sigma: float | Tensor,
    sigma_next: float | Tensor,
    *,
    noise_level: float,
    sigma_max: float | None,
    max_std: float | None = None,
) -> Transition:
    """The kernel called `name`, one of `TRANSITIONS`.

    Args:
        name: see the table of this module.
        sample, velocity, sigma, sigma_next: as in `ode`.
        noise_level: a of "flow-sde", "flow-sde-truncated" and "cps"; eta of "dance", "ma-sde" and "ddim".
        sigma_max: second sigma of the grid, for "flow-sde", "flow-sde-truncated" and "wan-linear".
        max_std: truncation of "flow-sde" and "flow-sde-truncated" (there 0.45 if None).

    Raises:
        ValueError: unknown name, or a step at which the kernel is singular.

    Example:
        >>> step = transition("dance", torch.ones(1, 1), torch.zeros(1, 1), 0.9, 0.8, noise_level=0.3, sigma_max=None)
        >>> round(step.std.item(), 5)
        0.09487
    """
    if name == "flow-sde":
        return flow_sde(sample, velocity, sigma, sigma_next, noise_level, sigma_max, max_std)
    if name == "flow-sde-truncated":
        return flow_sde(
            sample, velocity, sigma, sigma_next, noise_level, sigma_max, 0.45 if max_std is None else max_std
        )
    if name == "wan-linear":
        if sigma_max is None:
            raise ValueError("The wan-linear transition needs sigma_max, the second sigma of the grid.")
        return wan_linear_sde(sample, velocity, sigma, sigma_next, sigma_max)
    if name == "dance":
        return dance_sde(sample, velocity, sigma, sigma_next, noise_level)
    if name == "cps":
        return cps(sample, velocity, sigma, sigma_next, noise_level)
    if name == "ma-sde":
        return ma_sde(sample, velocity, sigma, sigma_next, noise_level)
    if name == "ddim":
        return ddim(sample, velocity, sigma, sigma_next, noise_level)
    if name == "ode":
        return ode(sample, velocity, sigma, sigma_next)
    raise ValueError(f"transition must be one of {', '.join(map(repr, TRANSITIONS))}, got {name!r}.")


def rectification(sigma: float | Tensor, sigma_next: float | Tensor, diffusion_coefficient: float | Tensor) -> Tensor:
    """1 / lambda, the temporal gradient rectification of Flash-GRPO (https://huggingface.co/papers/2605.15980).

    The gradient of an SDE step's log-probability is lambda * noise * grad(velocity) with
    lambda = sqrt(D) / g + g sqrt(D) (1 - sigma) / (2 sigma): late steps would drown early ones.

    Args:
        sigma, sigma_next: the step, floats or (B,).
        diffusion_coefficient: g = std / sqrt(D), float or (B,).

    Returns:
        () or (B,) float32.

    Example:
        >>> round(rectification(1.0, 0.75, 0.5).item(), 5)
        1.0
    """
    g = torch.as_tensor(diffusion_coefficient, dtype=torch.float64)
    sigma, sigma_next = (torch.as_tensor(t, dtype=torch.float64, device=g.device) for t in (sigma, sigma_next))
    root = torch.sqrt(sigma - sigma_next)
    return (1 / (root / g + g * root * (1 - sigma) / (2 * sigma))).float()


def timestep_weight(
    weighting: str,
    sigma: float | Tensor,
    sigma_next: float | Tensor,
    std: Tensor,
    noise_level: float,
    name: str = "flow-sde",
) -> Tensor:
    """Factor of a step's policy loss.

    The plain loss's gradient is lambda * noise * grad(velocity); see `rectification`. For Flow-SDE with noise level a,
    lambda = (1 + a^2 / 2) D / std, and after weighting it is

    | weighting  | factor        | gradient     | paper |
    |------------|---------------|--------------|-------|
    | "none"     | 1             | lambda       | https://huggingface.co/papers/2505.05470 |
    | "tempflow" | std           | ~ D          | https://huggingface.co/papers/2508.04324 |
    | "guard"    | 1 / D         | constant     | https://huggingface.co/papers/2510.22319 |
    | "longcat"  | std / (a D)   | 1/a + a/2    | https://huggingface.co/papers/2510.22200 |
    | "tgr"      | 1 / lambda    | 1            | https://huggingface.co/papers/2605.15980 |

    "guard" goes with `policy_losses.guard_log_ratio`, which supplies the missing factor std. "longcat" is the paper's
    sqrt(sigma / (D (1 - sigma))) wherever std is not truncated. "tgr" and "tempflow" are to be divided by their mean
    over the global batch, which is the caller's part.

    Args:
        weighting: one of the names above.
        sigma, sigma_next: the step, floats or (B,).
        std: (B,), `Transition.std` of the step.
        noise_level: a of the transition, used by "longcat".
        name: the transition, used by "tgr": lambda is that of its own log-probability, so that the gradient is 1 for
            "cps" and "ddim" as well, whose lambda is not the SDE's.

    Returns:
        (B,) float32.

    Example:
        >>> timestep_weight("guard", 0.75, 0.5, torch.tensor([0.3, 0.4]), noise_level=0.7).tolist()
        [4.0, 4.0]
    """
    sigma, sigma_next = (torch.as_tensor(t, dtype=torch.float64) for t in (sigma, sigma_next))
    step = (sigma - sigma_next).to(std.device, torch.float32)
    if weighting == "none":
        return torch.ones_like(std)
    if weighting == "tempflow":
        return std
    if weighting == "guard":
        return (1 / step).expand_as(std)
    if weighting == "longcat":
        return std / (noise_level * step)
    if weighting == "tgr":
        if name not in ("cps", "ddim"):
            return rectification(sigma, sigma_next, std / torch.sqrt(step))
        sigma, sigma_next = (t.to(std.device, torch.float32) for t in (sigma, sigma_next))
        # minus the derivative of the mean with respect to the velocity
        slope = (1 - sigma_next) * sigma - (1 - sigma) * torch.sqrt((sigma_next**2 - std**2).clamp(min=0))
        return 1 / (2 * slope * std) if name == "cps" else std / slope
    raise ValueError(f"timestep_weighting must be 'none', 'tempflow', 'guard', 'longcat' or 'tgr', got {weighting!r}.")


def _times(sigma: float | Tensor, sigma_next: float | Tensor, sample: Tensor) -> tuple[Tensor, Tensor]:
    """Both times as (B,) float64, each still on its own device."""
    sigma, sigma_next = (torch.as_tensor(t, dtype=torch.float64) for t in (sigma, sigma_next))
    return sigma.expand(len(sample)), sigma_next.expand(len(sample))


def _sde_step(sample: Tensor, velocity: Tensor, sigma: Tensor, sigma_next: Tensor, std: Tensor) -> Transition:
    # std^2 / 2 times the score, -noise_hat / sigma, is what keeps the marginals when noise of size std is added.
    drift = _like(std**2 / (2 * sigma), sample) * noise_from_velocity(sample, velocity, sigma)
    mean = sample.float() - _like(sigma - sigma_next, sample) * velocity.float() - drift
    return Transition(mean, std.to(sample.device, torch.float32))


def _exact_step(
    sample: Tensor, velocity: Tensor, sigma: Tensor, sigma_next: Tensor, std: Tensor, gaussian: bool = True
) -> Transition:
    kept = torch.sqrt((sigma_next**2 - std**2).clamp(min=0))  # rounding may take it below 0 when all noise is renewed
    x0 = x0_from_velocity(sample, velocity, sigma)
    noise = noise_from_velocity(sample, velocity, sigma)
    mean = _like(1 - sigma_next, sample) * x0 + _like(kept, sample) * noise
    return Transition(mean, std.to(sample.device, torch.float32), gaussian)


def _check_below_one(sigma: Tensor, what: str, fix: str) -> None:
    if (sigma >= 1).any():
        raise ValueError(f"At sigma = 1 (pure noise) {what} has infinite variance: {fix}.")


def _check_level(name: str, level: float, most: float = math.inf) -> None:
    if not 0 <= level <= most:
        limits = "non-negative" if most == math.inf else f"in [0, {most:g}]"
        raise ValueError(f"{name} must be {limits} for this transition, got {level}.")
