"""No network in any test; fixtures of the trainer tests."""

import os


os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest  # noqa: E402


@pytest.fixture(scope="session")
def clips(tmp_path_factory):
    """Six tiny captioned mp4 clips as a `datasets.Dataset`."""
    from sft_setup import write_clips

    return write_clips(tmp_path_factory.mktemp("clips"))


@pytest.fixture(scope="session")
def cache_dir(tmp_path_factory):
    """One cache of latents for all trainer tests."""
    return tmp_path_factory.mktemp("cache")
