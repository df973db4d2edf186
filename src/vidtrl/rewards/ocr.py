"""Reward for text that a prompt asks to see in the video, read by an OCR engine (`pip install vidtrl[ocr]`)."""

import functools
import importlib.util
import re
from collections.abc import Callable

import torch

from .checks import check_video, even_frames


_QUOTED = re.compile(r'"([^"]+)"|“([^”]+)”|«([^»]+)»|「([^」]+)」')


@functools.cache
def _engine():
    """One engine a process. It runs on the CPU with the models that its wheel contains: no download."""
    from rapidocr import RapidOCR

    return RapidOCR(params={"Global.log_level": "critical"})


def quoted_text(prompt: str) -> str | None:
    """The text that a prompt puts in double quotes (several: joined by spaces); `None` where there is none."""
    found = ["".join(groups) for groups in _QUOTED.findall(prompt)]
    return " ".join(found) if any(_plain(text) for text in found) else None


def text_similarity(wanted: str, read: str) -> float:
    """
    How well a text can be read: 1 if `read` contains `wanted`, else `1 - distance / len(wanted)` with the edit distance
    to the most similar run of words, at least 0. Case, spaces and punctuation do not count.

    Args:
        wanted (`str`): With at least one letter or digit.
        read (`str`): What was recognised.

    Returns:
        `float`: In [0, 1].
    """
    target, words = _plain(wanted), [_plain(word) for word in read.split()]
    if target in "".join(words):
        return 1.0
    longest = len(wanted.split()) + 1  # a word more than wanted, as a gap may be read into one
    spans = {"".join(words[i : i + n]) for i in range(len(words)) for n in range(1, longest + 1)}
    distance = min((_edit_distance(target, span) for span in spans), default=len(target))
    return max(0.0, 1 - distance / len(target))


def _edit_distance(a: str, b: str) -> int:
    row = list(range(len(b) + 1))
    for i, letter in enumerate(a, 1):
        above, row = row, [i]
        for j, other in enumerate(b, 1):
            row.append(min(above[j] + 1, row[-1] + 1, above[j - 1] + (letter != other)))
    return row[-1]


def get_prompt_ocr_reward(num_frames: int = 8) -> Callable:
    """
    Whether the text in double quotes in the prompt can be read in the video: [`text_similarity`], the mean over frames
    taken evenly from the whole clip, first and last included. `None` for a prompt without quotes. The text reward of
    Flow-GRPO (https://huggingface.co/papers/2505.05470, appendix), over frames, and with partial matches inside longer
    text.

    Failure mode: other text beside the wanted one costs nothing, and large flat letters that hold still read best, so
    motion and beauty fade: pair it with `"motion-magnitude"`. Similar words earn a part. The engine reads Latin and
    Chinese script. Not differentiable. About a second a frame on one CPU core.

    Args:
        num_frames (`int`, *optional*, defaults to `8`): Frames read in each clip.

    Returns:
        `Callable`: The reward function. It logs what it read in the middle frame as the extra column `ocr_text`.

    Raises:
        `ImportError`: If the engine is not installed.
    """
    if num_frames < 1:
        raise ValueError(f"num_frames must be at least 1, not {num_frames}")
    for package in ("rapidocr", "onnxruntime"):
        if importlib.util.find_spec(package) is None:
            raise ImportError(f"the prompt OCR reward needs {package}: pip install 'vidtrl[ocr]'")

    def prompt_ocr_reward(prompts, videos, log_extra=None, **kwargs) -> list[float | None]:
        rewards, shown = [], []
        for prompt, video in zip(prompts, videos, strict=True):
            wanted = quoted_text(prompt)
            if wanted is None:
                rewards.append(None)
                shown.append(None)
                continue
            texts = [_read(frame) for frame in even_frames(check_video(video), num_frames)]
            rewards.append(sum(text_similarity(wanted, text) for text in texts) / len(texts))
            shown.append(texts[len(texts) // 2])
        if log_extra is not None:
            log_extra("ocr_text", shown)
        return rewards

    return prompt_ocr_reward


def _read(frame: torch.Tensor) -> str:
    """The lines of text in a frame (3, H, W), joined by spaces."""
    pixels = (frame.clamp(0, 1) * 255).round().to(torch.uint8).flip(0).permute(1, 2, 0)  # the engine takes BGR
    lines = _engine()(pixels.contiguous().cpu().numpy(), use_cls=False).txts  # None where there is no text
    return " ".join(lines or ())


def _plain(text: str) -> str:
    return "".join(c for c in text.casefold() if c.isalnum())
