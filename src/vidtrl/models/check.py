"""Proof that a family's row is right for this checkpoint, in a few denoiser calls at a small size.

1. Oracle: feed the stock pipeline the ideal answer as denoiser. What it then hands to `vae.decode` must equal
   `vae.encode(video)`. Catches a wrong sign, prediction type, layout, normalisation or pixel range.
2. Parity: drive the stock loop with a first-order step and compare every step's latents with our own `sample`, with
   guidance off and on. Catches wrong timesteps, sigma grids, casts and guidance. Each denoiser call is also compared
   argument by argument (text, masks, timesteps, expert), which is sharp in half precision too.
3. Per-sample sigma: a batch of two noise levels, of one prompt and of two, equals two single calls.
4. Gradient: the velocity's loss reaches the denoiser's first and last weight.
"""

import contextlib
import copy
import inspect
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from diffusers import DiffusionPipeline, EulerAncestralDiscreteScheduler, EulerDiscreteScheduler
from PIL import Image
from torch import Tensor, nn

from ..diffusion import flow
from .capture import Condition, bind_call, map_tensors, patched, quiet
from .layout import CHANNEL_DIM
from .video_model import VideoModel


NUM_STEPS = 3
ARGUMENT_LIMIT = 5e-4
GUIDANCE_SCALE = 3.0


class CheckRow(NamedTuple):
    """One line of the report: the measured value must not exceed the limit (the gradient's must)."""

    check: str
    value: float
    limit: float
    ok: bool
    explanation: str


class CheckReport:
    """The result of `check_model`: `.ok`, `.rows`, `.raise_if_failed()`, and a readable table as `str()`."""

    def __init__(self, title: str, rows: list[CheckRow]):
        self.title, self.rows = title, rows

    @property
    def ok(self) -> bool:
        return all(row.ok for row in self.rows)

    def raise_if_failed(self) -> None:
        """Raise a ValueError with the whole table unless every check passed."""
        if not self.ok:
            raise ValueError(f"The model failed its check and would be trained wrongly.\n{self}")

    def __str__(self) -> str:
        width = max(len(row.check) for row in self.rows)
        lines = [self.title, f"  {'check':<{width}}  {'value':>9}  {'limit':>9}  result"]
        for row in self.rows:
            result = "ok" if row.ok else f"FAILED: {row.explanation}"
            limit = f"{row.limit:.1e}" if row.limit else "> 0"
            lines.append(f"  {row.check:<{width}}  {row.value:>9.1e}  {limit:>9}  {result}")
        failed = [row.check for row in self.rows if not row.ok]
        if failed:
            lines.append(f"Verdict: FAILED ({', '.join(failed)}). Do not train with this row or checkpoint.")
        else:
            lines.append("Verdict: ok, training and sampling agree with the stock pipeline.")
        return "\n".join(lines)


def check_model(
    model: VideoModel | DiffusionPipeline | str | os.PathLike,
    *,
    prompt: str | None = "a red circle moving right",
    height: int | None = None,
    width: int | None = None,
    num_frames: int | None = None,
    **pipeline_kwargs: Any,
) -> CheckReport:
    """Check that the model's row agrees with the stock pipeline on this checkpoint.

    Values are largest absolute differences, divided by the largest magnitude where that exceeds 1. The limit is 1e-4 in
    float32. In bfloat16 or float16 the pipeline itself rounds its inputs (8 or 11 bits), so two correct loops drift apart
    by a few percent; the limit is then 0.1, and wrong rows differ by 0.3 and more.

    Args:
        model: a `VideoModel`, a pipeline, a local path or a Hub id.
        prompt: text to check with; None when `prompt_embeds` (and `negative_prompt_embeds`) are passed.
        height, width, num_frames: size; by default the smallest that still shows swapped axes.
        **pipeline_kwargs: further pipeline arguments, such as `max_sequence_length`.

    Returns:
        a `CheckReport`.

    Raises:
        ValueError: the pipeline is unsupported, or a size or argument is invalid. A failed check is no exception; use
            `report.raise_if_failed()`.

    Example:
        >>> report = check_model("Wan-AI/Wan2.1-T2V-1.3B-Diffusers")
        >>> print(report)
        >>> report.raise_if_failed()
    """
    if not isinstance(model, VideoModel):
        model = VideoModel.from_pretrained(model)
    if model.pipe.vae is None:
        raise ValueError("The VAE is offloaded; call restore_encoders() before check_model.")
    check = _Check(model, prompt, height, width, num_frames, pipeline_kwargs)
    with ExitStack() as stack:
        stack.enter_context(quiet(model.pipe))
        for module in model.denoisers.values():  # dropout would make every comparison noise
            stack.callback(module.train, module.training)
            module.eval()
        rows = check.run()
    dtypes = sorted({str(m.dtype).removeprefix("torch.") for m in (*model.denoisers.values(), model.pipe.vae)})
    size = f"{check.num_frames} frames, {check.height}x{check.width}"
    return CheckReport(
        f"{type(model.pipe).__name__} as family {model.family.name!r}, {size}, {', '.join(dtypes)}", rows
    )


class _Check:
    def __init__(self, model, prompt, height, width, num_frames, pipeline_kwargs):
        self.model, self.prompt, self.kwargs = model, prompt, pipeline_kwargs
        m, config = model.pixel_multiple, next(iter(model.denoisers.values())).config
        short = max(2, -(-64 // m)) * m
        default = short, short + m, model.frame_offset + 2 * model.frame_multiple
        if config.get("use_learned_positional_embeddings"):  # CogVideoX-5B-I2V knows a single size
            factor = model.spatial_factor
            default = config.sample_height * factor, config.sample_width * factor, config.sample_frames
        self.height, self.width = height or default[0], width or default[1]
        self.num_frames = num_frames or default[2]
        self.shape = model.latent_shape(self.num_frames, self.height, self.width)
        generator = torch.Generator().manual_seed(0)
        video = torch.rand(1, self.num_frames, 3, self.height, self.width, generator=generator)
        self.video = (0.1 + 0.5 * video).mul(255).round() / 255  # off-centre, so that a wrong pixel range shows
        self.image = None
        if model.family.image:
            frame = self.video[0, 0].permute(1, 2, 0).mul(255).round().byte().numpy()
            self.image = self.kwargs.pop("image", None) or Image.fromarray(frame)
        half = {m.dtype for m in model.denoisers.values()} | {model.pipe.vae.dtype} != {torch.float32}
        half = half or torch.is_autocast_enabled(model.device.type)
        self.limit = 0.1 if half else 1e-4
        self.size = dict(height=self.height, width=self.width, num_frames=self.num_frames)

    def run(self) -> list[CheckRow]:
        positive, negative = self.kwargs, self.kwargs
        if self.prompt is None:
            stripped = {k.removeprefix("negative_") for k in self.kwargs if k.startswith("negative_")}
            negative = {k: v for k, v in self.kwargs.items() if k not in stripped}
            negative = {k.removeprefix("negative_"): v for k, v in negative.items() if v is not None}
        self.condition = self.model.condition(self.prompt, image=self.image, **self.size, **positive)
        negative_prompt = "blurry" if self.prompt is not None else None
        self.negative = self.model.condition(negative_prompt, image=self.image, negative=True, **self.size, **negative)
        rows = []
        rows += self._guarded("oracle", self._oracle)
        for scale in (1.0, GUIDANCE_SCALE):
            rows += self._guarded(f"parity, guidance {scale:g}", lambda scale=scale: self._parity(scale))
        if self.model.per_sample_sigma:
            rows += self._guarded("per-sample sigma", self._per_sample)
        for name in self.model.denoisers:
            rows += self._guarded(f"gradient, {name}", lambda name=name: self._gradient(name))
        return rows

    def _guarded(self, name: str, function: Callable[[], list[CheckRow]]) -> list[CheckRow]:
        """A wrong row mostly shows as a shape error inside the model: that is this check's verdict, not a crash."""
        try:
            return function()
        except (RuntimeError, IndexError, ValueError, AssertionError) as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            reason = str(error).strip().splitlines()
            explanation = f"{type(error).__name__}: {reason[0] if reason else 'no message'} (a wrong layout, or the model itself)"
            return [CheckRow(name, float("inf"), self.limit, False, explanation)]

    def _row(self, name: str, value: float, explanation: str, limit: float | None = None) -> CheckRow:
        limit = self.limit if limit is None else limit
        return CheckRow(name, value, limit, value <= limit, explanation)

    def _run_pipeline(self, scale: float, scheduler=None) -> tuple[Tensor, Tensor]:
        """The stock pipeline; returns what it hands to `vae.decode`, and its frames (F, C, H, W) in [0, 1]."""
        model, handed = self.model, []
        decode = model.pipe.vae.decode

        def spy(z, *args, **kwargs):
            handed.append(z.detach().float().clone())
            return decode(z, *args, **kwargs)

        call = model.call_arguments(**self.size, pipeline_kwargs=self.kwargs)
        if self.prompt is not None:
            call |= {"prompt": self.prompt, "negative_prompt": "blurry"} if scale != 1.0 else {"prompt": self.prompt}
        if self.image is not None:
            call["image"] = self.image
        # the seed of `VideoModel.condition`: some pipelines draw the image condition from its posterior
        generator = torch.Generator().manual_seed(0)
        call |= {"num_inference_steps": NUM_STEPS, "output_type": "pt", "return_dict": False, "generator": generator}
        with ExitStack() as stack:
            stack.enter_context(patched(model.pipe.vae, decode=spy))
            if scheduler is not None:
                stack.enter_context(patched(model.pipe, scheduler=scheduler))
            guidance = stack.enter_context(model.guidance(scale))
            frames = model.pipe(**guidance, **call)[0][0]
        return torch.cat(handed), frames.float().cpu()

    def _native(self, hidden: Tensor) -> Tensor:
        """The denoiser's input -> canonical layout, extra channels removed."""
        dim = CHANNEL_DIM[self.model.family.layout]
        channels = self.model.pack(torch.zeros(1, *self.shape)).shape[dim]
        return self.model.unpack(hidden.narrow(dim, 0, channels), self.shape).float()

    @torch.no_grad()
    def _oracle(self) -> list[CheckRow]:
        model, vae = self.model, self.model.pipe.vae
        x0, _ = model.encode(self.video)
        pixels = model.pipe.video_processor.preprocess_video(self.video, height=self.height, width=self.width)
        truth = vae.encode(pixels.to(device=vae.device, dtype=vae.dtype)).latent_dist.mode().float()

        sample = self.condition.samples[0]
        free = torch.ones_like(truth, dtype=torch.bool)
        if "fixed_mask" in sample:
            free = (sample["fixed_mask"] == 0).to(truth.device).expand_as(truth)
            x0 = torch.where(free, x0, sample["fixed_latents"].to(x0))
        with ExitStack() as stack:
            velocity: list[Tensor] = []
            for module in model.denoisers.values():
                stack.enter_context(patched(module, forward=self._ideal(module, x0, velocity)))
            handed, frames = self._run_pipeline(1.0)
        decoded = model.decode(model.normalize(handed))[0].cpu()
        return [
            self._row(
                "oracle, latents",
                _difference(torch.where(free, handed, truth), truth),
                "with the ideal answer as denoiser, the pipeline does not arrive at vae.encode(video): wrong sign, "
                "prediction type, layout, normalisation or pixel range",
            ),
            self._row("oracle, decode", _difference(decoded, frames), "our decode differs from the pipeline's video"),
        ]

    def _ideal(self, module: nn.Module, x0: Tensor, velocity: list[Tensor]) -> Callable:
        """A forward that answers what a perfect model of the single video x0 would."""
        model, row = self.model, self.model.family
        sigma_max = float(model.sigmas(NUM_STEPS, self.shape)[0])

        def forward(*args, **kwargs):
            call = bind_call(module, args, kwargs)
            x = self._native(call["hidden_states"])
            if row.prediction == "flow":
                if not velocity:  # the straight path from this noise to x0: constant, whatever the solver's order
                    velocity.append((x - x0) / sigma_max)
                answer = row.sign * velocity[0]
            else:
                sigma = model.schedule.sigma_of_timestep(call["timestep"].flatten()[:1].float())
                v = (x * model.noise_scale(sigma) - x0) / sigma
                answer = row.sign * flow.velocity_to_vp_output(v, x, sigma, row.prediction)
            answer = model.pack(answer).to(call["hidden_states"].dtype)
            dim = CHANNEL_DIM[row.layout]
            missing = (module.config.get("out_channels") or 0) - x0.shape[1]
            if missing > 0 and row.layout != "packed":
                answer = torch.cat(
                    [answer, torch.zeros_like(answer.narrow(dim, 0, 1)).repeat_interleave(missing, dim)], dim
                )
            return (answer,) if call.get("return_dict") is False else SimpleNamespace(sample=answer)

        return forward

    @torch.no_grad()
    def _parity(self, scale: float) -> list[CheckRow]:
        from ..rollout.sampling import sample  # the one look upwards: the loop under test

        model = self.model
        scheduler, steps = _first_order(model.pipe.scheduler)
        with self._recorded(lambda: steps[0]) as theirs:
            handed, _ = self._run_pipeline(scale, scheduler)
        # the pipeline's trajectory: the denoiser's inputs, and the clean latents it decodes
        sigmas = model.sigmas(NUM_STEPS, self.shape)
        stock = [self._native(theirs[i][0]["hidden_states"][-1:]) for i in range(NUM_STEPS)]
        noise = stock[0]
        stock = [x * model.noise_scale(float(s)) for x, s in zip(stock, sigmas, strict=False)] + [
            model.normalize(handed)
        ]
        own: list[Tensor] = []
        with self._recorded(lambda: len(own)) as ours:
            sample(
                model,
                self.condition,
                self.negative,
                guidance_scale=scale,
                num_inference_steps=NUM_STEPS,
                latents=noise.to(model.device),
                callback=lambda i, x: own.append(x),
            )
        name = f"guidance {scale:g}"
        return [
            self._row(
                f"parity, {name}",
                max(_difference(a, b) for a, b in zip(own, stock[1:], strict=True)),
                "our Euler steps leave the pipeline's first-order trajectory: wrong timestep, sigma grid, sign, "
                "prediction type, cast or guidance",
            ),
            CheckRow(f"arguments, {name}", *self._compare_arguments(ours, theirs)),
        ]

    @contextlib.contextmanager
    def _recorded(self, step: Callable[[], int]) -> Iterator[dict[int, list[dict[str, Any]]]]:
        """The denoiser calls inside the block, by sampling step."""
        calls: dict[int, list[dict[str, Any]]] = {}

        def record(name: str, module: nn.Module):
            def hook(_, args, kwargs):
                call = map_tensors(bind_call(module, args, kwargs), lambda t: t.detach().float().cpu().clone())
                calls.setdefault(step(), []).append({**call, "expert": name})

            return module.register_forward_pre_hook(hook, with_kwargs=True)

        handles = [record(name, module) for name, module in self.model.denoisers.items()]
        try:
            yield calls
        finally:
            for handle in handles:
                handle.remove()

    def _compare_arguments(self, ours: dict[int, list], theirs: dict[int, list]) -> tuple[float, float, bool, str]:
        """Each of our calls must be one of the pipeline's, in everything but the noisy latents.

        Both sides are rounded alike, so the limit is tight in every precision: one timestep in a thousand shows.
        """
        worst, culprit = 0.0, ""
        for i, calls in ours.items():
            candidates = [row for call in theirs[i] for row in _rows(call)]
            for call in calls:
                (value, name) = min((_argument_difference(call, row) for row in candidates), key=lambda pair: pair[0])
                if value > worst:
                    worst, culprit = value, f"{name} at step {i}"
        explanation = f"the pipeline calls its denoiser with other arguments than ours: {culprit}"
        return worst, ARGUMENT_LIMIT, worst <= ARGUMENT_LIMIT, explanation

    @torch.no_grad()
    def _per_sample(self) -> list[CheckRow]:
        model, shape = self.model, (2, *self.shape)
        x = torch.randn(shape, generator=torch.Generator().manual_seed(2)).to(model.device)
        # both on one side of an expert boundary
        pair = torch.tensor([0.6, 0.2] if model.boundary is None or model.boundary > 0.6 else [0.99, 0.95])
        worst = 0.0
        for both in (self.condition[[0, 0]], Condition.cat([self.condition, self.negative])):
            batch = model.velocity(x, pair.to(x.device), both)
            single = [model.velocity(x[i : i + 1], float(pair[i]), both[i]) for i in range(2)]
            worst = max(worst, _difference(batch, torch.cat(single)))
        return [
            self._row(
                "per-sample sigma",
                worst,
                "a batch of two noise levels is not what two single calls give; set per_sample_sigma=False in the row",
            )
        ]

    def _gradient(self, name: str) -> list[CheckRow]:
        model = self.model
        module = model.denoisers[name]
        # the first and last weight are enough, and cost no second copy of a large model
        floating = [p for p in module.parameters() if p.is_floating_point()]
        matrices = [p for p in floating if p.ndim > 1] or floating
        weights = [matrices[0], matrices[-1]]
        trainable = [p for p in module.parameters() if p.requires_grad]
        sigma = next(s for s in (0.5, 0.95, 0.05) if model.expert(s) == name)
        generator = torch.Generator().manual_seed(3)
        x0, noise = (torch.randn(1, *self.shape, generator=generator).to(model.device) for _ in range(2))
        try:
            for p in trainable:
                p.requires_grad_(False)
            for p in weights:
                p.requires_grad_(True)
            velocity = model.velocity(flow.add_noise(x0, noise, sigma), sigma, self.condition)
            loss = (velocity - flow.velocity_target(x0, noise)).square().mean()
            gradients = torch.autograd.grad(loss, weights, allow_unused=True) if loss.requires_grad else []
        finally:
            for p in weights:
                p.requires_grad_(False)
            for p in trainable:
                p.requires_grad_(True)
        norm = sum(float(g.float().norm()) for g in gradients if g is not None)
        explanation = "the loss has no (finite) gradient at the denoiser's first and last weight"
        return [CheckRow(f"gradient, {name}", norm, 0.0, 0 < norm < float("inf"), explanation)]


def _rows(call: dict[str, Any]) -> list[dict[str, Any]]:
    """A call under batched guidance as one call per row."""
    batch = len(call["hidden_states"])
    if batch == 1:
        return [call]
    split = {k: isinstance(v, Tensor) and v.ndim > 0 and len(v) == batch for k, v in call.items()}
    return [{k: v[i : i + 1] if split[k] else v for k, v in call.items()} for i in range(batch)]


def _argument_difference(ours: dict[str, Any], theirs: dict[str, Any]) -> tuple[float, str]:
    """Largest difference over the arguments, and the argument's name."""

    def distance(a: Any, b: Any) -> float:
        if isinstance(a, Tensor) and isinstance(b, Tensor):
            return _difference(a, b) if a.shape == b.shape and a.numel() else float(a.shape != b.shape)
        if isinstance(a, (tuple, list)) and isinstance(b, (tuple, list)) and len(a) == len(b):
            return max(map(distance, a, b), default=0.0)
        if isinstance(a, dict) and isinstance(b, dict) and a.keys() == b.keys():
            return max(map(distance, a.values(), b.values()), default=0.0)
        return 0.0 if a == b else 1.0

    names = sorted({*ours, *theirs} - {"hidden_states", "return_dict"})
    return max((distance(ours.get(name), theirs.get(name)), name) for name in names)


def _difference(a: Tensor, b: Tensor) -> float:
    assert a.shape == b.shape, f"{tuple(a.shape)} against {tuple(b.shape)}"
    a, b = a.float().cpu(), b.float().cpu()
    value = float((a - b).abs().max() / b.abs().max().clamp(min=1.0))
    return value if value == value else float("inf")


def _first_order(scheduler) -> tuple[Any, list[int]]:
    """A copy of `scheduler` whose step is the plain first-order one (Euler or deterministic DDIM), and its step counter.

    It reads only the scheduler's own grid and configuration, never the family's row: an independent reference.
    """
    scheduler = copy.deepcopy(scheduler)
    signature = inspect.signature(type(scheduler).step)
    config, steps = scheduler.config, [0]
    is_flow = not hasattr(scheduler, "alphas_cumprod") or bool(config.get("use_flow_sigmas"))
    scaled = isinstance(scheduler, (EulerDiscreteScheduler, EulerAncestralDiscreteScheduler))

    def ddim(x: Tensor, output: Tensor, i: int) -> Tensor:
        table = scheduler.alphas_cumprod.to(x.device, torch.float32)
        times = scheduler.timesteps.long()
        ab = table[times[i]]
        ab_next = table[times[i + 1]] if i + 1 < len(times) else torch.ones_like(ab)
        if config.prediction_type == "v_prediction":
            x0, noise = ab.sqrt() * x - (1 - ab).sqrt() * output, ab.sqrt() * output + (1 - ab).sqrt() * x
        else:
            x0, noise = (x - (1 - ab).sqrt() * output) / ab.sqrt(), output
        return ab_next.sqrt() * x0 + (1 - ab_next).sqrt() * noise

    def step(*args, **kwargs):
        call = signature.bind(scheduler, *args, **kwargs).arguments
        i, x, output = steps[0], call["sample"].float(), call["model_output"].float()
        if is_flow or scaled:  # dx / d sigma is the velocity, or the noise in Euler's unscaled coordinates
            nxt = x + float(scheduler.sigmas[i + 1] - scheduler.sigmas[i]) * output
        else:
            nxt = ddim(x, output, i)
        steps[0] += 1
        nxt = nxt.to(call["sample"].dtype)
        return SimpleNamespace(prev_sample=nxt) if call.get("return_dict", True) else (nxt, None)

    scheduler.step = step
    if scaled:  # theirs counts its own steps
        scheduler.scale_model_input = lambda x, t: x / float(scheduler.sigmas[steps[0]] ** 2 + 1) ** 0.5
    return scheduler, steps
