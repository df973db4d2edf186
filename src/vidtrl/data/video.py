"""Video files in and out, through PyAV: frames are chosen by timestamp, so variable frame rates are exact.

A *source* is anything a dataset row may hold: a path, the bytes of a file, the `{"path", "bytes"}` dict of
`datasets.Video(decode=False)`, a list of PIL images, a `(F, C, H, W)` or `(F, H, W, C)` array or tensor, one image, or a
torchcodec `VideoDecoder`. torchcodec itself is never imported.
"""

import contextlib
import io
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import av
import numpy as np
import torch
import torch.nn.functional as F
from av.video.reformatter import ColorPrimaries, ColorRange, Colorspace, ColorTrc, VideoReformatter
from PIL import Image, ImageOps, UnidentifiedImageError


VIDEO_EXTENSIONS = (".mp4", ".mov", ".mkv", ".webm", ".avi", ".mpeg", ".mpg", ".m4v", ".gif")
IMAGE_EXTENSIONS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")

# FFmpeg guesses the format from the content, whatever the name. Play lists and concat scripts would make it open
# further files or URLs named by the data set, so only formats that hold their own frames are allowed.
_FORMATS = "mov,mp4,matroska,webm,avi,mpeg,mpegts,mpegvideo,m4v,h264,hevc,flv,ogg,asf,gif,apng,ivf,obu,nut,y4m"
# Containers round timestamps (Matroska to 1 ms), so times are compared with this tolerance, as a share of a frame.
_SLACK = 0.1


@dataclass(frozen=True)
class VideoInfo:
    """
    What a container says about its video stream.

    Args:
        num_frames (`int`): Frames that decoding yields.
        fps (`float` or `None`): Average frame rate; `None` for a list of frames without a stated rate, and for images.
        height (`int`): Pixels, after the rotation that the file asks for.
        width (`int`): Pixels, after the rotation that the file asks for.
        duration (`float` or `None`): Seconds; `None` where `fps` is.
    """

    num_frames: int
    fps: float | None
    height: int
    width: int
    duration: float | None

    def frames_at(self, fps: float | None) -> int:
        """How many frames the whole clip has when it is resampled to `fps` (`None`: its own frames)."""
        if fps is None or self.fps is None:
            return self.num_frames
        return max(1, math.ceil(self.duration * fps - _SLACK))


def write_video(path, frames, fps: float, crf: int = 16) -> None:
    """
    Write an h264 mp4 that browsers play (`yuv420p`; odd sizes, which it cannot hold, are written as `yuv444p`).

    The same frames always give the same bytes.

    Args:
        path (`str`, `PathLike` or binary file): Where to write. Parent directories must exist.
        frames (`torch.Tensor` or `np.ndarray`): `(F, 3, H, W)`, uint8, or float in [0, 1].
        fps (`float`): Frames per second.
        crf (`int`, *optional*, defaults to `16`): x264 quality, 0 (lossless) to 51.

    Raises:
        `ValueError`: If the frames are not `(F, 3, H, W)`, there are none, or `fps` is not positive.
    """
    frames = torch.as_tensor(frames).detach().cpu()
    if frames.ndim != 4 or frames.shape[1] != 3 or len(frames) == 0:
        raise ValueError(f"write_video wants frames of shape (F, 3, H, W), got {tuple(frames.shape)}")
    if not fps > 0:
        raise ValueError(f"fps must be positive, not {fps}")
    if frames.is_floating_point():
        frames = (frames.float().clamp(0, 1) * 255).round().to(torch.uint8)
    frames = frames.permute(0, 2, 3, 1).contiguous().numpy()
    height, width = frames.shape[1:3]
    target = path if hasattr(path, "write") else os.fspath(path)
    pix_fmt = "yuv420p" if height % 2 == 0 and width % 2 == 0 else "yuv444p"
    reformatter = VideoReformatter()
    # without cpu-independent, some clips in a hundred differ from one encoding to the next
    options = {"crf": str(crf), "x264-params": "cpu-independent=1"}
    with av.open(target, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1001), options=options)
        stream.width, stream.height, stream.pix_fmt = width, height, pix_fmt
        stream.thread_count = 1  # faster for short clips, and one picture whatever the machine
        codec = stream.codec_context  # untagged colours are a guess of each player
        codec.colorspace, codec.color_range = Colorspace.ITU709, ColorRange.MPEG
        codec.color_primaries, codec.color_trc = ColorPrimaries.BT709, ColorTrc.BT709
        for frame in frames:
            frame = av.VideoFrame.from_ndarray(frame, format="rgb24")
            frame = reformatter.reformat(
                frame, format=pix_fmt, dst_colorspace=Colorspace.ITU709, dst_color_range=ColorRange.MPEG, threads=1
            )
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def probe_video(source, fps: float | None = None) -> VideoInfo:
    """
    Read size, frame count and frame rate from the container, without decoding frames.

    Args:
        source: See the module's docstring.
        fps (`float`, *optional*): States the frame rate of a list of frames, or corrects the one a file claims.

    Returns:
        [`VideoInfo`].

    Raises:
        `ValueError`: If the source is empty, truncated or not a video; the message names the file.
    """
    return _open(source, fps).info


def read_video(source, *, start: int = 0, num_frames: int | None = None, fps: float | None = None, source_fps=None):
    """
    Decode an exact window of frames.

    The window is counted on the grid of `fps`: frame `k` is the one on screen `k / fps` seconds after the first. A 24 fps
    clip read at 8 fps gives every third frame; with variable frame rate the timestamps decide.

    Args:
        source: See the module's docstring.
        start (`int`, *optional*, defaults to `0`): First frame of the window, on the grid of `fps`.
        num_frames (`int`, *optional*): Length of the window. Defaults to everything from `start`.
        fps (`float`, *optional*): Target frame rate. Defaults to the file's own frames.
        source_fps (`float`, *optional*): States the frame rate of a list of frames, or corrects the one a file claims.

    Returns:
        `torch.Tensor`: uint8 of shape `(F, 3, H, W)`.

    Raises:
        `ValueError`: If the window reaches past the end, or the source cannot be decoded.

    Example:

    ```python
    >>> clip = read_video("clip.mp4", start=4, num_frames=17, fps=8)
    ```
    """
    opened = _open(source, source_fps)
    if opened.info.fps is None:
        fps = None  # nothing is known about time: the frames are used as they are
    available = opened.info.frames_at(fps)
    num_frames = available - start if num_frames is None else num_frames
    if start < 0 or num_frames < 1 or start + num_frames > available:
        rate = f" at {fps:g} fps" if fps else ""
        raise ValueError(
            f"{opened.name} has {available} frames{rate}; frames {start} to {start + num_frames - 1} were requested"
        )
    indices = np.arange(start, start + num_frames)
    if fps is None:
        return opened.frames(indices)
    return opened.shown_at(indices / fps + _SLACK * min(1 / fps, 1 / opened.info.fps))


def resize_crop(frames: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """
    Scale until the frame covers `height` x `width` (antialiased), then crop the centre.

    Args:
        frames (`torch.Tensor`): uint8 of shape `(F, C, H, W)`.
        height (`int`): Pixels.
        width (`int`): Pixels.

    Returns:
        `torch.Tensor`: float32 of shape `(F, C, height, width)` in [0, 1].
    """
    scaled_h, scaled_w = cover_size(frames.shape[2], frames.shape[3], height, width)
    top, left = (scaled_h - height) // 2, (scaled_w - width) // 2
    out = torch.empty(len(frames), frames.shape[1], height, width)
    for i in range(0, len(frames), 8):  # a whole 1080p clip in float32 would take gigabytes
        part = frames[i : i + 8]
        if (scaled_h, scaled_w) != tuple(frames.shape[2:]):
            # uint8 with channels last is 20 times as fast as float32, and exact to 1/255
            part = part.contiguous(memory_format=torch.channels_last)
            part = F.interpolate(part, (scaled_h, scaled_w), mode="bilinear", antialias=True)
        out[i : i + 8] = part[..., top : top + height, left : left + width].float() / 255
    return out


def condition_image(image, height: int, width: int) -> Image.Image:
    """
    A still image as the first frame of a clip of this size: scaled to cover it, and cropped as clips are.

    Args:
        image: What `load_image` reads: PIL, path, bytes or `{"path", "bytes"}`.
        height (`int`): Pixels.
        width (`int`): Pixels.

    Raises:
        `ValueError`: If it cannot be read.
    """
    frame = torch.from_numpy(np.array(load_image(image))).permute(2, 0, 1)
    return as_image(resize_crop(frame[None], height, width)[0])


def as_image(frame: torch.Tensor) -> Image.Image:
    """A frame (3, H, W) in [0, 1] as a picture."""
    return Image.fromarray((frame * 255).round().byte().permute(1, 2, 0).cpu().numpy())


def cover_size(source_height: int, source_width: int, height: int, width: int) -> tuple[int, int]:
    """The smallest size of the source's aspect that covers `height` x `width`."""
    scale = max(height / source_height, width / source_width)
    return max(height, round(source_height * scale)), max(width, round(source_width * scale))


def is_image_path(path) -> bool:
    """Whether the extension, in upper or lower case, is that of a still image."""
    return os.fspath(path).lower().endswith(IMAGE_EXTENSIONS)


def load_image(image) -> Image.Image:
    """A still image (PIL, path, bytes or `{"path", "bytes"}`) as an RGB `PIL.Image`, upright."""
    if isinstance(image, Image.Image):
        return ImageOps.exif_transpose(image).convert("RGB")
    name = source_name(image)
    if isinstance(image, dict):
        image = image["bytes"] if image.get("bytes") is not None else image.get("path")
    if isinstance(image, bytes):
        image = io.BytesIO(image)
    if not isinstance(image, (str, os.PathLike, io.BytesIO)):
        raise ValueError(f"cannot read an image from {name}: use a PIL image, a path, or bytes")
    try:
        with Image.open(image) as opened:
            return ImageOps.exif_transpose(opened).convert("RGB")
    except UnidentifiedImageError as error:  # its own message is the address of a buffer
        raise ValueError(f"{name} cannot be read as an image: no image data found") from error
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"{name} cannot be read as an image: {error}") from error


def source_name(source) -> str:
    """A short name of a source for messages: the path where there is one."""
    if isinstance(source, dict):
        return source_name(source.get("path") or source.get("bytes"))
    if isinstance(source, (str, os.PathLike)):
        return os.fspath(source)
    if isinstance(source, (bytes, bytearray, memoryview)):
        return f"<{len(source)} bytes>"
    return f"<{type(source).__name__}>"


def _open(source, fps):
    """Wrap a source as an object with `.name`, `.info`, `.frames(indices)` and `.shown_at(seconds)`."""
    name = source_name(source)
    try:
        fps = float(fps or 0) or None  # a CSV file gives text
    except (TypeError, ValueError) as error:
        raise ValueError(f"the frame rate of {name} is stated as {fps!r}, which is no number") from error
    if fps is not None and not 0 < fps < math.inf:
        raise ValueError(f"the frame rate of {name} is stated as {fps}; leave it empty where it is not known")
    if isinstance(source, dict):
        source = source.get("bytes") if source.get("bytes") is not None else source.get("path")
    if isinstance(source, (str, os.PathLike)):
        if is_image_path(source):
            return _Frames([load_image(source)], None, name)
        return _File(source, fps, name)
    if isinstance(source, (bytes, bytearray, memoryview)):
        if _is_image_bytes(source):
            return _Frames([load_image(bytes(source))], None, name)
        return _File(source, fps, name)
    if isinstance(source, Image.Image):
        return _Frames([source], None, name)
    if type(source).__module__.startswith("torchcodec."):
        return _Decoder(source, fps, name)
    if isinstance(source, (torch.Tensor, np.ndarray)) or (isinstance(source, Sequence) and len(source)):
        return _Frames(source, fps, name)
    raise ValueError(
        f"cannot read a video from {name}: use a path, bytes, a {{'path', 'bytes'}} dict, a list of images, "
        "or an (F, C, H, W) array"
    )


def _is_image_bytes(data) -> bool:
    head = bytes(data[:12])
    return (
        head.startswith((b"\x89PNG", b"\xff\xd8\xff", b"BM", b"II*\x00", b"MM\x00*"))
        or head[:4] == b"RIFF"
        and head[8:] == b"WEBP"
    )


class _Source:
    def shown_at(self, seconds) -> torch.Tensor:
        """The frames on screen so many seconds after the first."""
        times = self.times()
        return self.frames(np.searchsorted(times, times[0] + seconds, side="right") - 1)


class _File(_Source):
    """A container that FFmpeg reads. It is opened anew for each purpose, so that nothing stays open between rows."""

    def __init__(self, source, fps, name):
        self.source, self.name, self.stated_fps = source, name, fps
        with _open_container(source, name) as container:
            stream = container.streams.video[0]
            stream.thread_count = 1
            self.pts = self._listed(container, stream)  # one per frame, ascending, in units of time_base
            self.time_base = stream.time_base
            self.counted = self.pts is None  # no presentation times, as in avi: frames are counted instead
            if self.counted:
                container.seek(0)
                self.pts = range(len(_packets(container, self.name)))
                self.time_base = 1 / (stream.average_rate or Fraction(1))
                container.seek(0)
            self.info = self._info(container, stream)

    def _listed(self, container, stream) -> list[int] | None:
        entries = [e for e in stream.index_entries if not e.is_discard]
        if "avi" in container.format.name.split(","):
            return None  # what FFmpeg makes up there does not ascend
        if "mp4" in container.format.name.split(",") and len(entries) >= stream.frames > 0:  # all are in the header
            size = _size_of(self.source)
            if max(e.pos + e.size for e in entries) > size:
                raise ValueError(f"{self.name} is truncated: its header lists frames beyond its {size} bytes")
            times = sorted(e.timestamp for e in entries)
            steps = {b - a for a, b in zip(times, times[1:], strict=False)}
            if len(steps) <= 1:  # these are decoding times; at a constant rate they differ by an offset only
                offset = (stream.start_time or 0) - times[0]
                return [t + offset for t in times]
        times = [p.pts for p in _packets(container, self.name)]
        container.seek(0)
        return None if None in times else sorted(times)

    def _info(self, container, stream) -> VideoInfo:
        count, rate = len(self.pts), float(stream.average_rate or stream.guessed_rate or 0)
        if self.stated_fps:
            rate, duration = float(self.stated_fps), count / self.stated_fps
        elif rate:
            duration = float((self.pts[-1] - self.pts[0]) * self.time_base) + 1 / rate
        else:
            raise ValueError(f"{self.name} states no frame rate; add an `fps` column")
        height, width = stream.height, self._square_width(stream)
        if _rotation(container, stream, self.name) % 180:
            height, width = width, height
        return VideoInfo(count, rate, height, width, duration)

    def _square_width(self, stream) -> int:
        return max(1, round(stream.width * (stream.sample_aspect_ratio or 1)))

    def times(self) -> np.ndarray:
        """Seconds at which each frame is shown, ascending."""
        if self.stated_fps:
            return np.arange(len(self.pts)) / self.stated_fps
        return np.array(self.pts, dtype=np.float64) * float(self.time_base)

    def frames(self, indices) -> torch.Tensor:
        wanted = {}  # time -> places in the result; several when frames are repeated
        for place, index in enumerate(indices):
            wanted.setdefault(self.pts[index], []).append(place)
        # a seek goes to the key frame before; where a container seeks badly, decode from the beginning
        for seek in (True, False) if min(wanted) > self.pts[0] and not self.counted else (False,):
            with _open_container(self.source, self.name) as container:
                stream = container.streams.video[0]
                stream.thread_type = "AUTO"
                if seek:
                    container.seek(min(wanted), stream=stream)
                frames, missing = self._decode(container, stream, wanted, len(indices))
            if not missing:
                return frames
        raise ValueError(f"{self.name} is damaged: {missing} of {len(wanted)} frames do not decode")

    def _decode(self, container, stream, wanted, count):
        frames, missing = None, set(wanted)
        reformatter, width = VideoReformatter(), self._square_width(stream)
        try:
            for number, frame in enumerate(container.decode(stream)):
                pts = number if self.counted else frame.pts
                if pts in missing:
                    # one thread: by default each frame starts a pool, which takes longer than its work
                    image = reformatter.reformat(frame, format="rgb24", width=width, threads=1).to_ndarray()
                    if frame.rotation:
                        image = np.rot90(image, round(frame.rotation / 90)).copy()
                    image = torch.from_numpy(image).permute(2, 0, 1)
                    if frames is None:
                        frames = torch.empty(count, *image.shape, dtype=torch.uint8)
                    if image.shape != frames.shape[1:]:
                        raise ValueError(f"{self.name} changes its frame size on the way")
                    frames[wanted[pts]] = image
                    missing.remove(pts)
                if not missing:
                    break
        except av.error.FFmpegError as error:
            raise ValueError(f"{self.name} is damaged: {error.strerror}") from error
        return frames, len(missing)


class _Frames(_Source):
    """Frames that are already in memory."""

    def __init__(self, frames, fps, name):
        self.name, self._frames = name, frames
        self.array = isinstance(frames, (torch.Tensor, np.ndarray))
        if self.array:
            if frames.ndim != 4 or 3 not in (frames.shape[1], frames.shape[3]):
                raise ValueError(f"frames must be (F, 3, H, W) or (F, H, W, 3), got shape {tuple(frames.shape)}")
            self.channels_first = frames.shape[1] == 3
            height, width = frames.shape[2:] if self.channels_first else frames.shape[1:3]
        else:
            first = _to_uint8(frames[0], name)
            height, width = first.shape[:2]
        count = len(frames)
        if count == 0:
            raise ValueError(f"{name} holds no frames")
        self.info = VideoInfo(count, float(fps) if fps else None, height, width, count / fps if fps else None)

    def times(self) -> np.ndarray:
        return np.arange(self.info.num_frames) / (self.info.fps or 1.0)

    def frames(self, indices) -> torch.Tensor:
        if self.array:
            chosen = torch.as_tensor(self._frames)[torch.as_tensor(np.asarray(indices))]
            chosen = chosen if self.channels_first else chosen.permute(0, 3, 1, 2)
            if chosen.is_floating_point():
                chosen = (chosen.float().clamp(0, 1) * 255).round()
            return chosen.to(torch.uint8).contiguous()
        images = [_to_uint8(self._frames[i], self.name) for i in indices]
        if len({image.shape for image in images}) > 1:
            raise ValueError(f"{self.name}: the frames of one clip must have one size")
        return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous()


class _Decoder(_Source):
    """A torchcodec `VideoDecoder` that the user handed over."""

    def __init__(self, decoder, fps, name):
        self.name, self.decoder = name, decoder
        meta = decoder.metadata
        rate = float(fps or meta.average_fps)
        duration = meta.num_frames / fps if fps else float(meta.duration_seconds)
        self.stated_fps = fps
        self.info = VideoInfo(meta.num_frames, rate, meta.height, meta.width, duration)

    def shown_at(self, seconds) -> torch.Tensor:
        if self.stated_fps:
            return self.frames(np.floor(seconds * self.stated_fps).astype(int).clip(0, self.info.num_frames - 1))
        meta = self.decoder.metadata
        last = np.nextafter(meta.end_stream_seconds, 0)
        at = (meta.begin_stream_seconds + seconds).clip(max=last)
        return self.decoder.get_frames_played_at(at.tolist()).data.to(torch.uint8)

    def frames(self, indices) -> torch.Tensor:
        return self.decoder.get_frames_at([int(i) for i in indices]).data.to(torch.uint8)


def _to_uint8(image, name) -> np.ndarray:
    """One frame of any kind as (H, W, 3) uint8."""
    if isinstance(image, (Image.Image, dict, str, os.PathLike, bytes)):
        return np.asarray(load_image(image))
    image = torch.as_tensor(image)
    if image.ndim != 3 or 3 not in (image.shape[0], image.shape[2]):
        raise ValueError(f"{name}: a frame must be an image, (3, H, W) or (H, W, 3), got {tuple(image.shape)}")
    image = image.permute(1, 2, 0) if image.shape[0] == 3 else image
    if image.is_floating_point():
        image = (image.float().clamp(0, 1) * 255).round()
    return image.to(torch.uint8).cpu().numpy()


@contextlib.contextmanager
def _open_container(source, name):
    if isinstance(source, (str, os.PathLike)):
        try:
            file = open(source, "rb")  # a Python file: FFmpeg sees no path or URL of the data set
        except OSError as error:
            raise ValueError(f"{name} cannot be opened: {error.strerror}") from error
    else:
        file = io.BytesIO(source)
    with file:
        if _size_of(source) == 0:
            raise ValueError(f"{name} cannot be read as a video: it is empty")
        try:
            container = av.open(file, container_options={"format_whitelist": _FORMATS}, io_open=_refuse)
        except (av.error.FFmpegError, OSError, ValueError) as error:
            raise ValueError(
                f"{name} cannot be read as a video: no video data found, or the file is truncated"
            ) from error
        with container:
            if not container.streams.video:
                raise ValueError(f"{name} has no video stream")
            yield container


def _refuse(url, flags, options):
    raise PermissionError(f"a video file may not refer to another file ({url})")


def _size_of(source) -> int:
    return os.path.getsize(source) if isinstance(source, (str, os.PathLike)) else len(source)


def _packets(container, name) -> list:
    """The packets of all frames. Reads the file, but does not decode it."""
    try:
        packets = [p for p in container.demux(video=0) if p.size and not p.is_discard]
    except av.error.FFmpegError as error:
        raise ValueError(f"{name} is damaged: {error.strerror}") from error
    if not packets:
        raise ValueError(f"{name} holds no video frames")
    return packets


def _rotation(container, stream, name) -> int:
    """The display rotation in degrees; FFmpeg tells it with a decoded frame only, so the first one is decoded."""
    try:
        for frame in container.decode(stream):
            return frame.rotation
    except av.error.FFmpegError as error:
        raise ValueError(f"{name} is damaged: {error.strerror}") from error
    raise ValueError(f"{name} is damaged: its first frame does not decode")
