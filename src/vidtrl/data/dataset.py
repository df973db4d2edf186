"""The uncached path: clips decoded when they are asked for."""

import logging

import torch
from torch.utils.data import Dataset

from .video import as_image, condition_image, read_video, resize_crop


logger = logging.getLogger(__name__)


class VideoDataset(Dataset):
    """
    The clips of a plan, decoded on access: for training with the VAE in memory, and for held-out clips.

    Args:
        dataset (`datasets.Dataset` or list of `dict`): With the columns of [`standardize_columns`].
        plan ([`Plan`]): From [`plan_dataset`] on the same dataset.
        images (`bool`, *optional*, defaults to `False`): Items have the `image` that an image-to-video model needs: the row's,
            resized and cropped as its clip is, or the clip's first frame where the row has none.

    Items are dicts: `video`, float32 `(F, C, H, W)` in [0, 1]; `prompt`; `sample_id`; `bucket`; `index`; `fps`, the clip's
    frame rate after resampling; and the dataset's other columns. A clip that turns out to be damaged costs one warning; the
    next readable one of its bucket takes its place.

    Example:

    ```python
    >>> clips = VideoDataset(dataset, plan_dataset(dataset, height=64, width=64, num_frames=17))
    >>> clips[0]["video"].shape
    torch.Size([17, 3, 64, 64])
    ```
    """

    def __init__(self, dataset, plan, images: bool = False):
        if not plan.complete:
            raise ValueError("a streaming dataset must be cached before training: use cache=True")
        self.dataset, self.plan, self.samples, self._damaged = dataset, plan, plan.samples, set()
        self.images = images

    @property
    def buckets(self) -> list[int]:
        """The bucket of each item."""
        return [sample.bucket for sample in self.samples]

    @property
    def sample_ids(self) -> list[str]:
        """The name of each item."""
        return [sample.sample_id for sample in self.samples]

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> dict:
        index = range(len(self))[index]
        bucket = self.samples[index].bucket
        for other in (*range(index, len(self)), *range(index)):
            if self.samples[other].bucket == bucket and other not in self._damaged:
                try:
                    return self._load(other)
                except ValueError as error:
                    logger.warning("clip skipped: %s", error)
                    self._damaged.add(other)
        raise ValueError(f"no clip of bucket {self.plan.buckets[bucket]} can be read")

    def _load(self, index):
        sample = self.samples[index]
        row = self.dataset[sample.index]
        bucket = self.plan.buckets[sample.bucket]
        video = load_clip(row, sample, bucket)
        made = {
            "video": video,
            "sample_id": sample.sample_id,
            "bucket": sample.bucket,
            "index": index,
            "fps": sample.fps,
        }
        if self.images:
            given = row.get("image")
            made["image"] = (
                as_image(video[0]) if given is None else condition_image(given, bucket.height, bucket.width)
            )
        return {**row, **made}


def load_clip(row: dict, sample, bucket, num_frames: int | None = None) -> torch.Tensor:
    """Decode and resize the window of one planned clip: float32 `(F, C, H, W)` in [0, 1]."""
    frames = read_video(
        row["video"],
        start=sample.start,
        num_frames=num_frames or bucket.num_frames,
        fps=sample.target_fps,
        source_fps=row.get("fps"),
    )
    return resize_crop(frames, bucket.height, bucket.width)
