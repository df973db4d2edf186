"""Arguments of [`VideoSFTTrainer`]."""

from dataclasses import dataclass, field
from typing import Any

from .base_config import VideoTrainingConfig


@dataclass
class VideoSFTConfig(VideoTrainingConfig):
    r"""
    Configuration of [`VideoSFTTrainer`]: [`VideoTrainingConfig`] plus the arguments below.

    The shape of the training clips is either fixed (`height`, `width` and `num_frames`), or a set of buckets
    (`resolution` with `num_frames` or `token_budget`, or `buckets`).

    Args:
        > Parameters that control the data

        resolution (`list[int]`, *optional*):
            Square roots of the bucket areas: 480 means 480x480 pixels, spent on another shape for another aspect ratio.
        aspect_ratios (`list[float]`, *optional*):
            Width over height of the buckets. Defaults to 9:16, 3:4, 1:1, 4:3 and 16:9.
        token_budget (`int`, *optional*):
            Largest number of latent positions (frames x height x width) of a bucket.
        buckets (`list[str]`, *optional*):
            The buckets themselves, as `frames x height x width`: `["17x64x64", "33x64x96"]`.
        windows (`str`, *optional*, defaults to `"first"`):
            What to use of a longer clip: its `"first"` frames, those at the `"center"`, or `"all"` windows that fit.
        max_bad_fraction (`float`, *optional*, defaults to `0.1`):
            Share of unreadable clips above which the run stops.
        cache (`bool`, *optional*, defaults to `True`):
            Encode every clip and prompt once before training, store them, and drop VAE and text encoder from memory.
            Clips keep mean and standard deviation of their posterior, so each use draws fresh latents.
        cache_dir (`str`, *optional*):
            Where. Default: `vidtrl` in the Hugging Face home directory, shared by all runs.

        > Parameters that control training

        sigma_sampling (`str`, *optional*, defaults to `"logit_normal"`):
            How training times are drawn: `"uniform"`, `"logit_normal"` or `"mode"`
            (https://huggingface.co/papers/2403.03206, section 3.1).
        shift (`str` or `float`, *optional*, defaults to `"auto"`):
            Shift of the drawn times towards noise: the model's own (`"auto"`), or a number (1 is none).
        loss_weighting (`str`, *optional*, defaults to `"none"`):
            Weight of the velocity error by sigma: `"none"` (the family's native loss), `"cosmap"` or `"min_snr"`.
        caption_dropout (`float`, *optional*, defaults to `0.1`):
            Share of samples trained with the empty prompt, which keeps classifier-free guidance working.

    Example:

    ```python
    >>> from vidtrl import VideoSFTConfig

    >>> args = VideoSFTConfig("wan-sft", height=480, width=832, num_frames=81, fps=16, max_steps=1000)
    ```
    """

    # Parameters that control the data
    resolution: list[int] | None = field(
        default=None, metadata={"help": "Square roots of the bucket areas, such as 480."}
    )
    aspect_ratios: list[float] | None = field(
        default=None, metadata={"help": "Width over height of the buckets. Default: 9:16 3:4 1:1 4:3 16:9."}
    )
    token_budget: int | None = field(
        default=None, metadata={"help": "Largest number of latent positions of a bucket."}
    )
    buckets: list[str] | None = field(
        default=None, metadata={"help": "The buckets, as frames x height x width: 17x64x64 33x64x96."}
    )
    windows: str = field(
        default="first",
        metadata={"help": "What to use of a longer clip.", "choices": ["first", "center", "all"]},
    )
    max_bad_fraction: float = field(
        default=0.1, metadata={"help": "Share of unreadable clips above which the run stops."}
    )
    cache: bool = field(
        default=True, metadata={"help": "Encode clips and prompts once, store them, and free the encoders."}
    )
    cache_dir: str | None = field(
        default=None, metadata={"help": "Where the cache goes. Default: `vidtrl` in the Hugging Face home."}
    )

    # Parameters that control training
    sigma_sampling: str = field(
        default="logit_normal",
        metadata={"help": "How training times are drawn.", "choices": ["uniform", "logit_normal", "mode"]},
    )
    shift: str = field(
        default="auto", metadata={"help": "Shift towards noise: the model's own (auto) or a number (1 is none)."}
    )
    loss_weighting: str = field(
        default="none",
        metadata={"help": "Weight of the error by sigma.", "choices": ["none", "cosmap", "min_snr"]},
    )
    caption_dropout: float = field(
        default=0.1, metadata={"help": "Share of samples trained with the empty prompt, for guidance."}
    )

    def __post_init__(self):
        super().__post_init__()
        for name, choices in (
            ("sigma_sampling", ("uniform", "logit_normal", "mode")),
            ("loss_weighting", ("none", "cosmap", "min_snr")),
            ("windows", ("first", "center", "all")),
        ):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} must be one of {', '.join(choices)}, not {getattr(self, name)!r}")
        if not 0 <= self.caption_dropout <= 1:
            raise ValueError(f"caption_dropout is a probability, not {self.caption_dropout}")
        if self.shift != "auto":
            try:
                self.shift = float(self.shift)
            except ValueError as error:
                raise ValueError(f"shift must be 'auto' or a positive number, not {self.shift!r}") from error
            if self.shift <= 0:
                raise ValueError(f"shift must be 'auto' or a positive number, not {self.shift}")

    def shape_rules(self) -> dict[str, Any]:
        """The arguments of [`~vidtrl.data.planner.ShapePlan`] that this configuration states."""
        names = ("height", "width", "num_frames", "resolution", "aspect_ratios", "token_budget", "fps", "windows")
        rules = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        if self.buckets is not None:
            try:
                rules["buckets"] = [tuple(int(n) for n in bucket.split("x")) for bucket in self.buckets]
                assert all(len(bucket) == 3 for bucket in rules["buckets"])
            except (ValueError, AssertionError) as error:
                raise ValueError(
                    f"buckets are frames x height x width such as 17x64x64, not {self.buckets}"
                ) from error
        return rules
