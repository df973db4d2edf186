"""What goes between [`RemoteReward`] and [`RewardServer`]: one safetensors file a request, JSON for the rest.

The body of a request holds the videos as tensors "0", "1", ... of shape (F, C, H, W), the PIL images of dataset columns as
tensors "image/0", ... of shape (H, W, C), and everything else as JSON in the file's metadata. Nothing of it can run code.
Images keep every bit. Videos travel as uint8 by default, a quarter of float32; both sides turn pixels into bytes and back
with the two functions here, so that a reward elsewhere equals a reward here on `dequantize(quantize(video))`.
"""

import json
import sys
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
import safetensors.torch
import torch
from PIL import Image

from .runner import RESERVED


PROTOCOL = 1
PATH = "/v1/score"
CONTENT_TYPE = "application/vnd.safetensors"  # no form of a web page can send it
DTYPES = {"uint8": torch.uint8, "float16": torch.float16, "float32": torch.float32}
CHANNELS = {"L": 1, "LA": 2, "RGB": 3, "RGBA": 4}  # of the images that are sent, by their mode
STATE = ("global_step", "max_steps", "epoch", "num_train_epochs")  # of the trainer's state, what is sent
MAX_METADATA = 1 << 26  # bytes


@dataclass
class ScoreRequest:
    """Videos to be scored: what one call of a reward function gets."""

    id: str
    reward: str | None
    prompts: list[str]
    videos: list[torch.Tensor]
    columns: dict[str, list] = field(default_factory=dict)
    trainer_state: Any = None


def quantize(video: torch.Tensor, dtype: str = "uint8") -> torch.Tensor:
    """
    A video as it is sent.

    Args:
        video (`torch.Tensor`): Float tensor (F, C, H, W) in [0, 1], on any device.
        dtype (`str`, *optional*, defaults to `"uint8"`): `"uint8"` rounds to the nearest 1/255, as an 8-bit video file
            does; `"float16"` rounds to 11 bits; `"float32"` keeps every bit.

    Returns:
        `torch.Tensor`: On the CPU.

    Raises:
        `ValueError`: If pixels that are to become bytes are NaN or outside [0, 1].
    """
    if dtype == "uint8" and video.dtype != torch.uint8:
        low, high = (x.item() for x in video.aminmax())
        if not (low >= 0 and high <= 1):  # true for NaN as well
            raise ValueError(f"pixels must be in [0, 1] to be sent as uint8, not {low:g} to {high:g}; clamp the video")
        video = video.mul(255).round_()
    return video.to(DTYPES[dtype]).cpu().contiguous()


def dequantize(video: torch.Tensor, device: torch.device | str = "cpu") -> torch.Tensor:
    """
    The float32 video in [0, 1] of one that was sent. Divided on the CPU: GPUs multiply by the rounded 1/255 instead.

    Args:
        video (`torch.Tensor`): From [`quantize`], (F, C, H, W).
        device (*optional*, defaults to `"cpu"`): Where the result goes.
    """
    return (video.float().div_(255) if video.dtype == torch.uint8 else video.float()).to(device)


def pack(request: ScoreRequest, dtype: str = "uint8") -> bytes:
    """
    The body of a request.

    Raises:
        `ValueError` or `TypeError`: If pixels are outside [0, 1], or a column holds what is neither an image nor JSON.
    """
    columns, images = {}, []
    tensors = {str(i): quantize(video, dtype) for i, video in enumerate(request.videos)}
    for name, values in request.columns.items():
        if any(isinstance(value, Image.Image) for value in values):
            images.append(name)
            tensors |= {f"{name}/{i}": _pixels(name, image) for i, image in enumerate(values) if image is not None}
            continue
        try:
            json.dumps(values)
        except (TypeError, ValueError) as error:
            raise TypeError(
                f"the dataset column {name!r} cannot be sent to a reward server ({error}): name the columns that the "
                "reward needs in RemoteReward(columns=[...]), or turn it into PIL images, numbers, strings or lists of "
                "numbers and strings"
            ) from error
        columns[name] = values
    state = request.trainer_state
    head = {
        "protocol": PROTOCOL,
        "id": request.id,
        "reward": request.reward,
        "prompts": request.prompts,
        "columns": columns,
        "images": images,
        "trainer_state": None if state is None else {name: getattr(state, name, None) for name in STATE},
    }
    return safetensors.torch.save(tensors, {"request": json.dumps(head)})


def unpack(body: bytes) -> ScoreRequest:
    """
    The request of a body that anybody may have sent. Videos stay as they came; see [`dequantize`].

    Raises:
        `ValueError`: If it is not exactly what [`pack`] makes.
    """
    head = _metadata(body)
    if head.get("protocol") != PROTOCOL:
        raise ValueError(
            f"this server speaks protocol {PROTOCOL}, not {head.get('protocol')!r:.20}: install one version of "
            "vidtrl on both sides"
        )
    identity, reward, prompts = head.get("id"), head.get("reward"), head.get("prompts")
    columns, images, state = head.get("columns"), head.get("images"), head.get("trainer_state")
    if not (isinstance(identity, str) and 0 < len(identity) <= 64 and identity.isascii() and identity.isalnum()):
        raise ValueError("id must have 1 to 64 ASCII letters and digits")
    if not (reward is None or isinstance(reward, str)):
        raise ValueError("reward must be a string or null")
    if not (isinstance(prompts, list) and prompts and all(isinstance(prompt, str) for prompt in prompts)):
        raise ValueError("prompts must be a list of one string a video")
    if not isinstance(columns, dict) or not all(
        isinstance(v, list) and len(v) == len(prompts) for v in columns.values()
    ):
        raise ValueError(f"columns must be lists of {len(prompts)} values, one a prompt")
    if not (isinstance(images, list) and all(isinstance(name, str) for name in images)):
        raise ValueError("images must be a list of the names of columns")
    if len({*columns, *images}) < len(columns) + len(images):
        raise ValueError("a column must stand once, in columns or in images")
    if taken := sorted({*columns, *images} & set(RESERVED)):
        raise ValueError(
            f"a column cannot be named {taken[0]!r}: every reward function receives an argument of that name"
        )
    if not (state is None or isinstance(state, dict)):
        raise ValueError("trainer_state must be an object or null")
    try:
        tensors = safetensors.torch.load(body)
    except (safetensors.SafetensorError, KeyError, ValueError, RuntimeError) as error:
        raise ValueError(f"the body is no safetensors file that this server reads: {str(error)[:200]!r}") from error
    n, pixels = len(prompts), {f"{name}/{i}" for name in images for i in range(len(prompts))}
    if set(tensors) - pixels != {str(i) for i in range(n)}:
        raise ValueError(f"{n} prompts need the tensors '0' to '{n - 1}', those of their images and no other")
    videos = [tensors[str(i)] for i in range(n)]
    for i, video in enumerate(videos):
        if video.dtype not in DTYPES.values() or video.ndim != 4 or video.numel() == 0:
            raise ValueError(
                f"tensor '{i}' must be a video (frames, channels, height, width) of {', '.join(DTYPES)}, not "
                f"{str(video.dtype).removeprefix('torch.')} of shape {tuple(video.shape)}"
            )
    for name in images:
        columns[name] = [_image(f"{name}/{i}", tensors.get(f"{name}/{i}")) for i in range(n)]
    state = None if state is None else SimpleNamespace(**{name: state.get(name) for name in STATE})
    return ScoreRequest(identity, reward, prompts, videos, columns, state)


def _pixels(column: str, image: Any) -> torch.Tensor:
    """An image of a column as it is sent: uint8 of shape (H, W, C)."""
    if not isinstance(image, Image.Image):
        raise TypeError(f"the dataset column {column!r} holds images and {image!r:.50}: images and None go together")
    if image.mode not in CHANNELS:
        raise TypeError(
            f"the dataset column {column!r} holds an image of mode {image.mode}, and {', '.join(CHANNELS)} are sent: "
            f"convert it with image.convert('RGB'), or leave it out with RemoteReward(columns=[...])"
        )
    return torch.from_numpy(np.array(image)).view(image.height, image.width, CHANNELS[image.mode])


def _image(name: str, pixels: torch.Tensor | None) -> Image.Image | None:
    """The image of a tensor that anybody may have sent; `None` where there is none."""
    if pixels is None:
        return None
    channels = CHANNELS.values()
    if pixels.dtype != torch.uint8 or pixels.ndim != 3 or pixels.shape[-1] not in channels or pixels.numel() == 0:
        raise ValueError(
            f"tensor {name[:100]!r} must be an image (height, width, 1 to 4 channels) of uint8, not "
            f"{str(pixels.dtype).removeprefix('torch.')} of shape {tuple(pixels.shape)}"
        )
    return Image.fromarray(pixels.squeeze(-1).numpy() if pixels.shape[-1] == 1 else pixels.numpy())


def _metadata(body: bytes) -> dict:
    """The JSON that [`pack`] puts beside the tensors. The safetensors library reads it from files only."""
    length = int.from_bytes(body[:8], "little")
    if len(body) < 8 or length > min(len(body) - 8, MAX_METADATA):
        raise ValueError("the body is no safetensors file")
    try:
        head = json.loads(json.loads(body[8 : 8 + length])["__metadata__"]["request"])
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError("the body is no safetensors file with a request in its metadata") from error
    if not isinstance(head, dict):
        raise ValueError("the request in the metadata must be an object")
    return head


def check_reply(reply: Any, identity: str, n: int) -> dict:
    """
    The reply to a request, if it is one.

    Args:
        reply: Decoded JSON of a server that is not trusted to be right.
        identity (`str`): The request's id.
        n (`int`): Its number of videos.

    Returns:
        `dict`: `rewards` (n floats or `None`), `metrics` (pairs of name and float), `extra` (n values a column).

    Raises:
        `ValueError`: If it answers another request, or anything is missing, of another length or not finite.
    """
    if not isinstance(reply, dict) or reply.get("protocol") != PROTOCOL or reply.get("id") != identity:
        raise ValueError("the answer belongs to another request")
    rewards, metrics, extra = (reply.get(key) for key in ("rewards", "metrics", "extra"))
    if not isinstance(rewards, list) or len(rewards) != n:
        raise ValueError(f"the answer does not have {n} rewards")
    if not all(value is None or _is_finite(value) for value in rewards):
        raise ValueError("the answer has rewards that are no finite numbers")
    if not isinstance(metrics, list) or not all(
        isinstance(pair, list) and len(pair) == 2 and isinstance(pair[0], str) and type(pair[1]) in (int, float)
        for pair in metrics
    ):
        raise ValueError("the answer has metrics that are no names and numbers")
    if not isinstance(extra, dict) or not all(isinstance(v, list) and len(v) == n for v in extra.values()):
        raise ValueError(f"the answer has extra columns that are not {n} values long")
    return reply


def _is_finite(value) -> bool:
    return type(value) in (int, float) and abs(value) <= sys.float_info.max  # false for NaN as well
