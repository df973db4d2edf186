"""What the built-in rewards share: the check of a clip, and an even choice of its frames."""

import torch


def check_video(video: torch.Tensor, min_frames: int = 1) -> torch.Tensor:
    """Return the clip in float32 on its own device, gradients kept. `ValueError` for another shape or range."""
    if video.ndim != 4 or video.shape[1] != 3 or not video.is_floating_point():
        raise ValueError(
            f"rewards take float clips of shape (F, 3, H, W), got {tuple(video.shape)} {video.dtype}; divide uint8 "
            "frames by 255"
        )
    if len(video) < min_frames:
        raise ValueError(f"this reward compares {min_frames} consecutive frames, the clip has {len(video)}")
    low, high = torch.stack(video.detach().aminmax()).tolist()
    if not (low >= -0.01 and high <= 1.01):  # false for NaN as well
        raise ValueError(
            f"rewards take values in [0, 1], this clip has [{low:g}, {high:g}]; clamp what the VAE returns"
        )
    return video.float()


def even_frames(video: torch.Tensor, num_frames: int) -> torch.Tensor:
    """At most `num_frames` frames, evenly over the whole clip, the first and the last among them."""
    count = min(num_frames, len(video))
    return video[torch.linspace(0, len(video) - 1, count).round().long().to(video.device)]
