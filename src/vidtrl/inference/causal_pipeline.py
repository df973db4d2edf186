"""Sample a causal student: block after block upon a KV cache, streamed, with prompts that may change on the way."""

import dataclasses
import math
import os
from collections.abc import Iterator
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from ..diffusion.distribution_matching import few_step_sigmas
from ..models.capture import Condition
from ..models.causal import CausalAttention, KVCache
from ..models.video_model import VideoModel
from ..rollout.causal import causal_rollout, recache
from ..rollout.sampling import draw_noise
from .distill_config import StudentConfig, read_distill_config
from .export import load_student, student_directory
from .optimization import InferenceOptimization
from .streaming_vae import StreamingDecoder


Prompt = str | list[str]


class CausalVideoPipeline:
    """
    A causal few-step student over a stock pipeline's components (Self Forcing,
    https://huggingface.co/papers/2506.08009).

    Each block of `frames_per_block` latent frames is denoised in a few steps while it attends to the keys and values
    of the blocks before it, then enters the cache itself: the rollout that the student was trained with. The text's
    keys and values are computed once per prompt. A switch of the prompt computes the cache anew under the new one
    (LongLive, https://huggingface.co/papers/2509.22622).

    Args:
        pipe (`DiffusionPipeline`): A text-to-video pipeline whose denoiser is the student: Wan 2.1, Wan 2.2 5B,
            SkyReels-V2 or LTX. Its attention processors are replaced by ones that act as before outside this class.
        denoising_steps, shift, sampler, frames_per_block, window, sink, context_noise: As in [`StudentConfig`].

    Attributes:
        pipe: The pipeline; move it with [`~CausalVideoPipeline.to`].
        sigmas: The noise levels visited, (S,) float32.

    Raises:
        `ValueError`: A family whose attention cannot be made causal, or numbers that do not fit together.

    Example:

    ```python
    >>> pipe = CausalVideoPipeline.from_pretrained("me/wan-causal", torch_dtype=torch.bfloat16).to("cuda")
    >>> stream = pipe.stream("a dog runs on a beach", height=480, width=832, generator=torch.Generator().manual_seed(0))
    >>> for frames in stream:  # (F, 3, 480, 832) in [0, 1], block after block
    ...     show(frames)
    ...     if tired_of_the_dog:
    ...         stream.switch("a cat runs on a beach")
    ```
    """

    def __init__(
        self,
        pipe: DiffusionPipeline,
        *,
        denoising_steps: list[float],
        shift: float,
        frames_per_block: int,
        sampler: str = "renoise",
        window: int | None = None,
        sink: int = 0,
        context_noise: float = 0.0,
    ):
        # one place knows which values are valid
        self.config = StudentConfig(
            base_model=str(pipe.config.get("_name_or_path") or type(pipe).__name__),
            denoising_steps=denoising_steps,
            shift=shift,
            frames_per_block=frames_per_block,
            sampler=sampler,
            window=window,
            sink=sink,
            context_noise=context_noise,
        )
        self.pipe = pipe
        self.model = VideoModel(pipe)
        self.causal = CausalAttention(self.model)
        self.sigmas = few_step_sigmas(denoising_steps, shift)

    @classmethod
    def from_pretrained(
        cls,
        directory: str | os.PathLike,
        base_model: str | os.PathLike | DiffusionPipeline | None = None,
        torch_dtype: torch.dtype | None = None,
        **load_kwargs: Any,
    ) -> "CausalVideoPipeline":
        """
        Load a causal student as the trainer saved it.

        Args:
            directory, base_model, torch_dtype, **load_kwargs: As in [`load_student`].

        Raises:
            `ValueError`: The student is bidirectional, or nothing can be loaded from there.
        """
        folder = student_directory(directory)
        config = read_distill_config(folder)
        if not config.causal:
            raise ValueError(
                f"The student in {os.fspath(directory)!r} is bidirectional: its whole video is denoised at once. Use "
                "load_student, which returns the stock pipeline."
            )
        pipe = load_student(folder, base_model, torch_dtype, **load_kwargs)
        names = ("denoising_steps", "shift", "frames_per_block", "sampler", "window", "sink", "context_noise")
        return cls(pipe, **{name: getattr(config, name) for name in names})

    def to(self, *args: Any, **kwargs: Any) -> "CausalVideoPipeline":
        """`pipe.to`, for the device or dtype; returns self."""
        self.pipe.to(*args, **kwargs)
        return self

    def optimize(self, optimization: InferenceOptimization) -> "CausalVideoPipeline":
        """
        Apply an [`InferenceOptimization`], as far as it goes together with a KV cache.

        With `compile`, attention stays out of the compiled graphs (`fullgraph` does not apply): the number of keys
        changes from block to block, and with it every graph would be compiled again.

        Args:
            optimization ([`InferenceOptimization`]): Without `cache` and `context_parallel`.

        Returns:
            [`CausalVideoPipeline`]: self.

        Raises:
            `ValueError`: What does not work here, and what `apply` refuses.
        """
        if optimization.cache is not None:
            raise ValueError("diffusers' caches reuse steps of one denoising run and know no blocks; leave cache out.")
        if optimization.context_parallel is not None:
            raise ValueError("context_parallel does not work with a KV cache; leave it out.")
        if optimization.compile:
            for name, module in self.pipe.transformer.named_modules():
                if name.endswith(("attn1", "attn2")):
                    module.forward = torch.compiler.disable(module.forward)
            kwargs = optimization.compile_kwargs | {"fullgraph": False}
            optimization = dataclasses.replace(optimization, compile_kwargs=kwargs)
        optimization.apply(self.pipe)
        return self

    def stream(
        self,
        prompt: Prompt | dict[int, Prompt],
        *,
        height: int,
        width: int,
        num_frames: int | None = None,
        num_blocks: int | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        output_type: str = "pt",
        **pipeline_kwargs: Any,
    ) -> "VideoStream":
        """
        Generate block after block, each when it is asked for.

        With a `window` memory is bounded and a stream may be endless. When the model runs out of positions (Wan has
        1024), the last clean frames start a new cache at position 0. Without a `window` a stream ends there with an
        error.

        Args:
            prompt (`str`, `list[str]` or `dict`): One prompt, one per clip, or a schedule {block: prompt} that begins
                with block 0.
            height, width (`int`): In pixels.
            num_frames (`int`, *optional*): Video frames to generate; they must be whole blocks.
            num_blocks (`int`, *optional*): Or the number of blocks. Endless without both.
            generator (`torch.Generator` or `list`, *optional*): One, or one per clip. Equal seeds give equal videos.
            output_type (`str`, *optional*, defaults to `"pt"`): `"pt"` for frames, `"latent"` for canonical latents
                (B, C, f, h, w).
            **pipeline_kwargs: Of the pipeline's call, such as `max_sequence_length`.

        Returns:
            [`VideoStream`]: An iterator over float32 frames (F, C, H, W) in [0, 1], or lists of them, one per clip,
            where `prompt` is a list.

        Raises:
            `ValueError`: A size that is not valid, frames that are not whole blocks, a schedule without block 0.
        """
        return VideoStream(
            self, prompt, height, width, num_frames, num_blocks, generator, output_type, pipeline_kwargs
        )

    @torch.no_grad()
    def __call__(self, prompt: Prompt | dict[int, Prompt], **stream_kwargs: Any) -> Tensor | list[Tensor]:
        """
        Generate a whole video.

        Args:
            prompt, **stream_kwargs: As in [`~CausalVideoPipeline.stream`], with `num_frames` or `num_blocks`.

        Returns:
            `Tensor` or `list[Tensor]`: Float32 frames (F, C, H, W) in [0, 1], or one video per prompt of a list;
            canonical latents (B, C, f, h, w) with `output_type="latent"`.
        """
        output_type = stream_kwargs.pop("output_type", "pt")
        _check_output_type(output_type)
        stream = self.stream(prompt, output_type="latent", **stream_kwargs)
        if stream.num_blocks is None:
            raise ValueError("A whole video needs num_frames or num_blocks; stream(...) generates without end.")
        latents = torch.cat(list(stream), 2)
        if output_type == "latent":
            return latents
        videos = self.model.decode(latents)
        return videos if stream.batched else videos[0]


class VideoStream(Iterator):
    """
    An iterator over the blocks of a video that is being generated; see [`CausalVideoPipeline.stream`].

    Attributes:
        num_blocks: How many blocks there will be; `None` for no end.
        block: How many there were.
        batched: Whether a list of prompts was given.
    """

    def __init__(
        self,
        pipeline: CausalVideoPipeline,
        prompt: Prompt | dict[int, Prompt],
        height: int,
        width: int,
        num_frames: int | None,
        num_blocks: int | None,
        generator: torch.Generator | list[torch.Generator] | None,
        output_type: str,
        pipeline_kwargs: dict[str, Any],
    ):
        self._pipeline, self._generator, self._pipeline_kwargs = pipeline, generator, pipeline_kwargs
        self._size = height, width
        config, model = pipeline.config, pipeline.model
        self._schedule = dict(prompt) if isinstance(prompt, dict) else {0: prompt}
        if 0 not in self._schedule:
            raise ValueError(f"A prompt schedule begins with block 0; got blocks {sorted(self._schedule)}.")
        if num_frames is not None and num_blocks is not None:
            raise ValueError("Give num_frames or num_blocks, not both.")
        if num_frames is not None:
            latent_frames = model.latent_shape(num_frames, height, width)[1]
            pipeline.causal.check_frames(latent_frames, config.frames_per_block)
            num_blocks = latent_frames // config.frames_per_block
        if num_blocks is not None and num_blocks < 1:
            raise ValueError(f"num_blocks must be at least 1, got {num_blocks}.")
        _check_output_type(output_type)
        self._decode = StreamingDecoder(model) if output_type == "pt" else None
        self.num_blocks, self.block = num_blocks, 0
        self.batched = isinstance(self._schedule[0], list)
        self._clips = len(self._schedule[0]) if self.batched else 1
        # the clip's length does not matter to the condition of a block
        self._block_video_frames = (config.frames_per_block - 1) * model.temporal_factor + model.family.frame_offset
        self._block_shape = model.latent_shape(self._block_video_frames, height, width)
        self._cache = KVCache(config.window, config.sink)
        self._position = 0  # of the next block's first frame
        self._recent: list[Tensor] = []  # the clean blocks that the next one sees
        self._blocks: Iterator[Tensor] | None = None
        self._condition = self._encode(self._schedule.pop(0))

    def switch(self, prompt: Prompt) -> None:
        """
        Go on with another prompt from the next block on.

        Args:
            prompt (`str` or `list[str]`): As many as there are clips.
        """
        self._condition = self._encode(prompt)
        self._restart(self._position)

    def __next__(self) -> Tensor | list[Tensor]:
        if self.block == self.num_blocks:
            raise StopIteration
        if self.block in self._schedule:
            self.switch(self._schedule.pop(self.block))
        config, limit = self._pipeline.config, self._max_positions()
        if limit is not None and self._position + config.frames_per_block > limit:
            if config.window is None:
                raise ValueError(
                    f"The model knows {limit} latent frames, and this stream attends to all of its past. Use a student with a "
                    "window, which streams without end."
                )
            self._restart(sum(block.shape[2] for block in self._recent))
        if self._blocks is None:
            self._blocks = self._rollout()
        latents = next(self._blocks)
        self.block, self._position = self.block + 1, self._position + latents.shape[2]
        self._remember(latents)
        if self._decode is None:
            return latents
        videos = self._decode(latents)
        return videos if self.batched else videos[0]

    def _rollout(self) -> Iterator[Tensor]:
        config, shape = self._pipeline.config, self._block_shape

        def noise() -> Iterator[Tensor]:
            while True:
                yield draw_noise(self._clips, shape, self._generator)

        return causal_rollout(
            self._pipeline.model,
            self._pipeline.causal,
            self._condition,
            noise(),
            self._pipeline.sigmas.tolist(),
            frames_per_block=config.frames_per_block,
            draw=lambda block, step: draw_noise(self._clips, shape, self._generator),
            context_noise=config.context_noise,
            cache=self._cache,
            sampler=config.sampler,
        )

    def _restart(self, position: int) -> None:
        """Compute the cache anew under the present prompt, so that the next block is at `position`."""
        self._position, self._blocks = position, None
        if not self._recent:
            self._cache.reset(position)
            return
        latents = torch.cat(self._recent, 2)
        recache(
            self._pipeline.model,
            self._pipeline.causal,
            self._condition,
            latents,
            self._cache,
            frames_per_block=self._pipeline.config.frames_per_block,
            start=position - latents.shape[2],
        )

    def _remember(self, latents: Tensor) -> None:
        self._recent.append(latents)
        window, size = self._pipeline.config.window, self._pipeline.config.frames_per_block
        if window is not None:
            visible = math.ceil((window - size) / size)
            self._recent = self._recent[-visible:] if visible else []

    def _encode(self, prompt: Prompt) -> Condition:
        prompts = prompt if isinstance(prompt, list) else [prompt]
        if len(prompts) != self._clips or isinstance(prompt, list) != self.batched:
            raise ValueError(f"This stream has {self._clips} clips; give one prompt for each, as at its start.")
        height, width = self._size
        return self._pipeline.model.condition(
            prompts, height, width, self._block_video_frames, **self._pipeline_kwargs
        )

    def _max_positions(self) -> int | None:
        return self._pipeline.pipe.transformer.config.get("rope_max_seq_len")


def _check_output_type(output_type: str) -> None:
    if output_type not in ("pt", "latent"):
        raise ValueError(f"output_type must be 'pt' or 'latent', got {output_type!r}.")
