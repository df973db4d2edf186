"""Nothing is lost: bit-exact resume, processes killed for good, a full disk, damaged and foreign checkpoints."""

import json
import shutil
import signal
from pathlib import Path

import pytest
from safetensors.torch import load_file
from sft_setup import digest, make_trainer, trained_weights
from sft_worker import start
from tiny_pipelines import tiny_wan_transformer, wan


# three micro-batches of two clips an epoch, two of them per step: step 4 lies inside the third epoch
CONFIG = dict(
    per_device_train_batch_size=1,
    gradient_accumulation_steps=2,
    max_steps=7,
    save_strategy="steps",
    save_steps=2,
    ema_decay=0.9,
    lr_scheduler_type="cosine",
)


@pytest.fixture(scope="module")
def clips_on_disk(clips, tmp_path_factory):
    path = tmp_path_factory.mktemp("saved") / "clips"
    clips.save_to_disk(path)
    return path


def run_worker(job):
    """Returns exit status, result and output of a process."""
    process, log = start(job)
    process.join(timeout=300)
    result = Path(job["out"], "result.json")
    return process.exitcode, json.loads(result.read_text()) if result.is_file() else None, log.read_text()


@pytest.fixture
def work(clips_on_disk, cache_dir, tmp_path):
    def run(name, **job):
        common = {"clips": str(clips_on_disk), "cache": str(cache_dir), "config": CONFIG}
        return run_worker({"out": str(tmp_path / name), **common, **job})

    return run


@pytest.fixture(scope="module")
def reference(clips_on_disk, cache_dir, tmp_path_factory):
    """The uninterrupted run."""
    out = tmp_path_factory.mktemp("reference") / "run"
    status, result, log = run_worker(
        {"out": str(out), "clips": str(clips_on_disk), "cache": str(cache_dir), "config": CONFIG}
    )
    assert status == 0, log[-3000:]
    return result, out


def checkpoints(out: Path) -> list[str]:
    return sorted(p.name for p in out.iterdir() if p.name.startswith("checkpoint"))


def test_killed_during_training_resumes_bit_exactly(work, reference, tmp_path):
    status, result, _ = work("run", kill="training@6")
    assert status == -signal.SIGKILL and result is None
    assert checkpoints(tmp_path / "run") == ["checkpoint-2", "checkpoint-4"]
    status, result, error = work("run", resume=True)
    assert status == 0, error[-3000:]
    assert result == reference[0]


def test_killed_while_saving_resumes_bit_exactly(work, reference, tmp_path):
    status, result, _ = work("run", kill="saving@4")
    assert status == -signal.SIGKILL and result is None
    half_written = tmp_path / "run" / "_checkpoint-4.tmp"
    assert (half_written / "pytorch_lora_weights.safetensors").is_file()
    assert checkpoints(tmp_path / "run") == ["checkpoint-2"]
    status, result, error = work("run", resume=True)
    assert status == 0, error[-3000:]
    assert result == reference[0]
    assert not half_written.exists()


def test_full_disk_leaves_the_previous_checkpoint(work, reference, tmp_path):
    status, result, error = work("run", kill="full disk@4")
    assert status == 1 and result is None
    assert checkpoints(tmp_path / "run") == ["checkpoint-2"]
    assert not list((tmp_path / "run").glob("_checkpoint*"))  # its space is given back
    status, result, error = work("run", resume=True)
    assert status == 0, error[-3000:]
    assert result == reference[0]


def test_reference_is_a_real_run(reference):
    result, out = reference
    assert len(result["losses"]) == 7 and len(set(result["losses"])) == 7
    assert checkpoints(out) == ["checkpoint-2", "checkpoint-4", "checkpoint-6", "checkpoint-7"]


def test_checkpoint_holds_average_for_diffusers_and_raw_weights_for_training(reference):
    _, out = reference
    averaged = load_file(out / "checkpoint-6" / "pytorch_lora_weights.safetensors")
    raw = load_file(out / "checkpoint-6" / "training_weights.safetensors")
    assert int(raw.pop("num_updates")) == 6
    assert digest(dict(enumerate_values(averaged))) != digest(dict(enumerate_values(raw)))


def enumerate_values(weights):
    return ((str(i), weights[name]) for i, name in enumerate(sorted(weights)))


@pytest.mark.parametrize("lora", [True, False], ids=["lora", "full"])
def test_resume_in_this_process(clips, cache_dir, tmp_path, lora):
    config = dict(max_steps=5, per_device_train_batch_size=4, save_strategy="steps", save_steps=3, lora=lora)
    whole = make_trainer(tmp_path / "whole", clips, cache_dir, **config)
    whole.train()
    resumed = make_trainer(tmp_path / "resumed", clips, cache_dir, **config)
    untrained = digest(trained_weights(resumed))
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    assert digest(trained_weights(resumed)) == digest(trained_weights(whole)) != untrained


def test_killed_between_the_two_renamings_of_a_replaced_checkpoint(tmp_path, monkeypatch):
    import os

    from vidtrl.trainer.checkpoint import claim_output_dir, publish

    def write(name, content):
        (tmp_path / name).mkdir()
        (tmp_path / name / "weights").write_text(content)
        return tmp_path / name

    final = write("checkpoint-1", "old")
    replace, calls = os.replace, []

    def killed(source, target):
        calls.append(target)
        if len(calls) == 2:
            raise KeyboardInterrupt
        replace(source, target)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os, "replace", killed)
        publish(write("_checkpoint-1.tmp", "new"), final)
    assert not final.exists()
    claim_output_dir(tmp_path, {})
    assert (final / "weights").read_text() == "old"
    publish(write("_checkpoint-1.tmp", "new"), final)
    claim_output_dir(tmp_path, {})
    assert (final / "weights").read_text() == "new"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint-1", "vidtrl.json"]


@pytest.fixture(scope="module")
def checkpoint(clips, cache_dir, tmp_path_factory):
    out = tmp_path_factory.mktemp("good")
    make_trainer(out / "run", clips, cache_dir, max_steps=2, save_strategy="steps", save_steps=1).train()
    return out / "run" / "checkpoint-1"


def truncate(directory):
    path = directory / "optimizer.pt"
    path.write_bytes(path.read_bytes()[:-100])
    return "optimizer.pt has .* bytes instead of"


def flip_a_bit(directory):
    path = directory / "pytorch_lora_weights.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    return "pytorch_lora_weights.safetensors was altered"


def remove(directory):
    (directory / "trainer_state.json").unlink()
    return "trainer_state.json is missing"


def damage_manifest(directory):
    (directory / "vidtrl.json").write_text("{")
    return "vidtrl.json is damaged"


def foreign(directory):
    (directory / "vidtrl.json").unlink()
    return "vidtrl did not write it"


@pytest.mark.parametrize("damage", [truncate, flip_a_bit, remove, damage_manifest, foreign])
def test_damaged_checkpoint_is_refused(clips, cache_dir, tmp_path, checkpoint, damage):
    damaged = tmp_path / "checkpoint-1"
    shutil.copytree(checkpoint, damaged)
    message = damage(damaged)
    trainer = make_trainer(tmp_path / "run", clips, cache_dir, max_steps=2)
    with pytest.raises(ValueError, match=message):
        trainer.train(resume_from_checkpoint=str(damaged))


def test_checkpoint_of_another_adapter_is_refused(clips, cache_dir, tmp_path, checkpoint):
    from peft import LoraConfig

    trainer = make_trainer(tmp_path, clips, cache_dir, lora=LoraConfig(r=2, lora_alpha=8))
    with pytest.raises(ValueError, match="adapter.r: this run has 2, the directory has 4"):
        trainer.train(resume_from_checkpoint=str(checkpoint))


def test_resuming_on_other_clips_is_refused(clips, cache_dir, tmp_path, checkpoint):
    fewer = make_trainer(tmp_path / "fewer", clips.select(range(5)), cache_dir, max_steps=2)
    with pytest.raises(ValueError, match="other clips. data.num_clips: this run has 5, the directory has 6"):
        fewer.train(resume_from_checkpoint=str(checkpoint))
    reordered = make_trainer(tmp_path / "reordered", clips.select([1, 0, 2, 3, 4, 5]), cache_dir, max_steps=2)
    with pytest.raises(ValueError, match="names and shapes.*pipe.fuse_lora"):
        reordered.train(resume_from_checkpoint=str(checkpoint))


def other_model():
    pipe = wan()[0]
    pipe.register_modules(transformer=tiny_wan_transformer(seed=1))
    return pipe


def test_another_model_is_refused(clips, cache_dir, tmp_path, checkpoint):
    trainer = make_trainer(tmp_path, clips, cache_dir, pipe=other_model())
    with pytest.raises(ValueError, match="base_weights"):
        trainer.train(resume_from_checkpoint=str(checkpoint))
    with pytest.raises(ValueError, match="output_dir .* holds a run of another model"):
        make_trainer(checkpoint.parent, clips, cache_dir, pipe=other_model())


def test_nothing_to_resume_from(clips, cache_dir, tmp_path):
    trainer = make_trainer(tmp_path / "new", clips, cache_dir)
    with pytest.raises(ValueError, match="no checkpoint"):
        trainer.train(resume_from_checkpoint=True)
    with pytest.raises(ValueError, match="no checkpoint directory"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-9"))


def test_a_checkpoint_without_optimizer_is_refused(clips, cache_dir, tmp_path):
    config = dict(max_steps=1, save_strategy="steps", save_steps=1, save_only_model=True)
    trainer = make_trainer(tmp_path, clips, cache_dir, **config)
    trainer.train()
    with pytest.raises(ValueError, match="save_only_model"):
        trainer.train(resume_from_checkpoint=True)
