"""The schedulers of few-step students. This file imports torch and diffusers, and nothing of vidtrl.

`export_student` copies it next to the weights, so that a student samples with diffusers alone:

    pipe = WanPipeline.from_pretrained(BASE)
    pipe.load_lora_weights("student")
    pipe.scheduler = FewStepFlowScheduler.from_pretrained("student", subfolder="scheduler")
    video = pipe("a dog", num_inference_steps=4, guidance_scale=1.0, generator=torch.Generator().manual_seed(0))
"""

import hashlib
from dataclasses import dataclass

import torch
from diffusers import ConfigMixin, SchedulerMixin
from diffusers.configuration_utils import register_to_config
from diffusers.utils import BaseOutput
from torch import Tensor


@dataclass
class FewStepFlowSchedulerOutput(BaseOutput):
    """
    Args:
        prev_sample (`Tensor`): The sample at the next noise level, in the shape and dtype of the one passed in.
    """

    prev_sample: Tensor


class FewStepFlowScheduler(SchedulerMixin, ConfigMixin):
    """
    Visits exactly the timesteps a few-step flow-matching student was trained on.

    With x_sigma = (1 - sigma) x0 + sigma e, the model's velocity v and x0^ = x - sigma v, one step is

    - `"renoise"`: x' = (1 - sigma') x0^ + sigma' e_new, the sampler of consistency models
      (https://huggingface.co/papers/2303.01469, algorithm 1) and of distribution matching distillation
      (https://huggingface.co/papers/2405.14867, section 4.4);
    - `"ode"`: x' = (1 - sigma') x0^ + sigma' e^ with e^ = x + (1 - sigma) v, an Euler step;

    and the last one returns x0^. It takes the place of any flow-matching scheduler of a stock pipeline: call the
    pipeline with `num_inference_steps=len(denoising_steps)` and guidance off.

    Equal seeds give equal videos. Where the pipeline hands its `generator` to `step`, the fresh noise e_new comes from
    it. Most do not (Wan, LTX, HunyuanVideo); then each clip's fresh noise is a function of its own initial noise,
    which does come from the pipeline's generator. It is drawn on the CPU, so that it is the same on every device, and
    does not depend on the other clips of the batch.

    Args:
        num_train_timesteps (`int`, defaults to 1000): The timestep of pure noise.
        denoising_steps (`list[float]`, defaults to `[1000, 750, 500, 250]`): Timesteps before the shift, descending,
            in (0, `num_train_timesteps`].
        shift (`float`, defaults to 5.0): sigma = shift u / (1 + (shift - 1) u) with u = step / `num_train_timesteps`;
            1 for a list that is shifted already.
        sampler (`str`, defaults to `"renoise"`): `"renoise"` or `"ode"`.
        integer_timesteps (`bool`, defaults to `False`): The model is given whole timesteps (937 instead of 937.5), as
            UniPC and DPM-Solver do. For students that were trained so; the sigmas stay exact.
        reversed_time (`bool`, defaults to `False`): The model is given 1 - sigma and predicts x0 - e, as Mochi does.
            `sigmas` are 1 - sigma then, as in diffusers' own scheduler, and the grid that the pipeline asks for is not
            looked at.

    Raises:
        `ValueError`: An unknown sampler, a shift that is not positive, or steps that are not a descending list in
        range.

    Example:

    ```python
    >>> scheduler = FewStepFlowScheduler(denoising_steps=[1000, 750, 500, 250], shift=5.0)
    >>> scheduler.set_timesteps(4)
    >>> scheduler.timesteps
    tensor([1000.0000,  937.5000,  833.3334,  625.0000])
    ```
    """

    order = 1

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        denoising_steps: list[float] = (1000, 750, 500, 250),
        shift: float = 5.0,
        sampler: str = "renoise",
        integer_timesteps: bool = False,
        reversed_time: bool = False,
    ):
        steps = [float(step) for step in denoising_steps]
        if (
            not steps
            or steps != sorted(set(steps), reverse=True)
            or not 0 < steps[-1] <= steps[0] <= num_train_timesteps
        ):
            raise ValueError(
                f"denoising_steps must be descending timesteps in (0, {num_train_timesteps}], such as "
                f"[1000, 750, 500, 250]; got {list(denoising_steps)}."
            )
        if not shift > 0:
            raise ValueError(f"shift must be positive, got {shift}; 1 leaves denoising_steps as they are.")
        if sampler not in ("renoise", "ode"):
            raise ValueError(f"sampler must be 'renoise' or 'ode', got {sampler!r}.")
        self.register_to_config(denoising_steps=list(denoising_steps))  # a tuple would come back from JSON as a list
        self.set_timesteps()

    def set_begin_index(self, begin_index: int = 0) -> None:
        """
        Args:
            begin_index (`int`, defaults to 0): The step that the first call of `step` makes.
        """
        self._begin_index = begin_index

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        sigmas: list[float] | None = None,
        mu: float | None = None,
        timesteps: list[float] | None = None,
    ) -> None:
        """
        Begin a new video. The grid is always the configured one.

        Args:
            num_inference_steps (`int`, *optional*): Must be the number of `denoising_steps`.
            device (`str` or `torch.device`, *optional*): Where `timesteps` goes; `sigmas` stays on the CPU.
            sigmas (`list[float]`, *optional*): Only what several pipelines pass unasked: the uniform grid 1, ..., 1/N.
            mu (`float`, *optional*): The dynamic shift some pipelines pass; the student's shift is fixed.
            timesteps (`list[float]`, *optional*): Must be left out.

        Raises:
            `ValueError`: Another number of steps, or another grid.
        """
        u = torch.tensor(self.config.denoising_steps, dtype=torch.float64) / self.config.num_train_timesteps
        shift, number = self.config.shift, len(u)
        if num_inference_steps is None:
            num_inference_steps = number if sigmas is None else len(sigmas)
        if num_inference_steps != number:
            raise ValueError(
                f"This student samples in {number} steps ({self.config.denoising_steps}, shift {shift:g}), not "
                f"{num_inference_steps}: call the pipeline with num_inference_steps={number}."
            )
        uniform = torch.arange(number, 0, -1, dtype=torch.float64) / number
        unasked = self.config.reversed_time or sigmas is None
        if timesteps is not None or not (
            unasked or torch.allclose(torch.as_tensor(sigmas, dtype=torch.float64), uniform)
        ):
            raise ValueError(
                "FewStepFlowScheduler visits the student's own denoising_steps: leave out sigmas and timesteps, or make "
                "another scheduler with denoising_steps=[...]."
            )
        self._levels = torch.cat([shift * u / (1 + (shift - 1) * u), torch.zeros(1)]).float()
        self.sigmas = 1 - self._levels if self.config.reversed_time else self._levels
        self.timesteps = self.sigmas[:-1] * self.config.num_train_timesteps
        if self.config.integer_timesteps:  # 2**-14 absorbs the float32 rounding of 1000 * sigma
            self.timesteps = (self.timesteps + 2**-14).long()
        self._begin(device)

    def _begin(self, device: str | torch.device | None) -> None:
        self.timesteps = self.timesteps.to(device)
        self.num_inference_steps = len(self.timesteps)
        self._step_index = self._begin_index = None
        self._generators: list[torch.Generator] | None = None

    def step(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        generator: torch.Generator | list[torch.Generator] | None = None,
        return_dict: bool = True,
    ) -> FewStepFlowSchedulerOutput | tuple[Tensor]:
        """
        One step, in float32.

        Args:
            model_output (`Tensor`): The model's velocity, (B, ...).
            timestep (`float` or `Tensor`): The timestep it was computed at, one of `timesteps`.
            sample (`Tensor`): The sample it was computed at, (B, ...) in the pipeline's layout.
            generator (`torch.Generator` or `list`, *optional*): Source of the fresh noise, one or one per clip.
            return_dict (`bool`, defaults to `True`): An output class, or a tuple.

        Returns:
            [`FewStepFlowSchedulerOutput`] or `tuple`: The next sample.

        Raises:
            `ValueError`: A timestep that is not on the grid, or a wrong number of generators.
        """
        if self._step_index is None:
            self._step_index = self._index(timestep) if self._begin_index is None else self._begin_index
        if self.config.sampler == "renoise" and generator is None and self._generators is None:
            self._generators = [_generator_of(clip) for clip in sample]
        x = sample.float()
        prev_sample, noise = self._estimates(x, model_output.float(), self._step_index)
        if self._step_index < self.num_inference_steps - 1:
            if self.config.sampler == "renoise":
                noise = _randn(x.shape, generator or self._generators).to(x.device)
            prev_sample = self._mix(prev_sample, noise, self._step_index + 1)
        self._step_index += 1
        prev_sample = prev_sample.to(sample.dtype)
        return FewStepFlowSchedulerOutput(prev_sample) if return_dict else (prev_sample,)

    def _estimates(self, x: Tensor, output: Tensor, i: int) -> tuple[Tensor, Tensor]:
        """x0^ and e^ at step i."""
        sigma = float(self._levels[i])
        velocity = -output if self.config.reversed_time else output
        return x - sigma * velocity, x + (1 - sigma) * velocity

    def _mix(self, x0: Tensor, noise: Tensor, i: int) -> Tensor:
        """What step i starts from."""
        sigma = float(self._levels[i])
        return (1 - sigma) * x0 + sigma * noise

    def _index(self, timestep: float | Tensor) -> int:
        distance = (self.timesteps.cpu().double() - float(timestep)).abs()
        index = int(distance.argmin())
        if distance[index] >= 1:  # SkyReels' diffusion-forcing pipeline cuts timesteps down to integers
            raise ValueError(f"Timestep {float(timestep):g} is not one of {self.timesteps.tolist()}.")
        return index


class FewStepVPScheduler(FewStepFlowScheduler):
    """
    [`FewStepFlowScheduler`] for variance-preserving models (CogVideoX, Allegro): x_t = a_t x0 + b_t e with a_t^2 =
    `alphas_cumprod[t]` and b_t^2 = 1 - a_t^2.

    Dividing x_t by a_t + b_t gives the flow's x_sigma at sigma = b_t / (a_t + b_t), so a student is the same in both
    coordinates. With the model's x0^ and e^ a step is x' = a' x0^ + b' e, where e is new noise (`"renoise"`) or e^
    (`"ode"`, which is DDIM, https://huggingface.co/papers/2010.02502, eq. 12 without noise).

    Args:
        alphas_cumprod (`list[float]`): The model's own noise schedule, one value for each of its timesteps.
        denoising_steps (`list[int]`): The student's timesteps in that table, descending.
        prediction_type (`str`, defaults to `"v_prediction"`): What the model predicts: a e - b x0 (`"v_prediction"`), or
            e (`"epsilon"`).
        sampler (`str`, defaults to `"renoise"`): `"renoise"` or `"ode"`.
        integer_timesteps (`bool`, defaults to `True`): Whether the model is given its timesteps as integers.
        num_train_timesteps (`int`, *optional*): The length of the table, whatever is given here.

    Raises:
        `ValueError`: Steps that are not a descending list of timesteps in the table, an unknown sampler or prediction.

    Example:

    ```python
    >>> scheduler = FewStepVPScheduler(alphas_cumprod=[0.99, 0.7, 0.4, 0.1], denoising_steps=[3, 1])
    >>> scheduler.set_timesteps(2)
    >>> scheduler.timesteps
    tensor([3, 1])
    ```
    """

    init_noise_sigma = 1.0

    @register_to_config
    def __init__(
        self,
        alphas_cumprod: list[float],
        denoising_steps: list[int],
        prediction_type: str = "v_prediction",
        sampler: str = "renoise",
        integer_timesteps: bool = True,
        num_train_timesteps: int | None = None,
    ):
        steps = [int(step) for step in denoising_steps]
        if (
            not steps
            or steps != sorted(set(steps), reverse=True)
            or not 0 <= steps[-1] <= steps[0] < len(alphas_cumprod)
        ):
            raise ValueError(
                f"denoising_steps must be descending timesteps of the model, 0 to {len(alphas_cumprod) - 1}; got "
                f"{list(denoising_steps)}."
            )
        if sampler not in ("renoise", "ode"):
            raise ValueError(f"sampler must be 'renoise' or 'ode', got {sampler!r}.")
        if prediction_type not in ("v_prediction", "epsilon"):
            raise ValueError(f"prediction_type must be 'v_prediction' or 'epsilon', got {prediction_type!r}.")
        self.register_to_config(
            denoising_steps=steps, alphas_cumprod=list(alphas_cumprod), num_train_timesteps=len(alphas_cumprod)
        )
        self.alphas_cumprod = torch.tensor(alphas_cumprod, dtype=torch.float32)
        self.set_timesteps()

    def scale_model_input(self, sample: Tensor, timestep: float | Tensor | None = None) -> Tensor:
        """
        Args:
            sample (`Tensor`): The model's input.
            timestep (`float` or `Tensor`, *optional*): Not used.

        Returns:
            `Tensor`: `sample` as it is.
        """
        return sample

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        timesteps: list[int] | None = None,
    ) -> None:
        """
        Begin a new video. The timesteps are always the configured ones.

        Args:
            num_inference_steps (`int`, *optional*): Must be the number of `denoising_steps`.
            device (`str` or `torch.device`, *optional*): Where `timesteps` goes.
            timesteps (`list[int]`, *optional*): Must be left out.

        Raises:
            `ValueError`: Another number of steps, or other timesteps.
        """
        steps = self.config.denoising_steps
        if timesteps is not None or num_inference_steps not in (None, len(steps)):
            raise ValueError(
                f"This student samples in {len(steps)} steps, at its own timesteps {steps}: call the pipeline with "
                f"num_inference_steps={len(steps)} and without timesteps."
            )
        table = self.alphas_cumprod.double()[torch.tensor(steps)]
        # the last pair is the clean end
        self._alphas = [*table.sqrt().tolist(), 1.0]
        self._betas = [*(1 - table).sqrt().tolist(), 0.0]
        self.timesteps = torch.tensor(steps, dtype=torch.int64 if self.config.integer_timesteps else torch.float32)
        self._begin(device)

    def _estimates(self, x: Tensor, output: Tensor, i: int) -> tuple[Tensor, Tensor]:
        alpha, beta = self._alphas[i], self._betas[i]
        if self.config.prediction_type == "epsilon":
            return (x - beta * output) / alpha, output
        return alpha * x - beta * output, beta * x + alpha * output

    def _mix(self, x0: Tensor, noise: Tensor, i: int) -> Tensor:
        return self._alphas[i] * x0 + self._betas[i] * noise


def _generator_of(clip: Tensor) -> torch.Generator:
    """A CPU generator seeded by the content of a clip's initial noise."""
    content = clip.detach().float().cpu().contiguous().numpy().tobytes()
    seed = int.from_bytes(hashlib.sha256(content).digest()[:8], "little")
    return torch.Generator().manual_seed(seed)


def _randn(shape: tuple[int, ...], generator: torch.Generator | list[torch.Generator]) -> Tensor:
    if not isinstance(generator, list):
        return torch.randn(shape, generator=generator, device=generator.device)
    if len(generator) != shape[0]:
        raise ValueError(f"Got {len(generator)} generators for {shape[0]} clips; pass one, or one per clip.")
    # moved, as generators of one batch may live on different devices
    return torch.stack([torch.randn(shape[1:], generator=g, device=g.device).cpu() for g in generator])
