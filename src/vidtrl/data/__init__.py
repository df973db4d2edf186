"""Videos on disk to batches: columns, decoding, shape planning, and the cache of latents and conditions."""

import importlib


_EXPORTS = {
    "BucketSampler": "sampler",
    "CachedDataset": "cache",
    "Plan": "planner",
    "ShapePlan": "planner",
    "VideoDataset": "dataset",
    "VideoInfo": "video",
    "build_cache": "cache",
    "load_video_folder": "columns",
    "plan_dataset": "planner",
    "probe_video": "video",
    "read_video": "video",
    "standardize_columns": "columns",
    "write_video": "video",
}
__all__ = list(_EXPORTS)


def __getattr__(name):
    if name in _EXPORTS:
        return getattr(importlib.import_module(f".{_EXPORTS[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__():
    return sorted(__all__)
