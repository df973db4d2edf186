"""Long videos that training continues from step to step (LongLive, https://huggingface.co/papers/2509.22622, section 3.2)."""

import json
import os
import random
from dataclasses import asdict, dataclass

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor


@dataclass
class Stream:
    """
    A batch of videos under way.

    Args:
        rows (`list[int]`): The dataset's rows whose prompts are followed at present.
        position (`int`): Latent frames generated so far.
        switch_at (`int`): Position from which on other prompts are followed; 0 for never again.
        sink (`Tensor`): (B, C, sink, h, w), the first latent frames, which stay visible; possibly none.
        tail (`Tensor`): (B, C, n, h, w), the last latent frames.
    """

    rows: list[int]
    position: int
    switch_at: int
    sink: Tensor
    tail: Tensor


class Streams:
    """
    The streams of this process, one for each micro-batch of a step.

    What is kept between steps are latents, not keys and values: those are computed anew from them with the present weights
    and prompt, which costs one pass over the window, makes a switch of prompts nothing special, and keeps checkpoints small.

    Args:
        num_frames (`int`): Latent frames of a whole video.
        new_frames (`int`): Latent frames that a step adds.
        keep (`int`): Latent frames of the tail that later blocks can see.
        sink (`int`): Latent frames of the beginning that they can see.
        prompt_switch (`bool`): Whether each video is continued under another prompt once.
    """

    def __init__(self, num_frames: int, new_frames: int, keep: int, sink: int, prompt_switch: bool):
        self.num_frames, self.new_frames, self.keep, self.sink = num_frames, new_frames, keep, sink
        self.prompt_switch = prompt_switch
        self.streams: dict[int, Stream] = {}

    def next(self, micro_step: int, rows: list[int]) -> Stream | None:
        """
        The stream to continue, its prompts switched if it is time.

        Args:
            micro_step (`int`): Which micro-batch of the step this is.
            rows (`list[int]`): Rows of the batch at hand, for a switch.

        Returns:
            [`Stream`] or `None`: `None` when a new video begins.
        """
        stream = self.streams.get(micro_step)
        if stream is None or stream.position + self.new_frames > self.num_frames or len(stream.rows) != len(rows):
            return None
        if stream.switch_at and stream.position >= stream.switch_at:
            stream.rows, stream.switch_at = list(rows), 0
        return stream

    def begin(self, micro_step: int, rows: list[int], latents: Tensor, seed: int) -> None:
        """Keep what a first window ends with; the seed decides where its prompts are switched."""
        first = latents.shape[2]
        switch = 0
        if self.prompt_switch:
            later = range(first, self.num_frames - self.new_frames + 1, self.new_frames)
            switch = random.Random(seed).choice(later) if later else 0
        latents = latents.detach()
        self.streams[micro_step] = Stream(
            list(rows), first, switch, latents[:, :, : self.sink].clone(), latents[:, :, -self.keep :].clone()
        )

    def drop(self, micro_step: int) -> None:
        """Begin a new video next time."""
        self.streams.pop(micro_step, None)

    def extend(self, micro_step: int, latents: Tensor) -> None:
        """Append new frames (B, C, n, h, w) to a stream."""
        stream = self.streams[micro_step]
        stream.tail = torch.cat([stream.tail, latents.detach()], 2)[:, :, -self.keep :].clone()
        stream.position += latents.shape[2]

    def save(self, path: str | os.PathLike) -> None:
        """Write all of them to a safetensors file."""
        tensors, meta = {}, {}
        for number, stream in self.streams.items():
            tensors |= {f"{number}.{name}": getattr(stream, name).cpu().contiguous() for name in ("sink", "tail")}
            plain = {n: v for n, v in asdict(stream).items() if n not in ("sink", "tail")}
            meta[str(number)] = json.dumps(plain)
        save_file(tensors, path, meta or None)  # safetensors cannot read empty metadata back

    def load(self, path: str | os.PathLike, device: torch.device) -> None:
        """Read them back."""
        with safe_open(path, framework="pt") as file:
            self.streams = {
                int(number): Stream(
                    **json.loads(plain),
                    sink=file.get_tensor(f"{number}.sink").to(device),
                    tail=file.get_tensor(f"{number}.tail").to(device),
                )
                for number, plain in (file.metadata() or {}).items()
            }
