"""A diffusers video pipeline as a trainable model: condition, encode, decode, velocity, sigmas."""

import contextlib
import difflib
import inspect
import itertools
import math
import os
from collections.abc import Iterator
from typing import Any

import PIL.Image
import torch
from diffusers import ClassifierFreeGuidance, DiffusionPipeline
from torch import Tensor, nn

from ..diffusion import flow
from . import layout
from .capture import Condition, capture, map_tensors, patched
from .families import Family, find_family
from .loading import load_pipeline
from .schedule import NoiseSchedule


class VideoModel:
    """A pipeline whose denoiser can be called at any noise level, in canonical coordinates.

    Canonical latents are (B, C, f, h, w), float32, normalised; x_sigma = (1 - sigma) x0 + sigma noise and the velocity
    is noise - x0 for every family. Videos are lists of float32 tensors (F, C, H, W) in [0, 1].

    Args:
        pipe: a loaded diffusers pipeline of a supported family (`vidtrl.models.FAMILIES`).
        family: the row to use instead of the table's (to try one out with `check_model`).

    Attributes:
        pipe: the pipeline.
        family: its row of the table.
        denoisers: {"transformer": module}, with "transformer_2" for two-expert models.
        boundary: sigma from which on "transformer" is used and below which "transformer_2"; None with one expert.
        frame_multiple, frame_offset: valid frame counts are frame_offset + k * frame_multiple.
        pixel_multiple: height and width must be multiples of it.
        latent_channels: of the VAE.
        per_sample_sigma: whether `velocity` takes a different sigma per clip.
        embedded_guidance: what a model that takes guidance as an input (HunyuanVideo) is told; 1.0, the value models are
            trained with, until it is set.

    Raises:
        ValueError: the pipeline's class, scheduler or guider is not supported; the message has the reason.

    Example:
        >>> model = VideoModel.from_pretrained("Wan-AI/Wan2.1-T2V-1.3B-Diffusers", torch_dtype=torch.bfloat16)
        >>> condition = model.condition("a red circle moving right", height=480, width=832, num_frames=81)
        >>> x0, _ = model.encode(videos)
        >>> noise = torch.randn_like(x0)
        >>> prediction = model.velocity(0.3 * x0 + 0.7 * noise, 0.7, condition)
        >>> loss = (prediction - (noise - x0)).square().mean()
    """

    def __init__(self, pipe: DiffusionPipeline, family: Family | None = None):
        components = pipe.components
        if family is None:
            denoiser = components.get("transformer") or components.get("transformer_2")
            family = find_family(type(pipe).__name__, None if denoiser is None else denoiser.config)
        self.pipe, self.family = pipe, family
        self._source: dict[str, Any] | None = None
        self._offloaded: dict[str, nn.Module | None] = {}
        self.embedded_guidance = 1.0
        self._guiders: dict[float, ClassifierFreeGuidance] = {}
        self._encoded: tuple[Any, list] = (None, [])  # the last image, and what the VAE said of it
        self.denoisers = {n: components[n] for n in ("transformer", "transformer_2") if components.get(n) is not None}
        if not self.denoisers:
            raise ValueError(
                f"{type(pipe).__name__} has no transformer loaded; load the pipeline with its transformer."
            )
        if components.get("vae") is None:
            raise ValueError(f"{type(pipe).__name__} has no VAE loaded; load the pipeline with its VAE.")
        self.boundary = pipe.config.get("boundary_ratio") if len(self.denoisers) > 1 else None
        if len(self.denoisers) > 1 and self.boundary is None:
            raise ValueError("The pipeline has two transformers but boundary_ratio is None; set boundary_ratio.")
        self._check_guider()

        config = next(iter(self.denoisers.values())).config
        patch = config.get("patch_size") or 1
        spatial_patch = patch if isinstance(patch, int) else patch[-1]
        temporal_patch = config.get("patch_size_t") or (1 if isinstance(patch, int) else patch[0])
        self._patch = (temporal_patch, spatial_patch)
        self.temporal_factor, self.spatial_factor = (int(getattr(pipe, name)) for name in family.factors)
        self.frame_multiple = self.temporal_factor * temporal_patch
        # the latent frame count (F - offset) / factor + 1 must divide by the temporal patch (CogVideoX 1.5)
        self.frame_offset = family.frame_offset + self.temporal_factor * (temporal_patch - 1)
        block = family.sparse_block if config.get("attention_type") == "nabla" else 1
        self.pixel_multiple = math.lcm(self.spatial_factor * spatial_patch * block, family.pixel_multiple)
        self.per_sample_sigma = family.per_sample_sigma
        self._setup_vae(pipe.vae)
        self.schedule = NoiseSchedule(pipe.scheduler, family, self._patch)

    def _setup_vae(self, vae: nn.Module) -> None:
        # LTX keeps the statistics in buffers, the others in the config
        stats = {**vae.config, **dict(vae.named_buffers())}
        self.latent_channels = int(stats.get("z_dim") or stats["latent_channels"])
        self._latents_mean, self._latents_scale = torch.zeros(1), torch.ones(1)
        if self.family.normalize:
            self._latents_scale = self._latents_scale * (stats.get("scaling_factor") or 1.0)
            if stats.get("latents_mean") is not None:
                mean, std = (
                    torch.as_tensor(stats[k], dtype=torch.float32, device="cpu")
                    for k in ("latents_mean", "latents_std")
                )
                self._latents_mean, self._latents_scale = mean, self._latents_scale / std
        self._latents_mean, self._latents_scale = (
            t.reshape(1, -1, 1, 1, 1) for t in (self._latents_mean, self._latents_scale)
        )
        if self.family.vae_tiling:
            vae.enable_tiling()

    def _check_guider(self) -> None:
        if self.family.guidance != "guider":
            return
        guider = self.pipe.guider
        plain = type(guider) is ClassifierFreeGuidance
        if not plain or guider.use_original_formulation or guider.guidance_rescale:
            raise ValueError(
                f"{type(guider).__name__} as configured is not plain classifier-free guidance; samples of the trained "
                "model could not match the pipeline's (momentum and rescaling keep state between steps). Use "
                "pipe.guider = diffusers.ClassifierFreeGuidance(guidance_scale=...) before passing the pipeline."
            )

    @classmethod
    def from_pretrained(
        cls,
        model: str | os.PathLike | DiffusionPipeline,
        torch_dtype: torch.dtype | str | None = None,
        quantization_config: Any | None = None,
        **load_kwargs: Any,
    ) -> "VideoModel":
        """Load a pipeline and wrap it.

        Args:
            model: Hub id, local directory written by `save_pretrained`, or a loaded pipeline.
            torch_dtype: dtype to load the weights in.
            quantization_config: a diffusers `PipelineQuantizationConfig`, passed through.
            **load_kwargs: further arguments of `DiffusionPipeline.from_pretrained` (`revision`, `token`, ...).

        Raises:
            ValueError: nothing can be loaded from there, or the pipeline is not supported; the message has the reason.
        """
        options = dict(load_kwargs)
        if torch_dtype is not None:
            options["dtype"] = torch_dtype
        if quantization_config is not None:
            options["quantization_config"] = quantization_config
        if isinstance(model, DiffusionPipeline):
            if options:
                raise ValueError(
                    f"{', '.join(options)} apply when a path or Hub id is loaded, not to a loaded pipeline."
                )
            return cls(model)
        self = cls(load_pipeline(model, **options))
        self._source = {"path": os.fspath(model), **options}
        return self

    @property
    def embeds_guidance(self) -> bool:
        """Whether the denoiser takes guidance as an input, beside classifier-free guidance of the pipeline."""
        config = next(iter(self.denoisers.values())).config
        return bool(config.get("guidance_embeds")) and self.family.guidance != "guidance_scale"

    @property
    def device(self) -> torch.device:
        """Where the denoiser computes (an expert that is not in use may wait on the CPU)."""
        devices = [next(module.parameters()).device for module in self.denoisers.values()]
        return next((d for d in devices if d.type != "cpu"), devices[0])

    def nearest_frames(self, num_frames: int) -> int:
        """The valid frame count nearest to `num_frames` (the smaller one on a tie)."""
        k = max(0, math.ceil((num_frames - self.frame_offset) / self.frame_multiple - 0.5))
        return max(self.frame_offset + k * self.frame_multiple, self.frame_offset or self.frame_multiple)

    def nearest_size(self, height: int, width: int) -> tuple[int, int]:
        """The valid (height, width) nearest to the given one."""
        m = self.pixel_multiple
        return tuple(max(1, math.ceil(x / m - 0.5)) * m for x in (height, width))

    def latent_shape(self, num_frames: int, height: int, width: int) -> tuple[int, int, int, int]:
        """(C, f, h, w) of a clip's latents.

        Raises:
            ValueError: an invalid size; the message says the nearest valid one.
        """
        size, frames = self.nearest_size(height, width), self.nearest_frames(num_frames)
        if frames != num_frames:
            rule = f"{self.frame_multiple}k" + (f"+{self.frame_offset}" if self.frame_offset else "")
            raise ValueError(
                f"num_frames={num_frames} is not valid for {self.family.name}: it takes {rule} frames; the nearest is {frames}."
            )
        if size != (height, width):
            raise ValueError(
                f"{height}x{width} (height x width) is not valid for {self.family.name}: both must be multiples of "
                f"{self.pixel_multiple}; the nearest is {size[0]}x{size[1]}."
            )
        latent_frames = (num_frames - self.family.frame_offset) // self.temporal_factor + self.family.frame_offset
        return self.latent_channels, latent_frames, height // self.spatial_factor, width // self.spatial_factor

    @torch.no_grad()
    def condition(
        self,
        prompt: str | list[str] | None,
        height: int,
        width: int,
        num_frames: int,
        *,
        image: Any | None = None,
        fps: float | None = None,
        negative: bool = False,
        **pipeline_kwargs: Any,
    ) -> Condition:
        """Everything the denoiser needs besides latents and timestep, prepared by the stock pipeline.

        Guidance is off and embedded guidance is `embedded_guidance`.

        Args:
            prompt: one prompt or a list; None when `prompt_embeds` is passed.
            height, width: in pixels.
            num_frames: frames of the clip.
            image: the first frame(s) for image-to-video families, as the pipeline takes them (one per prompt).
            fps: frame rate, for families that know one.
            negative: encode the prompt as the pipeline encodes negative prompts (some pipelines treat them differently).
            **pipeline_kwargs: further arguments of the pipeline, such as `max_sequence_length`.

        Raises:
            ValueError: an invalid size (the message says the nearest valid one), an unknown pipeline argument, or an
                image that is missing or not wanted.
        """
        row, latent_shape = self.family, self.latent_shape(num_frames, height, width)
        prompts = prompt if isinstance(prompt, list) else [prompt]
        images = image if isinstance(image, list) else [image] * len(prompts)
        if not prompts or len(images) != len(prompts):
            raise ValueError(f"Got {len(prompts)} prompts and {len(images)} images; pass one image per prompt.")
        if any(row.image != (picture is not None) for picture in images):
            need = "needs an image per prompt" if row.image else "takes no image"
            raise ValueError(f"{type(self.pipe).__name__} {need}.")
        call = self.call_arguments(height, width, num_frames, fps, negative, pipeline_kwargs)
        # only the first step is reached
        call |= {"output_type": "latent", "num_inference_steps": self.schedule.probe_steps}
        call |= {"generator": torch.Generator().manual_seed(0)}
        # One prompt at a time: what belongs to a clip is then unmistakable, and equals what a single call gives.
        conditions = []
        for text, picture in zip(prompts, images, strict=True):
            single = dict(call, prompt=text) if text is not None else dict(call)
            if picture is not None:
                single["image"] = picture
            branch = negative and row.negative_branch and text is not None
            if branch:
                single |= {"prompt": "", "negative_prompt": text}
            more_images = any(name.endswith("image") for name in pipeline_kwargs)  # such as Wan's last_image
            once = contextlib.nullcontext() if more_images else self._encoding_once(picture, latent_shape)
            with self.guidance(2.0 if branch else 1.0) as scale, once:
                caught = capture(self.pipe, self.denoisers, skip=int(branch), **scale, **single)
            conditions.append(self._to_condition(caught, latent_shape))
        return Condition.cat(conditions)

    @contextlib.contextmanager
    def _encoding_once(self, image: Any, latent_shape: tuple[int, ...]) -> Iterator[None]:
        """Inside, the VAE does not encode an image again that it has just encoded: all conditions of a sample share it."""
        if not isinstance(image, PIL.Image.Image):
            yield
            return
        vae, calls = self._vae(), itertools.count()
        encode, state = vae.encode, (image.mode, image.size, image.tobytes(), latent_shape, vae.device, vae.dtype)
        if self._encoded[0] != state:
            self._encoded = state, []

        def once(x: Tensor, *args: Any, **kwargs: Any) -> Any:
            number, answers = next(calls), self._encoded[1]
            if number == len(answers):
                answers.append((x.shape, encode(x, *args, **kwargs)))
            assert answers[number][0] == x.shape, f"{tuple(x.shape)} instead of {tuple(answers[number][0])}"
            return answers[number][1]

        with patched(vae, encode=once):
            yield

    def call_arguments(
        self,
        height: int,
        width: int,
        num_frames: int,
        fps: float | None = None,
        negative: bool = False,
        pipeline_kwargs: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        """The pipeline's arguments for a clip of this size, without prompt, image and guidance.

        Raises:
            ValueError: `pipeline_kwargs` names an argument that the pipeline does not have or that is set here.
        """
        row, pipeline_kwargs = self.family, pipeline_kwargs or {}
        known = inspect.signature(type(self.pipe).__call__).parameters
        for name in pipeline_kwargs:
            if name not in known:
                hint = difflib.get_close_matches(name, known, 1)
                raise ValueError(
                    f"{type(self.pipe).__name__} has no argument {name!r}"
                    + (f"; did you mean {hint[0]!r}?" if hint else ".")
                )
        call = {"height": height, "width": width, row.frames_argument: num_frames}
        if fps is not None and row.fps_argument:
            call[row.fps_argument] = fps
        reserved = {
            *call,
            "output_type",
            "num_inference_steps",
            "generator",
            "latents",
            "guidance_scale",
            row.guidance,
        }
        if taken := sorted(reserved & pipeline_kwargs.keys()):
            raise ValueError(f"{', '.join(taken)} cannot be given as extra pipeline arguments; vidtrl sets them.")
        return call | row.call | pipeline_kwargs | (row.negative_call if negative else {})

    @contextlib.contextmanager
    def guidance(self, scale: float = 1.0) -> Iterator[dict[str, float]]:
        """Set the pipeline's classifier-free guidance for the block; yields the pipeline arguments that belong to it.

        Embedded (distilled) guidance is `embedded_guidance`.
        """
        call = (
            {"guidance_scale": self.embedded_guidance}
            if "guidance_scale" in inspect.signature(type(self.pipe).__call__).parameters
            else {}
        )
        if self.family.guidance == "guider":
            if scale not in self._guiders:
                self._guiders[scale] = ClassifierFreeGuidance(guidance_scale=scale)
            with patched(self.pipe, guider=self._guiders[scale]):
                yield call
        else:
            yield call | {self.family.guidance: scale}

    def _to_condition(self, caught: dict[str, Any], latent_shape: tuple[int, int, int, int]) -> Condition:
        row = self.family
        hidden, timestep = caught.pop("hidden_states"), caught.pop("timestep")
        caught.pop("return_dict", None)
        for name in row.tie_to_timestep:
            caught.pop(name)
        sample: dict[str, Tensor] = {}
        shared: dict[str, Any] = {}
        for name, value in caught.items():
            if name in row.unbatched:
                sample[name] = value[None]
            elif isinstance(value, Tensor) and value.ndim and value.shape[0] == 1:
                sample[name] = value
            elif value is not None:
                shared[name] = value
        dim = layout.CHANNEL_DIM[row.layout]
        used = self.pack(torch.zeros(1, *latent_shape)).shape[dim]
        if hidden.shape[dim] > used:
            sample["hidden_states"] = hidden.narrow(dim, used, hidden.shape[dim] - used)
        if timestep.ndim > 1:  # one timestep per token or frame; zero marks tokens that are given, not denoised
            sample["timestep"] = (timestep > 0).float()
            if bool((timestep == 0).any()):
                sample["fixed_mask"] = layout.token_mask(timestep == 0, self._patch, latent_shape).float()
        if row.fixed_frames:
            sample["fixed_mask"] = torch.zeros(1, 1, *latent_shape[1:], device=hidden.device)
            sample["fixed_mask"][:, :, : row.fixed_frames] = 1
        if "fixed_mask" in sample:
            sample["fixed_latents"] = self.unpack(hidden.narrow(dim, 0, used), latent_shape).float()
        dtype = next(iter(self.denoisers.values())).dtype
        return Condition([sample], shared, tuple(latent_shape), dtype, timestep.dtype)

    def pack(self, latents: Tensor) -> Tensor:
        """Canonical (B, C, f, h, w) -> the denoiser's layout."""
        return layout.pack(latents, self.family.layout, self._patch)

    def unpack(self, hidden: Tensor, latent_shape: tuple[int, int, int, int]) -> Tensor:
        """The denoiser's layout -> canonical (B, C, f, h, w)."""
        return layout.unpack(hidden, self.family.layout, self._patch, latent_shape)

    @torch.no_grad()
    def encode(self, videos: Tensor | list[Tensor]) -> tuple[Tensor, Tensor]:
        """Videos in [0, 1] -> mean and standard deviation of the latents' posterior.

        Args:
            videos: (B, F, C, H, W), or a list of (F, C, H, W) of one size; values in [0, 1].

        Returns:
            two canonical normalised float32 tensors (B, C, f, h, w).

        Raises:
            ValueError: an invalid size; the message says the nearest valid one.
        """
        vae = self._vae()
        videos = torch.stack(list(videos)) if not isinstance(videos, Tensor) else videos
        if videos.ndim != 5 or videos.shape[2] != 3:
            raise ValueError(f"videos must be (B, F, 3, H, W) or a list of (F, 3, H, W), got {tuple(videos.shape)}.")
        self.latent_shape(videos.shape[1], *videos.shape[3:])
        low, high = self.family.pixel_range
        pixels = (videos.float() * (high - low) + low).transpose(1, 2)
        moments = []
        for chunk in pixels.split(self.family.vae_batch or len(pixels)):
            posterior = vae.encode(chunk.to(device=vae.device, dtype=vae.dtype)).latent_dist
            moments.append((posterior.mean.float(), posterior.std.float()))
        mean, std = (torch.cat(m) for m in zip(*moments, strict=True))
        return self.normalize(mean), std * self._latents_scale.to(std.device).abs()

    @torch.no_grad()
    def decode(self, latents: Tensor, chunk_size: int | None = None) -> list[Tensor]:
        """Canonical latents (B, C, f, h, w) -> B videos (F, C, H, W), float32 in [0, 1], as long as the pipeline's.

        Args:
            latents: clean canonical latents.
            chunk_size: clips per VAE call; all at once by default.
        """
        vae = self._vae()
        low, high = self.family.pixel_range
        videos = []
        for chunk in latents.split(self.family.vae_batch or chunk_size or len(latents)):
            z = self.denormalize(chunk).to(device=vae.device, dtype=vae.dtype)
            # timestep-conditioned decoders (LTX 0.9.1 and later) are asked for the clean end, as the pipeline does
            extra = (z.new_zeros(len(z)),) if vae.config.get("timestep_conditioning") else ()
            pixels = vae.decode(z, *extra, return_dict=False)[0].float()
            pixels = pixels.transpose(1, 2) if self.family.decoded_layout == "BCFHW" else pixels
            pixels = pixels[:, self.family.dropped_frames :]
            videos.extend(((pixels - low) / (high - low)).clamp(0, 1).unbind())
        return videos

    def normalize(self, z: Tensor) -> Tensor:
        """The VAE's latents -> canonical normalised latents, float32."""
        return (z.float() - self._latents_mean.to(z.device)) * self._latents_scale.to(z.device)

    def denormalize(self, latents: Tensor) -> Tensor:
        """Canonical normalised latents -> what `vae.decode` takes, float32."""
        latents = latents.float()
        return latents / self._latents_scale.to(latents.device) + self._latents_mean.to(latents.device)

    def _vae(self) -> nn.Module:
        if self.pipe.vae is None:
            raise ValueError("The VAE is offloaded; call restore_encoders() first.")
        return self.pipe.vae

    def expert(self, sigma: float) -> str:
        """Which of `denoisers` works at noise level `sigma`."""
        if self.boundary is None:
            return next(iter(self.denoisers))
        t = float(self.timestep(torch.tensor(float(sigma))))
        return "transformer" if t >= self.boundary * self.schedule.num_train_timesteps else "transformer_2"

    def timestep(self, sigma: Tensor) -> Tensor:
        """The timestep that the denoiser is given at `sigma` (any shape), float32."""
        return self.schedule.timestep(sigma)

    def velocity(
        self,
        latents: Tensor,
        sigma: float | Tensor,
        condition: Condition,
        *,
        denoiser: nn.Module | dict[str, nn.Module] | None = None,
    ) -> Tensor:
        """The model's velocity noise - x0 at x_sigma. Gradients flow; the caller sets autocast.

        Args:
            latents: x_sigma, canonical (B, C, f, h, w); in the modes of `CausalAttention` f need not be the condition's.
            sigma: noise level in (0, 1], float or (B,); or (B, f) in [0, 1], one per latent frame, where the family's
                `frame_sigma` allows it.
            condition: of B clips, or of one clip used for all.
            denoiser: the wrapped (DDP, PEFT, compiled) module to call instead of the model's own, or a dict by expert
                name.

        Returns:
            (B, C, f, h, w) float32.

        Raises:
            ValueError: sigmas that differ within the batch where the family (or a two-expert boundary between them)
                does not allow it, noise levels per frame where it takes none, or a condition of another batch size.
        """
        batch = len(latents)
        if len(condition) == 1 and batch > 1:
            condition = condition[[0] * batch]
        if len(condition) != batch:
            raise ValueError(f"{batch} latents but {len(condition)} conditions; they must match.")
        name = self._expert_of_batch(sigma)
        if isinstance(denoiser, dict):
            denoiser = denoiser.get(name)
        call = denoiser if denoiser is not None else self.denoisers[name]
        dtype = self.denoisers[name].dtype

        x = latents.float()
        sigma = torch.as_tensor(sigma, dtype=torch.float32, device=x.device)
        sigma = sigma if sigma.ndim == 2 else sigma.expand(batch)
        groups = condition.batches()
        parts = [
            (rows, self._velocity(call, dtype, x[rows], sigma[rows], tensors, condition))
            if len(groups) > 1
            else (rows, self._velocity(call, dtype, x, sigma, tensors, condition))
            for rows, tensors in groups
        ]
        if len(parts) == 1:
            return parts[0][1]
        order = torch.tensor([i for rows, _ in parts for i in rows], device=x.device).argsort()
        return torch.cat([v for _, v in parts])[order]

    def _expert_of_batch(self, sigma: float | Tensor) -> str:
        if isinstance(sigma, Tensor) and sigma.ndim == 2:
            if not self.family.frame_sigma or self.boundary is not None:
                raise ValueError(
                    f"The {self.family.name} family{' with two experts' if self.boundary is not None else ''} takes one sigma "
                    "per clip, not one per latent frame."
                )
            return next(iter(self.denoisers))
        mixed = isinstance(sigma, Tensor) and sigma.numel() > 1
        if mixed and not self.per_sample_sigma and bool((sigma != sigma[0]).any()):
            raise ValueError(
                f"The {self.family.name} family takes one sigma per batch (its denoiser is wrong for mixed noise levels); "
                "pass a single sigma."
            )
        if self.boundary is None:  # no need to wait for the value on the device
            return next(iter(self.denoisers))
        if not mixed:
            return self.expert(float(sigma))
        names = {self.expert(s) for s in sigma.tolist()}
        if len(names) > 1:
            raise ValueError(
                f"The batch mixes sigmas of both experts (boundary {self.boundary}); keep each batch on one side."
            )
        return names.pop()

    def _velocity(
        self,
        call: nn.Module,
        dtype: torch.dtype,
        x: Tensor,
        sigma: Tensor,
        tensors: dict[str, Tensor],
        condition: Condition,
    ) -> Tensor:
        row, device = self.family, x.device
        fixed = None
        if "fixed_mask" in tensors:
            fixed, given = (tensors[k].to(device) for k in ("fixed_mask", "fixed_latents"))
            x_in = torch.lerp(x, given, fixed)
        else:
            x_in = x
        if self.schedule.is_vp:
            x_in = x_in / self.noise_scale(sigma).reshape(-1, 1, 1, 1, 1)
        hidden = self.pack(x_in).to(dtype)
        dim = layout.CHANNEL_DIM[row.layout]
        channels = hidden.shape[dim]

        kwargs = map_tensors(condition.shared, lambda t: t.to(device))
        for name, value in tensors.items():
            if not name.startswith("fixed_"):
                value = value[0] if name in row.unbatched else value  # the same for all clips of a group
                kwargs[name] = value.to(device=device, dtype=dtype if value.dtype == condition.dtype else value.dtype)
        if "hidden_states" in kwargs:
            hidden = torch.cat([hidden, kwargs["hidden_states"].to(dtype)], dim)
        frames = x.shape[2]
        if row.frame_sigma and "timestep" in tensors and frames != condition.latent_shape[1] and sigma.ndim == 1:
            sigma = sigma[:, None].expand(-1, frames)  # the condition's timesteps are for another number of frames
        t = self.timestep(sigma)
        if sigma.ndim == 2:
            if tuple(sigma.shape) != (len(x), frames):
                raise ValueError(f"sigma is (B,) or (B, f) = {(len(x), frames)}, got {tuple(sigma.shape)}.")
            if row.frame_sigma == "token":
                t = t.repeat_interleave(x[0, 0, 0].numel() // self._patch[1] ** 2, 1)
            kwargs |= row.frame_call
        elif "timestep" in tensors:
            mask = tensors["timestep"].to(device)
            t = t.reshape(-1, *[1] * (mask.ndim - 1)) * mask
        # the pipeline's dtype: some cast the timestep to half precision, and the model is used to it
        t = t.to(dtype if condition.timestep_dtype == condition.dtype != torch.float32 else condition.timestep_dtype)
        kwargs |= {"hidden_states": hidden, "timestep": t, "return_dict": False}
        kwargs |= dict.fromkeys(row.tie_to_timestep, t)
        output = call(**kwargs)
        output = output if isinstance(output, Tensor) else output[0]  # Kandinsky 5 returns no tuple
        # learned-variance heads append channels that no sampler uses
        output = self.unpack(output.narrow(dim, 0, channels).float(), x.shape[1:])
        if self.schedule.is_vp:
            velocity = flow.vp_output_to_velocity(output, x_in, sigma, row.prediction) * row.sign
        else:
            velocity = output * row.sign
        if fixed is not None:  # given tokens move straight to their given value and carry no gradient
            velocity = torch.lerp(velocity, (x - given) / sigma.reshape(-1, 1, 1, 1, 1), fixed)
        return velocity

    def sigmas(self, num_inference_steps: int, latent_shape: tuple[int, int, int, int]) -> Tensor:
        """The stock scheduler's own grid for this size: (N + 1,) float32, descending, ends with 0."""
        return self.schedule.sigmas(num_inference_steps, latent_shape)

    def training_sigma(
        self, u: Tensor, latent_shape: tuple[int, int, int, int] | None = None, shift: float | str = "auto"
    ) -> Tensor:
        """Training times u in [0, 1) (B,) -> sigma (B,), float32.

        Args:
            u: as drawn by `flow.sample_u`.
            latent_shape: (C, f, h, w); needed where the model's shift depends on the size.
            shift: "auto" for the model's own shift, or a number. VP models map u (shifted, if a number is given) to the
                nearest timestep of their training table.
        """
        return self.schedule.training_sigma(u, latent_shape, shift)

    def native_weight(self, sigma: Tensor) -> Tensor:
        """w (B,) with w * MSE(velocity) == the loss in the model's own prediction (1 for flow models)."""
        return self.schedule.native_weight(sigma)

    def noise_scale(self, sigma: float | Tensor) -> float | Tensor:
        """x_flow / x_native: what multiplies unit noise to start at `sigma` as the pipeline does (1 for flow models)."""
        return self.schedule.noise_scale(sigma)

    def offload_encoders(self, keep: tuple[str, ...] = ()) -> None:
        """Drop text and image encoders and the VAE (all but `keep`) from device memory, once everything is cached.

        A model loaded from a path forgets them and reloads them later; a pipeline that was passed in keeps them on the
        CPU.
        """
        self._encoded = (None, [])
        for name, component in self.pipe.components.items():
            if isinstance(component, nn.Module) and name not in self.denoisers and name not in keep:
                passed_in = self._source is None
                self._offloaded[name] = component.to("cpu") if passed_in else None
                self.pipe.register_modules(**{name: None})

    @property
    def offloaded(self) -> bool:
        """Whether `offload_encoders` has dropped something that was not restored since."""
        return bool(self._offloaded)

    def restore_encoders(self) -> None:
        """Bring back what `offload_encoders` dropped, on the denoiser's device."""
        if not self._offloaded:
            return
        if self._source is not None:
            present = {k: v for k, v in self.pipe.components.items() if k not in self._offloaded}
            options = {k: v for k, v in self._source.items() if k not in ("path", *present)}
            loaded = type(self.pipe).from_pretrained(self._source["path"], **options, **present).components
        else:
            loaded = self._offloaded
        self.pipe.register_modules(**{name: loaded[name].to(self.device) for name in self._offloaded})
        if self.family.vae_tiling:
            self.pipe.vae.enable_tiling()
        self._offloaded = {}
