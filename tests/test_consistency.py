"""Consistency distillation on a Gaussian, whose consistency function is known in closed form, and on small networks."""

import copy
import doctest
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_pipelines import WAN_LIKE, flow_unipc, wan
from torch import nn

from vidtrl.diffusion import consistency as module
from vidtrl.diffusion import flow
from vidtrl.diffusion.consistency import (
    consistency_loss,
    finite_difference_tangent,
    flow_latents,
    flow_velocity,
    jvp_tangent,
    ode_regression_loss,
    ode_step,
    scm_loss,
    trig_function,
    trig_latents,
    trig_sigma,
    trig_time,
    trig_velocity,
    trig_velocity_from_flow,
    x0_from_trig,
)
from vidtrl.models import VideoModel


MEAN, STD = 1.5, 0.6
SIGMAS = st.floats(0, 1)
TIMES = st.floats(0, math.pi / 2)


def draws(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def relative_error(ours, theirs):
    return ((ours - theirs).norm() / theirs.norm()).item()


# ---- x0 ~ N(MEAN, STD^2): the teacher, and the function that ends its trajectories


def teacher(x, sigma):
    """E[noise - x0 | x_sigma]."""
    sigma = sigma.reshape(-1, 1)
    variance = (1 - sigma) ** 2 * STD**2 + sigma**2
    return (sigma - (1 - sigma) * STD**2) / variance * (x - (1 - sigma) * MEAN) - MEAN


def consistency(x, sigma, std=STD):
    """A trajectory keeps its quantile."""
    sigma = sigma.reshape(-1, 1)
    return MEAN + std * (x - (1 - sigma) * MEAN) / torch.sqrt((1 - sigma) ** 2 * std**2 + sigma**2)


def consistency_F(x_t, t, std=STD):
    return trig_velocity(x_t, consistency(flow_latents(x_t, t), trig_sigma(t), std), t)


def noised(n, generator, dim=4):
    """x_sigma at n random noise levels."""
    x0 = MEAN + STD * torch.randn(n, dim, generator=generator)
    sigma = 0.02 + 0.96 * torch.rand(n, generator=generator)
    return flow.add_noise(x0, torch.randn(n, dim, generator=generator), sigma), sigma


class Student(nn.Module):
    """velocity = a(sigma) x + b(sigma) with polynomials a and b."""

    def __init__(self, degree=5):
        super().__init__()
        self.coefficients = nn.Parameter(torch.zeros(2, degree + 1))

    def forward(self, x, sigma):
        powers = (2 * sigma[:, None] - 1) ** torch.arange(self.coefficients.shape[1])
        a, b = self.coefficients @ powers.T
        return a[:, None] * x + b[:, None]

    def x0(self, x, sigma):
        return flow.x0_from_velocity(x, self(x, sigma), sigma)

    def error(self):
        """Root mean square distance to the consistency function, relative to the spread of the data."""
        x, sigma = noised(2000, torch.Generator().manual_seed(7))
        with torch.no_grad():
            return (self.x0(x, sigma) - consistency(x, sigma)).square().mean().sqrt().item() / STD


def train(loss_of, steps=1000, lr=0.03, batch=64):
    """`loss_of(student, average, x, sigma, step)`; the average follows with a decay of 0.95. Returns the student."""
    generator = torch.Generator().manual_seed(0)
    student = Student()
    average = copy.deepcopy(student)
    optimizer = torch.optim.Adam(student.parameters(), lr=lr, foreach=False)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for step in range(steps):
        loss = loss_of(student, average, *noised(batch, generator), step)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        average.coefficients.data.lerp_(student.coefficients.data, 0.05)
    return student


# ---- discrete consistency


def test_euler_steps_of_the_teacher_end_at_the_consistency_function():
    x1 = draws(16, 4)
    errors = []
    for n in (100, 200):
        x, sigmas = x1, torch.linspace(1, 0, n + 1)
        for sigma, sigma_next in zip(sigmas[:-1], sigmas[1:], strict=True):
            x = ode_step(x, teacher(x, sigma), sigma, sigma_next)
        errors.append((x - consistency(x1, torch.ones(16))).abs().max().item())
    assert errors[1] < 0.02 and 1.7 < errors[0] / errors[1] < 2.3  # first order


@settings(deadline=None)
@given(st.lists(SIGMAS, min_size=3, max_size=3), st.lists(SIGMAS, min_size=3, max_size=3))
def test_ode_step_is_exact_on_a_straight_path(sigma, sigma_next):
    x0, noise = draws(3, 2, 2), draws(3, 2, 2, seed=1)
    sigma, sigma_next = torch.tensor(sigma), torch.tensor(sigma_next)
    stepped = ode_step(flow.add_noise(x0, noise, sigma), noise - x0, sigma, sigma_next)
    torch.testing.assert_close(stepped, flow.add_noise(x0, noise, sigma_next), atol=1e-5, rtol=0)


def discrete_loss(f, h, weighting="mse"):
    x, sigma = noised(512, torch.Generator().manual_seed(0))
    sigma_next = (sigma - h).clamp(min=0)
    x_next = ode_step(x, teacher(x, sigma), sigma, sigma_next)
    return consistency_loss(f(x, sigma), f(x_next, sigma_next), weighting).item()


@pytest.mark.parametrize("weighting", ["mse", "huber", "sum"])
def test_the_true_consistency_function_has_no_discrete_loss(weighting):
    def denoiser(x, sigma):  # the right answer to another question
        return flow.x0_from_velocity(x, teacher(x, sigma), sigma)

    true, coarse = (discrete_loss(consistency, h, weighting) for h in (0.01, 0.02))
    wrong = discrete_loss(lambda x, s: consistency(x, s, std=0.7), 0.01, weighting)
    assert coarse > 2 * true > 0  # what is left is the error of the Euler step
    assert wrong > 10 * true and discrete_loss(denoiser, 0.01, weighting) > 10 * true
    if weighting == "mse":
        assert true < 1e-7


def discrete(target, n=30):
    def loss(student, average, x, sigma, step):
        sigma_next = (sigma - 1 / n).clamp(min=0)
        x_next = ode_step(x, teacher(x, sigma), sigma, sigma_next)
        return consistency_loss(student.x0(x, sigma), target(student, average).x0(x_next, sigma_next))

    return loss


@pytest.mark.parametrize("target", [lambda student, average: student, lambda student, average: average])
def test_discrete_consistency_learns_the_consistency_function(target):
    assert Student().error() > 0.5
    assert train(discrete(target), steps=2000, lr=0.1).error() < 0.04


def test_flow_matching_learns_another_function():
    """Control: the x0 of a velocity model, trained to convergence, is the mean over trajectories and not their end."""

    def regression(student, average, x, sigma, step):
        return (student(x, sigma) - teacher(x, sigma)).square().mean()

    assert train(regression).error() > 0.3


def test_consistency_target_gets_no_gradient():
    prediction, target = (draws(2, 3, seed=i).requires_grad_() for i in range(2))
    consistency_loss(prediction, target).backward()
    torch.testing.assert_close(prediction.grad, 2 * (prediction - target).detach() / 6)
    assert target.grad is None


def test_consistency_weightings():
    prediction, target = draws(2, 3, 4), draws(2, 3, 4, seed=1)
    error = (prediction - target).square()
    torch.testing.assert_close(consistency_loss(prediction, target), error.mean())
    torch.testing.assert_close(consistency_loss(prediction, target, "sum"), error.sum() / 2)
    norm, c = error.flatten(1).sum(1).sqrt(), 0.00054 * math.sqrt(12)  # iCT writes it with the norm
    huber = (torch.sqrt(norm**2 + c**2) - c) / math.sqrt(12)
    torch.testing.assert_close(consistency_loss(prediction, target, "huber"), huber.mean())
    with pytest.raises(ValueError, match="'huber' or 'sum', got 'l1'"):
        consistency_loss(prediction, target, "l1")


def test_huber_has_a_finite_gradient_at_the_target():
    prediction = torch.zeros(2, 3, requires_grad=True)
    consistency_loss(prediction, torch.zeros(2, 3), "huber").backward()
    assert not prediction.grad.any()


# ---- ODE regression


def test_ode_regression_leaves_clean_frames_out():
    prediction, target = draws(2, 3, 4, 2, 2).requires_grad_(), draws(2, 3, 4, 2, 2, seed=1)
    sigma = torch.tensor([[0.9, 0.0, 0.5, 0.0], [0.0, 0.0, 0.1, 1.0]])
    loss = ode_regression_loss(prediction, target, sigma)
    counted = torch.cat([(prediction - target)[i, :, j].flatten() for i, j in sigma.nonzero().tolist()])
    torch.testing.assert_close(loss, counted.square().mean())
    loss.backward()
    assert torch.equal(prediction.grad.abs().sum(dim=(1, 3, 4)) > 0, sigma > 0)


def test_ode_regression_per_sample():
    prediction, target = draws(2, 3, 4, 2, 2), draws(2, 3, 4, 2, 2, seed=1)
    loss = ode_regression_loss(prediction, target, torch.tensor([0.0, 0.3]))
    torch.testing.assert_close(loss, (prediction - target)[1].square().mean())
    with_nan = prediction.clone()
    with_nan[0] = float("nan")
    torch.testing.assert_close(ode_regression_loss(with_nan, target, torch.tensor([0.0, 0.3])), loss)
    assert ode_regression_loss(prediction, target, torch.zeros(2)) == 0


# ---- TrigFlow


@settings(deadline=None)
@given(SIGMAS)
def test_trig_time_is_undone(sigma):
    assert trig_sigma(trig_time(sigma)).item() == pytest.approx(sigma, abs=1e-6)


@settings(deadline=None)
@given(TIMES)
def test_trig_flow_is_the_straight_path(t):
    x0, noise, time = draws(2, 3, 2), draws(2, 3, 2, seed=1), torch.full((2,), t)
    x_t, sigma = math.cos(t) * x0 + math.sin(t) * noise, trig_sigma(time)
    x_sigma = flow.add_noise(x0, noise, sigma)
    close = dict(atol=2e-6, rtol=1e-5)
    torch.testing.assert_close(trig_latents(x_sigma, sigma), x_t, **close)
    torch.testing.assert_close(flow_latents(x_t, time), x_sigma, **close)
    F = math.cos(t) * noise - math.sin(t) * x0  # d x_t / d t
    torch.testing.assert_close(trig_velocity_from_flow(x_t, noise - x0, time), F, **close)
    torch.testing.assert_close(flow_velocity(x_t, F, time), noise - x0, **close)
    torch.testing.assert_close(x0_from_trig(x_t, F, time), x0, **close)
    if t > 0.01:
        torch.testing.assert_close(trig_velocity(x_t, x0, time), F, atol=1e-4, rtol=1e-4)


@settings(deadline=None)
@given(TIMES, st.integers(0, 1000))
def test_trig_conversions_are_inverses_for_any_estimate(t, seed):
    x_t, F, velocity = (draws(2, 3, seed=seed + i) for i in range(3))
    close = dict(atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(trig_latents(flow_latents(x_t, t), trig_sigma(t)), x_t, **close)
    torch.testing.assert_close(trig_velocity_from_flow(x_t, flow_velocity(x_t, F, t), t), F, **close)
    torch.testing.assert_close(flow_velocity(x_t, trig_velocity_from_flow(x_t, velocity, t), t), velocity, **close)
    if t > 0.1:
        torch.testing.assert_close(trig_velocity(x_t, x0_from_trig(x_t, F, t), t), F, atol=1e-4, rtol=1e-4)


def test_trig_function_and_the_flow_agree_on_x0():
    x_sigma, sigma = noised(8, torch.Generator().manual_seed(0))
    x_t, t = trig_latents(x_sigma, sigma), trig_time(sigma)
    x0 = x0_from_trig(x_t, trig_function(teacher)(x_t, t), t)
    torch.testing.assert_close(x0, flow.x0_from_velocity(x_sigma, teacher(x_sigma, sigma), sigma))
    assert relative_error(x0, x_sigma) > 0.1


# ---- the tangent


def trig_points(n=64, dim=4):
    x_sigma, sigma = noised(n, torch.Generator().manual_seed(3), dim)
    return trig_latents(x_sigma, sigma), trig_time(sigma)


def small_network():
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(5, 32), nn.SiLU(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 4))
    return lambda x, sigma: layers(torch.cat([x, sigma[:, None]], dim=1))


def tiny_wan(scheduler=None):
    pipe = wan()[0]
    pipe.scheduler = scheduler or pipe.scheduler
    model = VideoModel(pipe)
    condition = model.condition(["a red circle", "the blue square"], **WAN_LIKE)
    shape = (2, *condition.latent_shape)
    function = trig_function(lambda x, sigma: model.velocity(x, sigma, condition))
    return pipe.transformer, function, draws(*shape), torch.tensor([0.6, 1.2]), draws(*shape, seed=1)


@pytest.mark.parametrize("h, tolerance", [(1e-3, 1e-3), (1e-4, 1e-3)])
def test_finite_differences_agree_with_the_derivative(h, tolerance):
    function, (x_t, t) = trig_function(small_network()), trig_points()
    exact = jvp_tangent(function, x_t, t, draws(64, 4))
    assert relative_error(finite_difference_tangent(function, x_t, t, draws(64, 4), h), exact) < tolerance
    assert relative_error(finite_difference_tangent(function, x_t, t, draws(64, 4, seed=1), h), exact) > 0.1


def test_finite_differences_agree_with_the_derivative_on_wan():
    _, function, x_t, t, teacher_F = tiny_wan()
    exact = jvp_tangent(function, x_t, t, teacher_F)
    errors = {
        h: relative_error(finite_difference_tangent(function, x_t, t, teacher_F, h), exact) for h in (1e-4, 1e-1)
    }
    assert errors[1e-4] < 2e-3 and errors[1e-1] > 0.3
    assert not exact.requires_grad
    with torch.autocast("cpu", torch.bfloat16):  # control: too coarse for differences
        assert relative_error(finite_difference_tangent(function, x_t, t, teacher_F), exact) > 0.3


def test_the_tangent_needs_a_smooth_time():
    """Control: with a scheduler of integer timesteps the student is a staircase in t."""
    _, function, x_t, t, teacher_F = tiny_wan()
    rounded = tiny_wan(flow_unipc(3.0))[1]
    exact = jvp_tangent(function, x_t, t, teacher_F)
    assert relative_error(finite_difference_tangent(rounded, x_t, t, teacher_F), exact) > 0.3
    assert relative_error(jvp_tangent(rounded, x_t, t, teacher_F), exact) > 0.3


def test_finite_differences_stay_inside_the_time_range():
    times = []

    def function(x, t):
        times.append(t)
        return x * t[:, None]

    x_t, t = torch.ones(2, 3), torch.tensor([5e-4, math.pi / 2 - 5e-4])
    tangent = finite_difference_tangent(function, x_t, t, torch.zeros(2, 3), h=1e-3)
    assert min(time.min() for time in times) == 0 and max(time.max() for time in times) <= math.pi / 2 + 1e-7
    expected = torch.cos(t) * torch.sin(t)  # dF/dt = 1
    torch.testing.assert_close(tangent, expected[:, None].expand(2, 3), rtol=5e-3, atol=0)


# ---- sCM


def trig_teacher(x_t, t):
    return trig_function(teacher)(x_t, t)


def scm_pieces(function, x_t, t, tangent=jvp_tangent):
    teacher_F = trig_teacher(x_t, t)
    return function(x_t, t), teacher_F, tangent(function, x_t, t, teacher_F), x_t, t


def g_of(F, teacher_F, tangent, x_t, t, r=1.0):
    """The direction that `scm_loss` moves F along, from its gradient."""
    F = F.detach().requires_grad_()
    pull = -torch.autograd.grad(scm_loss(F, teacher_F, tangent, x_t, t, r, normalization=1e6), F)[0]
    return pull * len(F) * 1e6 / 200


@pytest.mark.parametrize("tangent", [jvp_tangent, finite_difference_tangent])
def test_the_tangent_of_the_true_consistency_function_cancels(tangent):
    x_t, t = trig_points()
    true = scm_pieces(consistency_F, x_t, t, tangent)
    wrong = scm_pieces(lambda x, t: consistency_F(x, t, std=0.7), x_t, t, tangent)
    assert g_of(*true).norm() < 0.02 * g_of(*wrong).norm()
    assert g_of(*true).norm() < 0.02 * g_of(*scm_pieces(trig_teacher, x_t, t, tangent)).norm()
    assert scm_loss(*true) < 1 < scm_loss(*wrong)


def test_g_is_the_change_of_f_along_the_trajectory():
    function, (x_t, t) = trig_function(small_network()), trig_points()
    with torch.no_grad():
        pieces = scm_pieces(function, x_t, t)
        h, teacher_F = 1e-3, pieces[1]

        def f(a):
            x, time = math.cos(a) * x_t + math.sin(a) * teacher_F, t + a
            return x0_from_trig(x, function(x, time), time)

        expected = torch.cos(t)[:, None] * (f(h) - f(-h)) / (2 * h)
    assert relative_error(g_of(*pieces), expected) < 2e-3
    assert relative_error(g_of(*pieces, r=0.5), expected) > 0.1


def test_scm_warm_up_starts_as_regression_on_the_teacher():
    F, teacher_F, tangent, x_t, t = scm_pieces(trig_function(small_network()), *trig_points())
    expected = torch.cos(t)[:, None] * (teacher_F - F)
    torch.testing.assert_close(g_of(F, teacher_F, tangent, x_t, t, r=0.0), expected, atol=1e-5, rtol=1e-4)
    cos, sin = torch.cos(t)[:, None], torch.sin(t)[:, None]
    half = cos * torch.sqrt(1 - 0.25 * sin**2) * (teacher_F - F) - 0.5 * (cos * sin * x_t + tangent)
    torch.testing.assert_close(g_of(F, teacher_F, tangent, x_t, t, r=0.5), half, atol=1e-5, rtol=1e-4)
    for r in (-0.1, 1.1):
        with pytest.raises(ValueError, match=r"r must lie in \[0, 1\]"):
            scm_loss(F, teacher_F, tangent, x_t, t, r=r)


def test_scm_loss_value_and_gradient():
    pieces = scm_pieces(trig_function(small_network()), *trig_points())
    g = g_of(*pieces)
    norm = g.norm(dim=1, keepdim=True)
    F = pieces[0].detach().requires_grad_()
    loss = scm_loss(F, *pieces[1:])
    torch.testing.assert_close(loss, 100 * (norm / (norm + 0.1)).square().mean().double(), rtol=1e-4, atol=0)
    torch.testing.assert_close(torch.autograd.grad(loss, F)[0], -200 * g / (norm + 0.1) / len(F), rtol=1e-3, atol=1e-4)


def test_scm_loss_reaches_the_student_only_through_F():
    F, teacher_F, tangent, x_t, t = scm_pieces(trig_function(small_network()), *trig_points())
    others = [piece.detach().requires_grad_() for piece in (teacher_F, tangent, x_t)]
    assert not scm_loss(F.detach(), *others, t).requires_grad
    assert scm_loss(F, *others, t).requires_grad


@pytest.mark.parametrize("tangent", [jvp_tangent, finite_difference_tangent])
def test_scm_learns_the_consistency_function(tangent):
    def loss(student, average, x, sigma, step):
        x_t, t = trig_latents(x, sigma), trig_time(sigma)
        return scm_loss(*scm_pieces(trig_function(student), x_t, t, tangent), r=min(1, step / 200))

    assert train(loss, steps=800).error() < 0.05


def test_a_gradient_step_moves_wan_along_g():
    transformer, function, x_t, t, teacher_F = tiny_wan()
    parameters = list(transformer.parameters())
    F = function(x_t, t)
    tangent = finite_difference_tangent(function, x_t, t, teacher_F)
    g = g_of(F, teacher_F, tangent, x_t, t)
    gradients = torch.autograd.grad(scm_loss(F, teacher_F, tangent, x_t, t), parameters)
    size = torch.stack([gradient.norm() for gradient in gradients]).norm()
    with torch.no_grad():
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter -= 1e-3 * gradient / size
        moved = function(x_t, t) - F
    direction = g / (g.flatten(1).norm(dim=1).reshape(-1, 1, 1, 1, 1) + 0.1)
    assert (moved * direction).sum() > 0
    assert (moved * direction).sum().item() == pytest.approx(1e-3 * size.item() * len(F) / 200, rel=0.05)


def test_the_examples_in_the_docstrings():
    result = doctest.testmod(module)
    assert result.failed == 0 < result.attempted
