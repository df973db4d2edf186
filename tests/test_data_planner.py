import json
import math

import pytest
import torch
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st

from vidtrl.data import Plan, ShapePlan, VideoDataset, VideoInfo, load_video_folder, plan_dataset, write_video
from vidtrl.data.planner import ACTIONS
from vidtrl.toy import world


FIXED = dict(height=64, width=64, num_frames=17)


def clip(frames, height, width, seed=0):
    return torch.randint(0, 255, (frames, 3, height, width), generator=torch.manual_seed(seed)).to(torch.uint8)


def rows_of(*shapes, fps=8):
    return [{"prompt": "a clip", "video": clip(*shape), "fps": fps} for shape in shapes]


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    """Clips that need every action, two of them damaged."""
    folder, rows = tmp_path_factory.mktemp("mixed"), []
    shapes = {
        "fits": (17, 64, 64, 8),
        "wide": (17, 64, 96, 8),
        "long": (40, 64, 64, 8),
        "fast": (51, 64, 64, 24),
        "slow": (9, 64, 64, 4),
        "short": (5, 64, 64, 8),
        "small": (17, 32, 32, 8),
        "large": (17, 128, 128, 8),
    }
    for name, (*shape, fps) in shapes.items():
        write_video(folder / f"{name}.mp4", clip(*shape), fps=fps)
        rows.append({"file_name": f"{name}.mp4", "prompt": name})
    (folder / "empty.mp4").write_bytes(b"")
    (folder / "text.mp4").write_text("not a video")
    rows += [{"file_name": "empty.mp4", "prompt": "e"}, {"file_name": "text.mp4", "prompt": "t"}]
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return load_video_folder(folder)


def test_every_clip_is_accounted_for(mixed, caplog, tmp_path):
    plan = plan_dataset(mixed, **FIXED, fps=8, max_bad_fraction=0.5)
    said = {row.sample_id.removesuffix(".mp4"): (row.action, row.reason) for row in plan.rows}
    assert said["fits"] == ("kept", "fits as it is")
    assert said["wide"] == ("cropped", "cropped to 64x64 (33.3% of the picture lost)")
    assert said["long"] == ("cropped", "frames 0-16 of 40")
    assert said["fast"] == ("retimed", "24 to 8 fps")
    assert said["slow"] == ("retimed", "4 to 8 fps (frames are repeated); frames 0-16 of 18")
    assert said["short"] == ("dropped", "too short: 5 frames at 8 fps, 17 are needed; num_frames=5 would keep it")
    assert said["small"] == ("kept", "enlarged 32x32 to 64x64")
    assert said["large"] == ("kept", "scaled 128x128 to 64x64")
    assert said["empty"][0] == said["text"][0] == "dropped"
    assert said["empty"][1].startswith("unreadable: ") and "it is empty" in said["empty"][1]
    assert plan.counts() == {"kept": 3, "cropped": 2, "retimed": 2, "dropped": 3}
    skipped = [record.getMessage() for record in caplog.records if "clip skipped" in record.getMessage()]
    assert len(skipped) == 2 and "empty.mp4" in skipped[0] and "text.mp4" in skipped[1]  # one warning per file
    assert len(VideoDataset(mixed, plan)) == 7
    for item in VideoDataset(mixed, plan):
        assert item["video"].shape == (17, 3, 64, 64) and item["fps"] == 8

    plan.to_json(tmp_path / "plan.json")
    written = json.loads((tmp_path / "plan.json").read_text())
    assert len(written["clips"]) == len(mixed) and written["counts"] == plan.counts()
    assert written["buckets"][0] == {"num_frames": 17, "height": 64, "width": 64, "tokens": 320, "clips": 7}
    assert [c["sample_id"] for c in written["clips"]] == [row.sample_id for row in plan.rows]
    assert written["clips"][5]["reason"] == said["short"][1]

    text = str(plan)
    assert text.startswith("plan: 10 clips: 3 kept, 2 cropped, 2 retimed, 3 dropped")
    assert all(name in text for name in said) and "bucket 0: 17x64x64" in text
    lines = plan.report(max_rows=3).splitlines()
    assert "dropped" in lines[2] and "and 7 more; plan.to_json(path) lists them all" in lines[-1]


def test_quiet(mixed, caplog):
    plan_dataset(mixed, **FIXED, max_bad_fraction=0.5, quiet=True)
    assert not caplog.records


def test_too_many_bad_clips(mixed):
    with pytest.raises(ValueError, match="2 of 10 clips cannot be read, more than max_bad_fraction=0.1.*empty.mp4"):
        plan_dataset(mixed, **FIXED)
    plan_dataset(mixed, **FIXED, max_bad_fraction=0.2)
    with pytest.raises(ValueError, match="between 0 and 1"):
        plan_dataset(mixed, **FIXED, max_bad_fraction=10)


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        (dict(height=64, width=64, num_frames=16), "frame counts are 4k.1; the nearest are 13 and 17"),
        (dict(height=64, width=64, num_frames=0), "frame counts are 4k.1; the nearest are 1"),
        (dict(height=70, width=64, num_frames=17), "multiples of 16; the nearest size is height=64, width=64"),
        (dict(height=4, width=60, num_frames=17), "the nearest size is height=16, width=64"),
        (dict(height=64, width=64, num_frames=7, frame_offset=0, frame_multiple=2), "are 2k; the nearest are 6 and 8"),
        (dict(height=64, num_frames=17), "a fixed shape needs height, width and one num_frames"),
        (dict(height=64, width=64, num_frames=17, resolution=64), "give either height and width, or resolution"),
        (dict(), "state the training shape"),
        (dict(resolution=64), "state the training shape"),
        (dict(resolution=64, num_frames=18), "the nearest are 17 and 21"),
        (
            dict(resolution=512, token_budget=100),
            "no bucket fits token_budget=100: the smallest, .* lower the resolution",
        ),
        (dict(resolution=64, num_frames=17, token_budget=100), "no bucket fits token_budget=100"),
        (dict(buckets=[(17, 64, 64)], token_budget=100), "17x64x64 is 320 tokens, more than token_budget=100"),
        (dict(buckets=[(17, 64, 63)]), "the nearest size is height=64, width=64"),
        (dict(buckets=[]), "buckets is empty"),
        (dict(**FIXED, fps=0), "fps must be positive"),
        (dict(**FIXED, windows="last"), "windows must be one of first, center, all"),
    ],
)
def test_rules_that_do_not_fit(rules, message):
    with pytest.raises(ValueError, match=message):
        ShapePlan(**rules)


def test_nothing_left():
    with pytest.raises(ValueError, match="every clip was dropped; the first: row-0 too short"):
        plan_dataset(rows_of((5, 64, 64)), **FIXED)
    with pytest.raises(ValueError, match="dataset is empty"):
        plan_dataset([], **FIXED)
    with pytest.raises(ValueError, match="prompt of row row-0 is empty"):
        plan_dataset([{"prompt": " ", "video": clip(17, 64, 64)}], **FIXED)


def test_windows():
    rows = rows_of((40, 64, 64))
    starts = {
        mode: [row.start for row in plan_dataset(rows, **FIXED, windows=mode).rows]
        for mode in ("first", "center", "all")
    }
    assert starts == {"first": [0], "center": [11], "all": [0, 17]}
    plan = plan_dataset(rows, **FIXED, windows="all")
    assert [row.sample_id for row in plan.rows] == ["row-0#0", "row-0#17"]
    clips = VideoDataset(rows, plan)
    assert torch.equal((clips[1]["video"] * 255).round().byte(), rows[0]["video"][17:34])


def test_still_images():
    rows = rows_of((17, 64, 64)) + [{"prompt": "p", "video": clip(1, 64, 64)}]
    plan = plan_dataset(rows, **FIXED, fps=8)
    assert [plan.buckets[row.bucket].num_frames for row in plan.rows] == [17, 1]
    assert VideoDataset(rows, plan)[1]["video"].shape == (1, 3, 64, 64)
    even = dict(frame_multiple=2, frame_offset=0)  # a model that cannot hold one frame
    plan = plan_dataset(rows, height=64, width=64, num_frames=16, **even)
    assert plan.rows[1].reason == "is a still image, and the model's frame counts are 2k"


def test_unknown_frame_rate_is_said():
    plan = plan_dataset([{"prompt": "p", "video": clip(17, 64, 64)}], **FIXED, fps=8)
    assert "frame rate unknown" in plan.rows[0].reason and plan.rows[0].target_fps is None


def test_stated_frame_rates_may_be_text():
    row = {"prompt": "p", "video": clip(17, 64, 64)}
    for fps, seconds in (("8", 17 / 8), (None, None), ("", None), (16, 17 / 16)):
        plan = plan_dataset([{**row, "fps": fps}], **FIXED)
        assert plan.rows[0].fps == (17 / seconds if seconds else None)
    for fps, message in (
        ("fast", "'fast', which is no number"),
        (-1, "is stated as -1"),
        (float("nan"), "stated as nan"),
    ):
        plan = plan_dataset([row, {**row, "fps": fps}], **FIXED, max_bad_fraction=0.5, quiet=True)
        assert message in plan.rows[1].reason


def test_buckets_by_aspect_length_and_size():
    spec = dict(resolution=[64, 128], token_budget=2000)
    rows = rows_of(
        (17, 64, 64), (33, 128, 128), (33, 96, 160), (60, 160, 96), (17, 500, 500), (5, 20, 20), (3, 64, 64)
    )
    plan = plan_dataset(rows, **spec)
    chosen = [None if row.bucket is None else tuple(plan.buckets[row.bucket]) for row in plan.rows]
    assert chosen[0] == (17, 64, 64)
    assert chosen[1] == (25, 128, 128)  # 33 frames of this size are beyond the budget
    assert chosen[2] == (33, 96, 160) or chosen[2][1] < chosen[2][2]
    assert chosen[3][1] > chosen[3][2]
    assert chosen[4] == (17, 128, 128)
    assert chosen[5] == (5, 64, 64) and "enlarged 20x20" in plan.rows[5].reason
    assert chosen[6] is None and "too short: 3 frames, 5 are needed" in plan.rows[6].reason
    assert all(plan.spec.tokens(b) <= 2000 for b in plan.buckets)
    stated = plan_dataset(rows, buckets=[(17, 64, 64), (33, 64, 96)])
    assert [tuple(b) for b in stated.buckets if b.num_frames > 1] == [(17, 64, 64), (33, 64, 96)]


def test_plan_of_prompts():
    plan = plan_dataset([{"prompt": "a"}, {"prompt": "b"}], **FIXED)
    assert [row.action for row in plan.rows] == ["kept", "kept"] and plan.rows[0].bucket == 0


def test_streams_are_planned_later():
    stream = Dataset.from_list([{"prompt": "a", "video": "x.mp4"}]).to_iterable_dataset()
    plan = plan_dataset(stream, **FIXED)
    assert not plan.complete and "planned while it is cached" in str(plan)
    with pytest.raises(ValueError, match="streaming dataset must be cached"):
        VideoDataset(stream, plan)


def test_damage_found_late_costs_that_clip(tmp_path, caplog):
    folder = world.write_dataset(tmp_path, num_clips=3)
    data = (folder / "clean_00001.mp4").read_bytes()
    middle = len(data) // 2  # beyond the first frame, which is decoded early
    (folder / "clean_00001.mp4").write_bytes(data[:middle] + bytes(400) + data[middle + 400 :])
    dataset = load_video_folder(folder)
    clips = VideoDataset(dataset, plan_dataset(dataset, **FIXED))
    assert [clips[i]["sample_id"] for i in (0, 1, 2, 1)] == [f"clean_0000{i}.mp4" for i in (0, 2, 2, 2)]
    assert len([record for record in caplog.records if "clean_00001.mp4" in record.getMessage()]) == 1


infos = st.builds(
    lambda n, fps, h, w: VideoInfo(n, fps, h, w, n / fps),
    st.integers(1, 300),
    st.sampled_from([1.0, 8.0, 15.0, 23.976, 24.0, 30.0, 60.0]),
    st.integers(8, 2160),
    st.integers(8, 3840),
)
families = st.sampled_from(
    [
        dict(frame_multiple=4, frame_offset=1, pixel_multiple=16, spatial_factor=8, temporal_factor=4),
        dict(frame_multiple=8, frame_offset=1, pixel_multiple=32, spatial_factor=32, temporal_factor=8),
        dict(frame_multiple=6, frame_offset=1, pixel_multiple=16, spatial_factor=8, temporal_factor=6),
        dict(frame_multiple=2, frame_offset=0, pixel_multiple=16, spatial_factor=8, temporal_factor=4),
    ]
)
shapes = st.one_of(
    st.fixed_dictionaries(
        {"resolution": st.lists(st.sampled_from([64, 128, 256, 480]), min_size=1, max_size=3)},
        optional={"token_budget": st.integers(20_000, 60_000)},
    ).map(lambda rules: rules if "token_budget" in rules else {**rules, "token_budget": 30_000}),
    st.tuples(st.integers(1, 20), st.integers(1, 20), st.integers(1, 20)),
)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_planner_properties(data):
    family, shape = data.draw(families), data.draw(shapes)
    if isinstance(shape, tuple):
        k, h, w = shape
        m, p = family["frame_multiple"], family["pixel_multiple"]
        shape = dict(num_frames=family["frame_offset"] + k * m, height=h * p, width=w * p)
    fps, windows = data.draw(st.sampled_from([None, 8.0, 16.0, 24.0])), data.draw(st.sampled_from(["first", "all"]))
    spec = ShapePlan(**shape, **family, fps=fps, windows=windows)
    for bucket in spec.buckets:
        assert (bucket.num_frames - family["frame_offset"]) % family["frame_multiple"] == 0
        assert bucket.height % family["pixel_multiple"] == 0 == bucket.width % family["pixel_multiple"]
        assert spec.token_budget is None or spec.tokens(bucket) <= spec.token_budget or bucket in spec.image_only
    info = data.draw(infos)
    rows = spec.plan_clip(0, "clip", info)
    assert rows and rows == spec.plan_clip(0, "clip", info)  # no clip is forgotten, and the choice is stable
    available = info.frames_at(fps)
    used = set()
    for row in rows:
        assert row.action in ACTIONS and row.reason
        if row.action == "dropped":
            assert row.bucket is None
            usable = [b for b in spec.buckets if b not in spec.image_only or info.num_frames == 1]
            if info.num_frames > 1:  # only what cannot be used is dropped
                assert all(b.num_frames > available for b in usable)
            else:
                assert all(b.num_frames != 1 for b in usable)
            continue
        bucket = spec.buckets[row.bucket]
        frames = set(range(row.start, row.start + bucket.num_frames))
        assert 0 <= row.start and row.start + bucket.num_frames <= available  # the window is inside the clip
        assert not used & frames  # windows do not overlap
        used |= frames
        retimed = fps is not None and abs(info.fps - fps) > 1e-3 * fps
        lost = abs(math.log(info.width / info.height * bucket.height / bucket.width))
        if row.action == "kept":
            assert not retimed and bucket.num_frames == available
        assert (row.action == "retimed") == retimed
        assert ("cropped to" in row.reason) or lost < 0.2
        assert row.target_fps == fps


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 12), st.integers(0, 11), st.integers(1, 500))
def test_nearest_frames(multiple, offset, n):
    spec = ShapePlan(height=16, width=16, num_frames=offset + multiple, frame_multiple=multiple, frame_offset=offset)
    valid = [c for c in range(1, 1200) if (c - offset) % multiple == 0]
    assert abs(spec.nearest_frames(n) - n) == min(abs(c - n) for c in valid)
    assert spec.nearest_frames(n) in valid


def test_larger_clips_never_get_smaller_buckets():
    spec = ShapePlan(resolution=[64, 128, 256], token_budget=5000)
    infos = [VideoInfo(200, 8.0, side, side, 25.0) for side in (40, 70, 140, 300, 600)]
    tokens = [spec.tokens(spec.buckets[spec.assign(info)[0]]) for info in infos]
    assert tokens == sorted(tokens)
    assert [spec.buckets[spec.assign(info)[0]].height for info in infos[:3]] == [64, 64, 128]


def test_plan_is_deterministic(mixed):
    plans = [plan_dataset(mixed, resolution=64, token_budget=400, fps=8, max_bad_fraction=0.5) for _ in range(2)]
    assert plans[0].rows == plans[1].rows and isinstance(plans[0], Plan)
    assert [row.index for row in plans[0].rows] == list(range(len(mixed)))
