"""Rewards for steady, well exposed, colourful clips. In [0, 1], 1 is best. Each states how a policy could cheat it.

Every reward is a function of one measurement of a clip. Where the measurement is differentiable it says so: gradients
flow from the returned scalar tensor to the clip.
"""

import io
from collections.abc import Callable

import torch
from PIL import Image

from .checks import check_video, even_frames


LUMA = (0.299, 0.587, 0.114)  # weights of R, G, B in perceived brightness (ITU-R BT.601)


def temporal_roughness(video: torch.Tensor) -> torch.Tensor:
    """
    Mean absolute second difference over time of all pixels. Differentiable.

    Args:
        video (`torch.Tensor`): Float tensor of shape (F, 3, H, W) in [0, 1], F >= 3.

    Returns:
        `torch.Tensor`: Scalar in [0, 2]. 0 where every pixel changes at a constant rate, so for a frozen clip too.
    """
    x = check_video(video, 3)
    return (x[2:] - 2 * x[1:-1] + x[:-2]).abs().mean()


def flicker(video: torch.Tensor) -> torch.Tensor:
    """
    Mean absolute second difference over time of each frame's mean colour, relative to the clip's mean. Differentiable.

    Args:
        video (`torch.Tensor`): Float tensor of shape (F, 3, H, W) in [0, 1], F >= 3.

    Returns:
        `torch.Tensor`: Scalar >= 0. A frame-to-frame brightness change of +-5 % gives 0.2; a steady fade gives 0.
    """
    mean = check_video(video, 3).mean((2, 3))  # (F, 3)
    return (mean[2:] - 2 * mean[1:-1] + mean[:-2]).abs().mean() / mean.mean().clamp(min=1 / 255)


def colorfulness(video: torch.Tensor) -> torch.Tensor:
    """
    Colourfulness of Hasler and Süsstrunk, "Measuring colourfulness in natural images" (2003,
    https://doi.org/10.1117/12.477378), M^(3) of its section 5, averaged over the frames. Differentiable.

    Args:
        video (`torch.Tensor`): Float tensor of shape (F, 3, H, W) in [0, 1].

    Returns:
        `torch.Tensor`: Scalar on the paper's scale for 8-bit colours: 0 grey, 33 moderately, 59 quite, 82 highly and
        109 extremely colourful.
    """
    red, green, blue = (255 * check_video(video)).unbind(1)  # (F, H, W)
    opponents = torch.stack([red - green, (red + green) / 2 - blue], 1).flatten(2)  # (F, 2, H * W)
    # the tiny term keeps the gradient of the square root finite at grey
    spread = (opponents.var(2, unbiased=False).sum(1) + 1e-6).sqrt()
    offset = (opponents.mean(2).square().sum(1) + 1e-6).sqrt()
    return (spread + 0.3 * offset).mean()


def clipped_light(video: torch.Tensor) -> torch.Tensor:
    """
    Share of pixels that are crushed to black or blown out to white. Differentiable: a pixel counts gradually over the
    last 5 % at either end of the range.

    Args:
        video (`torch.Tensor`): Float tensor of shape (F, 3, H, W) in [0, 1].

    Returns:
        `torch.Tensor`: Scalar in [0, 1].
    """
    luma = torch.einsum("fchw,c->fhw", check_video(video), torch.tensor(LUMA, device=video.device))
    return ((0.05 - luma).clamp(min=0) + (luma - 0.95).clamp(min=0)).clamp(max=0.05).mean() / 0.05


def jpeg_bits_per_pixel(video: torch.Tensor, quality: int = 95, num_frames: int = 8) -> float:
    """
    Size of a clip's frames as JPEG files. Not differentiable.

    Args:
        video (`torch.Tensor`): Float tensor of shape (F, 3, H, W) in [0, 1].
        quality (`int`, *optional*, defaults to `95`): JPEG quality, from 1 to 95.
        num_frames (`int`, *optional*, defaults to `8`): Frames looked at, evenly over the clip.

    Returns:
        `float`: Bits per pixel, the mean over the frames. A blank frame needs less than 0.5, noise more than 10.
    """
    frames = even_frames(check_video(video), num_frames)
    pixels = (frames.clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
    size = 0
    for frame in pixels:
        buffer = io.BytesIO()
        Image.fromarray(frame).save(buffer, format="JPEG", quality=quality)
        size += buffer.tell()
    return 8 * size / pixels[..., 0].size


def temporal_smoothness_reward(videos, **kwargs) -> list[float]:
    """
    `exp(-temporal_roughness / 0.05)`: 1 for constant change, 0.37 where pixels jitter by 5 % of the range.

    Failure mode: freezing and blurring raise it, fast sharp motion lowers it. Pair it with `"motion-magnitude"`, or use
    `"motion-smoothness"`, which gives nothing to a frozen clip. Differentiable through [`temporal_roughness`].

    ```python
    >>> import torch
    >>> from vidtrl.rewards import temporal_smoothness_reward

    >>> temporal_smoothness_reward(videos=[torch.full((5, 3, 32, 32), 0.5)])
    [1.0]
    ```
    """
    return [float(torch.exp(-temporal_roughness(v) / 0.05)) for v in videos]


def flicker_reward(videos, **kwargs) -> list[float]:
    """
    `exp(-flicker / 0.1)`: 1 for steady light and for a steady fade, 0.13 where brightness alternates by +-5 %.

    Failure mode: only the colour of whole frames counts, so regions that flicker against each other go unseen; cuts and
    true flashes of light cost; a frozen or empty clip gets 1. Differentiable through [`flicker`].
    """
    return [float(torch.exp(-flicker(v) / 0.1)) for v in videos]


def get_colorfulness_reward(low: float = 15.0, high: float = 90.0, falloff: float = 30.0) -> Callable:
    """
    A guard against grey and oversaturated clips: 1 while [`colorfulness`] is between `low` and `high`; below, it falls
    linearly to 0 at grey; above, linearly to 0 within `falloff`.

    Failure mode: a coloured tint over a grey clip counts as colour, and films that are meant to be black and white get
    nothing. A guard, not a goal: inside the band it does not care. Differentiable through [`colorfulness`].

    Args:
        low (`float`, *optional*, defaults to `15.0`): "Slightly colourful" on the paper's scale.
        high (`float`, *optional*, defaults to `90.0`): Just above "highly colourful".
        falloff (`float`, *optional*, defaults to `30.0`): From full marks to none above `high`.

    Returns:
        `Callable`: The reward function.
    """
    if not (0 < low <= high and falloff > 0):
        raise ValueError(f"needs 0 < low <= high and falloff > 0, got low={low}, high={high}, falloff={falloff}")

    def colorfulness_reward(videos, **kwargs) -> list[float]:
        values = [float(colorfulness(v)) for v in videos]
        return [min(max(0.0, min(1.0, m / low)), max(0.0, 1 - max(0.0, m - high) / falloff)) for m in values]

    return colorfulness_reward


def get_exposure_reward(tolerance: float = 0.1) -> Callable:
    """
    A guard against crushed and blown-out clips: 1 while [`clipped_light`] stays below `tolerance`, from there linearly
    to 0 at an all-black or all-white clip.

    Failure mode: scenes that are black or white by design (night sky, studio background) get little; a flat grey clip
    gets 1. A guard, not a goal. Differentiable through [`clipped_light`].

    Args:
        tolerance (`float`, *optional*, defaults to `0.1`): Share of clipped pixels that costs nothing, in [0, 1).

    Returns:
        `Callable`: The reward function.
    """
    if not 0 <= tolerance < 1:
        raise ValueError(f"tolerance must be in [0, 1), not {tolerance}")

    def exposure_reward(videos, **kwargs) -> list[float]:
        return [min(1.0, max(0.0, 1 - float(clipped_light(v))) / (1 - tolerance)) for v in videos]

    return exposure_reward


def jpeg_compressibility_reward(videos, **kwargs) -> list[float]:
    """
    `1 / (1 + bits per pixel)` of the frames as JPEG files of quality 95: near 1 for blank frames, below 0.1 for noise.
    The compressibility task of DDPO (https://huggingface.co/papers/2305.13301, section 5.1), which uses the negative
    file size; per pixel, it does not depend on the resolution.

    Failure mode: it is meant to be gamed. Detail vanishes until the frames are blank. Use it to see that training
    works, not to improve a model. Not differentiable.
    """
    return [1 / (1 + jpeg_bits_per_pixel(v)) for v in videos]


def jpeg_incompressibility_reward(videos, **kwargs) -> list[float]:
    """
    1 - [`jpeg_compressibility_reward`]: the opposite task of DDPO (https://huggingface.co/papers/2305.13301).

    Failure mode: noise and high-frequency texture. Not differentiable.
    """
    return [1 - reward for reward in jpeg_compressibility_reward(videos)]
