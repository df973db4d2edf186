"""The completion log: files, the data set they form, the printed table, trackers, and uploads."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from datasets import Video, load_dataset
from PIL import Image
from torch.utils.tensorboard import SummaryWriter
from transformers.integrations import TensorBoardCallback


sys.path.insert(0, str(Path(__file__).parent))

from hub_server import OTHER, hub  # noqa: E402, F401

from vidtrl.data.video import read_video  # noqa: E402
from vidtrl.hub import HubError  # noqa: E402
from vidtrl.toy import render  # noqa: E402
from vidtrl.trainer.completions import CompletionLog  # noqa: E402


PROMPTS = ["a red circle moving right", "a red circle moving right", "a blue square moving up"]


def clip(prompt, seed):
    return render(prompt, seed=seed).float() / 255


def completions(step=10, prompts=PROMPTS, **changes):
    values = dict(
        step=step,
        prompts=prompts,
        videos=changes.get("videos") or [clip(prompt, step + i) for i, prompt in enumerate(prompts)],
        rewards={"toy-color": [1.0, None, 0.25], "never": [None, math.nan, None]},
        advantages=[0.7, -0.7, 0.0],
        seeds=[step, step + 1, step + 2],
        extra={"seen": ["red", None, "blue"], "frames": [17, 17.0, None]},
    )
    return values | changes


@pytest.fixture
def log(tmp_path):
    return CompletionLog(tmp_path, fps=8)


def test_files_of_a_step(log, tmp_path, capsys):
    table = pq.read_table(log.write(**completions()))
    folder = tmp_path / "completions"
    assert table.column_names == "step prompt video toy-color never advantage seed seen frames".split()
    assert table["step"].to_pylist() == [10] * 3 and table["prompt"].to_pylist() == PROMPTS
    assert table["toy-color"].to_pylist() == [1.0, None, 0.25] and table["never"].to_pylist() == [None] * 3
    assert table["advantage"].to_pylist() == [0.7, -0.7, 0.0] and table["seed"].to_pylist() == [10, 11, 12]
    assert table["seen"].to_pylist() == ["red", None, "blue"] and table["frames"].to_pylist() == [17, 17, None]
    assert table["video"].to_pylist()[2] == "step_000010/02-a-blue-square-moving-up.mp4"
    for i, name in enumerate(table["video"].to_pylist()):
        clips = [read_video(folder / name).float() / 255, clip(PROMPTS[i], 10 + i)]
        assert (clips[0] - clips[1]).abs().mean() < 0.02  # h264
        assert (clips[0] - clip(PROMPTS[i], 99)).abs().mean() > 0.02
        with Image.open((folder / name).with_suffix(".png")) as strip:
            assert strip.size == (8 * 64, 64)
    assert not [path for path in folder.rglob("*") if path.name.startswith("_")]


def test_load_dataset_reads_the_folder_back(log, tmp_path):
    # the first step leaves a reward and a text column empty: their types must come from all steps together
    log.write(**completions(5, rewards={"toy-color": [None] * 3, "never": [None] * 3}, extra={"seen": [None] * 3}))
    log.write(**completions(10, extra={"seen": ["red", None, "blue"]}))
    cache = str(tmp_path / "cache")
    for source in ({"path": str(tmp_path / "completions")}, {"path": "videofolder", "data_dir": str(log.folder)}):
        videos = load_dataset(**source, split="train", cache_dir=cache).cast_column("video", Video(decode=False))
        assert set(videos.column_names) == set("step prompt video toy-color never advantage seed seen".split())
        assert videos["step"] == [5] * 3 + [10] * 3 and videos["prompt"] == PROMPTS * 2
        assert videos["toy-color"] == [None] * 3 + [1.0, None, 0.25] and videos["seen"][3:] == ["red", None, "blue"]
        for row in videos:
            prompt_index = PROMPTS.index(row["prompt"]) if row["seed"] != row["step"] + 1 else 1
            assert Path(row["video"]["path"]).name.startswith(f"{prompt_index:02d}-")
            assert read_video(row["video"]).shape == (17, 3, 64, 64)


def test_a_step_written_again_replaces_itself(log):
    log.write(**completions(10))
    log.write(**completions(20))
    log.write(**completions(10, ["a green triangle moving left"] * 3, seeds=[7, 8, 9]))
    rows = [json.loads(line) for line in (log.folder / "metadata.jsonl").read_text().splitlines()]
    assert [(row["step"], row["seed"]) for row in rows] == [(20, 20), (20, 21), (20, 22), (10, 7), (10, 8), (10, 9)]
    files = sorted(path.name for path in (log.folder / "step_000010").glob("*.mp4"))
    assert files == [f"{i:02d}-a-green-triangle-moving-left.mp4" for i in range(3)]
    assert all((log.folder / row["file_name"]).is_file() for row in rows)


def test_a_failed_write_leaves_no_half_step(log):
    broken = [*completions()["videos"][:2], torch.zeros(17, 1, 64, 64)]
    with pytest.raises(ValueError, match="shape"):
        log.write(**completions(videos=broken))
    assert not (log.folder / "step_000010").exists() and not list(log.folder.glob("*.parquet"))
    log.write(**completions())
    assert len(list((log.folder / "step_000010").iterdir())) == 6


def test_printed_table(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "250")
    odd = ["a red circle [bold]", *PROMPTS[1:]]
    CompletionLog(tmp_path).write(**completions(prompts=odd, videos=completions()["videos"]))
    shown = capsys.readouterr().out
    assert "Step 10" in shown and "a red circle [bold]" in shown and "never" in shown and "advantage" in shown
    assert shown.count(".png") == 3 and "0.250" in shown and "-0.700" in shown and "blue" in shown
    for num_print, rows in ((2, 2), (3, 3), (99, 3), (0, 0)):
        CompletionLog(tmp_path, num_print=num_print).write(**completions())
        assert capsys.readouterr().out.count(".png") == rows


def test_watching_draws_nothing_from_the_global_generators(tmp_path):
    import random

    import numpy as np

    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    CompletionLog(tmp_path, num_print=1).write(**completions())
    assert before == (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rewards": {"prompt": [0.0] * 3}}, "a reward is named 'prompt'"),
        ({"extra": {"toy-color": [0.0] * 3}}, "a log_extra column is named 'toy-color'"),
    ],
)
def test_names_that_collide(log, change, message):
    with pytest.raises(ValueError, match=message):
        log.write(**completions(**change))


def test_tensorboard_gets_frame_strips(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for unique, expected in ((False, 3), (True, 2)):
        runs = tmp_path / f"runs{unique}"
        callback = TensorBoardCallback(SummaryWriter(str(runs)))
        log = CompletionLog(tmp_path, unique_prompts=unique)
        for step in (10, 20):
            log.write(**completions(step), report_to=["tensorboard"], callbacks=[callback])
        callback.tb_writer.close()
        events = EventAccumulator(str(runs))
        events.Reload()
        tags = sorted(events.Tags()["images"])
        assert tags == [f"completions/{i}" for i in range(expected)]
        assert [event.step for event in events.Images("completions/0")] == [10, 20]
        assert len(list((log.folder / "step_000020").glob("*.mp4"))) == 3  # files have all of them


@pytest.mark.slow
def test_trackio_gets_videos_and_the_table(tmp_path):
    """In its own process: trackio starts a server."""
    code = f"""
import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})
import trackio
from test_completions import CompletionLog, completions
trackio.init(project="test-completions", name="r")
CompletionLog({str(tmp_path)!r}, unique_prompts=True).write(**completions(), report_to=["trackio"])
trackio.finish()
"""
    env = os.environ | {"TRACKIO_DIR": str(tmp_path / "trackio"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(list((tmp_path / "trackio").rglob("*.mp4"))) == 2


# ---- The Hub, over real sockets ----


def finish(log):
    for future, _ in log.uploads:
        future.exception(timeout=60)


def test_each_step_is_uploaded(hub, tmp_path):  # noqa: F811
    log = CompletionLog(tmp_path, hub_repo="log", hub_token=OTHER, hub_private_repo=True)
    log.write(**completions(10))
    finish(log)
    log.write(**completions(20))
    finish(log)
    repo = hub.repo("other/log", "dataset")
    assert repo.private and repo.messages[1:] == ["Completions of step 10", "Completions of step 20"]
    _, first, second = repo.commits.values()
    names = ["README.md", "completions_00010.parquet", "metadata.jsonl"]
    names += [str(path.relative_to(log.folder)) for path in (log.folder / "step_000010").iterdir()]
    assert sorted(first) == sorted(names) and len(names) == 9
    assert {name: blob for name, blob in second.items() if "000010" in name} == {
        n: first[n] for n in names if "000010" in n
    }
    assert len(second["metadata.jsonl"].data.splitlines()) == 6
    assert first["README.md"].data == (log.folder / "README.md").read_bytes()


def test_what_could_not_be_uploaded_goes_with_the_next_step(hub, tmp_path, caplog):  # noqa: F811
    log = CompletionLog(tmp_path, hub_repo="me/log")
    hub.fail("POST", "/commit/", 403, message="closed")
    log.write(**completions(10))
    finish(log)
    assert "step 10 not uploaded to me/log" in caplog.text and "closed" in caplog.text
    log.write(**completions(20))
    finish(log)
    repo = hub.repo("me/log", "dataset")
    assert repo.messages[1:] == ["Completions of step 20"]
    assert {"completions_00010.parquet", "completions_00020.parquet"} <= set(repo.files())
    assert sum(name.endswith(".mp4") for name in repo.files()) == 6


def test_a_repository_that_cannot_be_created_stops_at_once(hub, tmp_path):  # noqa: F811
    with pytest.raises(HubError, match="cannot create other/log.*write access"):
        CompletionLog(tmp_path, hub_repo="other/log")
    with pytest.raises(ValueError, match="me/log/too/deep"):
        CompletionLog(tmp_path, hub_repo="me/log/too/deep")
