"""Videos as a page holds them: data URIs, or links to the files where they would be too much, and a still of each."""

import base64
import functools
import io
import os
import struct
from collections.abc import Iterable
from pathlib import Path
from urllib.parse import quote

from PIL import Image

from ..data.video import VideoInfo, probe_video, read_video


MAX_EMBEDDED = 64 * 2**20  # bytes of mp4; a page of base64 is a third larger
POSTER_HEIGHT = 360  # pixels


def total_size(paths: Iterable[str | os.PathLike]) -> int:
    """Bytes of all files that exist, each counted once."""
    return sum(os.path.getsize(path) for path in {os.fspath(path) for path in paths} if os.path.isfile(path))


def video_source(path: str | os.PathLike, page: Path, embed: bool) -> dict:
    """
    What a `<video>` element needs.

    Args:
        path (`str` or `PathLike`): h264 mp4 file.
        page (`Path`): HTML file that shows it.
        embed (`bool`): Put the file into the page; else link it, relative to the page.

    Returns:
        `dict`: `src`, `poster` (JPEG of the first frame as a data URI), `width` and `height` in pixels, with which the page
        keeps its layout before a video is loaded.

    Raises:
        `ValueError`: If the file cannot be decoded, or a part of it is missing.
        `FileNotFoundError`: If there is none.
    """
    info, still = _open(os.fspath(path), os.stat(path).st_mtime_ns)
    if embed:
        src = f"data:video/mp4;base64,{base64.b64encode(Path(path).read_bytes()).decode('ascii')}"
    else:
        src = quote(Path(os.path.relpath(path, page.parent)).as_posix())
    poster = f"data:image/jpeg;base64,{base64.b64encode(still).decode('ascii')}"
    return {"src": src, "poster": poster, "width": info.width, "height": info.height}


def video_problem(path: str | os.PathLike) -> str | None:
    """Why [`video_source`] would refuse a file, in words for its owner; `None` if it would not."""
    try:
        _open(os.fspath(path), os.stat(path).st_mtime_ns)
    except FileNotFoundError:
        return f"{path} does not exist"
    except (ValueError, OSError) as error:
        return str(error) if str(path) in str(error) else f"{path}: {error}"
    return None


@functools.lru_cache(maxsize=2048)
def _open(path: str, mtime_ns: int) -> tuple[VideoInfo, bytes]:
    """Size and first frame as JPEG. The time is for the cache: a file that is written again is read again."""
    if not _whole(path):
        raise ValueError(f"{path} is no mp4 file, or only the beginning of one")
    info = probe_video(path)
    still, buffer = Image.fromarray(read_video(path, num_frames=1)[0].permute(1, 2, 0).numpy()), io.BytesIO()
    still.thumbnail((16 * POSTER_HEIGHT, POSTER_HEIGHT))
    still.save(buffer, "JPEG", quality=80)
    return info, buffer.getvalue()


def _whole(path: str) -> bool:
    """Whether the boxes of an mp4 file end where the file does: decoders are content with the first frames of a part."""
    size, position, kinds = os.path.getsize(path), 0, set()
    with open(path, "rb") as file:
        while position < size:
            file.seek(position)
            header = file.read(16)
            if len(header) < 8:
                return False
            length, kind = struct.unpack(">I4s", header[:8])
            if length == 1 and len(header) == 16:  # 64 bits follow
                length = struct.unpack(">Q", header[8:])[0]
            if length == 0:  # to the end of the file
                length = size - position
            if length < 8:
                return False
            kinds.add(kind)
            position += length
    return position == size and {b"moov", b"mdat"} <= kinds
