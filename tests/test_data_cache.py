import ctypes
import json
import os
import pickle
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.utils.data import DataLoader

from vidtrl.data import (
    BucketSampler,
    CachedDataset,
    VideoDataset,
    build_cache,
    load_video_folder,
    plan_dataset,
    standardize_columns,
    write_video,
)
from vidtrl.data import store as store_module
from vidtrl.data.cache import remove_old_temporaries
from vidtrl.toy import world


FIXED = dict(height=64, width=64, num_frames=17)
FINGERPRINT = {"model": "someone/Tiny Video", "revision": "abc"}


class Encoders:
    """Stand-ins whose outputs depend on every pixel and letter, and which count their calls."""

    def __init__(self, delay=0.0, log=None):
        self.delay, self.log, self.clips, self.prompts, self.rows = delay, log, 0, [], []

    def encode(self, videos):
        assert len(videos) == 1 and videos[0].dtype == torch.float32
        self.clips += 1
        time.sleep(self.delay)
        if self.log:
            with open(self.log, "a") as file:
                file.write(f"{float(videos[0].double().sum()):.3f}\n")
        pooled = torch.nn.functional.avg_pool3d(videos[0].transpose(0, 1)[None], (1, 8, 8))[:, :, ::4]
        return pooled * 3 - 1, pooled * 0.1

    def condition(self, row, height, width, num_frames):
        self.prompts.append(row.get("prompt"))
        self.rows.append(row)
        codes = torch.tensor([ord(c) for c in row.get("prompt", "")], dtype=torch.bfloat16).view(-1, 1)
        mask = torch.ones(len(codes), dtype=torch.bool)
        return {"text": codes, "mask": mask}, {"shape": [num_frames, height, width], "scale": 0.1}


def build(dataset, cache_dir, encoders=None, rules=None, **kwargs):
    encoders = encoders or Encoders()
    plan = plan_dataset(dataset, **(rules or FIXED), max_bad_fraction=kwargs.pop("max_bad_fraction", 0.1))
    kwargs.setdefault("fingerprint", FINGERPRINT)
    cached = build_cache(dataset, plan, encoders.encode, encoders.condition, cache_dir=cache_dir, **kwargs)
    return cached, encoders, plan


def same(a, b):
    """Bitwise equality of two items."""
    assert a.keys() == b.keys()
    for name in ("mean", "std"):
        assert a[name].dtype == b[name].dtype and torch.equal(a[name], b[name])
    (tensors_a, meta_a), (tensors_b, meta_b) = a["condition"], b["condition"]
    assert meta_a == meta_b and tensors_a.keys() == tensors_b.keys()
    assert all(torch.equal(tensors_a[n], tensors_b[n]) and tensors_a[n].dtype == tensors_b[n].dtype for n in tensors_a)
    assert (a["prompt"], a["sample_id"], a["bucket"]) == (b["prompt"], b["sample_id"], b["bucket"])
    return True


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return world.write_dataset(tmp_path_factory.mktemp("clips") / "toy", num_clips=6)


@pytest.fixture(scope="module")
def dataset(folder):
    return load_video_folder(folder)


def test_hit_equals_miss_equals_uncached(dataset, tmp_path):
    first, counted, plan = build(dataset, tmp_path)
    assert counted.clips == 6 and len(first) == 6
    again, uncounted, _ = build(dataset, tmp_path)
    assert uncounted.clips == 0 and uncounted.prompts == []
    assert all(same(first[i], again[i]) for i in range(6))
    for item, clip in zip(first, VideoDataset(dataset, plan), strict=True):
        mean, std = Encoders().encode([clip["video"]])
        assert torch.equal(item["mean"], mean[0].half()) and torch.equal(item["std"], std[0].half())
        tensors, meta = Encoders().condition({"prompt": clip["prompt"]}, 64, 64, 17)
        assert torch.equal(item["condition"][0]["text"], tensors["text"]) and item["condition"][1] == meta
        assert item["condition"][0]["text"].dtype == torch.bfloat16
    assert not torch.equal(first[0]["mean"], first[1]["mean"])
    assert first.buckets == [0] * 6 and first[-1]["sample_id"] == "clean_00005.mp4"
    with pytest.raises(IndexError):
        first[6]


def test_prompts_are_encoded_once(folder, tmp_path):
    rows = [{"video": str(folder / f"clean_0000{i}.mp4"), "prompt": f"prompt {i % 2}"} for i in range(6)]
    cached, counted, _ = build(rows, tmp_path)
    assert sorted(counted.prompts) == ["", "prompt 0", "prompt 1"]
    assert cached.empty_condition(3)[0]["text"].shape == (0, 1)
    assert cached.empty_condition(3)[1] == {"shape": [17, 64, 64], "scale": 0.1}
    without, counted, _ = build(rows, tmp_path / "b", empty_prompt=False)
    assert sorted(counted.prompts) == ["prompt 0", "prompt 1"]
    with pytest.raises(ValueError, match="empty_prompt=True"):
        without.empty_condition(0)
    # a duplicate file is encoded once, too
    _, counted, _ = build([rows[0], rows[0], rows[1]], tmp_path / "c")
    assert counted.clips == 2


def test_what_conditions_share_is_stored_once(dataset, tmp_path, caplog):
    """Tensors named `shared.*`, such as rotary tables: 9 MB a prompt in CogVideoX."""

    class Rotary(Encoders):
        def condition(self, row, height, width, num_frames):
            tensors, meta = super().condition(row, height, width, num_frames)
            table = torch.arange(num_frames * 10_000).view(num_frames, -1) / height
            return {**tensors, "shared.rope.0": table, "shared.rope.1": table + 1, "shared.again": table.clone()}, meta

    def size(directory):
        return sum(p.stat().st_size for p in directory.rglob("*.safetensors") if "latents" not in p.name)

    cached, counted, _ = build(dataset, tmp_path / "a", Rotary())
    assert len(counted.prompts) == 7  # six and the empty one
    (directory,) = (tmp_path / "a").glob("tiny-video-*")
    files = sorted(directory.glob("shared.*.safetensors"))
    one = 17 * 10_000 * 4
    assert len(files) == 2 and 2 * one < size(directory) < 2.1 * one
    expected = Rotary().condition({"prompt": cached[0]["prompt"]}, 64, 64, 17)[0]
    for tensors, _ in (cached[0]["condition"], cached[5]["condition"], cached.empty_condition(3)):
        assert tensors.keys() == expected.keys()
        assert all(torch.equal(tensors[n], expected[n]) for n in expected if n.startswith("shared."))
    assert torch.equal(cached[0]["condition"][0]["text"], expected["text"])
    _, counted, _ = build(dataset, tmp_path / "a", Rotary())
    assert counted.prompts == []
    # another shape has another table
    _, counted, _ = build(dataset, tmp_path / "a", Rotary(), rules={**FIXED, "num_frames": 13})
    assert len(counted.prompts) == 7 and len(list(directory.glob("shared.*"))) == 4
    for number, damage in enumerate((Path.unlink, lambda path: path.write_bytes(path.read_bytes()[:-9]))):
        damage(files[0])
        again, counted, _ = build(dataset, tmp_path / "a", Rotary())
        assert len(counted.prompts) == 7 and counted.clips == 0 and all(same(again[i], cached[i]) for i in range(6))
        assert ("damaged and will be made again" in caplog.text) == bool(number)


def test_what_the_directory_holds(dataset, tmp_path):
    build(dataset, tmp_path)
    assert {p.name for p in tmp_path.iterdir()} - {"files.parquet"} == {p.name for p in tmp_path.glob("tiny-video-*")}
    (directory,) = tmp_path.glob("tiny-video-*")
    assert json.loads((directory / "fingerprint.json").read_text()) == FINGERPRINT
    assert {p.suffix for p in directory.iterdir()} == {
        ".safetensors",
        ".parquet",
        ".json",
    }  # nothing that is unpickled
    import pyarrow.parquet

    index = pyarrow.parquet.read_table(directory / "index.parquet").to_pylist()
    latents = [row for row in index if row["kind"] == "latents"]
    assert [row["sample_id"] for row in latents] == [f"clean_0000{i}.mp4" for i in range(6)]
    assert latents[0]["prompt"] == "a red circle moving right" and latents[0]["num_frames"] == 17
    for row in latents:
        assert f"{row['key']}/mean" in load_file(directory / row["shard"])


def test_every_input_is_part_of_the_key(folder, tmp_path):
    rows = [{"video": str(folder / "clean_00000.mp4"), "prompt": "a", "fps": 8}]
    base, counted, _ = build(rows, tmp_path)
    assert counted.clips == 1
    variants = {
        "revision": dict(fingerprint={**FINGERPRINT, "revision": "def"}),
        "frames": dict(rules={**FIXED, "num_frames": 13}),
        "size": dict(rules={**FIXED, "width": 48}),
        "frame rate": dict(rules={**FIXED, "num_frames": 5, "fps": 4}),
        "fewer frames": dict(rules={**FIXED, "num_frames": 9}),
        "window": dict(rules={**FIXED, "num_frames": 9, "windows": "center"}),
    }
    for name, change in variants.items():
        _, counted, _ = build(rows, tmp_path, **change)
        assert counted.clips == 1, name
    _, counted, _ = build([{**rows[0], "fps": 16}], tmp_path, rules={**FIXED, "num_frames": 5, "fps": 4})
    assert counted.clips == 1  # the stated frame rate of the clip
    _, counted, _ = build([{**rows[0], "prompt": "b"}], tmp_path)
    assert counted.clips == 0 and counted.prompts == ["b"]
    renamed = folder / "renamed.mp4"
    renamed.write_bytes((folder / "clean_00000.mp4").read_bytes())
    again, counted, _ = build([{"video": str(renamed), "prompt": "a", "fps": 8}], tmp_path)
    renamed.unlink()
    assert counted.clips == 0 and torch.equal(again[0]["mean"], base[0]["mean"])  # content, not name


@pytest.mark.parametrize("remembered", [True, False])
def test_stale_entries_are_not_read(folder, tmp_path, monkeypatch, remembered):
    """A file whose content changes under the same name, size and modification time."""
    if remembered:  # hashes of files this fresh are not remembered by default
        monkeypatch.setattr(store_module, "RACY_NS", 0)
    clip = tmp_path / "clip.mp4"
    data = (folder / "clean_00000.mp4").read_bytes()
    other = (folder / "clean_00003.mp4").read_bytes()
    size = max(len(data), len(other)) + 8

    def write(content):  # padded with an mp4 box of type "free" to one size
        pad = size - len(content)
        clip.write_bytes(content + pad.to_bytes(4, "big") + b"free" + bytes(pad - 8))
        os.utime(clip, ns=(10**18, 10**18))

    write(data)
    rows = [{"video": str(clip), "prompt": "a"}]
    first, counted, _ = build(rows, tmp_path / "cache")
    _, counted, _ = build(rows, tmp_path / "cache")
    assert counted.clips == 0
    assert (tmp_path / "cache" / "files.parquet").exists() == remembered
    before = os.stat(clip)
    time.sleep(0.05)  # the clock of the file system ticks
    write(other)
    assert (os.stat(clip).st_size, os.stat(clip).st_mtime_ns) == (before.st_size, before.st_mtime_ns)
    second, counted, _ = build(rows, tmp_path / "cache")
    assert counted.clips == 1 and not torch.equal(first[0]["mean"], second[0]["mean"])


def test_hashes_are_remembered(dataset, tmp_path, monkeypatch):
    for path in Path(dataset[0]["video"]["path"]).parent.glob("*.mp4"):
        os.utime(path)
    build(dataset, tmp_path)
    assert not (tmp_path / "files.parquet").exists()  # the files are too fresh to be trusted
    monkeypatch.setattr(store_module, "RACY_NS", 0)
    build(dataset, tmp_path)
    assert (tmp_path / "files.parquet").exists()
    hashes = store_module.FileHashes(tmp_path)
    path = dataset[0]["video"]["path"]
    want = hashes.content(path)
    hashes.known[os.path.abspath(path)]["sha256"] = "remembered"
    assert hashes.content(path) == "remembered"
    os.utime(path)
    assert hashes.content(path) == want


def test_pictures_that_look_different_have_different_hashes(tmp_path):
    hashes, plain = store_module.FileHashes(tmp_path), Image.new("P", (4, 4))
    red, blue = plain.copy(), plain.copy()
    red.putpalette([255, 0, 0] * 256)
    blue.putpalette([0, 0, 255] * 256)
    assert hashes.content(red) == hashes.content(Image.new("RGB", (4, 4), "red")) != hashes.content(blue)


def test_lost_index_and_damaged_shard(dataset, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(store_module, "SHARD_ENTRIES", 2)
    first = list(build(dataset, tmp_path)[0])
    (directory,) = tmp_path.glob("tiny-video-*")
    (directory / "index.parquet").unlink()
    _, counted, _ = build(dataset, tmp_path)
    assert counted.clips == 0  # shards say themselves what they hold
    (directory / "index.parquet").write_bytes(b"garbage")
    _, counted, _ = build(dataset, tmp_path)
    assert counted.clips == 0 and "is damaged and will be rebuilt" in caplog.text
    shard = sorted(directory.glob("latents-*"))[1]
    shard.write_bytes(shard.read_bytes()[:-100])
    again, counted, _ = build(dataset, tmp_path)
    assert counted.clips == 2 and caplog.text.count(f"{shard} is damaged") == 1
    assert all(same(first[i], again[i]) for i in range(6))
    shard.unlink()
    sorted(directory.glob("latents-*"))[0].unlink()
    again, counted, _ = build(dataset, tmp_path)
    assert counted.clips == 2 and all(same(first[i], again[i]) for i in range(6))


def test_unreadable_clips_are_dropped(folder, tmp_path, caplog):
    copy = tmp_path / "data"
    copy.mkdir()
    for path in folder.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    data = (copy / "clean_00002.mp4").read_bytes()
    middle = data.index(b"mdat") + 1200  # only decoding can tell
    (copy / "clean_00002.mp4").write_bytes(data[:middle] + bytes(400) + data[middle + 400 :])
    (copy / "clean_00004.mp4").write_bytes(b"")
    dataset = load_video_folder(copy)
    for _ in range(2):
        caplog.clear()
        cached, _, plan = build(dataset, tmp_path / "cache", max_bad_fraction=0.4)
        assert [cached[i]["sample_id"] for i in range(len(cached))] == [f"clean_0000{i}.mp4" for i in (0, 1, 3, 5)]
        assert plan.counts()["dropped"] == 2 and plan.rows[2].unreadable and "is damaged" in plan.rows[2].reason
        assert len([r for r in caplog.records if "clip skipped" in r.getMessage()]) == 2
    with pytest.raises(ValueError, match="2 of 6 clips cannot be read, more than max_bad_fraction=0.2"):
        build(dataset, tmp_path / "cache", max_bad_fraction=0.2)


def test_streaming_is_planned_and_cached_in_one_pass(dataset, tmp_path):
    want, _, _ = build(dataset, tmp_path / "a")
    reads = []
    stream = dataset.to_iterable_dataset().map(lambda row: reads.append(row["prompt"]) or row)
    stream = standardize_columns(stream)
    reads.clear()
    got, counted, plan = build(stream, tmp_path / "b")
    assert counted.clips == 6 and plan.complete and plan.counts()["kept"] == 6
    assert len(reads) <= 7  # one pass, and a look at the first row
    assert all(same(want[i], got[i]) for i in range(6))
    _, counted, _ = build(standardize_columns(dataset.to_iterable_dataset()), tmp_path / "b")
    assert counted.clips == 0
    _, counted, _ = build(dataset, tmp_path / "b")  # the same entries serve the plain dataset
    assert counted.clips == 0


def test_embedded_bytes(dataset, tmp_path):
    rows = [{"video": {"path": None, "bytes": Path(r["video"]["path"]).read_bytes()}, "prompt": "x"} for r in dataset]
    want, _, _ = build(dataset, tmp_path)
    got, counted, _ = build(rows, tmp_path)
    assert counted.clips == 0 and torch.equal(want[0]["mean"], got[0]["mean"])  # the content is the same


def test_buckets_and_images(tmp_path, folder):
    write_video(tmp_path / "wide.mp4", torch.zeros(9, 3, 64, 96), fps=8)
    rows = [
        {"video": str(folder / "clean_00000.mp4"), "prompt": "a"},
        {"video": str(tmp_path / "wide.mp4"), "prompt": "a"},
    ]
    rows += [{"video": np.zeros((1, 64, 64, 3), np.uint8), "prompt": "a"}]
    cached, counted, plan = build(rows, tmp_path / "cache", rules=dict(resolution=64, token_budget=400))
    assert len(counted.prompts) == 6  # the prompt and the empty prompt, in three shapes
    assert [tuple(cached.shapes[b]) for b in cached.buckets] == [tuple(plan.buckets[r.bucket]) for r in plan.samples]
    for item in cached:
        frames, height, width = cached.shapes[item["bucket"]]
        assert item["mean"].shape[1:] == ((frames + 3) // 4, height // 8, width // 8)
        assert item["condition"][1]["shape"] == [frames, height, width]


def test_condition_columns(dataset, tmp_path, folder, caplog):
    previous = None
    cached, counted, _ = build(dataset, tmp_path, condition_columns=("prompt", "fps", "image"))
    assert len(counted.rows) == 12  # the image is each clip's first frame: nothing is shared
    row = counted.rows[0]
    assert set(row) == {"prompt", "fps", "image"} and row["fps"] == 8
    frame = torch.from_numpy(np.array(row["image"])).permute(2, 0, 1)
    plan = plan_dataset(dataset, **FIXED)
    assert torch.equal(frame, (VideoDataset(dataset, plan)[0]["video"][0] * 255).round().byte())
    _, counted, _ = build(dataset, tmp_path, condition_columns=("prompt", "fps", "image"))
    assert counted.rows == []
    _, counted, _ = build(dataset, tmp_path)
    assert len(counted.rows) == 7  # an image is part of the key

    image = {"path": None, "bytes": (folder / "clean_00000.mp4").read_bytes()[:0]}
    rows = [{**dataset[i], "image": np_image(i // 2), "style": f"s{i % 2}"} for i in range(4)]
    _, counted, _ = build(rows, tmp_path / "b", condition_columns=("prompt", "image", "style"), empty_prompt=False)
    assert len(counted.rows) == 4 and counted.rows[0]["style"] == "s0"
    rows = [{**row, "prompt": "same"} for row in rows]
    _, counted, _ = build(rows, tmp_path / "b", condition_columns=("prompt", "image"), empty_prompt=False)
    assert len(counted.rows) == 2  # two images
    with pytest.raises(ValueError, match="condition_columns names mood; the dataset has video, prompt"):
        build(dataset, tmp_path, condition_columns=("prompt", "mood"))
    cached, _, plan = build(
        [{**rows[0], "image": image}, *rows[1:]],
        tmp_path / "c",
        condition_columns=("prompt", "image"),
        max_bad_fraction=0.5,
    )
    assert len(cached) == 3 and "cannot be read as an image" in plan.rows[0].reason
    assert caplog.text.count("clip skipped") == 1
    # a bad picture that two clips share drops both
    rows = [{**row, "image": image} for row in rows[:2]] + rows[2:]
    shared = dict(condition_columns=("prompt", "image"), max_bad_fraction=0.5)
    assert len(build(rows, tmp_path / "d", **shared)[0]) == 2

    path = tmp_path / "condition.png"
    for seed in (0, 1, 1):  # a picture replaced under the same name
        np_image(seed).save(path)
        _, counted, _ = build([{**rows[2], "image": str(path)}], tmp_path / "e", condition_columns=("image",))
        assert len(counted.rows) == (0 if seed == 1 and previous == 1 else 1)
        previous = seed
    pose = [{**rows[2], "pose": np.full((2, 2), i // 2), "tags": ["x", i % 2]} for i in range(4)]
    _, counted, _ = build(pose, tmp_path / "f", condition_columns=("pose", "tags"))
    assert len(counted.rows) == 4


def np_image(seed):
    from PIL import Image

    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (8, 8, 3), dtype=np.uint8))


def test_text_only(tmp_path):
    rows = standardize_columns([{"text": "a"}, {"text": "b"}, {"text": "a"}], prompts_only=True)
    cached, counted, _ = build(rows, tmp_path, text_only=True)
    assert counted.clips == 0 and sorted(counted.prompts) == ["", "a", "b"]
    assert "mean" not in cached[0] and cached[2]["condition"][0]["text"].shape == (1, 1)
    with pytest.raises(ValueError, match="use text_only=True"):
        build(rows, tmp_path)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e6])
def test_encoder_without_finite_values(dataset, tmp_path, value):
    plan, good = plan_dataset(dataset, **FIXED), Encoders()
    kwargs = dict(cache_dir=tmp_path, fingerprint=FINGERPRINT)
    bad = torch.full((1, 3, 5, 8, 8), value)
    with pytest.raises(ValueError, match=r"NaN, Inf or values beyond float16 for clean_00000\.mp4"):
        build_cache(dataset, plan, lambda videos: (bad, bad * 0), good.condition, **kwargs)
    if value != 1e6:
        with pytest.raises(ValueError, match="text encoder returned NaN or Inf in text for the prompt"):
            kwargs["cache_dir"] = tmp_path / "other"
            build_cache(dataset, plan, good.encode, lambda *_: ({"text": bad}, {}), **kwargs)


SCRIPT = """
import sys, time, os
sys.path.insert(0, {tests!r})
from pathlib import Path
from test_data_cache import Encoders, FIXED, FINGERPRINT
from vidtrl.data import build_cache, load_video_folder, plan_dataset, store
store.SHARD_ENTRIES = 2
clips, cache, rank, world, delay, log, stream = sys.argv[1:]
rank, world, step = int(rank), int(world), 0

def wait():  # a barrier over the file system
    global step
    step += 1
    Path(log + f".{{step}}.{{rank}}").touch()
    while not all(os.path.exists(log + f".{{step}}.{{r}}") for r in range(world)):
        time.sleep(0.01)

dataset, columns = load_video_folder(clips), ("prompt",)
if stream == "stream":
    dataset, columns = dataset.to_iterable_dataset(), ("prompt", "image")
encoders = Encoders(float(delay), f"{{log}}-{{rank}}.txt")
cached = build_cache(dataset, plan_dataset(dataset, **FIXED), encoders.encode, encoders.condition, cache_dir=cache,
                     fingerprint=FINGERPRINT, process_index=rank, num_processes=world, wait=wait,
                     condition_columns=columns)
assert len(cached) == 12
"""


def start(clips, cache, log, rank=0, world=1, delay=0.0, stream="plain"):
    code = SCRIPT.format(tests=os.path.dirname(__file__))
    arguments = [str(x) for x in (clips, cache, rank, world, delay, log, stream)]
    return subprocess.Popen([sys.executable, "-c", code, *arguments], stderr=subprocess.PIPE, text=True)


def encoded(log):
    return [line for path in Path(log).parent.glob(Path(log).name + "-*.txt") for line in path.read_text().split()]


@pytest.fixture(scope="module")
def twelve(tmp_path_factory):
    return world.write_dataset(tmp_path_factory.mktemp("twelve"), num_clips=12, seed=3)


def test_resumes_after_kill_9(twelve, tmp_path):
    cache, log = tmp_path / "cache", tmp_path / "log"
    process = start(twelve, cache, log, delay=0.15)
    try:
        deadline = time.monotonic() + 60
        while len(list(cache.glob("*/latents-*.safetensors"))) < 2:
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.01)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stderr.close()
    (directory,) = cache.glob("tiny-video-*")
    (directory / ".tmp-1234-latents-r0-00009.safetensors").write_bytes(b"half a shard")  # as if killed while writing
    entries = {"entries": json.dumps([{"key": "k"}])}  # complete, but another run is about to rename it
    save_file({"x": torch.zeros(1)}, directory / ".tmp-5678-latents-r1-00000.safetensors", entries)
    assert not store_module.Store(directory, 0).has("k")
    written = len(list(directory.glob("latents-*.safetensors"))) * 2
    assert 4 <= written < 12 and not (directory / "index.parquet").exists()
    dataset = load_video_folder(twelve)
    resumed, counted, _ = build(dataset, cache)
    assert counted.clips == 12 - written and counted.prompts == []  # only the rest
    fresh, _, _ = build(dataset, tmp_path / "other")
    assert all(same(resumed[i], fresh[i]) for i in range(12))


@pytest.mark.parametrize("stream", ["plain", "stream"])
def test_two_processes_share_the_work(twelve, tmp_path, stream):
    cache, log = tmp_path / "cache", tmp_path / "log"
    processes = [start(twelve, cache, log, rank, 2, delay=0.02, stream=stream) for rank in range(2)]
    for process in processes:
        _, error = process.communicate(timeout=120)
        assert process.returncode == 0, error
    lines = encoded(log)
    assert len(lines) == len(set(lines)) == 12  # every clip once, in one process or the other
    assert {p.name.split("-")[1] for p in cache.glob("*/latents-*")} == {"r0", "r1"}
    dataset = load_video_folder(twelve)
    columns = ("prompt", "image") if stream == "stream" else ("prompt",)
    shared, counted, _ = build(dataset, cache, condition_columns=columns)
    alone, _, _ = build(dataset, tmp_path / "other", condition_columns=columns)
    assert counted.clips == 0 and counted.prompts == []
    assert all(same(shared[i], alone[i]) for i in range(12))


def test_temporary_files_come_and_go_while_old_ones_are_removed(tmp_path):
    code = "import sys; from pathlib import Path; from vidtrl.data.store import write_atomic\n"
    code += "while True: write_atomic(Path(sys.argv[1], 'file.json'), 'x')"
    other = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)])
    try:
        deadline = time.monotonic() + 60
        while not (tmp_path / "file.json").exists():
            assert other.poll() is None and time.monotonic() < deadline
            time.sleep(0.01)
        left = tmp_path / ".tmp-1234-file.json"  # by a run that was killed two days ago
        left.touch()
        os.utime(left, times=(time.time() - 2 * 86400,) * 2)
        for _ in range(20_000):  # each finds a file of the other process and may come too late to ask for its age
            remove_old_temporaries(tmp_path)
        assert other.poll() is None and not left.exists()
    finally:
        other.kill()
        other.wait()


def test_several_processes_need_a_barrier_and_one_directory(dataset, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="pass wait"):
        build(dataset, tmp_path, num_processes=2)
    monkeypatch.setattr("vidtrl.data.cache.WAIT_SECONDS", 0.0)
    with pytest.raises(RuntimeError, match="process 1 wrote nothing to .* file system that all processes share"):
        build(dataset, tmp_path, num_processes=2, wait=lambda: None)

    def died():  # after its report, before its shards
        for directory in tmp_path.glob("tiny-video-*"):
            (directory / "unreadable-r1of2.json").write_text("{}")

    with pytest.raises(RuntimeError, match="entries are missing from .* another process stopped early"):
        build(dataset, tmp_path, num_processes=2, wait=died)


@pytest.mark.skipif(not hasattr(signal, "SIGXFSZ"), reason="needs file size limits")
def test_full_disk(twelve, tmp_path):
    """A limit on the size of files stands in for a full disk: both make `write` fail half-way."""
    import resource

    cache, dataset = tmp_path / "cache", load_video_folder(twelve)
    build(dataset.select(range(4)), cache)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (6000, limits[1]))
    try:
        with pytest.raises(
            OSError, match="cannot write .*What was cached before is intact; free some space and rerun"
        ):
            build(dataset, cache)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not list(cache.rglob(".tmp-*"))
    rerun, counted, _ = build(dataset, cache)
    assert counted.clips == 8 and len(rerun) == 12


def test_foreign_files_are_ignored(dataset, tmp_path, caplog):
    build(dataset, tmp_path)
    (directory,) = tmp_path.glob("tiny-video-*")
    save_file({"x": torch.zeros(1)}, directory / "foreign.safetensors")
    old = directory / ".tmp-0-latents"
    old.write_bytes(b"x")
    os.utime(old, (0, 0))
    _, counted, _ = build(dataset, tmp_path)
    assert counted.clips == 0 and "foreign.safetensors is damaged and will not be used" in caplog.text
    assert not old.exists()  # what killed processes left behind long ago


def test_loader_workers(dataset, tmp_path):
    cached, _, plan = build(dataset, tmp_path)
    for clips in (cached, VideoDataset(dataset, plan)):
        sampler = BucketSampler(clips.buckets, batch_size=2, seed=1)
        batches = [
            list(DataLoader(clips, 2, sampler=sampler, num_workers=workers, collate_fn=list)) for workers in (0, 2)
        ]
        ids = [[item["sample_id"] for batch in loaded for item in batch] for loaded in batches]
        assert ids[0] == ids[1] and len(set(ids[0])) == 6
    copy = pickle.loads(pickle.dumps(cached))  # how a spawned worker gets it
    assert same(copy[3], cached[3])


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="needs /proc")
def test_ten_thousand_clips_in_bounded_memory(tmp_path):
    def resident():
        ctypes.CDLL(None).malloc_trim(0)  # what earlier tests left free would hide what this one takes
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20

    writer = store_module.Store(tmp_path, 0)
    tensors, text = {"mean": torch.zeros(3, 1, 32, 32).half()}, {"text": torch.zeros(7, 8)}
    tensors["std"] = tensors["mean"] + 1
    keys = [store_module.sha256_json(i) for i in range(10_500)]
    for i, key in enumerate(keys[:10_000]):
        tensors["mean"][0, 0, 0, 0] = i % 2048  # exact in float16
        info = {"sample_id": f"clip-{i}", "start": 0, "prompt": "p", "num_frames": 1, "height": 256, "width": 256}
        writer.add("latents", key, tensors, {}, info)
    for key in keys[10_000:]:
        writer.add("conditions", key, text, {}, {"sample_id": "", "prompt": "p"})
    writer.flush()
    items = [(f"clip-{i}", "p", 0, (keys[i], keys[10_000 + i % 500], None)) for i in range(10_000)]
    cached = CachedDataset(str(tmp_path), [(1, 256, 256)], items, writer.shard, text_only=False)
    del items, keys, writer
    size = sum(p.stat().st_size for p in tmp_path.rglob("*.safetensors")) / 2**20
    order = random.Random(0).sample(range(10_000), 2500)  # touches every shard, many times
    for i in order[:500]:
        cached[i]
    before = resident()
    for i in order[500:]:
        item = cached[i]
        assert item["mean"][0, 0, 0, 0] == i % 2048 and item["sample_id"] == f"clip-{i}"
    growth = resident() - before
    kept = [cached[i] for i in range(6000)]  # the control: holding items shows, beyond what earlier tests left free
    held = resident() - before - growth
    assert len(kept) == 6000 and size > 100 and growth < 5, (size, growth, held)
    assert held > 10, (growth, held)
