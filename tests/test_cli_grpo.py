"""`vidtrl grpo`: prompts from files, rewards by name, and a training run in a process of its own."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest
import torch
import yaml
from datasets import load_dataset
from safetensors.torch import load_file

from vidtrl import toy
from vidtrl.cli.errors import UserError
from vidtrl.cli.grpo import GRPOScriptArguments, load_prompts, make_parser, resolve_reward
from vidtrl.cli.main import main
from vidtrl.toy import captions, write_dataset


ENV = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
PROMPTS = captions()[:4]
REWARDS = """
def red(videos, **kwargs):
    return [v[:, 0].mean().item() for v in videos]

def rows(prompts, videos, weight, log_extra, **kwargs):
    log_extra("weight_seen", weight)
    return [float(w) for w in weight]

def broken(videos, **kwargs):
    raise KeyError("no such file")

def short(videos, **kwargs):
    return [0.0]

LIMIT = 3
"""


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("\n".join(PROMPTS) + "\n")
    return path


@pytest.fixture
def config(tmp_path, prompts):
    """A complete config file; returns a function that writes it with changes."""

    def write(**changes):
        values = {
            "model_name_or_path": toy.pipeline_path(),
            "dataset_name": str(prompts),
            "reward_funcs": ["toy-color", "toy-steadiness"],
            "use_peft": True,
            "lora_r": 4,
            "use_cpu": True,
            "height": 32,
            "width": 32,
            "num_frames": 5,
            "max_sequence_length": 16,
            "num_inference_steps": 2,
            "num_generations": 2,
            "per_device_train_batch_size": 4,
            "output_dir": str(tmp_path / "out"),
            "gradient_checkpointing": False,
            "check_model": False,
            "max_steps": 2,
            "save_steps": 1,
            "logging_steps": 1,
            "report_to": "none",
        }
        path = tmp_path / "grpo.yaml"
        path.write_text(yaml.safe_dump({k: v for k, v in (values | changes).items() if v is not ...}))
        return str(path)

    return write


@pytest.fixture
def here(tmp_path, monkeypatch):
    """Work in a folder of our own, with a wide terminal."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setenv("COLUMNS", "200")
    return tmp_path


def error_line(capsys):
    err = capsys.readouterr().err
    lines = [line for line in err.splitlines() if line.startswith("vidtrl: error: ")]
    assert len(lines) == 1 and "Traceback" not in err, err[-3000:]
    return lines[0]


# ---- Options ----


def test_options_come_from_file_and_command_line(config):
    script, training, lora, *_ = make_parser().parse_args_and_config(
        [
            "--config",
            config(recipe="mix-grpo"),
            "--reward_funcs",
            "toy-shape",
            "my:f",
            "--shared_noise",
            "--sde_steps",
            "1",
        ]
    )
    assert script.reward_funcs == ["toy-shape", "my:f"] and script.eval_reward_funcs is None and lora.lora_r == 4
    assert training.recipe == "mix-grpo" and training.shared_noise is True and training.sde_steps == 1
    with pytest.raises(UserError, match="invalid choice: 'flash-gpro'"):
        make_parser().parse_args_and_config(["--config", config(recipe="flash-gpro")])


def test_help_lists_every_option(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["grpo", "--help"])
    shown = capsys.readouterr().out
    assert stop.value.code == 0
    assert all(
        f"--{name} " in shown
        for name in ("reward_funcs", "eval_reward_funcs", "recipe", "use_peft", "log_completions")
    )


def test_example_config_parses():
    example = Path(__file__).parents[1] / "examples" / "grpo_flash_wan" / "config.yaml"
    script, training, lora, *_ = make_parser().parse_args_and_config(
        ["--config", str(example), "--bf16", "false", "--use_cpu"]
    )
    assert [resolve_reward(name) for name in script.reward_funcs + script.eval_reward_funcs]
    assert lora.use_peft and training.recipe == "flash-grpo" and training.num_frames == 81
    videos = training.per_device_train_batch_size * training.gradient_accumulation_steps
    assert videos == 64 and videos % training.num_generations == 0


# ---- Prompts ----


def split_of(name, split="train", **kwargs):
    return load_prompts(GRPOScriptArguments(dataset_name=str(name), **kwargs), split)


def test_every_kind_of_prompt_file_gives_the_same_prompts(tmp_path, monkeypatch):
    table = pd.DataFrame({"prompt": PROMPTS, "weight": [0.5, 1.0, 1.5, 2.0]})
    table.to_csv(tmp_path / "p.csv", index=False)
    table.to_parquet(tmp_path / "p.parquet")
    table.to_json(tmp_path / "p.jsonl", orient="records", lines=True)
    (tmp_path / "p.txt").write_bytes(
        "\ufeff".encode() + "\r\n".join([PROMPTS[0], "", *PROMPTS[1:], "  ", ""]).encode()
    )
    for name in ("p.csv", "p.parquet", "p.jsonl", "p.txt"):
        assert split_of(tmp_path / name)["prompt"] == PROMPTS, name
        if name != "p.txt":
            assert split_of(tmp_path / name)["weight"] == [0.5, 1.0, 1.5, 2.0]
        assert [row["prompt"] for row in split_of(tmp_path / name, dataset_streaming=True)] == PROMPTS, name
    assert split_of(tmp_path / "p.jsonl", "train[75%:]")["prompt"] == PROMPTS[3:]
    monkeypatch.chdir(tmp_path)
    assert split_of("p.csv")["prompt"] == PROMPTS


def test_folders_hold_prompts_too(tmp_path):
    (tmp_path / "lists").mkdir()
    for name, rows in (("train", PROMPTS[:3]), ("test", PROMPTS[3:])):
        pd.DataFrame({"prompt": rows}).to_json(tmp_path / "lists" / f"{name}.jsonl", orient="records", lines=True)
    assert split_of(tmp_path / "lists")["prompt"] == PROMPTS[:3]
    assert split_of(tmp_path / "lists", "test")["prompt"] == PROMPTS[3:]
    clips = split_of(write_dataset(tmp_path / "clips", num_clips=2))  # its videos would need torchcodec
    assert clips[0]["prompt"] in captions() and set(clips[0]["video"]) == {"bytes", "path"}


@pytest.mark.parametrize(
    ("name", "split", "message"),
    [
        ("missing.txt", "train", "prompt file 'missing.txt' does not exist"),
        ("./nowhere", "train", "dataset folder './nowhere' does not exist"),
        (__file__, "train", "must be one of .txt, .jsonl"),
        ("good.txt", "test", 'Unknown split "test"'),
        ("bad.jsonl", "train", "cannot load split 'train' of 'bad.jsonl'"),
    ],
)
def test_prompt_mistakes(tmp_path, monkeypatch, name, split, message):
    monkeypatch.chdir(tmp_path)
    Path("good.txt").write_text("a red circle moving up\n")
    Path("bad.jsonl").write_text('{"prompt": "a red circle"}\n{"prompt": \n')
    with pytest.raises(UserError, match=message):
        split_of(name, split)


# ---- Rewards ----


def test_rewards_are_names_or_import_paths(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    Path("rewards_by_path.py").write_text(REWARDS)
    assert resolve_reward("toy-color") == "toy-color"
    assert resolve_reward("vidtrl.toy.rewards:shape_reward") is toy.shape_reward
    assert resolve_reward("rewards_by_path:red").__name__ == "red"
    for name, message in (
        ("toy-colour", "there is no built-in reward 'toy-colour'. Did you mean 'toy-color'?"),
        ("rewards_by_path:rad", "has no function 'rad'; did you mean rewards_by_path:red?"),
        ("rewards_by_path:LIMIT", "has no function 'LIMIT'"),
        ("rewards_by_path.py:red", "write module:function"),
        ("./rewards_by_path:red", "write module:function"),
        ("rewards_by_path:", "write module:function"),
        ("no_such_module:red", "No module named 'no_such_module'"),
    ):
        with pytest.raises((UserError, ValueError)) as error:
            resolve_reward(name)
        assert message in str(error.value), name


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"reward_funcs": ["toy-colour"]}, "Did you mean 'toy-color'?"),
        ({"eval_reward_funcs": ["toy-shape", "toy-colour"], "eval_strategy": "steps"}, "Did you mean 'toy-color'?"),
        ({"eval_reward_funcs": ["toy-shape"]}, "set --eval_strategy steps"),
        ({"reward_funcs": ...}, "--reward_funcs is required"),
        ({"dataset_name": ...}, "--dataset_name is required"),
        ({"model_name_or_path": ...}, "--model_name_or_path is required"),
        ({"reward_weights": [1.0]}, "1 weights for 2 reward functions"),
        ({"num_generations": 1}, "num_generations must be at least 2"),
        ({"num_generations": 3}, "num_generations=3"),
    ],
)
def test_mistakes_are_one_line(config, capsys, change, message):
    assert main(["grpo", "--config", config(**change)]) == 2
    assert message in error_line(capsys)


# ---- Training ----


def history(checkpoint):
    return json.loads((checkpoint / "trainer_state.json").read_text())["log_history"]


def test_trains_evaluates_logs_and_resumes(config, here, capsys):
    (here / "rewards_that_work.py").write_text(REWARDS)
    rows = [{"prompt": p, "weight": i} for i, p in enumerate(PROMPTS)]
    (here / "prompts.jsonl").write_text("\n".join(map(json.dumps, rows)))
    path = config(
        dataset_name="prompts.jsonl",
        dataset_test_split="train[:2]",
        reward_funcs=["rewards_that_work:red", "rewards_that_work:rows", "toy-steadiness"],
        eval_reward_funcs=["toy-presence"],
        eval_strategy="steps",
        eval_steps=2,
        eval_num_inference_steps=2,
        log_completions=True,
        num_completions_to_print=1,
    )
    assert main(["grpo", "--config", path]) == 0
    out, shown = here / "out", capsys.readouterr().out
    assert (out / "pytorch_lora_weights.safetensors").is_file() and (out / "checkpoint-2").is_dir()
    logs = history(out / "checkpoint-2")
    names = {name for entry in logs for name in entry}
    assert {"reward", "reward_std", "rewards/red/mean", "rewards/rows/mean", "rewards/toy-steadiness/mean"} <= names
    assert "eval_rewards/toy-presence/mean" in names and "rewards/toy-presence/mean" not in names
    # the completion log
    assert shown.count(".png") == 2 and "Step 1" in shown
    logged = load_dataset(str(out / "completions"), split="train", cache_dir=str(here / "cache"))
    logged = logged.remove_columns("video")
    assert len(logged) == 8 and all(row["prompt"] == PROMPTS[int(row["weight_seen"])] for row in logged)
    assert all(row["rows"] == row["weight_seen"] and 0 < row["red"] < 1 for row in logged)
    # one more update
    assert main(["grpo", "--config", path, "--max_steps", "3", "--resume_from_checkpoint", "latest"]) == 0
    assert f"resuming from {out / 'checkpoint-2'}" in capsys.readouterr().out
    assert [entry["step"] for entry in history(out / "checkpoint-3") if "reward" in entry] == [1, 2, 3]


@pytest.mark.parametrize(("name", "message"), [("broken", "rewards_that_fail.py, line 10."), ("short", "4")])
def test_a_reward_that_fails_is_one_line_that_says_where(config, here, capsys, name, message):
    (here / "rewards_that_fail.py").write_text(REWARDS)
    assert main(["grpo", "--config", config(reward_funcs=[f"rewards_that_fail:{name}"])]) == 2
    line = error_line(capsys)
    assert f"reward function '{name}' failed" in line and message in line
    assert ("Raised in" in line) == (name == "broken")


@pytest.mark.slow
def test_two_processes_train_together(config, here):
    (here / "rewards_of_two.py").write_text(REWARDS)
    path = config(
        max_steps=1, per_device_train_batch_size=2, reward_funcs=["rewards_of_two:red"], log_completions=True
    )
    command = ["grpo", "--config", path, "--accelerate_config", "multi_gpu", "--num_processes", "2"]
    done = subprocess.run([sys.executable, "-m", "vidtrl.cli.main", *command], capture_output=True, text=True, env=ENV)
    assert done.returncode == 0, done.stderr[-3000:]
    # one process would write rng_state.pth
    checkpoint = here / "out" / "checkpoint-1"
    assert sorted(f.name for f in checkpoint.glob("rng_state*")) == ["rng_state_0.pth", "rng_state_1.pth"]
    assert len(list((here / "out" / "completions").glob("step_*/*.mp4"))) == 4  # of both, written once


def test_ctrl_c_exits_130_and_the_same_command_goes_on_bit_for_bit(config, tmp_path, capsys):
    # a continuous reward and no average: every step changes the saved weights
    changes = dict(reward_funcs=["temporal-smoothness"], ema_decay=0, lr_scheduler_type="constant")
    path = config(max_steps=100_000, **changes)
    command = [sys.executable, "-m", "vidtrl.cli.main", "grpo", "--config", path]
    process = subprocess.Popen(
        command,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env=ENV,
        # a suite that runs in the background ignores Ctrl-C, and its children would inherit that
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    deadline = time.monotonic() + 120
    while not (tmp_path / "out" / "checkpoint-1").is_dir():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    err = process.communicate(timeout=60)[1]
    assert process.returncode == 130, err[-2000:]
    assert "--resume_from_checkpoint latest goes on from" in err and "Traceback" not in err

    last = max(int(folder.name.split("-")[1]) for folder in (tmp_path / "out").glob("checkpoint-*"))
    steps = ["--max_steps", str(last + 1)]
    assert main(["grpo", "--config", path, *steps, "--resume_from_checkpoint", "latest"]) == 0
    assert f"resuming from {tmp_path / 'out' / f'checkpoint-{last}'}" in capsys.readouterr().out
    assert main(["grpo", "--config", path, *steps, "--output_dir", str(tmp_path / "whole")]) == 0
    runs = (("out", last), ("out", last + 1), ("whole", last + 1))
    before, resumed, whole = (
        load_file(tmp_path / run / f"checkpoint-{step}" / "pytorch_lora_weights.safetensors") for run, step in runs
    )
    assert all(torch.equal(resumed[name], whole[name]) for name in whole) and resumed.keys() == whole.keys()
    assert not all(torch.equal(resumed[name], before[name]) for name in before)  # the last step changed something
