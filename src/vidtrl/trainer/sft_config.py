"""Arguments of [`VideoSFTTrainer`]."""

from dataclasses import dataclass, field

from .clip_config import ClipConfig


@dataclass
class VideoSFTConfig(ClipConfig):
    r"""
    Configuration of [`VideoSFTTrainer`]: [`ClipConfig`] plus the arguments below.

    Args:
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
