"""Videos as a page holds them: data URIs, or links to the files where they would be too much, and a still of each."""

import base64
import io
import os
from collections.abc import Iterable
from pathlib import Path
from urllib.parse import quote

from PIL import Image

from ..data.video import probe_video, read_video


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
        `ValueError`: If the file cannot be decoded.
        `FileNotFoundError`: If there is none.
    """
    info = probe_video(path)
    frame = read_video(path, num_frames=1)[0].permute(1, 2, 0).numpy()
    still, buffer = Image.fromarray(frame), io.BytesIO()
    still.thumbnail((16 * POSTER_HEIGHT, POSTER_HEIGHT))
    still.save(buffer, "JPEG", quality=80)
    if embed:
        src = f"data:video/mp4;base64,{base64.b64encode(Path(path).read_bytes()).decode('ascii')}"
    else:
        src = quote(Path(os.path.relpath(path, page.parent)).as_posix())
    poster = f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"
    return {"src": src, "poster": poster, "width": info.width, "height": info.height}
