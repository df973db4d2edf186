import json
import shutil
import subprocess
import sys
import zipfile

import pytest
import torch
from datasets import Dataset, DatasetDict, Features, Image, IterableDataset, List, Value, Video, load_dataset
from PIL import Image as PILImage

from vidtrl.data import load_video_folder, read_video, standardize_columns
from vidtrl.toy.world import write_dataset


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_dataset(tmp_path_factory.mktemp("clips") / "toy", num_clips=4)


@pytest.fixture
def sidecars(tmp_path, folder):
    """The same clips, with captions in text files; one name in upper case, one in a sub-directory."""
    (tmp_path / "sub").mkdir()
    rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    for name, row in zip(("a.mp4", "b.MP4", "c.mp4", "sub/d.mp4"), rows, strict=True):
        shutil.copy(folder / row["file_name"], tmp_path / name)
        (tmp_path / name).with_suffix(".txt").write_text(row["prompt"] + "\n")
    return tmp_path


PROMPTS = [f"a red circle moving {d}" for d in ("right", "left", "up", "down")]


@pytest.fixture(autouse=True)
def local_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("hf"))


def test_videofolder_as_it_is(folder):
    dataset = standardize_columns(load_dataset("videofolder", data_dir=str(folder), split="train"))
    assert dataset.column_names == ["video", "prompt"] and dataset["prompt"][:] == PROMPTS
    assert read_video(dataset[0]["video"]).shape == (17, 3, 64, 64)
    assert "torchcodec" not in sys.modules


def test_streaming_videofolder(folder, tmp_path):
    rows = list(standardize_columns(load_dataset("videofolder", data_dir=str(folder), split="train", streaming=True)))
    assert [row["prompt"] for row in rows] == PROMPTS
    with zipfile.ZipFile(tmp_path / "clips.zip", "w") as archive:
        for path in folder.iterdir():
            archive.write(path, path.name)
    packed = load_dataset("videofolder", data_files=str(tmp_path / "clips.zip"), split="train", streaming=True)
    for row, plain in zip(standardize_columns(packed), rows, strict=True):
        assert row["prompt"] == plain["prompt"]
        assert torch.equal(read_video(row["video"]), read_video(plain["video"]))


def test_only_the_hub_and_archives_are_fetched():
    row = {"video": {"path": "https://10.0.0.1/clip.mp4", "bytes": None}, "prompt": "x"}
    features = Features({"video": Video(decode=False), "prompt": Value("string")})
    dataset = standardize_columns(Dataset.from_list([row], features=features).to_iterable_dataset())
    with pytest.raises(ValueError, match="not on the Hub"):
        next(iter(dataset))


def test_load_video_folder(folder, sidecars):
    dataset = load_video_folder(folder)
    assert dataset["prompt"][:] == PROMPTS
    beside = load_video_folder(sidecars)
    assert sorted(beside["prompt"]) == sorted(PROMPTS)
    assert any(row["video"]["path"].endswith("b.MP4") for row in beside)
    (sidecars / "metadata.csv").write_text("file_name,caption,source\na.mp4,hello,x\nb.MP4,there,y\n")
    listed = load_video_folder(sidecars)  # what the metadata leaves out is left out
    assert listed["prompt"][:] == ["hello", "there"] and listed["source"][:] == ["x", "y"]
    assert read_video(listed[1]["video"]).shape == (17, 3, 64, 64)


def test_sidecars_of_a_videofolder_without_metadata(sidecars):
    dataset = load_dataset("videofolder", data_dir=str(sidecars), split="train", drop_labels=True)
    assert sorted(standardize_columns(dataset)["prompt"]) == sorted(PROMPTS)
    streamed = standardize_columns(
        load_dataset("videofolder", data_dir=str(sidecars), split="train", drop_labels=True, streaming=True)
    )
    assert sorted(row["prompt"] for row in streamed) == sorted(PROMPTS)
    (sidecars / "c.txt").unlink()
    with pytest.raises(ValueError, match=r"1 of 4 clips have no caption file; the first: .*c\.mp4"):
        load_video_folder(sidecars)
    for path in sidecars.rglob("*.txt"):
        path.unlink()
    with pytest.raises(ValueError, match='no "prompt" column.*clip.txt beside clip.mp4'):
        load_video_folder(sidecars)


@pytest.mark.parametrize("prompt", ["prompt", "caption", "text", "txt"])
@pytest.mark.parametrize("video", ["video", "file_name", "path", "video_path", "mp4"])
def test_aliases(prompt, video):
    rows = [{prompt: "a", video: "x.mp4", "score": 1}, {prompt: "b", video: "y.mp4", "score": 2}]
    want = [{"prompt": "a", "video": "x.mp4", "score": 1}, {"prompt": "b", "video": "y.mp4", "score": 2}]
    for dataset in (rows, Dataset.from_list(rows), Dataset.from_list(rows).to_iterable_dataset()):
        assert [dict(row) for row in standardize_columns(dataset)] == want


def test_the_first_name_wins():
    rows = [{"prompt": "good", "text": "bad", "video": "x.mp4", "path": "elsewhere"}]
    for dataset in (rows, Dataset.from_list(rows)):
        assert standardize_columns(dataset)[0] == rows[0]


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (("promt", "video"), r'no "prompt" column; its columns are: promt, video. Did you mean "promt"\?'),
        (("Caption", "video"), r'Did you mean "Caption"\?'),
        (
            ("prompt", "vidoe"),
            r'no "video" column.*Did you mean "vidoe"\? Use dataset.rename_column\("vidoe", "video"\)',
        ),
        (("prompt", "image", "vidoe"), r'Did you mean "vidoe"\?'),  # not a dataset of images
        (("prompt", "clip"), r'no "video" column; its columns are: prompt, clip.*file_name, video_path, path'),
    ],
)
def test_missing_columns(columns, message):
    row = dict.fromkeys(columns, "x")
    for dataset in ([row], Dataset.from_list([row]), Dataset.from_list([row]).to_iterable_dataset()):
        with pytest.raises(ValueError, match=message):
            standardize_columns(dataset)


def test_other_mistakes():
    rows = [{"prompt": "a", "video": "x.mp4"}]
    with pytest.raises(ValueError, match=r'pass one split, for example dataset\["train"\]'):
        standardize_columns(DatasetDict(train=Dataset.from_list(rows)))
    with pytest.raises(ValueError, match="dataset is empty"):
        standardize_columns([])
    with pytest.raises(TypeError, match="got str"):
        standardize_columns("clips")
    with pytest.raises(ValueError, match="not a directory"):
        load_video_folder("/does/not/exist")


@pytest.mark.parametrize("empty", ["", "  \n", None])
def test_empty_captions(empty):
    rows = [{"prompt": "a", "video": "x.mp4"}, {"prompt": empty, "video": "y.mp4"}]
    for dataset in (rows, Dataset.from_list(rows)):
        with pytest.raises(ValueError, match="prompt of row 1 is empty.*dataset.filter"):
            standardize_columns(dataset)
    with pytest.raises(ValueError, match=r"2 prompts are empty or not text \(rows 1, 2\)"):
        standardize_columns(rows + rows[1:])
    with pytest.raises(ValueError, match="prompt of row 0 is a int"):
        standardize_columns([{"prompt": 3, "video": "x.mp4"}])


def test_images_stand_in_for_videos(tmp_path):
    PILImage.new("RGB", (16, 8), "red").save(tmp_path / "a.jpg")
    rows = [{"image": str(tmp_path / "a.jpg"), "prompt": "red"}]
    for dataset in (rows, Dataset.from_list(rows), Dataset.from_list(rows).cast_column("image", Image())):
        row = standardize_columns(dataset)[0]
        assert set(row) == {"video", "prompt"}
        assert read_video(row["video"]).shape == (1, 3, 8, 16)
    (tmp_path / "a.txt").write_text("red")
    assert load_video_folder(tmp_path)[0]["prompt"] == "red"
    both = standardize_columns([{"image": "a.jpg", "video": "a.mp4", "prompt": "x"}])[0]
    assert both == {"image": "a.jpg", "video": "a.mp4", "prompt": "x"}  # then it is a condition


def test_paths_stay_inside_the_root(tmp_path, folder):
    inside = tmp_path / "data"
    inside.mkdir()
    shutil.copy(folder / "clean_00000.mp4", inside / "ok.mp4")
    shutil.copy(folder / "clean_00000.mp4", tmp_path / "secret.mp4")
    (tmp_path / "data-other").mkdir()  # a prefix of the name is not the directory
    shutil.copy(folder / "clean_00000.mp4", tmp_path / "data-other" / "secret.mp4")
    for bad in ("../secret.mp4", str(tmp_path / "secret.mp4"), "x/../../secret.mp4", "../data-other/secret.mp4"):
        rows = [{"file_name": "ok.mp4", "prompt": "a"}, {"file_name": bad, "prompt": "b"}]
        (inside / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        with pytest.raises(ValueError, match="leaves the dataset's directory"):
            load_video_folder(inside)
        for dataset in (rows, Dataset.from_list(rows)):
            with pytest.raises(ValueError, match="leaves the dataset's directory"):
                standardize_columns(dataset, root=inside)
        stream = standardize_columns(Dataset.from_list(rows).to_iterable_dataset(), root=inside)
        with pytest.raises(ValueError, match="leaves the dataset's directory"):
            list(stream)
        struct = [{"video": {"path": row["file_name"], "bytes": None}, "prompt": row["prompt"]} for row in rows]
        typed = Dataset.from_list(struct).cast_column("video", Video(decode=False))
        for dataset in (struct, typed, typed.to_iterable_dataset()):
            with pytest.raises(ValueError, match="leaves the dataset's directory"):
                list(standardize_columns(dataset, root=inside))
            assert list(standardize_columns(dataset))[1]["video"]["path"] == bad  # without a root it is the user's own
    held = [{"video": {"path": "/elsewhere/a.mp4", "bytes": (inside / "ok.mp4").read_bytes()}, "prompt": "a"}]
    held = Dataset.from_list(held).cast_column("video", Video(decode=False))
    assert standardize_columns(held, root=inside)[0]["video"] == held[0]["video"]  # nothing is read from there
    near = Dataset.from_list([{"video": {"path": "ok.mp4", "bytes": None}, "prompt": "a"}])
    near = standardize_columns(near.cast_column("video", Video(decode=False)), root=inside)
    assert near[0]["video"] == {"path": str(inside / "ok.mp4"), "bytes": None}
    good = [{"file_name": str(inside / "ok.mp4"), "prompt": "a"}, {"file_name": "./x/../ok.mp4", "prompt": "b"}]
    assert [row["video"] for row in standardize_columns(good, root=inside)] == [str(inside / "ok.mp4")] * 2
    with pytest.raises(ValueError, match="is a URL"):
        standardize_columns([{"video": "https://example.com/a.mp4", "prompt": "x"}])


def test_bad_metadata(tmp_path):
    with pytest.raises(ValueError, match="holds no clips"):
        load_video_folder(tmp_path)
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.mp4", "prompt": "x"}\n{"file_name": \n')
    with pytest.raises(ValueError, match=r"metadata\.jsonl, line 2: not valid JSON"):
        load_video_folder(tmp_path)
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.mp4", "prompt": "x"}\n')
    with pytest.raises(ValueError, match=r"a\.mp4 is named in the metadata.*does not exist"):
        load_video_folder(tmp_path)


def test_a_generator_of_frames():
    def rows():
        yield {"caption": "a", "video": torch.zeros(3, 3, 8, 8)}

    row = next(iter(standardize_columns(IterableDataset.from_generator(rows))))
    assert row["prompt"] == "a" and read_video(row["video"]).shape == (3, 3, 8, 8)


def test_importing_the_package_is_cheap():
    code = "import sys, vidtrl.data; sys.exit(any(m in sys.modules for m in ('torch', 'datasets', 'av')))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
    import vidtrl.data

    assert all(hasattr(vidtrl.data, name) for name in vidtrl.data.__all__)
    with pytest.raises(AttributeError, match="has no attribute"):
        vidtrl.data.nothing  # noqa: B018


def test_a_column_of_image_lists():
    frames = [PILImage.new("RGB", (16, 8), color) for color in ("red", "green", "blue")]
    features = Features({"video": List(Image()), "prompt": Value("string")})
    dataset = Dataset.from_list([{"video": frames, "prompt": "a"}], features=features)
    row = standardize_columns(dataset)[0]
    assert set(row["video"][0]) == {"path", "bytes"}  # not decoded for the plan
    assert read_video(row["video"])[:, :, 0, 0].tolist() == [[255, 0, 0], [0, 128, 0], [0, 0, 255]]


def test_prompts_only():
    rows = [{"text": "a", "answer": 1}]
    assert standardize_columns(rows, prompts_only=True) == [{"prompt": "a", "answer": 1}]
    with pytest.raises(ValueError, match='Did you mean "promt"'):
        standardize_columns([{"promt": "a"}], prompts_only=True)
