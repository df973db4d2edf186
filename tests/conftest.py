"""No network in any test; fixtures of the trainer tests."""

import os


os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest  # noqa: E402


@pytest.fixture(scope="session")
def clips(tmp_path_factory):
    """Six tiny captioned mp4 clips as a `datasets.Dataset`."""
    from sft_setup import write_clips

    return write_clips(tmp_path_factory.mktemp("clips"))


@pytest.fixture
def attention_default():
    """For tests that set an attention backend: diffusers makes it the default of the process, and resetting a model does not
    take that back (0.42); later tests would compute with another kernel."""
    from diffusers.models.attention_dispatch import attention_backend

    with attention_backend("native"):
        yield


@pytest.fixture(scope="session")
def cache_dir(tmp_path_factory):
    """One cache of latents for all trainer tests."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def zero(clips, cache_dir, tmp_path_factory):
    """`zero_setup.train` of cases into a folder of a name."""
    from zero_setup import train

    root = tmp_path_factory.mktemp("zero")
    clips.save_to_disk(root / "clips")
    return lambda name, cases, accelerate_config=None: train(
        root / name, root / "clips", cache_dir, cases, accelerate_config
    )
