"""`vidtrl run`: the file, the plan, and all four stages as real processes: stopped, continued, changed, done again."""

import importlib.util
import json
import os
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from diffusers import WanPipeline
from peft import LoraConfig
from safetensors.torch import load_file


sys.path.insert(0, str(Path(__file__).parent))

import tiny_pipelines  # noqa: E402
from processes import free_port  # noqa: E402

from vidtrl import toy
from vidtrl.cli.errors import UserError
from vidtrl.cli.main import main
from vidtrl.cli.run import _apart
from vidtrl.cli.run_memory import estimated_memory
from vidtrl.cli.run_plan import Pipeline, Stage, parse_stage, read_pipeline
from vidtrl.cli.run_result import write_script
from vidtrl.cli.run_stage import run_process
from vidtrl.cli.run_state import State, data_digests, identity, output_digest, plan
from vidtrl.inference import load_student
from vidtrl.prompts import PromptEnhancer, video_reward
from vidtrl.toy import captions, write_dataset
from vidtrl.toy.paraphrases import enhancer_path, paraphrases
from vidtrl.trainer.lora import add_lora, save_adapter


ROOT = Path(__file__).parents[1]
ADAPTER = "pytorch_lora_weights.safetensors"
ENV = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
FEW = {"max_steps": 1, "use_cpu": True, "bf16": False, "gradient_checkpointing": False, "report_to": "none"}
VALUES = {
    "model": toy.pipeline_path(),
    "output_dir": "out",
    "enhance_prompts": True,
    "shared": {
        "seed": 1, "height": 32, "width": 32, "num_frames": 5, "max_sequence_length": 16, "use_peft": True, "lora_r": 4,
        "use_cpu": True, "gradient_checkpointing": False, "check_model": False, "report_to": "none", "max_steps": 2,
        "save_steps": 1, "logging_steps": 1,
    },
    "launch": {"accelerate_config": "single"},
    "stages": {
        "sft": {"dataset_name": "clips", "fps": 8, "per_device_train_batch_size": 2},
        "grpo": {
            "dataset_name": "prompts.txt", "reward_funcs": ["toy-color", "toy-steadiness"], "num_generations": 2,
            "per_device_train_batch_size": 4, "num_inference_steps": 2, "dataset_train_split": "train[:4]",
            "dataset_test_split": "train[4:]", "eval_strategy": "steps", "eval_steps": 1, "per_device_eval_batch_size": 2,
        },
        "prompt": {
            "model_name_or_path": enhancer_path(), "pairs_dataset_name": "pairs.jsonl", "dataset_name": "users.txt",
            "reward_funcs": ["vidtrl.toy.paraphrases:intent_reward"], "num_inference_steps": 1, "guidance_scale": 1.0,
            "pipeline_kwargs": {"max_sequence_length": 16}, "sft": {**FEW, "per_device_train_batch_size": 2},
            "grpo": {**FEW, "per_device_train_batch_size": 4, "num_generations": 2},
        },
        "distill": {"dataset_name": "users.txt", "per_device_train_batch_size": 2, "fake_updates_per_student": 1},
    },
}  # fmt: skip


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder with the four stages' data; the working directory."""
    monkeypatch.chdir(tmp_path)
    write_dataset("clips", num_clips=4, quality="clean", seed=0, fps=8)
    Path("prompts.txt").write_text("\n".join(captions()[:6]) + "\n")
    Path("users.txt").write_text("\n".join(row["prompt"] for row in paraphrases(4, "prompts")) + "\n")
    pairs = [{"prompt": row["prompt"], "enhanced": row["caption"]} for row in paraphrases(4, "pairs")]
    Path("pairs.jsonl").write_text("\n".join(map(json.dumps, pairs)) + "\n")
    return tmp_path


def write(name="pipeline.yaml", **changes):
    """Write the file; `stages__grpo__seed=2` changes a value, `...` takes it out."""
    values = json.loads(json.dumps(VALUES))
    for path, value in changes.items():
        *parents, last = path.split("__")
        inner = values
        for parent in parents:
            inner = inner.setdefault(parent, {})
        if value is ...:
            del inner[last]
        else:
            inner[last] = value
    Path(name).write_text(yaml.safe_dump(values))
    return name


def error_line(capsys):
    err = capsys.readouterr().err
    lines = [line for line in err.splitlines() if line.startswith("vidtrl: error: ")]
    assert len(lines) == 1 and "Traceback" not in err, err[-3000:]
    return lines[0]


# ---- The file ----


def test_stages_get_shared_settings_and_the_adapters_before_them(here):
    pipeline = read_pipeline(write(base_adapters=["me/style"], stages__grpo__lora_r=8, shared__fps=4))
    settings = {stage.name: stage.settings for stage in pipeline.stages}
    assert [settings[name]["lora_r"] for name in ("sft", "grpo", "prompt", "distill")] == [4, 8, 4, 4]
    assert settings["sft"]["fps"] == 8 and settings["grpo"]["fps"] == 4 and "fps" not in settings["prompt"]
    assert settings["sft"]["base_adapters"] == ["me/style"]
    assert settings["grpo"]["base_adapters"] == ["me/style", "out/sft"]
    assert (
        settings["prompt"]["base_adapters"]
        == settings["distill"]["base_adapters"]
        == ["me/style", "out/sft", "out/grpo"]
    )
    assert settings["prompt"]["video_model_name_or_path"] == toy.pipeline_path()
    assert settings["prompt"]["model_name_or_path"] == enhancer_path()
    assert settings["distill"]["dataset_name"] == "out/distill/prompts"
    assert pipeline.stage("distill").needs == ("sft", "grpo", "prompt") and pipeline.stage("prompt").needs == (
        "sft",
        "grpo",
    )
    plain = read_pipeline(write(enhance_prompts=False, stages__grpo=...))
    assert plain.stage("distill").needs == ("sft",) and plain.stage("distill").settings["dataset_name"] == "users.txt"


MISTAKES = [
    ({"modle": "x"}, "unknown key modle; did you mean model?"),
    ({"stages__stf": {}}, "unknown key stages.stf; did you mean stages.sft?"),
    ({"stages__grpo__recpie": "dmd2"}, "unknown key stages.grpo.recpie; did you mean stages.grpo.recipe?"),
    ({"stages__prompt__num_frame": 5}, "unknown key stages.prompt.num_frame; did you mean stages.prompt.num_frames?"),
    ({"stages__prompt__grpo__max_step": 5}, "stages.prompt: trl.GRPOConfig has no argument 'max_step'; did you mean max_steps?"),
    ({"shared__hieght": 32}, "unknown key shared.hieght; did you mean shared.height?"),
    ({"launch__num_process": 2}, "did you mean launch.num_processes?"),
    ({"launch__mixed_precision": "bf16"}, "write bf16: true under shared"),
    ({"launch__num_machines": 2}, "starts its stages on one machine"),
    ({"launch__accelerate_config": "sinlge"}, "neither a file nor one of"),
    ({"stages__grpo__recipe": "flash-gpro"}, "stages.grpo: argument --recipe: invalid choice: 'flash-gpro'"),
    ({"stages__sft__learning_rate": "fast"}, "--learning-rate: invalid float value: 'fast'"),
    ({"stages__distill__denoising_steps": [1, 2]}, "stages.distill: denoising_steps must be strictly decreasing"),
    ({"stages__grpo__reward_funcs": ["toy-colour"]}, "Did you mean 'toy-color'?"),
    ({"stages__grpo__output_dir": "x"}, "stages.grpo.output_dir is set by vidtrl run: write output_dir, beside stages"),
    ({"stages__distill__base_adapters": ["x"]}, "stages.distill.base_adapters is set by vidtrl run"),
    ({"shared__hub_token": "secret"}, "hf auth login"),
    ({"stages__prompt__grpo__hub_token": "secret"}, "stages.prompt.grpo.hub_token holds a secret"),
    ({"stages__prompt__sft__model_init_kwargs": {"token": "secret"}}, "stages.prompt.sft.model_init_kwargs.token holds a secret"),
    ({"stages__sft__model_init_kwargs": '{"token": "secret"}'}, "stages.sft.model_init_kwargs.token holds a secret"),
    ({"stages__grpo__reward_funcs": [f"https://hf_{'a' * 34}@host"]}, "stages.grpo.reward_funcs holds a secret"),
    ({"stages__grpo__use_peft": False, "shared__lora_r": 32}, "stages.grpo: the next stages stack on an adapter"),
    ({"stages__prompt": ...}, "enhance_prompts: true needs both"),
    ({"stages__distill__recipe": "lcm"}, "set enhance_prompts: false"),
    ({"stages__sft__dataset_name": "./clisp"}, "stages.sft.dataset_name: './clisp' does not exist"),
    ({"stages__grpo__dataset_name": "promts.txt"}, "stages.grpo.dataset_name: 'promts.txt' does not exist"),
    ({"output_dir": "clips"}, "is not empty and holds no pipeline"),
    ({"model": ...}, "model is required"),
    ({"stages": "all"}, "stages must be a mapping"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "message"), MISTAKES, ids=[message[:40] for _, message in MISTAKES])
def test_mistakes_are_one_line_before_anything_starts(here, capsys, changes, message):
    assert main(["run", "--config", write(**changes)]) == 2
    assert message in error_line(capsys)
    assert not Path("out").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--stages", "grpo", "--redo", "sft"], "--redo sft: --stages leaves it out"),
        (["--redo", "prompt"], "--redo prompt: pipeline.yaml has no stages.prompt"),
        (["--stages", "distill"], "distill builds on sft, which is not finished: add sft to --stages"),
        (["--stages", "dstill"], "invalid choice"),
    ],
)
def test_options_are_checked(here, capsys, options, message):
    path = write(stages__prompt=..., enhance_prompts=False)
    assert main(["run", "--config", path, *options]) == 2
    assert message in error_line(capsys)
    assert not Path("out").exists()


def test_settings_are_read_in_another_process_where_there_is_an_accelerator(monkeypatch):
    assert _apart(os.getpid) == os.getpid()
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    assert _apart(os.getpid) != os.getpid()
    with pytest.raises(UserError, match="'nowhere.yaml' does not exist"):
        _apart(read_pipeline, "nowhere.yaml")


# ---- The dry run ----


def test_dry_run_prints_every_setting_and_starts_nothing(here, capsys):
    from vidtrl.cli import distill, grpo, prompt, sft

    assert main(["run", "--config", write(stages__distill__learning_rate=3e-5), "--dry-run"]) == 0
    shown = capsys.readouterr().out
    parts = dict(zip(("sft", "grpo", "prompt", "distill"), shown.split("\n[")[1:], strict=True))
    for name, command in {"sft": sft, "grpo": grpo, "prompt": prompt, "distill": distill}.items():
        text = parts[name]
        for action in command.make_parser()._actions:
            if action.dest not in ("help", "config", "hub_token", "sft", "grpo"):
                assert f" {action.dest}: " in text or f" {action.dest}=" in text, (name, action.dest)
        command = f"-m accelerate.commands.launch --config_file={ROOT}/src/vidtrl/accelerate_configs/single.yaml"
        assert (
            f"{command} --num_processes=1 --quiet --module vidtrl.cli.{name} --config out/{name}/config.yaml" in text
        )
        assert "lora_r: 4  # shared" in text
    assert (
        "learning_rate: 3e-05  # stage" in parts["distill"] and "base_adapters: out/sft, out/grpo" in parts["distill"]
    )
    assert "vidtrl.cli.run_prompts --enhancer out/prompt" in parts["distill"]
    assert "sft.max_steps: 1  # stage" in parts["prompt"] and "grpo.temperature=" in parts["prompt"]
    assert "sft: runs" in shown and not Path("out").exists()
    for name in ("sft", "grpo", "distill"):
        assert "on each device, in the phase" in parts[name], parts[name][-2000:]
    assert "language model" in parts["prompt"].partition("memory:")[2]


def test_dry_run_without_the_model_or_data(here, capsys):
    """The Hub cannot be reached in this suite: the plan is printed, with the reason for what is not known."""
    path = write(model="nobody/no-such-model", stages__sft__dataset_name="./nowhere", shared__bf16=True)
    assert main(["run", "--config", path, "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert (
        shown.count("unknown: OSError: ") + shown.count("unknown: ValueError: ") == 4
        and "missing stages.sft.dataset_name: './nowhere' does not exist" in shown
    )
    assert "bf16: true  # shared" in shown


def test_the_example_is_valid(monkeypatch, capsys):
    monkeypatch.chdir(ROOT / "examples" / "four_stages_wan")
    pipeline = read_pipeline("config.yaml")
    assert [stage.name for stage in pipeline.stages] == ["sft", "grpo", "prompt", "distill"]
    assert main(["run", "--config", "config.yaml", "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert 'recipe: "flash-grpo"  # stage' in shown and "4 stages, in wan-four-stages" in shown


def test_a_bug_in_the_estimate_is_raised(here):
    pipeline = read_pipeline(write())
    texts = estimated_memory(pipeline, {stage.name: parse_stage(stage, dry_run=True) for stage in pipeline.stages})
    assert not any(text.startswith("unknown") for text in texts.values())
    with pytest.raises(KeyError):  # nothing was parsed
        estimated_memory(pipeline, {})


@pytest.mark.parametrize("name", ["run", "run_stage", "run_state"])
def test_windows_can_import_it_and_is_told_what_to_do(here, monkeypatch, capsys, name):
    monkeypatch.setitem(sys.modules, "fcntl", None)
    for missing in ("SIGHUP", "SIGKILL"):
        monkeypatch.delattr(signal, missing)
    spec = importlib.util.spec_from_file_location(
        f"vidtrl.cli._{name}", ROOT / "src" / "vidtrl" / "cli" / f"{name}.py"
    )
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    monkeypatch.setattr(sys, "platform", "win32")
    assert main(["run", "--config", write()]) == 2
    assert "start it in WSL" in error_line(capsys) and not Path("out").exists()


# ---- The plan ----


@pytest.fixture
def trained(here):
    """A pipeline of two stages, as if both were finished; returns what reads the file and plans anew."""

    def read(**changes):
        return read_pipeline(write(stages__prompt=..., stages__grpo=..., enhance_prompts=False, **changes))

    state = State(Path("out"))
    for stage in read().stages:
        stage.folder.mkdir(parents=True)
        (stage.folder / ADAPTER).write_text(stage.name)
        inputs = {name: state.stages[name]["output"] for name in stage.needs}
        record = {"settings": identity(stage), "data": data_digests(stage), "inputs": inputs}
        state.write(stage.name, status="finished", output=output_digest(stage), **record)

    def actions(redo=(), selected=("sft", "distill"), **changes):
        return [(s.stage.name, s.action, s.reason) for s in plan(read(**changes), State(Path("out")), selected, redo)]

    return actions


def test_what_is_finished_and_unchanged_is_done(trained):
    assert trained() == [("sft", "done", ""), ("distill", "done", "")]
    # settings that say what is watched, and how it is launched, are free
    assert (
        trained(shared__report_to="tensorboard", shared__save_steps=5, launch__accelerate_config="multi_gpu")
        == trained()
    )
    Path("out").rename("moved")
    trained(output_dir="moved")  # writes the file; what it returns is about the folder that is not there any more
    steps = plan(read_pipeline("pipeline.yaml"), State(Path("moved")), ["sft", "distill"], [])
    assert [step.action for step in steps] == ["done", "done"]


def test_changes_are_refused_with_the_way_out(trained):
    with pytest.raises(UserError, match="learning_rate was not set, is 0.1. .*--redo distill"):
        trained(stages__distill__learning_rate=0.1)
    with pytest.raises(UserError, match="stage sft is finished with other settings: seed was 1, is 2"):
        trained(shared__seed=2)
    Path("users.txt").write_text("another prompt\n")
    with pytest.raises(UserError, match="the contents of dataset_name 'users.txt' changed"):
        trained()
    assert trained(selected=("sft",)) == [("sft", "done", ""), ("distill", "skip", "not in --stages")]
    assert [action for _, action, _ in trained(redo=["distill"])] == ["done", "redo"]


def test_what_builds_on_a_changed_stage_is_redone(trained):
    assert trained(redo=["sft"], shared__seed=1)[1] == ("distill", "redo", "builds on sft, which runs again")
    state = State(Path("out"))
    (Path("out/sft") / ADAPTER).write_text("trained again")
    with pytest.raises(UserError, match="is not the one that the stage wrote.*--redo sft"):
        trained()
    state.write("sft", output=output_digest(read_pipeline("pipeline.yaml").stage("sft")))
    assert trained() == [("sft", "done", ""), ("distill", "redo", "builds on sft, which ran again")]
    (Path("out/sft") / ADAPTER).unlink()
    with pytest.raises(UserError, match="is gone: put it back, or train it again with --redo sft"):
        trained()


def test_an_unfinished_stage_goes_on_from_its_newest_checkpoint(trained):
    State(Path("out")).write("distill", status="interrupted")
    assert trained()[1] == ("distill", "run", "no checkpoint yet")
    assert trained(stages__distill__learning_rate=0.1)[1][1] == "redo"  # nothing is lost
    for step in (9, 10):
        Path(f"out/distill/checkpoint-{step}").mkdir()
    assert trained()[1] == ("distill", "continue", "checkpoint-10")
    with pytest.raises(UserError, match="has trained with other settings: learning_rate"):
        trained(stages__distill__learning_rate=0.1)


def test_the_program_loads_both_experts_of_a_model_with_two(trained):
    pipeline = read_pipeline("pipeline.yaml")
    (Path("out/sft") / ADAPTER).rename("out/sft/pytorch_lora_weights_high_noise.safetensors")
    Path("out/sft/pytorch_lora_weights_low_noise.safetensors").write_text("low")
    path = write_script(pipeline, pipeline.stages[:1])
    lines = [line for line in path.read_text().splitlines() if line.startswith("pipe.load_lora_weights")]
    name = "here / 'sft', adapter_name='sft', weight_name='pytorch_lora_weights"
    assert lines[0] == f"pipe.load_lora_weights({name}_high_noise.safetensors')"
    assert lines[1] == f"pipe.load_lora_weights({name}_low_noise.safetensors', load_into_transformer_2=True)"
    compile(path.read_text(), "generate.py", "exec")
    Path("out/distill/distill_config.json").write_text(
        json.dumps({"denoising_steps": [1000, 500], "frames_per_block": 3})
    )
    text = write_script(pipeline, pipeline.stages).read_text()  # a causal student is no stock pipeline's
    assert 'CausalVideoPipeline.from_pretrained(here / "distill"' in text and "load_lora_weights" not in text
    compile(text, "generate.py", "exec")


def test_the_program_of_an_image_to_video_model_takes_an_image(tmp_path, monkeypatch):
    pipe, call = tiny_pipelines.wan_i2v()
    pipe.save_pretrained(tmp_path / "model")
    (tmp_path / "sft").mkdir()
    save_adapter(add_lora(pipe.transformer, LoraConfig(r=2)), tmp_path / "sft")
    settings = {"height": 16, "width": 32, "num_frames": 5, "max_sequence_length": 16, "fps": 8}
    settings["pipeline_kwargs"] = {"num_inference_steps": 1, "guidance_scale": 1.0}
    stage = Stage("sft", tmp_path / "sft", settings, {})
    path = write_script(Pipeline(str(tmp_path / "model"), tmp_path, [stage]), [stage])
    call["image"].resize((40, 40)).save(tmp_path / "image.png")
    arguments = ["a red ball", str(tmp_path / "video.mp4")]
    monkeypatch.setattr(sys, "argv", ["generate.py", *arguments])
    with pytest.raises(SystemExit):  # no image
        runpy.run_path(str(path))
    monkeypatch.setattr(sys, "argv", ["generate.py", *arguments, "--image", str(tmp_path / "image.png")])
    used = runpy.run_path(str(path))
    assert used["image"].size == (32, 16) and used["prompt"] == "a red ball" and len(used["video"]) == 5
    assert (tmp_path / "video.mp4").stat().st_size > 0


# ---- Processes ----

WAITS = """
import signal, sys, time
try:
    print("ready", flush=True)
    time.sleep(60)
except KeyboardInterrupt:
    print("leaving", flush=True)
    sys.exit(130)
"""
PARENT = """
import os, sys
from pathlib import Path
from vidtrl.cli.run_stage import run_process
ended = run_process([sys.executable, "-c", sys.argv[1]], Path("log"), os.open("log", os.O_RDWR | os.O_CREAT), lambda pid: None)
print(ended)
"""


def test_output_goes_to_the_log_and_errors_are_found(tmp_path, capfd):
    with open(tmp_path / "lock", "w") as lock:
        code = "print('h\\u00e4llo'); raise SystemExit('vidtrl: error: no such thing')"
        ended = run_process([sys.executable, "-c", code], tmp_path / "logs" / "a.log", lock.fileno(), lambda pid: None)
        assert (ended.code, ended.stopped, ended.error) == (1, False, "vidtrl: error: no such thing")
        ended = run_process(
            [sys.executable, "-c", "1 / 0"], tmp_path / "logs" / "a.log", lock.fileno(), lambda pid: None
        )
        assert ended.code == 1 and ended.error == "ZeroDivisionError: division by zero"
    shown, log = capfd.readouterr().out, (tmp_path / "logs" / "a.log").read_text()
    assert "h\u00e4llo" in shown and "division by zero" in shown and log.count("$ ") == 2 and "h\u00e4llo" in log


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_reach_the_stage(tmp_path, number):
    process = subprocess.Popen(
        [sys.executable, "-c", PARENT, WAITS], cwd=tmp_path, stdout=subprocess.PIPE, text=True, env=ENV
    )
    for line in process.stdout:
        if "ready" in line:
            break
    process.send_signal(number)
    rest, _ = process.communicate(timeout=60)
    assert "leaving" in rest and "Ended(code=130, stopped=True" in rest


# ---- The frozen model of the prompt stage ----


def test_the_enhancer_is_trained_against_the_model_with_the_adapters_so_far(tmp_path):
    for seed in (0, 1):
        torch.manual_seed(seed)
        pipe = WanPipeline.from_pretrained(toy.pipeline_path())
        model = add_lora(pipe.transformer, LoraConfig(r=2))
        with torch.no_grad():
            for name, weight in model.named_parameters():
                if "lora_B" in name:
                    weight.normal_(0, 0.2)
        (tmp_path / str(seed)).mkdir()
        save_adapter(model, tmp_path / str(seed))
    size = {"height": 32, "width": 32, "num_frames": 5, "num_inference_steps": 2, "guidance_scale": 1.0}
    enhancer = PromptEnhancer(None)

    def video(model, **options):
        reward = video_reward(model, "toy-presence", enhancer=enhancer, max_sequence_length=16, **size, **options)
        return reward.generate(["a red circle moving right"])[0]

    stacked = [str(tmp_path / "0"), str(tmp_path / "1")]
    found = video(toy.pipeline_path(), base_adapters=stacked, device="cpu")
    pipe = WanPipeline.from_pretrained(toy.pipeline_path())
    for name, source in zip(("first", "second"), stacked, strict=True):
        pipe.load_lora_weights(source, adapter_name=name)
    pipe.set_adapters(["first", "second"])
    assert (found - video(pipe)).abs().max() < 2.5 / 255  # 8 bits, and adapters that are added up in another order
    assert (found - video(toy.pipeline_path(), device="cpu")).abs().max() > 0.05
    assert (found - video(toy.pipeline_path(), base_adapters=stacked[:1], device="cpu")).abs().max() > 0.05
    with pytest.raises(ValueError, match="load them into the pipeline that you pass"):
        video(pipe, base_adapters=stacked)


# ---- All of it ----


def vidtrl_run(*options, wait=True):
    command = [sys.executable, "-m", "vidtrl.cli.main", "run", "--config", "pipeline.yaml", *options]
    if wait:
        return subprocess.run(command, env=ENV, capture_output=True, text=True)
    return subprocess.Popen(command, env=ENV, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def statuses():
    stages = json.loads(Path("out/pipeline_state.json").read_text())["stages"]
    return {name: record["status"] for name, record in stages.items()}


@pytest.mark.slow
def test_four_stages_then_again_then_one_anew(here):
    write()
    done = vidtrl_run()
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert statuses() == dict.fromkeys(("sft", "grpo", "prompt", "distill"), "finished")
    # each on the adapters before it
    configs = {name: yaml.safe_load(Path("out", name, "config.yaml").read_text()) for name in statuses()}
    assert configs["grpo"]["base_adapters"] == ["out/sft"]
    for name in ("sft", "grpo", "distill"):
        weights = load_file(Path("out", name, ADAPTER))
        assert any(v.abs().max() > 0 for n, v in weights.items() if "lora_B" in n), name
        assert {v.shape[0] for n, v in weights.items() if "lora_A" in n} == {4}
    # the student learned on what the trained enhancer writes
    rows = [json.loads(line) for line in Path("out/distill/prompts/train.jsonl").read_text().splitlines()]
    users = Path("users.txt").read_text().splitlines()
    assert [row["user_prompt"] for row in rows] == users
    assert [row["prompt"] for row in rows] == PromptEnhancer.from_pretrained("out/prompt")(users)
    # what is said at the end
    summary = done.stdout.partition("\nfinished:")[2]
    assert "eval_reward: " in summary and "rewards/video_reward/mean: " in summary and "out/generate.py" in summary
    assert "vidtrl benchmark out/distill" in summary and "2 updates" in summary and "out/report.html" in summary
    page = Path("out/report.html").read_text()
    assert all(f">{name}<" in page for name in ("SFT", "GRPO", "Prompt enhancement", "Distillation"))
    assert "Enhanced prompts</h2>" in page and "nothing to show" not in page
    for name in ("sft", "grpo", "prompt", "distill"):
        assert "accelerate.commands.launch" in Path("out/logs", f"{name}.log").read_text()
    # the program that uses it, from another folder after a move
    Path("out").rename("moved")
    program = [sys.executable, str(here / "moved" / "generate.py"), "crimson disc drifting east", "shown.mp4"]
    used = subprocess.run(program, env=ENV, capture_output=True, text=True, cwd=here)
    assert used.returncode == 0 and Path("shown.mp4").stat().st_size > 500, used.stderr[-3000:]
    student = load_student("moved/distill")
    assert student.get_active_adapters() == ["base_0", "base_1", "student"]
    Path("moved").rename("out")

    before = {name: Path("out", name, "config.yaml").stat().st_mtime_ns for name in statuses()}
    again = vidtrl_run()
    assert again.returncode == 0 and again.stdout.count("done before") == 4, again.stderr[-3000:]
    assert before == {name: Path("out", name, "config.yaml").stat().st_mtime_ns for name in statuses()}

    write(stages__distill__learning_rate=1e-3)
    refused = vidtrl_run()
    assert refused.returncode == 2 and "learning_rate was not set, is 0.001" in refused.stderr
    first = load_file(Path("out/distill", ADAPTER))
    redone = vidtrl_run("--redo", "distill")
    assert redone.returncode == 0 and redone.stdout.count("done before") == 3, redone.stderr[-3000:]
    (kept,) = Path("out/replaced").iterdir()
    assert kept.name.startswith("distill-") and all(
        torch.equal(v, first[n]) for n, v in load_file(kept / ADAPTER).items()
    )
    second = load_file(Path("out/distill", ADAPTER))
    assert any(not torch.equal(second[name], first[name]) for name in first)


def start_and_wait_for(path):
    process = vidtrl_run(wait=False)
    deadline = time.monotonic() + 240
    while not Path(path).exists():
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.05)
    return process


@pytest.mark.slow
def test_a_stopped_stage_goes_on_where_it_was(here):
    """Against an uninterrupted run, bit for bit: stopped with Ctrl-C, then with `vidtrl run` itself killed."""
    long = {"stages__sft__max_steps": 30, "shared__save_steps": 2, "shared__save_total_limit": 2}
    for name in ("grpo", "prompt", "distill"):
        long[f"stages__{name}"] = ...
    write(enhance_prompts=False, output_dir="whole", **long)
    assert vidtrl_run().returncode == 0
    write(enhance_prompts=False, **long)
    process = start_and_wait_for("out/sft/checkpoint-2")
    process.send_signal(signal.SIGINT)
    shown, err = process.communicate(timeout=120)
    assert process.returncode == 130 and "`vidtrl run --config pipeline.yaml` goes on" in err, (
        shown[-2000:],
        err[-2000:],
    )
    assert statuses() == {"sft": "interrupted"} and not Path("out/sft", ADAPTER).exists()

    reached = max(int(path.name.rpartition("-")[2]) for path in Path("out/sft").glob("checkpoint-*"))
    process = start_and_wait_for(f"out/sft/checkpoint-{reached + 2}")
    pid = json.loads(Path("out/pipeline_state.json").read_text())["stages"]["sft"]["pid"]
    os.killpg(pid, signal.SIGSTOP)  # the stage outlives who started it
    process.kill()
    process.communicate()
    refused = vidtrl_run()
    assert refused.returncode == 2, refused.stdout[-2000:]
    assert f"stage sft is running in 'out' (process group {pid})" in refused.stderr
    os.killpg(pid, signal.SIGKILL)
    time.sleep(1)
    last = vidtrl_run()
    assert last.returncode == 0 and "sft: goes on from checkpoint-" in last.stdout, last.stderr[-2000:]
    one, other = load_file(Path("whole/sft", ADAPTER)), load_file(Path("out/sft", ADAPTER))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.slow
def test_a_failing_stage_ends_the_run_and_the_next_one_mends_it(here):
    Path("my_rewards.py").write_text("def broken(videos, **kwargs):\n    raise KeyError('no such file')\n")
    short = {"stages__prompt": ..., "stages__distill": ..., "enhance_prompts": False, "stages__sft__max_steps": 1}
    write(stages__grpo__reward_funcs=["my_rewards:broken"], **short)
    failed = vidtrl_run()
    assert failed.returncode == 2, failed.stdout[-2000:] + failed.stderr[-2000:]
    assert (
        "stage grpo failed: reward function 'broken' failed" in failed.stderr and "out/logs/grpo.log" in failed.stderr
    )
    assert statuses() == {"sft": "finished", "grpo": "failed"}
    write(stages__grpo__reward_funcs=["toy-color"], **short)
    mended = vidtrl_run()
    assert mended.returncode == 0 and "sft: done before" in mended.stdout, mended.stderr[-3000:]
    assert statuses() == {"sft": "finished", "grpo": "finished"}


@pytest.mark.slow
def test_a_stage_on_two_processes(here):
    launch = {"accelerate_config": "multi_gpu", "num_processes": 2, "main_process_port": free_port()}
    write(launch=launch, stages__prompt=..., stages__distill=..., stages__grpo=..., enhance_prompts=False)
    done = vidtrl_run()
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    names = sorted(path.name for path in Path("out/sft/checkpoint-2").glob("rng_state*"))
    assert names == ["rng_state_0.pth", "rng_state_1.pth"]  # one process would write rng_state.pth
