"""Consistency distillation: a function f(x_sigma, sigma) = x0 that is constant along the teacher's trajectories.

Consistency models (https://huggingface.co/papers/2303.01469) need f(x, 0) = x; f = `flow.x0_from_velocity` has that by
itself. Three ways to train it: the discrete loss compares two neighbouring points of a trajectory (`ode_step`,
`consistency_loss`); `ode_regression_loss` regresses on the end of stored trajectories (CausVid,
https://huggingface.co/papers/2412.07772); the continuous-time sCM (https://huggingface.co/papers/2410.11081) in the form of
rCM (https://huggingface.co/papers/2510.08431) uses the derivative along the trajectory (`scm_loss`).

sCM speaks TrigFlow: x_t = cos t x0 + sin t noise with t in [0, pi/2], and F = d x_t / d t = cos t noise - sin t x0. It is the
straight path in other coordinates, x_t = (cos t + sin t) x_sigma with sigma = sin t / (cos t + sin t). One step of sCM:

    function = trig_function(lambda x, sigma: model.velocity(x, sigma, condition))      # the student; the teacher likewise
    teacher_F = teacher_function(x_t, t)                                                # no gradient, guided
    tangent = finite_difference_tangent(function, x_t, t, teacher_F)                    # or jvp_tangent
    loss = scm_loss(function(x_t, t), teacher_F, tangent, x_t, t)

All functions compute in float32; sigma and t are floats or tensors of shape (B,) where nothing else is said. `free` is
broadcastable to x, 1 for coordinates that are learned and 0 for those that a condition fixes (the first frame of
image-to-video), which no loss counts; all are learned by default.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from .flow import _like, sample_mean


def consistency_loss(prediction: Tensor, target: Tensor, weighting: str = "mse", free: Tensor | None = None) -> Tensor:
    """The distance between f at sigma and the (constant) target, f at the next smaller noise level of the trajectory.

    Args:
        prediction: (B, ...) x0 of the student at x_sigma, with gradient.
        target: (B, ...) x0 at `ode_step`'s result, of the student itself (iCT, https://huggingface.co/papers/2310.14189;
            rCM) or of its moving average (LCM, https://huggingface.co/papers/2310.04378); no gradient reaches it.
        weighting: "mse"; "huber" (iCT's pseudo-Huber of the root mean square d of a sample,
            sqrt(d^2 + c^2) - c with c = 0.00054: linear in large errors); "sum" (the squared error summed over a
            sample's coordinates, rCM's discrete loss).
        free: as above.

    Returns:
        scalar float32, the mean over the batch.

    Raises:
        ValueError: unknown `weighting`.

    Example:
        >>> consistency_loss(torch.ones(2, 3), torch.zeros(2, 3), "sum").item()
        3.0
    """
    error = torch.square(prediction.float() - target.detach().float())
    if weighting == "mse":
        return sample_mean(error, free).mean()
    if weighting == "huber":
        c = 0.00054
        return (torch.sqrt(sample_mean(error, free) + c**2) - c).mean()
    if weighting == "sum":
        return (error if free is None else error * free).flatten(1).sum(1).mean()
    raise ValueError(f"consistency weighting must be 'mse', 'huber' or 'sum', got {weighting!r}.")


def ode_step(x: Tensor, velocity: Tensor, sigma: float | Tensor, sigma_next: float | Tensor) -> Tensor:
    """The teacher's Euler step x + (sigma_next - sigma) velocity, to the next point of discrete consistency.

    Args:
        x: x_sigma, (B, ...).
        velocity: (B, ...) of the (guided) teacher at x.
        sigma, sigma_next: float or (B,); sigma_next may be 0.

    Returns:
        (B, ...) float32, x at sigma_next.

    Example:
        >>> ode_step(torch.ones(1, 2), torch.full((1, 2), 2.0), 1.0, 0.75).tolist()
        [[0.5, 0.5]]
    """
    return x.float() + (_like(sigma_next, x) - _like(sigma, x)) * velocity.float()


def ode_regression_loss(prediction: Tensor, target: Tensor, sigma: Tensor, free: Tensor | None = None) -> Tensor:
    """Regression on the end of the teacher's trajectories (CausVid, https://huggingface.co/papers/2412.07772).

    The mean squared error over the samples (or frames) whose sigma is not 0: where it is, the answer was the input.

    Args:
        prediction: (B, C, f, h, w) x0 of the student at stored states x_sigma, with gradient.
        target: (B, C, f, h, w), where those trajectories end.
        sigma: (B,), or (B, f) when every frame has its own.
        free: as above.

    Returns:
        scalar float32; 0 when no sigma is positive.

    Example:
        >>> x = torch.zeros(1, 1, 2, 1, 1)
        >>> ode_regression_loss(x + torch.tensor([9.0, 2.0]).reshape(x.shape), x, torch.tensor([[0.0, 0.5]])).item()
        4.0
    """
    shape = (len(sigma), 1, sigma.shape[1], 1, 1) if sigma.ndim == 2 else (len(sigma), *[1] * (prediction.ndim - 1))
    error = torch.square(prediction.float() - target.detach().float())
    counts = (sigma > 0).reshape(shape).expand_as(error)
    counts = counts if free is None else counts & (free > 0)
    return torch.where(counts, error, 0).sum() / counts.sum().clamp(min=1)


def trig_time(sigma: float | Tensor) -> Tensor:
    """t = arctan(sigma / (1 - sigma)) in [0, pi/2]: the time of TrigFlow at flow time `sigma` (any shape).

    Example:
        >>> trig_time(torch.tensor([0.0, 0.5, 1.0])).tolist()
        [0.0, 0.7853981852531433, 1.5707963705062866]
    """
    sigma = torch.as_tensor(sigma, dtype=torch.float32)
    return torch.atan2(sigma, 1 - sigma)


def trig_sigma(t: float | Tensor) -> Tensor:
    """sigma = sin t / (cos t + sin t); inverse of `trig_time`."""
    cos, sin = _cos_sin(torch.as_tensor(t, dtype=torch.float32))
    return sin / (cos + sin)


def trig_latents(x_sigma: Tensor, sigma: float | Tensor) -> Tensor:
    """x_t = (cos t + sin t) x_sigma at t = `trig_time(sigma)`, (B, ...)."""
    cos, sin = _cos_sin(_like(trig_time(sigma), x_sigma))
    return (cos + sin) * x_sigma.float()


def flow_latents(x_t: Tensor, t: float | Tensor) -> Tensor:
    """x_sigma = x_t / (cos t + sin t), (B, ...); inverse of `trig_latents`."""
    cos, sin = _cos_sin(_like(t, x_t))
    return x_t.float() / (cos + sin)


def trig_velocity(x_t: Tensor, x0: Tensor, t: float | Tensor) -> Tensor:
    """F = (cos t x_t - x0) / sin t = d x_t / d t, from an estimate of x0; t > 0.

    At small t the difference cancels: from a velocity, use `trig_velocity_from_flow`.
    """
    cos, sin = _cos_sin(_like(t, x_t))
    return (cos * x_t.float() - x0.float()) / sin


def trig_velocity_from_flow(x_t: Tensor, velocity: Tensor, t: float | Tensor) -> Tensor:
    """F = ((cos t - sin t) x_t + velocity) / (cos t + sin t), from the flow velocity noise - x0 at the same point."""
    cos, sin = _cos_sin(_like(t, x_t))
    return ((cos - sin) * x_t.float() + velocity.float()) / (cos + sin)


def flow_velocity(x_t: Tensor, F: Tensor, t: float | Tensor) -> Tensor:
    """velocity = (cos t + sin t) F - (cos t - sin t) x_t; inverse of `trig_velocity_from_flow`."""
    cos, sin = _cos_sin(_like(t, x_t))
    return (cos + sin) * F.float() - (cos - sin) * x_t.float()


def x0_from_trig(x_t: Tensor, F: Tensor, t: float | Tensor) -> Tensor:
    """x0 = cos t x_t - sin t F; inverse of `trig_velocity`."""
    cos, sin = _cos_sin(_like(t, x_t))
    return cos * x_t.float() - sin * F.float()


def trig_function(velocity: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    """A flow model as TrigFlow's F.

    Args:
        velocity: velocity(x_sigma, sigma) -> (B, ...), with sigma of shape (B,).

    Returns:
        function(x_t, t) -> F, (B, ...), with t of shape (B,).

    Example:
        >>> function = trig_function(lambda x, sigma: model.velocity(x, sigma, condition))
    """

    def function(x_t: Tensor, t: Tensor) -> Tensor:
        return trig_velocity_from_flow(x_t, velocity(flow_latents(x_t, t), trig_sigma(t)), t)

    return function


@torch.no_grad()
def finite_difference_tangent(
    function: Callable[[Tensor, Tensor], Tensor], x_t: Tensor, t: Tensor, teacher_F: Tensor, h: float = 1e-4
) -> Tensor:
    """cos t sin t dF/dt along the teacher's trajectory, by two more evaluations of the student.

    dF/dt = [F(x_{t+h}, t + h) - F(x_{t-h}, t - h)] / 2h, where the teacher takes x_t to
    x_{t+h} = cos h x_t + sin h teacher_F (exact if its x0 and noise stay constant). At the ends of [0, pi/2] the difference
    is one-sided. Works with every attention kernel, unlike `jvp_tangent`.

    `function` has to compute in float32 and to be smooth in t. Under bfloat16 the difference over 2h is rounding noise (use
    `jvp_tangent`), and so it is where timesteps are whole numbers (as with a UniPC scheduler). The timestep embedding's
    frequencies of up to 1000 ask for an h well below 1e-3.

    Args:
        function: function(x_t, t) -> F of the student (`trig_function`); called without gradient.
        x_t: (B, ...).
        t: (B,) in (0, pi/2).
        teacher_F: (B, ...), F of the (guided) teacher at x_t.
        h: half the width of the difference, in radians.

    Returns:
        (B, ...) float32: what `scm_loss` takes.
    """
    x_t, t, teacher_F = x_t.float(), t.float(), teacher_F.float()

    def on_trajectory(time: Tensor) -> Tensor:
        cos, sin = _cos_sin(_like(time - t, x_t))  # the step that was taken in float32, not h
        return function(cos * x_t + sin * teacher_F, time).float()

    later, earlier = (t + h).clamp(max=math.pi / 2), (t - h).clamp(min=0)
    slope = (on_trajectory(later) - on_trajectory(earlier)) / _like(later - earlier, x_t)
    return _like(torch.cos(t) * torch.sin(t), x_t) * slope


@torch.no_grad()
def jvp_tangent(function: Callable[[Tensor, Tensor], Tensor], x_t: Tensor, t: Tensor, teacher_F: Tensor) -> Tensor:
    """cos t sin t dF/dt along the teacher's trajectory, exactly: one forward-mode derivative of the student.

    The Jacobian-vector product of F with (cos t sin t teacher_F, cos t sin t); as the factors stand inside, nothing
    overflows near the ends (sCM, https://huggingface.co/papers/2410.11081, section 5.1). Attention runs through
    `SDPBackend.MATH`, the only kernel with a forward derivative: it stores the whole attention matrix.

    Args:
        function, x_t, t, teacher_F: as in `finite_difference_tangent`. `function` may compute in bfloat16, but must be
            smooth in t (the derivative of a rounded timestep is 0) and not compiled.

    Returns:
        (B, ...) float32: what `scm_loss` takes.
    """
    x_t, t, teacher_F = x_t.float(), t.float(), teacher_F.float()
    scale = torch.cos(t) * torch.sin(t)
    with sdpa_kernel(SDPBackend.MATH):
        _, tangent = torch.func.jvp(function, (x_t, t), (_like(scale, x_t) * teacher_F, scale))
    return tangent.float()


def scm_loss(
    F: Tensor,
    teacher_F: Tensor,
    tangent: Tensor,
    x_t: Tensor,
    t: float | Tensor,
    r: float = 1.0,
    normalization: float = 0.1,
    free: Tensor | None = None,
) -> Tensor:
    """Continuous-time consistency (sCM, https://huggingface.co/papers/2410.11081) as rCM trains it.

    With f(x_t, t) = cos t x_t - sin t F, moving F along

        g = -cos t sqrt(1 - r^2 sin^2 t) (F - teacher_F) - r (cos t sin t x_t + tangent),

    which for r = 1 is cos t df/dt along the teacher's trajectory, makes f constant along it; for r = 0 it is the
    regression of F on the teacher. The loss is 100 |F - stop_gradient(F + g / (|g| + normalization))|^2 with norms over all
    coordinates of a sample, as in rCM (https://huggingface.co/papers/2510.08431): a sum and not a mean, so learning rates
    and the weight of an added DMD term can be taken over. Its gradient with respect to F is
    -200 g / (|g| + normalization); its value, 100 (|g| / (|g| + normalization))^2, stays near 100 until g is small.

    Args:
        F: (B, ...) of the student at (x_t, t), with gradient.
        teacher_F: (B, ...) of the (guided) teacher there.
        tangent: (B, ...), cos t sin t dF/dt of the student along the teacher's trajectory
            (`finite_difference_tangent` or `jvp_tangent`).
        x_t: (B, ...).
        t: float or (B,) in (0, pi/2).
        r: tangent warm-up from 0 to 1; rCM: min(1, step / 1000).
        normalization: c > 0 of g / (|g| + c).
        free: as above; norms are over the free coordinates.

    Returns:
        scalar float64, the mean over the batch.

    Raises:
        ValueError: r outside [0, 1].
    """
    if not 0 <= r <= 1:
        raise ValueError(f"r must lie in [0, 1], got {r}; the tangent warm-up ends at 1.")
    fixed = F.detach().double()
    cos, sin = _cos_sin(_like(t, x_t).double())
    pull = cos * torch.sqrt((1 - r**2 * sin**2).clamp(min=0)) * (fixed - teacher_F.detach().double())
    g = -pull - r * (cos * sin * x_t.detach().double() + tangent.detach().double())
    g = g if free is None else g * free
    norm = g.flatten(1).norm(dim=1).reshape(-1, *[1] * (g.ndim - 1))
    error = torch.square(F.double() - fixed - g / (norm + normalization))
    error = error if free is None else error * free
    return 100 * error.flatten(1).sum(1).mean()


def _cos_sin(t: Tensor) -> tuple[Tensor, Tensor]:
    return torch.cos(t), torch.sin(t)
