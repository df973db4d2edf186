"""`vidtrl prompt`: both steps from a config file, resumed, with mistakes in one line."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from prompt_setup import SHORT, byte_lm, byte_tokenizer

from vidtrl import toy
from vidtrl.cli.grpo import resolve_reward
from vidtrl.cli.main import main
from vidtrl.cli.prompt import PromptScriptArguments, make_parser, trl_config
from vidtrl.prompts import PromptEnhancer


PAIRS = [{"prompt": "ball", "enhanced": "a red circle"}, {"prompt": "box", "enhanced": "a blue square"}]
FAST = {"max_steps": 1, "use_cpu": True, "bf16": False, "gradient_checkpointing": False, "report_to": "none"}
FAST |= {"disable_tqdm": True, "logging_steps": 1}


@pytest.fixture
def config(tmp_path, monkeypatch):
    """A complete config file, with a language model of a few thousand weights; returns a function that writes it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    tokenizer = byte_tokenizer(chat=True)
    byte_lm(tokenizer).save_pretrained("lm")
    tokenizer.save_pretrained("lm")
    Path("template.json").write_text(json.dumps(SHORT.to_dict()))
    Path("pairs.jsonl").write_text("\n".join(map(json.dumps, PAIRS)))
    Path("prompts.txt").write_text("ball\nbox\n")

    def write(**changes):
        values = {
            "model_name_or_path": "lm",
            "template": "template.json",
            "max_new_tokens": 6,
            "output_dir": "out",
            "pairs_dataset_name": "pairs.jsonl",
            "sft": {**FAST, "per_device_train_batch_size": 2},
            "dataset_name": "prompts.txt",
            "video_model_name_or_path": toy.pipeline_path(),
            "reward_funcs": ["vidtrl.toy.paraphrases:intent_reward", "toy-presence"],
            "reward_weights": [1.0, 0.5],
            "height": 64,
            "width": 64,
            "num_frames": 5,
            "num_inference_steps": 1,
            "guidance_scale": 1.0,
            "pipeline_kwargs": {"max_sequence_length": 16},
            "grpo": {**FAST, "per_device_train_batch_size": 4, "num_generations": 2, "temperature": 1.5},
        }
        path = tmp_path / "prompt.yaml"
        path.write_text(yaml.safe_dump({k: v for k, v in (values | changes).items() if v is not ...}))
        return str(path)

    return write


def error_line(capsys):
    err = capsys.readouterr().err
    lines = [line for line in err.splitlines() if line.startswith("vidtrl: error: ")]
    assert len(lines) == 1 and "Traceback" not in err, err[-3000:]
    return lines[0]


def history(folder):
    return json.loads(Path(folder, "trainer_state.json").read_text())["log_history"]


@pytest.mark.parametrize("peft", [False, True])
def test_both_steps_then_again_without_doing_anything_twice(config, capsys, peft):
    lora = {"use_peft": True, "lora_r": 2, "lora_alpha": 2} if peft else {}
    path = config(**lora)
    assert main(["prompt", "--config", path]) == 0
    names = {name for entry in history("out/grpo") for name in entry}
    assert {"video/intent_reward", "video/toy-presence", "rewards/structure_reward/mean"} <= names
    assert any("loss" in entry for entry in history("out/sft"))
    enhancer = PromptEnhancer.from_pretrained("out")
    assert enhancer.template == SHORT and enhancer.max_new_tokens == 6
    assert Path("out/adapter_model.safetensors").is_file() == peft
    for step in ("sft", "grpo"):  # each step's result is an enhancer as well
        assert PromptEnhancer.from_pretrained(f"out/{step}").settings() == enhancer.settings()
    assert enhancer.generate(["ball"]) == PromptEnhancer.from_pretrained("out/grpo").generate(["ball"])
    before = Path("out/sft/trainer_state.json").stat().st_mtime_ns
    capsys.readouterr()
    assert main(["prompt", "--config", path, "--resume_from_checkpoint", "latest"]) == 0
    shown = capsys.readouterr().out
    assert "sft: done before" in shown and "grpo: done before" in shown
    Path("out/grpo/trainer_state.json").unlink()  # as if it had been killed while it saved
    assert main(["prompt", "--config", path, "--resume_from_checkpoint", "latest"]) == 0
    shown = capsys.readouterr().out
    assert "sft: done before" in shown and "resuming from out/grpo/checkpoint-1" in shown
    assert Path("out/sft/trainer_state.json").stat().st_mtime_ns == before
    assert PromptEnhancer.from_pretrained("out").generate(["ball"]) == enhancer.generate(["ball"])


def test_one_step_from_a_saved_enhancer(config):
    assert main(["prompt", "--config", config(), "--steps", "sft", "--language", "French"]) == 0
    assert not Path("out/grpo").exists()
    path = config(model_name_or_path="out", template=..., max_new_tokens=..., output_dir="more", steps=["grpo"])
    assert main(["prompt", "--config", path]) == 0
    enhancer = PromptEnhancer.from_pretrained("more")  # what was not given anew is what was saved
    assert (enhancer.language, enhancer.template, enhancer.max_new_tokens) == ("French", SHORT, 6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_name_or_path": ...}, "--model_name_or_path is required"),
        ({"model_name_or_path": "./nowhere"}, "cannot load the language model './nowhere'"),
        ({"pairs_dataset_name": ...}, "--pairs_dataset_name is required"),
        ({"dataset_name": ...}, "--dataset_name is required"),
        ({"height": ...}, "--height is required"),
        ({"reward_funcs": ["toy-colour"]}, "Did you mean 'toy-color'?"),
        ({"template": "wann"}, "Did you mean 'wan'?"),
        ({"steps": ["stf"]}, "invalid choice: 'stf'"),
        ({"sft": {"max_step": 1}}, "trl.SFTConfig has no argument 'max_step'; did you mean max_steps?"),
        ({"sft": {"seed": 1}}, "sft.seed is set by vidtrl"),
        ({"grpo": {**FAST, "num_generations": 1}}, "grpo: "),
        ({"grpo": "many"}, "grpo must be a mapping"),
        ({"num_frames": 6, "steps": ["grpo"]}, "nearest is 5"),
        ({"reward_weights": [1.0], "steps": ["grpo"]}, "1 weights for 2 reward functions"),
        ({"pairs_dataset_name": "prompts.txt"}, "needs a column 'enhanced'"),
        ({"push_to_hub": True}, "push_to_hub needs hub_model_id"),
        ({"lora_r": 4}, "add --use_peft"),
    ],
)
def test_mistakes_are_one_line(config, capsys, change, message):
    assert main(["prompt", "--config", config(**change)]) == 2
    assert message in error_line(capsys)


def test_a_reward_that_fails_is_one_line(config, capsys, monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(tmp_path)
    Path("prompt_rewards.py").write_text("def broken(videos, **kwargs):\n    raise KeyError('no such file')\n")
    path = config(reward_funcs=["prompt_rewards:broken"], reward_weights=..., steps=["grpo"])
    assert main(["prompt", "--config", path]) == 2
    line = error_line(capsys)
    assert "reward function 'broken' failed" in line and "prompt_rewards.py, line 2" in line


@pytest.mark.slow
def test_two_processes_train_together(config):
    path = config(grpo={**FAST, "per_device_train_batch_size": 2, "num_generations": 2})
    command = ["prompt", "--config", path, "--accelerate_config", "multi_gpu", "--num_processes", "2"]
    env = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-m", "vidtrl.cli.main", *command], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr[-3000:]
    for step in ("sft", "grpo"):  # one process would write rng_state.pth
        names = sorted(f.name for f in Path("out", step, "checkpoint-1").glob("rng_state*"))
        assert names == ["rng_state_0.pth", "rng_state_1.pth"]
    assert PromptEnhancer.from_pretrained("out").template == SHORT


def test_help_lists_every_option(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["prompt", "--help"])
    shown = capsys.readouterr().out
    assert stop.value.code == 0
    assert all(f"--{name} " in shown for name in ("template", "sft", "grpo", "video_model_name_or_path", "use_peft"))


def test_example_config_parses():
    example = Path(__file__).parents[1] / "examples" / "prompt_enhancer" / "config.yaml"
    script, lora, _ = make_parser().parse_args_and_config(["--config", str(example), "--seed", "7"])
    assert script.seed == 7 and lora.use_peft and script.template == "wan" and script.steps == ["sft", "grpo"]
    assert [resolve_reward(name) for name in script.reward_funcs]
    for kind in ("sft", "grpo"):
        getattr(script, kind).update(use_cpu=True, bf16=False)
    assert trl_config("sft", script).num_train_epochs == 2
    args = trl_config("grpo", script)
    assert args.generation_batch_size == 64 and args.output_dir == "wan-prompts/grpo"


def test_mappings_come_as_json_too():
    args = PromptScriptArguments(sft='{"max_steps": 3}', grpo={"max_steps": 4})
    assert args.sft == {"max_steps": 3} and args.grpo == {"max_steps": 4} and args.pipeline_kwargs == {}
