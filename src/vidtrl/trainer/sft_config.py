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
            Weight of the velocity error by sigma: `"none"` (the family's native loss), `"cosmap"`, `"min_snr"` or `"bell"` (that
            of CausVid's and Self Forcing's trainings: largest at 1/2, 0 at both ends).
        caption_dropout (`float`, *optional*, defaults to `0.1`):
            Share of samples trained with the empty prompt, which keeps classifier-free guidance working.
        causal (`str`, *optional*):
            Train a causal model, that generates block after block of frames and whose blocks see the past alone: with
            `"teacher_forcing"` each noisy block sees the clean blocks before it (twice the tokens; what generation does),
            with `"diffusion_forcing"` the noisy ones. Every block has its own noise level. Wan 2.1, Wan 2.2-TI2V-5B,
            SkyReels-V2 and LTX, text-to-video. `None` trains the usual bidirectional model.
        frames_per_block (`int`, *optional*, defaults to `3`):
            Latent frames of a block of a causal model. Clips have a multiple of that many latent frames.

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
        metadata={"help": "Weight of the error by sigma.", "choices": ["none", "cosmap", "min_snr", "bell"]},
    )
    caption_dropout: float = field(
        default=0.1, metadata={"help": "Share of samples trained with the empty prompt, for guidance."}
    )
    causal: str | None = field(
        default=None,
        metadata={
            "help": "Train a causal model: what a noisy block of frames sees of the past. Default: not causal.",
            "choices": ["teacher_forcing", "diffusion_forcing"],
        },
    )
    frames_per_block: int = field(default=3, metadata={"help": "Latent frames of a block of a causal model."})

    def __post_init__(self):
        super().__post_init__()
        for name, choices in (
            ("sigma_sampling", ("uniform", "logit_normal", "mode")),
            ("loss_weighting", ("none", "cosmap", "min_snr", "bell")),
        ):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} must be one of {', '.join(choices)}, not {getattr(self, name)!r}")
        if self.causal not in (None, "teacher_forcing", "diffusion_forcing"):
            raise ValueError(
                f"causal must be 'teacher_forcing' or 'diffusion_forcing' (or unset), not {self.causal!r}"
            )
        if self.frames_per_block < 1:
            raise ValueError(f"frames_per_block must be at least 1, not {self.frames_per_block}")
        if not 0 <= self.caption_dropout <= 1:
            raise ValueError(f"caption_dropout is a probability, not {self.caption_dropout}")
        if self.shift != "auto":
            try:
                self.shift = float(self.shift)
            except ValueError as error:
                raise ValueError(f"shift must be 'auto' or a positive number, not {self.shift!r}") from error
            if self.shift <= 0:
                raise ValueError(f"shift must be 'auto' or a positive number, not {self.shift}")
