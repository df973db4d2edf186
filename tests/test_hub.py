"""Folders to the Hub and back over real sockets, through whatever a network and a server do wrong."""

import hashlib
import io
import json
import logging
import os
import sys
import time
import urllib.request
from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from datasets import Dataset, Video
from huggingface_hub import HfApi, constants
from PIL import Image


sys.path.insert(0, str(Path(__file__).parent))

from hub_server import ME, OTHER, READER, card_data, card_problems, hub  # noqa: E402, F401

from vidtrl.cli.main import main  # noqa: E402
from vidtrl.data import load_video_folder  # noqa: E402
from vidtrl.data.video import write_video  # noqa: E402
from vidtrl.hub import (  # noqa: E402
    HubError,
    pull_from_hub,
    push_preferences,
    push_rollouts,
    push_sft,
    push_to_hub,
    upload,
)
from vidtrl.hub.upload import card_for, create_repository, hide_tokens  # noqa: E402
from vidtrl.trainer.completions import CompletionLog  # noqa: E402


CARD = """---
license: apache-2.0
pipeline_tag: text-to-video
widget:
- text: a cat
  output:
    url: validation/step_000002/00-a-cat.mp4
---

```python
pipe.load_lora_weights("/home/somebody/run")
```
<!-- vidtrl: the code above loads from "/home/somebody/run" -->

<video controls loop muted src="validation/step_000002/00-a-cat.mp4"></video>
"""


@pytest.fixture(autouse=True)
def nothing_logs_a_token(caplog, capfd, monkeypatch):
    """Not at any level, on any stream, whatever the test does."""
    monkeypatch.setattr(upload, "WAIT", 0.01)
    for name in ("huggingface_hub", "transformers", "vidtrl", "httpx2", "httpcore2"):
        caplog.set_level(logging.DEBUG, name)
        logging.getLogger(name).propagate = True
    yield
    seen = "".join([caplog.text, *capfd.readouterr()])
    for token in (ME, READER, OTHER):
        assert token not in seen


@pytest.fixture
def run(tmp_path):
    """A trainer's directory, with all that must stay at home."""
    files = {
        "README.md": CARD.encode(),
        "pytorch_lora_weights.safetensors": os.urandom(200_000),
        "training_args.json": b"{}",
        "vidtrl.json": b'{"model": {"pipeline": "WanPipeline"}}',
        "validation/step_000002/00-a-cat.mp4": os.urandom(3000),
        "validation/step_000002/01-not-shown.mp4": os.urandom(3000),
        "curves/rewards.png": os.urandom(100),
        "runs/now/events.out.tfevents.1": os.urandom(100),
        "scheduler/scheduler_config.json": b"{}",
        "optimizer.pt": os.urandom(100),
        "checkpoint-2/optimizer.pt": os.urandom(100),
        "checkpoint-2/pytorch_lora_weights.safetensors": os.urandom(1000),
        "checkpoint-2/scheduler.pt": os.urandom(100),
        "checkpoint-2/rng_state.pth": os.urandom(100),
        "completions/metadata.jsonl": b"",
        "cache/latents.safetensors": os.urandom(100),
        "_transformer.tmp/config.json": b"{}",
    }
    for name, data in files.items():
        path = tmp_path / "run" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return tmp_path / "run"


PUSHED = {
    "README.md",
    "pytorch_lora_weights.safetensors",
    "training_args.json",
    "vidtrl.json",
    "validation/step_000002/00-a-cat.mp4",
    "curves/rewards.png",
    "runs/now/events.out.tfevents.1",
    "scheduler/scheduler_config.json",
}
WEIGHTS = "pytorch_lora_weights.safetensors"


def test_push_and_pull(hub, run, tmp_path):  # noqa: F811
    url = push_to_hub(run, "wan-sft")
    files = hub.repo("me/wan-sft").files()
    assert set(files) == PUSHED and url.startswith(f"{hub.url}/me/wan-sft/commit/")
    assert not list(run.glob("_push*"))
    pulled = pull_from_hub("me/wan-sft", tmp_path / "pulled")
    for name in PUSHED:
        assert (pulled / name).read_bytes() == files[name]
        if name != "README.md":
            assert (run / name).read_bytes() == files[name]
    assert (run / "README.md").read_text() == CARD

    # again: nothing has changed, nothing is sent
    received, commits = hub.received, len(hub.repo("me/wan-sft").commits)
    push_to_hub(run, "me/wan-sft")
    assert hub.received == received and len(hub.repo("me/wan-sft").commits) == commits


def test_the_card_loads_and_plays_from_the_repository(hub, run):  # noqa: F811
    push_to_hub(run, "me/wan-sft")
    card = hub.repo("me/wan-sft").files()["README.md"].decode()
    assert 'load_lora_weights("me/wan-sft")' in card and "/home/somebody" not in card
    (address,) = [part.split('"')[0] for part in card.split('src="')[1:]]
    with urllib.request.urlopen(address) as response:
        assert response.read() == (run / "validation/step_000002/00-a-cat.mp4").read_bytes()
    # a card that was pulled goes on to another repository
    again = card_for(card, "lab/other", "v2")
    assert 'load_lora_weights("lab/other")' in again and f'src="{hub.url}/lab/other/resolve/v2/' in again
    assert card_for(again, "me/wan-sft") == card
    branch = card_for(card, "me/wan-sft", "try/2")
    assert f'src="{hub.url}/me/wan-sft/resolve/try%2F2/' in branch and card_for(branch, "me/wan-sft") == card


def test_cards_of_odd_directories():
    """Jinja and json spell some characters differently; what diffusers has no loader for is loaded by its path."""
    card = """pipe.load_lora_weights("/home/o'hara/a&b")
load_lora(pipe.transformer, "/home/o'hara/a&b/pytorch_lora_weights.safetensors", "trained")
<!-- vidtrl: the code above loads from "/home/o\\u0027hara/a\\u0026b" -->"""
    assert card_for(card, "me/x").splitlines() == [
        'pipe.load_lora_weights("me/x")',
        'load_lora(pipe.transformer, hf_hub_download("me/x", "pytorch_lora_weights.safetensors"), "trained")',
        '<!-- vidtrl: the code above loads from "me/x" -->',
    ]


def test_a_checkpoint_goes_up_with_its_runs_card(hub, run):  # noqa: F811
    push_to_hub(run / "checkpoint-2", "me/early")
    files = hub.repo("me/early").files()
    assert files[WEIGHTS] == (run / "checkpoint-2" / WEIGHTS).read_bytes()
    assert "README.md" in files and not any("optimizer" in f or f.endswith((".pt", ".pth")) for f in files)


def test_two_experts_and_full_weights(hub, tmp_path):  # noqa: F811
    for name in ("pytorch_lora_weights_high_noise.safetensors", "pytorch_lora_weights_low_noise.safetensors"):
        (tmp_path / "experts").mkdir(exist_ok=True)
        (tmp_path / "experts" / name).write_bytes(name.encode())
    push_to_hub(tmp_path / "experts", "me/experts")
    assert len([f for f in hub.repo("me/experts").files() if f.endswith("noise.safetensors")]) == 2
    for part in ("transformer", "transformer_2"):
        (tmp_path / "full" / part).mkdir(parents=True)
        (tmp_path / "full" / part / "config.json").write_text("{}")
        (tmp_path / "full" / part / "diffusion_pytorch_model.safetensors").write_bytes(b"1")
    push_to_hub(tmp_path / "full", "me/full")
    assert len(hub.repo("me/full").files()) == 4


def test_enhancers_and_pipelines_go_up_whole(hub, tmp_path):  # noqa: F811
    for kind, names in {
        "enhancer": ["prompt_enhancer.json", "model.safetensors", "tokenizer.json"],
        "pipeline": ["model_index.json", "vae/config.json", "scheduler/few_step_flow_scheduler.py"],
    }.items():
        leftovers = ["checkpoint-1/optimizer.pt", "_x.tmp", "training_args.bin", "sft/checkpoint-3/model.safetensors"]
        leftovers += ["config.yaml"]  # a stage's settings
        for name in [*names, *leftovers]:
            path = tmp_path / kind / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("{}")
        (tmp_path / kind / "README.md").write_text('from_pretrained("PATH_OR_REPOSITORY")')
        push_to_hub(tmp_path / kind, f"me/{kind}")
        files = hub.repo(f"me/{kind}").files()
        assert set(files) == {*names, "README.md"} and f'"me/{kind}"' in files["README.md"].decode()


def test_nothing_to_push(hub, tmp_path, capfd):  # noqa: F811
    with pytest.raises(ValueError, match="no directory"):
        push_to_hub(tmp_path / "nowhere", "me/x")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no trained model.*pytorch_lora_weights"):
        push_to_hub(tmp_path / "empty", "me/x")
    (tmp_path / "empty" / "metadata.jsonl").write_text("{half")
    assert main(["push", str(tmp_path / "empty"), "me/x"]) == 2
    error = capfd.readouterr().err
    assert "is no JSON" in error and "--kind" in error and error.count("\n") == 1


# ---- Whose it is ----


def test_private_repositories(hub, run, tmp_path):  # noqa: F811
    push_to_hub(run, "me/secret", private=True)
    assert hub.repo("me/secret").private
    assert (pull_from_hub("me/secret", tmp_path / "mine") / WEIGHTS).is_file()
    for token in (OTHER, False):
        with pytest.raises(HubError, match="no such repository|private"):
            pull_from_hub("me/secret", tmp_path / "theirs", token=token)
    assert not (tmp_path / "theirs" / WEIGHTS).exists()
    push_to_hub(run, "lab/open")
    assert not hub.repo("lab/open").private


def test_what_is_meant_to_be_private_is_not_published(hub, run, tmp_path):  # noqa: F811
    push_to_hub(run, "me/open")
    before = hub.repo("me/open").messages.copy()
    with pytest.raises(ValueError, match=f"me/open is there already and public.*{hub.url}/me/open/settings"):
        push_to_hub(run, "me/open", private=True)
    assert hub.repo("me/open").messages == before
    push_to_hub(run, "me/secret", private=True)
    push_to_hub(run, "me/secret", private=True)  # as it is
    push_to_hub(run, "me/secret")
    assert hub.repo("me/secret").private
    hub.put("me/clips", {}, "dataset")
    with pytest.raises(ValueError, match=f"{hub.url}/datasets/me/clips/settings"):
        push_sft([{"prompt": "a", "video": clip(tmp_path / "a.mp4")}], "me/clips", private=True)


def test_permissions_say_what_to_do(hub, run):  # noqa: F811
    with pytest.raises(HubError, match=r"hf auth login.*\(401\)"):
        push_to_hub(run, "me/x", token="hf_NobodyHasThisToken99")
    with pytest.raises(HubError, match=r"write access.*\(403\)"):
        push_to_hub(run, "reader/x", token=READER)
    with pytest.raises(HubError, match=r"\(403\)"):
        push_to_hub(run, "other/x")
    assert not hub.repos


def test_an_existing_repository_keeps_what_it_has(hub, run):  # noqa: F811
    hub.put("me/wan-sft", {"NOTES.md": b"mine", WEIGHTS: b"older"})
    push_to_hub(run, "me/wan-sft")
    files = hub.repo("me/wan-sft").files()
    assert files["NOTES.md"] == b"mine" and files[WEIGHTS] == (run / WEIGHTS).read_bytes()


def test_revisions(hub, run, tmp_path):  # noqa: F811
    push_to_hub(run, "me/wan-sft")
    first = hub.repo("me/wan-sft").refs["main"]
    before = (run / WEIGHTS).read_bytes()
    (run / WEIGHTS).write_bytes(b"newer")
    push_to_hub(run, "me/wan-sft", revision="try-2")
    assert hub.repo("me/wan-sft").refs["main"] == first
    for revision, expected in ((first, before), ("main", before), (None, before), ("try-2", b"newer")):
        folder = pull_from_hub("me/wan-sft", tmp_path / f"pulled-{revision}", revision=revision)
        assert (folder / WEIGHTS).read_bytes() == expected
    assert f"{hub.url}/me/wan-sft/resolve/try-2/" in hub.repo("me/wan-sft").files("try-2")["README.md"].decode()
    with pytest.raises(HubError, match="revision"):
        pull_from_hub("me/wan-sft", tmp_path / "x", revision="nowhere")


# ---- What goes wrong on the way ----


@pytest.mark.parametrize("reset", [False, True])
def test_an_upload_that_breaks_off_is_finished(hub, run, reset):  # noqa: F811
    fault = hub.fail("PUT", "/lfs/", drop_after=50_000, reset=reset)
    push_to_hub(run, "me/wan-sft")
    assert fault.hits == 1 and hub.repo("me/wan-sft").files()[WEIGHTS] == (run / WEIGHTS).read_bytes()


def test_a_second_push_sends_only_what_the_first_could_not(hub, run, monkeypatch):  # noqa: F811
    monkeypatch.setattr(upload, "ATTEMPTS", 1)
    hub.fail("POST", "/commit/", drop_after=10)
    with pytest.raises(HubError, match="connection.*failed"):
        push_to_hub(run, "me/wan-sft")
    assert not hub.repo("me/wan-sft").files() and hub.received > 200_000
    received = hub.received
    push_to_hub(run, "me/wan-sft")
    assert set(hub.repo("me/wan-sft").files()) == PUSHED and hub.received == received


def test_large_files_in_parts(hub, run, tmp_path):  # noqa: F811
    hub.part_size = 64_000
    fault = hub.fail("PUT", "/lfs/.*/2$", drop_after=100)
    push_to_hub(run, "me/wan-sft")
    assert fault.hits == 1 and hub.count("PUT", "/lfs/.*/4$") == 1
    assert (pull_from_hub("me/wan-sft", tmp_path / "x") / WEIGHTS).read_bytes() == (run / WEIGHTS).read_bytes()


def test_a_download_that_breaks_off_goes_on_where_it_was(hub, run, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1000)  # the client keeps whole pieces, of 10 MB
    push_to_hub(run, "me/wan-sft")
    fault = hub.fail("GET", f"/cdn/{hashlib.sha256((run / WEIGHTS).read_bytes()).hexdigest()}", drop_after=50_000)
    folder = pull_from_hub("me/wan-sft", tmp_path / "pulled")
    assert fault.hits == 1 and (folder / WEIGHTS).read_bytes() == (run / WEIGHTS).read_bytes()
    assert (206, "bytes=50000-") in hub.ranges  # the rest, not all of it


def test_a_download_that_is_reset_is_tried_again(hub, run, tmp_path):  # noqa: F811
    push_to_hub(run, "me/wan-sft")
    fault = hub.fail("GET", "/cdn/", drop_after=50, reset=True)
    folder = pull_from_hub("me/wan-sft", tmp_path / "pulled")
    assert fault.hits == 1 and (folder / WEIGHTS).read_bytes() == (run / WEIGHTS).read_bytes()


def test_what_is_complete_is_not_downloaded_again(hub, run, tmp_path):  # noqa: F811
    push_to_hub(run, "me/wan-sft")
    pull_from_hub("me/wan-sft", tmp_path / "pulled")
    before = hub.count("GET", "/cdn/")
    (tmp_path / "pulled" / "curves/rewards.png").unlink()
    pull_from_hub("me/wan-sft", tmp_path / "pulled")
    assert hub.count("GET", "/cdn/") == before + 1


@pytest.mark.parametrize("status", [500, 503, 429])
def test_a_server_that_recovers(hub, run, status):  # noqa: F811
    headers = {"Retry-After": "0"} if status == 429 else {}
    faults = [
        hub.fail("POST", "/api/repos/create", status, headers=headers),
        hub.fail("POST", "/commit/", status, headers=headers),
    ]
    push_to_hub(run, "me/wan-sft")
    assert [fault.hits for fault in faults] == [1, 1] and set(hub.repo("me/wan-sft").files()) == PUSHED


def test_retry_after_is_obeyed(hub, run, monkeypatch, caplog):  # noqa: F811
    for header, limit, wait in (("1", 60.0, 1), ("9999", 0.5, 0.5)):
        monkeypatch.setattr(upload, "MAX_WAIT", limit)
        hub.fail("POST", "/api/repos/create", 429, headers={"Retry-After": header})
        began = time.monotonic()
        create_repository(HfApi(), "me/wan-sft", "model", None, None)
        assert wait <= time.monotonic() - began < wait + 20 and f"trying again in {wait:g} s" in caplog.text


@pytest.mark.parametrize(
    "status, message", [(401, "hf auth login"), (403, "write access"), (429, "limits"), (503, "out of order")]
)
def test_a_server_that_does_not(hub, run, status, message):  # noqa: F811
    hub.put("me/wan-sft", {})
    fault = hub.fail("POST", "/commit/", status, message=f"because of {ME}", times=99)
    with pytest.raises(HubError, match=message) as caught:
        push_to_hub(run, "me/wan-sft")
    assert ME not in str(caught.value) and "because of ***" in str(caught.value)
    assert fault.hits == (upload.ATTEMPTS if status in (429, 503) else 1)
    assert not hub.repo("me/wan-sft").files()


@pytest.mark.parametrize(
    "status, message",
    [(401, "hf auth login"), (403, "gated"), (404, "no such"), (429, "limits"), (503, "out of order")],
)
def test_a_server_that_gives_nothing(hub, tmp_path, status, message):  # noqa: F811
    hub.put("me/wan-sft", {WEIGHTS: b"1"})
    fault = hub.fail("GET", "/api/models/me/wan-sft", status, message=f"because of {ME}", times=99)
    with pytest.raises(HubError, match=f"cannot pull me/wan-sft: .*{message}") as caught:
        pull_from_hub("me/wan-sft", tmp_path / "pulled")
    assert ME not in str(caught.value) and "because of ***" in str(caught.value)
    assert (
        fault.hits == (upload.ATTEMPTS if status in (429, 503) else 1) and not (tmp_path / "pulled" / WEIGHTS).exists()
    )


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_server_that_gives_at_the_second_try(hub, tmp_path, status):  # noqa: F811
    hub.put("me/wan-sft", {WEIGHTS: b"1"})
    headers = {"Retry-After": "0"} if status == 429 else {}
    faults = [hub.fail("GET", path, status, headers=headers) for path in ("/api/models/me/wan-sft", "/cdn/")]
    assert (pull_from_hub("me/wan-sft", tmp_path / "pulled") / WEIGHTS).read_bytes() == b"1"
    assert [fault.hits for fault in faults] == [1, 1]


def test_no_server_at_all(hub, run):  # noqa: F811
    hub.shutdown(), hub.server_close()
    with pytest.raises(HubError, match="connection to http://127.0.0.1.* failed"):
        push_to_hub(run, "me/wan-sft")
    hub.serve_forever = lambda *args: None  # already down


def test_a_card_that_the_hub_would_refuse_stops_the_push(hub, run):  # noqa: F811
    (run / "README.md").write_text(CARD.replace("apache-2.0", "whatever-1.0"))
    with pytest.raises(ValueError, match='"license" must be one of'):
        push_to_hub(run, "me/wan-sft")
    assert not hub.repo("me/wan-sft").files()


def test_tokens_are_hidden():
    assert hide_tokens("token hf_abcdefghij and hf_x", None) == "token *** and hf_x"
    assert hide_tokens("a secretsecret b", "secretsecret") == "a *** b"


# ---- Datasets ----


def run_fresh(hub, script, tmp_path):  # noqa: F811
    hub.run("-c", script, folder=tmp_path, PYTHONPATH=os.pathsep.join([str(Path(__file__).parent), *sys.path]))


def clip(path, value=0.5):
    path.parent.mkdir(parents=True, exist_ok=True)
    frames = torch.full((5, 3, 16, 16), value)
    frames[:, :, 4:8, 4:8] = 1 - value
    write_video(path, frames, fps=8)
    return path


@pytest.fixture
def completions(tmp_path):
    log = CompletionLog(tmp_path / "run", num_print=0, fps=8)
    for step in (10, 20):
        log.write(
            step=step,
            prompts=["a red circle", 'a sign says "ON"'],
            videos=[torch.rand(5, 3, 16, 16), torch.rand(5, 3, 16, 16)],
            rewards={"smooth": [0.5, None], "bright": [1.0, 2.0]},
            advantages=[0.25, -0.25],
            seeds=[step, step + 1],
        )
    return tmp_path / "run"


def test_rollouts(hub, completions):  # noqa: F811
    push_rollouts(completions, "me/rollouts", steps=[20])
    repo = hub.repo("me/rollouts", "dataset")
    files = repo.files()
    rows = [json.loads(line) for line in files["metadata.jsonl"].decode().splitlines()]
    assert [row["prompt"] for row in rows] == ["a red circle", 'a sign says "ON"']
    assert [(row["step"], row["seed"], row["advantage"]) for row in rows] == [(20, 20, 0.25), (20, 21, -0.25)]
    assert [(row["smooth"], row["bright"]) for row in rows] == [(0.5, 1.0), (None, 2.0)]
    (local,) = (completions / "completions/step_000020").glob("00-*.mp4")
    assert files[rows[0]["file_name"]] == local.read_bytes()
    card = files["README.md"].decode()
    assert not card_problems(card, "dataset") and "`advantage`" in card
    assert card_data(card)["task_categories"] == ["text-to-video"]
    with pytest.raises(ValueError, match="nothing to upload"):
        push_rollouts(completions, "me/rollouts", steps=[30])


def test_preferences_and_clips_from_rows(hub, tmp_path):  # noqa: F811
    a, b = clip(tmp_path / "a.mp4", 0.2), clip(tmp_path / "b.mp4", 0.8)
    rows = [
        {"prompt": "a cat", "chosen": str(a), "rejected": {"path": None, "bytes": b.read_bytes()}, "axis": "overall"}
    ]
    rows[0] |= {"votes": torch.tensor([3, 1]), "margin": np.float32(0.5), "judge": SimpleNamespace(item="a name")}
    push_preferences(rows, "me/preferences", private=True)
    repo = hub.repo("me/preferences", "dataset")
    (row,) = [json.loads(line) for line in repo.files()["metadata.jsonl"].decode().splitlines()]
    assert repo.private and repo.files()[row["chosen_file_name"]] == a.read_bytes()
    assert repo.files()[row["rejected_file_name"]] == b.read_bytes() and row["axis"] == "overall"
    assert (row["votes"], row["margin"], row["judge"]) == ([3, 1], 0.5, "namespace(item='a name')")

    dataset = Dataset.from_dict({"prompt": ["one", "two"], "video": [str(a), str(b)], "score": [float("nan"), 1.0]})
    push_sft(dataset.cast_column("video", Video(decode=False)), "me/clips")
    files = hub.repo("me/clips", "dataset").files()
    rows = [json.loads(line) for line in files["metadata.jsonl"].decode().splitlines()]
    assert [files[row["file_name"]] for row in rows] == [a.read_bytes(), b.read_bytes()]
    assert [row["score"] for row in rows] == [None, 1.0]


def test_a_dataset_that_was_pulled_is_pushed_again(hub, tmp_path):  # noqa: F811
    """Whatever a prompt holds: some characters end a line for Python, and not in JSON."""
    prompt = "one\u2028two\x85three\nfour"
    push_sft([{"prompt": prompt, "video": clip(tmp_path / "a.mp4")}], "me/clips")
    push_sft(pull_from_hub("me/clips", tmp_path / "pulled", repo_type="dataset"), "me/again")
    files = [hub.repo(f"me/{name}", "dataset").files() for name in ("clips", "again")]
    (row,) = [json.loads(line) for line in files[1]["metadata.jsonl"].decode().split("\n") if line]
    assert row["prompt"] == prompt and files[0]["metadata.jsonl"] == files[1]["metadata.jsonl"]


FROM_IMAGES = """
import torch
{code}
assert [row["prompt"] for row in dataset] == ["zero", "one", "two"] and dataset[1]["image"] is None
assert [dataset[i]["image"].getpixel((0, 0)) for i in (0, 2)] == [(255, 0, 0), (0, 0, 255)]

# as a stream, of which torchcodec is not asked to decode anything
from vidtrl.data import standardize_columns
from vidtrl.data.video import load_image, read_video
streamed = next(iter(standardize_columns(load_dataset("me/clips", split="train", streaming=True))))
assert read_video(streamed["video"]).shape == (5, 3, 16, 16) and load_image(streamed["image"]).size == (24, 16)

# a trainer's condition is that of the image that was uploaded
import tiny_pipelines
from PIL import Image
from vidtrl.models import VideoModel
from sft_setup import make_trainer
pipe, call = tiny_pipelines.wan_i2v()
image, size = call.pop("image"), dict(height=16, width=16, num_frames=5)
trainer = make_trainer("run", dataset, "cache", pipe=pipe, max_sequence_length=16, max_steps=1, **size)
condition = lambda i: trainer.clean_latents(trainer._prepare_inputs(trainer.data_collator([trainer.train_dataset[i, 0]])))[2]
for i, red in ((0, True), (2, False)):
    wanted = VideoModel(tiny_pipelines.wan_i2v()[0]).condition(
        "x", image=Image.new("RGB", (16, 16), "red"), max_sequence_length=16, **size
    )
    same = torch.equal(condition(i).samples[0]["hidden_states"], wanted.samples[0]["hidden_states"])
    assert same == red
trainer.train()
"""


def test_images_of_image_to_video_data(hub, tmp_path, monkeypatch, capfd):  # noqa: F811
    """Embedded in the rows, whatever they were: what comes back trains as what went up, from the Hub and from a folder."""
    data = tmp_path / "data"
    lines = []
    for name, colour in (("zero", "red"), ("one", None), ("two", "blue")):
        clip(data / f"{name}.mp4")
        if colour:
            (data / "images").mkdir(exist_ok=True)
            Image.new("RGB", (24, 16), colour).save(data / "images" / f"{name}.png")
        image = f"images/{name}.png" if colour else None
        lines.append({"file_name": f"{name}.mp4", "prompt": name, "image": image, "score": len(lines)})
    (data / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert main(["push", str(data), "clips"]) == 0
    files = hub.repo("me/clips", "dataset").files()
    card = files["README.md"].decode()
    assert sorted(f.split("/")[0] for f in files) == ["README.md", "metadata.parquet", "videos", "videos", "videos"]
    assert not card_problems(card, "dataset") and "`image`" in card

    # from there once more, and the same from rows of every kind
    pulled = pull_from_hub("me/clips", tmp_path / "pulled", repo_type="dataset")
    monkeypatch.chdir(tmp_path)
    assert main(["push", "pulled", "again"]) == 0
    red, blue = ((data / "images" / f"{name}.png").read_bytes() for name in ("zero", "two"))
    rows = [
        {"prompt": name, "video": data / f"{name}.mp4", "image": None, "score": 7} for name in ("zero", "one", "two")
    ]
    for repo, zero, two in (
        ("me/paths", str(data / "images/zero.png"), data / "images/two.png"),
        ("me/bytes", red, {"path": None, "bytes": blue}),
        ("me/pil", Image.open(data / "images/zero.png"), Image.new("RGB", (24, 16), "blue").convert("CMYK")),
    ):
        rows[0]["image"], rows[2]["image"] = zero, two
        push_sft(rows, repo)
    dataset = Dataset.from_list([{**row, "video": str(row["video"]), "image": None} for row in rows])
    images = [str(data / "images/zero.png"), None, str(data / "images/two.png")]
    dataset = dataset.remove_columns("image").add_column("image", images).cast_column("image", datasets.Image())
    push_sft(dataset, "me/feature")
    for repo in ("clips", "again", "paths", "bytes", "pil", "feature"):
        table = pq.read_table(io.BytesIO(hub.repo(f"me/{repo}", "dataset").files()["metadata.parquet"]))
        zero, one, two = [row["image"] for row in table.to_pylist()]
        assert one is None and (zero["bytes"] == red or repo == "pil"), repo
        shown = [Image.open(io.BytesIO(image["bytes"])).getpixel((0, 0)) for image in (zero, two)]
        assert shown[0] == (255, 0, 0) and shown[1][2] > 200 > 50 > shown[1][0]
    assert load_video_folder(pulled)[2]["image"]["bytes"] == blue

    code = card.split("```python\n")[1].split("```")[0]
    run_fresh(hub, FROM_IMAGES.format(code=code), tmp_path)


def test_images_that_cannot_go_up(hub, tmp_path):  # noqa: F811
    video = clip(tmp_path / "data/a.mp4")
    (tmp_path / "data/broken.png").write_bytes(b"no picture")
    for image, message in (
        (tmp_path / "data/broken.png", "row 0: .*broken.png cannot be read as an image"),
        ("nowhere.png", "row 0: nowhere.png cannot be read as an image"),
        (3, "row 0: cannot read an image from <int>"),
    ):
        with pytest.raises(ValueError, match=message):
            push_sft([{"prompt": "x", "video": video, "image": image}], "me/x")
    Image.new("RGB", (8, 8)).save(tmp_path / "secret.png")
    line = {"file_name": "a.mp4", "prompt": "x"}
    for image in ("../secret.png", {"path": str(tmp_path / "secret.png"), "bytes": None}):
        (tmp_path / "data/metadata.jsonl").write_text(json.dumps({**line, "image": image}))
        with pytest.raises(ValueError, match="outside its folder"):
            push_sft(tmp_path / "data", "me/x")
        with pytest.raises(ValueError, match="leaves the dataset's directory"):
            load_video_folder(tmp_path / "data")
    assert not hub.repos


def test_a_folder_goes_up_as_the_dataset_it_is(hub, tmp_path):  # noqa: F811
    """All of it, whatever a video is named; its card stays as it is, here and there."""
    card = "---\nbase_model: lab/wan\n---\nMine.\n"
    hub.put("lab/wan", {"README.md": b"---\nlicense: mit\n---\n"})
    names = ["00-an-optimizer-at-work.mp4", "checkpoint-charlie.mp4", "config.yaml"]
    unwanted = ["training_args.bin", "_half/a.mp4", ".cache/x"]
    for name in [*names, *unwanted]:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"1")
    (tmp_path / "README.md").write_text(card)
    push_to_hub(tmp_path, "me/clips", repo_type="dataset")
    files = hub.repo("me/clips", "dataset").files()
    assert set(files) == {*names, "README.md"}
    assert files["README.md"].decode() == card == (tmp_path / "README.md").read_text()


def test_load_dataset_reads_them_back(hub, completions, tmp_path):  # noqa: F811
    """In a fresh process, as a reader of the card would."""
    push_rollouts(completions, "me/rollouts")
    live = CompletionLog(tmp_path / "live", num_print=0, fps=8, hub_repo="me/live")  # log_completions_hub_repo
    live.write(10, ["a cat"], [torch.rand(5, 3, 16, 16)], {"smooth": [0.5]}, [0.25], [7])
    [job.result(timeout=60) for job, _ in live.uploads]
    a, b = clip(tmp_path / "a.mp4", 0.2), clip(tmp_path / "b.mp4", 0.8)
    push_preferences([{"prompt": "a cat", "chosen": a, "rejected": b}], "me/preferences")
    code = [
        hub.repo(f"me/{name}", "dataset").files()["README.md"].decode().split("```python\n")[1].split("```")[0]
        for name in ("rollouts", "preferences")
    ]
    script = f"""
{code[0]}
assert sorted(dataset["seed"]) == [10, 11, 20, 21] and set(dataset["bright"]) == {{1.0, 2.0}}, dataset[0]
from vidtrl.data.video import read_video
assert read_video(dataset[0]["video"]).shape == (5, 3, 16, 16)
(row,) = load_dataset("me/live", split="train").cast_column("video", Video(decode=False))
assert (row["prompt"], row["smooth"], row["advantage"], row["step"], row["seed"]) == ("a cat", 0.5, 0.25, 10, 7)
assert read_video(row["video"]).shape == (5, 3, 16, 16)
{code[1]}
print(read_video(dataset[0]["chosen"]).float().mean() / 255, read_video(dataset[0]["rejected"]).float().mean() / 255)
"""
    run_fresh(hub, script, tmp_path)


def test_videos_that_no_browser_plays(hub, tmp_path):  # noqa: F811
    path = clip(tmp_path / "a.mp4")
    other = path.rename(tmp_path / "a.mkv")
    with pytest.raises(ValueError, match="row 0.*a.mkv is a .mkv.*convert it"):
        push_sft([{"prompt": "x", "video": other}], "me/x")
    (tmp_path / "broken.mp4").write_bytes(b"no video")
    with pytest.raises(ValueError, match="broken.mp4"):
        push_sft([{"prompt": "x", "video": tmp_path / "broken.mp4"}], "me/x")
    with pytest.raises(ValueError, match="row 0 has no 'rejected'"):
        push_preferences([{"prompt": "x", "chosen": tmp_path / "broken.mp4"}], "me/x")
    with pytest.raises(ValueError, match="row 0 has no prompt"):
        push_sft([{"caption": "x", "video": other}], "me/x")
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "../a.mp4", "prompt": "x"}\n')
    with pytest.raises(ValueError, match="outside its folder"):
        push_sft(tmp_path, "me/x")
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.mp4", "prompt": "x"}\n\n{"file_name": "a.m')
    clip(tmp_path / "a.mp4")
    with pytest.raises(ValueError, match="line 3 of .*metadata.jsonl' is no JSON"):
        push_sft(tmp_path, "me/x")
    (tmp_path / "metadata.jsonl").write_text(
        '{"chosen_file_name": "a.mp4", "rejected_file_name": null, "prompt": "x"}'
    )
    with pytest.raises(ValueError, match="row 0 has no 'rejected'"):
        push_preferences(tmp_path, "me/x")
    with pytest.raises(ValueError, match="is no file: write it with"):
        push_sft([{"prompt": "x", "video": torch.zeros(5, 3, 16, 16)}], "me/x")
    assert not hub.repos


# ---- The commands ----


def test_commands_find_the_hub_by_its_variable(hub, run, tmp_path):  # noqa: F811
    """HF_ENDPOINT and HF_TOKEN of fresh processes, in which nothing was set by hand."""
    for argv in (["push", str(run), "wan-sft"], ["pull", "me/wan-sft", "pulled"]):
        hub.run("-m", "vidtrl.cli.main", *argv, folder=tmp_path)
    assert (tmp_path / "pulled" / WEIGHTS).read_bytes() == (run / WEIGHTS).read_bytes()


def test_commands(hub, run, completions, tmp_path, monkeypatch, capfd):  # noqa: F811
    assert main(["push", str(run), "wan-sft", "--private", "--message", "first"]) == 0
    assert capfd.readouterr().out.strip().startswith(f"{hub.url}/me/wan-sft/commit/")
    assert hub.repo("me/wan-sft").private and hub.repo("me/wan-sft").messages[-1] == "first"
    monkeypatch.chdir(tmp_path)
    assert main(["pull", "me/wan-sft"]) == 0
    assert Path(capfd.readouterr().out.strip()) == tmp_path / "wan-sft" and (tmp_path / "wan-sft" / WEIGHTS).is_file()

    assert main(["push", str(completions / "completions"), "log", "--steps", "10"]) == 0
    assert len(hub.repo("me/log", "dataset").files()["metadata.jsonl"].splitlines()) == 2
    assert main(["pull", "me/log", "log", "--dataset"]) == 0
    assert len(list((tmp_path / "log").rglob("*.mp4"))) == 2
    capfd.readouterr()

    assert main(["pull", "me/wan-sft"]) == 0  # again
    other = tmp_path / "other" / "wan-sft"
    other.mkdir(parents=True)
    (other / WEIGHTS).write_bytes(b"mine")
    monkeypatch.chdir(other.parent)
    capfd.readouterr()
    assert main(["pull", "me/wan-sft"]) == 2
    error = capfd.readouterr().err
    assert "'wan-sft' is here already" in error and "vidtrl pull me/wan-sft DIR" in error
    assert (other / WEIGHTS).read_bytes() == b"mine" and len(list(other.iterdir())) == 1
    assert main(["pull", "me/wan-sft", "wan-sft"]) == 0  # it was named
    assert (other / WEIGHTS).read_bytes() == (run / WEIGHTS).read_bytes()
    monkeypatch.chdir(tmp_path)
    capfd.readouterr()
    hub.put("lab/wan-sft", {WEIGHTS: b"another"})
    assert main(["pull", "lab/wan-sft"]) == 2  # the same name, from somebody else
    assert "not from an earlier pull of lab/wan-sft" in capfd.readouterr().err

    assert main(["push", str(run), "wan-sft", "--steps", "1"]) == 2
    assert "for rollouts" in capfd.readouterr().err
    assert main(["pull", "me/nowhere"]) == 2
    assert "no such repository" in capfd.readouterr().err
    hub.fail("POST", "/commit/", 403, times=9)
    assert main(["push", str(run), "other-repo"]) == 2
    last = capfd.readouterr().err.splitlines()[-1]
    assert last.startswith("vidtrl: error: cannot push to me/other-repo") and "write access" in last
