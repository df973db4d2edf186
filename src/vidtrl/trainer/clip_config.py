"""Arguments of the trainers that learn from clips."""

from dataclasses import dataclass, field
from typing import Any

from .base_config import VideoTrainingConfig


@dataclass
class ClipConfig(VideoTrainingConfig):
    r"""
    Base of the configurations of trainers that learn from clips: [`VideoTrainingConfig`] plus the arguments below.

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

    Example:

    ```python
    >>> from vidtrl.trainer.clip_config import ClipConfig

    >>> ClipConfig("run", resolution=[480], num_frames=81, windows="center").shape_rules()["resolution"]
    [480]
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

    def __post_init__(self):
        super().__post_init__()
        if self.windows not in ("first", "center", "all"):
            raise ValueError(f"windows must be one of first, center, all, not {self.windows!r}")

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
