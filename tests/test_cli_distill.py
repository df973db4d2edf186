"""`vidtrl distill`: options, a student trained, resumed and sampled, mistakes in one line."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
import yaml
from safetensors.torch import load_file

from vidtrl import toy
from vidtrl.cli.distill import make_parser
from vidtrl.cli.errors import UserError
from vidtrl.cli.main import main
from vidtrl.inference import load_student
from vidtrl.toy import captions, write_dataset


ADAPTER = "pytorch_lora_weights.safetensors"
ENV = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}


@pytest.fixture
def config(tmp_path):
    """A complete config file; returns a function that writes it with changes."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(captions()[:6]) + "\n")

    def write(**changes):
        values = {
            "model_name_or_path": toy.pipeline_path(),
            "dataset_name": str(prompts),
            "use_peft": True,
            "lora_r": 4,
            "lora_alpha": 4,
            "use_cpu": True,
            "height": 32,
            "width": 32,
            "num_frames": 5,
            "max_sequence_length": 16,
            "per_device_train_batch_size": 2,
            "fake_updates_per_student": 1,
            "cache_dir": str(tmp_path / "cache"),
            "output_dir": str(tmp_path / "out"),
            "gradient_checkpointing": False,
            "check_model": False,
            "max_steps": 2,
            "save_steps": 1,
            "logging_steps": 1,
            "report_to": "none",
        }
        path = tmp_path / "distill.yaml"
        path.write_text(yaml.safe_dump({k: v for k, v in (values | changes).items() if v is not ...}))
        return str(path)

    return write


def error_line(capsys):
    err = capsys.readouterr().err
    lines = [line for line in err.splitlines() if line.startswith("vidtrl: error: ")]
    assert len(lines) == 1 and "Traceback" not in err, err[-3000:]
    return lines[0]


def test_options_come_from_file_and_command_line(config):
    argv = ["--config", config(recipe="self-forcing"), "--frames_per_block", "2", "--denoising_steps", "1000", "500"]
    script, training, lora, *_ = make_parser().parse_args_and_config(argv)
    assert (training.recipe, training.frames_per_block, training.rollout) == ("self-forcing", 2, "self_forcing")
    assert training.denoising_steps == [1000, 500] and training.shift == 5.0 and lora.lora_r == 4
    assert script.teacher_model_name_or_path is None
    with pytest.raises(UserError, match="invalid choice: 'self-forced'"):
        make_parser().parse_args_and_config(["--config", config(recipe="self-forced")])


def test_the_example_is_valid(tmp_path, monkeypatch):
    path = os.path.join(os.path.dirname(__file__), "..", "examples", "distill_4_steps_wan", "config.yaml")
    overrides = ["--bf16", "False", "--use_cpu", "True", "--report_to", "none", "--output_dir", str(tmp_path)]
    _, training, lora, *_ = make_parser().parse_args_and_config(["--config", path, *overrides])
    assert training.recipe == "dmd2" and lora.use_peft and training.teacher_guidance_scale == 4.5


def test_a_run_its_resumption_and_the_student(config, tmp_path):
    """Two runs in processes of their own; the second goes on where the first stopped, and stock loading samples it."""
    command = [sys.executable, "-m", "vidtrl.cli.main", "distill", "--config", config()]
    done = subprocess.run(command, env=ENV, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    first = load_file(tmp_path / "out" / ADAPTER)
    again = [*command, "--max_steps", "4", "--resume_from_checkpoint", "latest"]
    done = subprocess.run(again, env=ENV, capture_output=True, text=True)
    assert done.returncode == 0 and "resuming from" in done.stdout, done.stderr[-3000:]
    second = load_file(tmp_path / "out" / ADAPTER)
    assert any(not torch.equal(first[name], second[name]) for name in first)
    log = json.loads((tmp_path / "out" / "checkpoint-4" / "trainer_state.json").read_text())["log_history"]
    turns = [[role for role in ("student", "fake") if f"loss/{role}" in entry] for entry in log if "loss" in entry]
    assert turns == [["fake"], ["student"], ["fake"], ["student"]]
    pipe = load_student(tmp_path / "out", torch_dtype=torch.float32)
    size = {"height": 32, "width": 32, "num_frames": 5, "max_sequence_length": 16, "output_type": "pt"}
    video = pipe(captions()[0], num_inference_steps=4, guidance_scale=1.0, **size).frames[0]
    assert video.shape == (5, 3, 32, 32) and video.isfinite().all()
    with pytest.raises(ValueError, match="num_inference_steps=4"):
        pipe(captions()[0], num_inference_steps=20, guidance_scale=1.0, **size)


def test_recipes_that_learn_from_clips_read_a_folder(config, tmp_path):
    write_dataset(tmp_path / "clips", num_clips=4, quality="clean", seed=0, fps=8)
    clips = {"height": 64, "width": 64, "num_frames": 17, "fps": 8, "teacher_steps": 4}
    path = config(recipe="lcm", dataset_name=str(tmp_path / "clips"), max_steps=1, **clips)
    assert main(["distill", "--config", path]) == 0
    assert (tmp_path / "out" / ADAPTER).is_file() and (tmp_path / "out" / "scheduler").is_dir()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dataset_name": ...}, "--dataset_name is required"),
        ({"dataset_name": "nowhere.txt"}, "'nowhere.txt' does not exist"),
        ({"denoising_steps": [500, 1000]}, "must be strictly decreasing"),
        ({"recipe": "self-forcing"}, "the nearest counts that do: 3"),
        ({"use_peft": False, "lora_r": ..., "lora_alpha": ..., "init_adapter": "a"}, "add --use_peft"),
        ({"base_adapters": ["./nothing-here"]}, "there is no adapter at './nothing-here'"),
        ({"rolout": "data"}, "did you mean rollout"),
        ({"teacher_model_name_or_path": "./nowhere"}, "No such directory: './nowhere'"),
    ],
)
def test_mistakes_end_in_one_line(config, capsys, changes, message):
    assert main(["distill", "--config", config(**changes)]) == 2
    assert message in error_line(capsys)


@pytest.mark.slow
def test_two_processes_train_together(config, tmp_path):
    path = config(max_steps=1, per_device_train_batch_size=1)
    command = ["distill", "--config", path, "--accelerate_config", "multi_gpu", "--num_processes", "2"]
    done = subprocess.run([sys.executable, "-m", "vidtrl.cli.main", *command], capture_output=True, text=True, env=ENV)
    assert done.returncode == 0, done.stderr[-3000:]
    # one process would write rng_state.pth
    checkpoint = tmp_path / "out" / "checkpoint-1"
    assert sorted(f.name for f in checkpoint.glob("rng_state*")) == ["rng_state_0.pth", "rng_state_1.pth"]
    shutil.rmtree(tmp_path / "out")
    command = ["distill", "--config", path, "--accelerate_config", "fsdp2", "--num_processes", "2"]
    done = subprocess.run([sys.executable, "-m", "vidtrl.cli.main", *command], capture_output=True, text=True, env=ENV)
    assert done.returncode == 0, done.stderr[-3000:]
    assert [f.name for f in checkpoint.glob("optimizer*")] == ["optimizer.bin"]  # in shards
