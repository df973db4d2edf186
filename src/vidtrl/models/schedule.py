"""Noise levels of a checkpoint: its scheduler's sigma grid, timesteps and shift in canonical sigma."""

import copy
import inspect
import math
from typing import Any

import numpy as np
import torch
from diffusers import SchedulerMixin
from torch import Tensor

from ..diffusion import flow
from .families import Family


class NoiseSchedule:
    """Translates between canonical sigma and the pipeline's scheduler, which is only read, never changed.

    Args:
        scheduler: the pipeline's scheduler.
        family: the row.
        patch: the denoiser's (temporal, spatial) patch, for shifts that depend on the number of tokens.

    Raises:
        ValueError: the scheduler is not of the family's kind.
    """

    def __init__(self, scheduler: SchedulerMixin, family: Family, patch: tuple[int, int]):
        self.scheduler, self.family, self.patch = scheduler, family, patch
        config, name = scheduler.config, type(scheduler).__name__
        is_flow = "Flow" in name or bool(config.get("use_flow_sigmas"))
        if is_flow != (self.family.prediction == "flow"):
            kind = "a flow-matching" if self.family.prediction == "flow" else f"a {self.family.prediction} (VP)"
            raise ValueError(
                f"The {self.family.name} family is {kind} model, but the scheduler is {name} "
                f"({'flow' if is_flow else config.get('prediction_type')}). Load the scheduler that belongs to the checkpoint."
            )
        if not is_flow and config.get("prediction_type") != self.family.prediction:
            raise ValueError(
                f"This checkpoint's scheduler says prediction_type={config.get('prediction_type')!r}, but the "
                f"{self.family.name} family predicts {self.family.prediction!r}."
            )
        self.num_train_timesteps = config.num_train_timesteps
        self.vp_sigmas = None if is_flow else flow.vp_to_flow_sigma(scheduler.alphas_cumprod.cpu().double()).float()
        probe = copy.deepcopy(scheduler)
        # two, as Mochi's grid is undefined for one; a few-step student's scheduler knows a single number of steps
        self.probe_steps = len(config.get("denoising_steps", (0, 0)))
        probe.set_timesteps(self.probe_steps, **({"mu": 1.0} if config.get("use_dynamic_shifting") else {}))
        self.integer_timesteps = not probe.timesteps.is_floating_point()  # what the pipeline passes to its denoiser

    @property
    def is_vp(self) -> bool:
        """Whether the native model is variance preserving (v or noise prediction)."""
        return self.vp_sigmas is not None

    def timestep(self, sigma: Tensor) -> Tensor:
        """The family's timestep at `sigma` (any shape), float32; whole numbers where the scheduler's are integers."""
        if self.vp_sigmas is not None:
            t = _interpolate(sigma, self.vp_sigmas.to(sigma.device))
            return t.round() if self.integer_timesteps else t
        t = (sigma if self.family.timestep == "noise" else 1 - sigma) * self.num_train_timesteps
        # flow schedulers with integer timesteps truncate; 2**-14 absorbs the float32 rounding of 1000 * sigma
        return (t + 2**-14).floor() if self.integer_timesteps else t

    def sigma_of_timestep(self, timestep: Tensor) -> Tensor:
        """Inverse of `timestep` for VP models: the flow sigma of (fractional) table entries."""
        table, t = self.vp_sigmas.to(timestep.device), timestep.float()
        low = table[t.floor().long()]
        return low + (table[t.ceil().long()] - low) * (t - t.floor())

    def noise_scale(self, sigma: float | Tensor) -> float | Tensor:
        """x_flow / x_native: what multiplies unit noise to start at `sigma` as the pipeline does (1 for flow models)."""
        if self.vp_sigmas is None:
            return 1.0
        return ((1 - sigma) ** 2 + sigma**2) ** 0.5

    def sigmas(self, num_inference_steps: int, latent_shape: tuple[int, int, int, int]) -> Tensor:
        """The stock scheduler's own grid for this size: (N + 1,) float32, descending, ends with 0."""
        row, scheduler = self.family, copy.deepcopy(self.scheduler)
        kwargs: dict[str, Any] = {}
        if row.grid == "uniform":
            kwargs["sigmas"] = np.linspace(1.0, 1 / num_inference_steps, num_inference_steps)
        elif row.grid == "linear_quadratic":
            kwargs["sigmas"] = flow.linear_quadratic_sigmas(num_inference_steps).numpy()
        else:
            kwargs["num_inference_steps"] = num_inference_steps
        if row.mu is not None and "mu" in inspect.signature(scheduler.set_timesteps).parameters:
            kwargs["mu"] = self._mu(latent_shape)
        scheduler.set_timesteps(**kwargs)
        if self.vp_sigmas is not None:
            grid = self.sigma_of_timestep(scheduler.timesteps.cpu())
        else:
            grid = scheduler.sigmas[:-1].float().cpu()
            grid = grid if row.timestep == "noise" else 1 - grid
        return torch.cat([grid, torch.zeros(1)])

    def _mu(self, latent_shape: tuple[int, int, int, int]) -> float:
        if self.family.mu != "sequence":
            return float(self.family.mu)
        _, f, h, w = latent_shape
        pt, p = self.patch
        config = self.scheduler.config
        return flow.sequence_mu(
            (f // pt) * (h // p) * (w // p),
            config.get("base_image_seq_len", 256),
            config.get("max_image_seq_len", 4096),
            config.get("base_shift", 0.5),
            config.get("max_shift", 1.15),
        )

    def training_sigma(
        self, u: Tensor, latent_shape: tuple[int, int, int, int] | None = None, shift: float | str = "auto"
    ) -> Tensor:
        """See `VideoModel.training_sigma`."""
        u = u.float()
        if shift != "auto":
            u = flow.shift_sigma(u, float(shift))
        if self.vp_sigmas is not None:
            table = self.vp_sigmas.to(u.device)
            return table[(u * len(table)).long().clamp(0, len(table) - 1)]
        return flow.shift_sigma(u, self._native_shift(latent_shape)) if shift == "auto" else u

    def _native_shift(self, latent_shape: tuple[int, int, int, int] | None) -> float:
        config = self.scheduler.config
        if not config.get("use_dynamic_shifting"):
            # an UniPC or DPM config has flow_shift, a FlowMatch one has shift
            return float(config.get("flow_shift") or config.get("shift") or 1.0)
        if self.family.mu == "sequence" and latent_shape is None:
            raise ValueError("This model's shift depends on the clip's size; pass latent_shape.")
        mu = self._mu(latent_shape) if self.family.mu is not None else 0.0
        return mu if config.get("time_shift_type") == "linear" else math.exp(mu)

    def native_weight(self, sigma: Tensor) -> Tensor:
        """w (B,) with w * MSE(velocity) == the loss in the model's own prediction (1 for flow models)."""
        if self.vp_sigmas is None:
            return torch.ones_like(sigma, dtype=torch.float32)
        return flow.vp_native_weight(sigma, self.family.prediction)


def _interpolate(sigma: Tensor, table: Tensor) -> Tensor:
    """Index (fractional) at which the ascending `table` takes the value `sigma`."""
    upper = torch.searchsorted(table, sigma.contiguous()).clamp(1, len(table) - 1)
    low, high = table[upper - 1], table[upper]
    return (upper - 1 + (sigma - low) / (high - low)).clamp(0, len(table) - 1)
