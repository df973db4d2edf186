"""The `vidtrl` command: options and config files, error messages and exit codes, launching, and a training run."""

import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny_pipelines
import torch
import yaml
from huggingface_hub.errors import LocalTokenNotFoundError

from vidtrl.cli.errors import Interrupted, UserError, guarded
from vidtrl.cli.launch import launch_command, shipped_configs, split_launch_options
from vidtrl.cli.main import COMMANDS, main
from vidtrl.cli.sft import LoraArguments, QuantizationArguments, load_split, make_parser, resume_hint, resume_point
from vidtrl.toy import write_dataset


ENV = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    tiny_pipelines.wan()[0].save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    return write_dataset(tmp_path_factory.mktemp("clips"), num_clips=8)


@pytest.fixture
def config(tmp_path, base, clips):
    """A complete config file; returns a function that writes it with changes."""

    def write(**changes):
        values = {
            "model_name_or_path": str(base),
            "dataset_name": str(clips),
            "use_peft": True,
            "lora_r": 4,
            "learning_rate": "1e-3",
            "use_cpu": True,
            "height": 16,
            "width": 16,
            "num_frames": 9,
            "max_sequence_length": 16,
            "output_dir": str(tmp_path / "out"),
            "cache_dir": str(tmp_path / "cache"),
            "gradient_checkpointing": False,
            "check_model": False,
            "max_steps": 2,
            "save_steps": 1,
            "logging_steps": 1,
            "report_to": "none",
        }
        path = tmp_path / "sft.yaml"
        path.write_text(yaml.safe_dump({k: v for k, v in (values | changes).items() if v is not ...}))
        return str(path)

    return write


def vidtrl(*args, **kwargs):
    """The command in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "vidtrl.cli.main", *map(str, args)], capture_output=True, text=True, env=ENV, **kwargs
    )


# ---- Options and config files ----


def parse(*args):
    return make_parser().parse_args_and_config([str(a) for a in args])


def test_config_file_gives_defaults_and_the_command_line_wins(config):
    path = config(lora_target_modules=["to_q", "to_k"], shift=3, validation_prompts=["-1 circles", "a 'b' \"c\""])
    script, training, lora, _, launch = parse("--config", path, "--lora_r", "16", "--check_model", "--no_cache")
    assert (lora.lora_r, lora.use_peft, training.learning_rate, training.use_cpu) == (16, True, 1e-3, True)
    assert training.shift == 3.0 and training.height == 16 and training.gradient_checkpointing is False
    assert lora.lora_target_modules == ["to_q", "to_k"] and launch.accelerate_config is None
    assert training.validation_prompts == ["-1 circles", "a 'b' \"c\""]
    assert script.dataset_train_split == "train" and training.check_model is True and training.cache is False


def test_config_file_may_hold_dicts_nulls_and_environment(config, monkeypatch):
    monkeypatch.setenv("VIDTRL_TEST_VARIABLE", "before")
    path = config(pipeline_kwargs={"max_sequence_length": 8}, model_init_kwargs='{"a": 1}', height=None)
    text = Path(path).read_text() + "env:\n  VIDTRL_TEST_VARIABLE: after\n"
    Path(path).write_text(text)
    _, training, *_ = parse("--config", path)
    assert training.pipeline_kwargs == {"max_sequence_length": 8} and training.model_init_kwargs == {"a": 1}
    assert training.height is None and os.environ["VIDTRL_TEST_VARIABLE"] == "after"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"learning_rat": 1}, "unknown key 'learning_rat' in the config file; did you mean learning_rate?"),
        ({"zzz": 1}, "unknown key 'zzz' in the config file; --help lists all of them"),
        ({"lora_r": "big"}, "lora_r"),
        ({"lora_r": 2.5}, "invalid int value: '2.5'"),  # argparse itself would take a float default as it is
        ({"sigma_sampling": "cosine"}, "invalid choice: 'cosine'"),
        ({"use_peft": "perhaps"}, "use_peft"),
        ({"use_peft": False}, "lora_r is set, but all weights would be trained: add --use_peft"),
        ({"caption_dropout": 2}, "caption_dropout is a probability"),
        ({"lora_dropout": 1.0}, "lora_dropout must lie in"),
        ({"load_in_4bit": True, "load_in_8bit": True}, "choose one of"),
    ],
)
def test_mistakes_in_the_config_file(config, change, message):
    with pytest.raises(UserError) as error:
        parse("--config", config(**change))
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--lora_alfa", "4"], "unknown option --lora_alfa; did you mean --lora_alpha?"),
        (["--max_step", "4"], "unknown option --max_step; did you mean --max_steps?"),  # no abbreviations
        (["--lora_r=x"], "invalid int value: 'x'"),
        (["stray"], "unexpected argument 'stray'"),
        (["--config", "missing.yaml"], "config file 'missing.yaml' does not exist"),
        (["--config"], "--config needs the path"),
        (["--lora_r", "8"], "add --use_peft"),
    ],
)
def test_mistakes_on_the_command_line(args, message):
    with pytest.raises(UserError) as error:
        parse(*args)
    assert message in str(error.value)


def test_broken_yaml_is_a_users_mistake(tmp_path):
    for text, message in (("a: [1", "is not valid YAML"), ("- a\n- b\n", "must contain a YAML mapping")):
        (tmp_path / "c.yaml").write_text(text)
        with pytest.raises(UserError, match=message):
            parse(f"--config={tmp_path / 'c.yaml'}")


# command line -> what its one line on stderr has: the mistake, and what mends it
MISTAKES = {
    "sft --learning_rat 1": "did you mean --learning_rate?",
    "grpo --num_generation 4": "did you mean --num_generations?",
    "distill --recip dmd2": "did you mean --recipe?",
    "prompt --languag en": "did you mean --language?",
    "run --confg a.yaml": "did you mean --config?",
    "run --config a.yaml --dry_run": "did you mean --dry-run?",
    "check-model --hight 64": "did you mean --height?",
    "estimate --lora_alfa 8": "no trainer has the option --lora_alfa; did you mean lora_alpha?",
    "benchmark --step 4": "did you mean --steps?",
    "report --outptu a": "did you mean --output?",
    "compare --prot 1": "did you mean --port?",
    "reward-server --rewrad a": "did you mean --reward?",
    "push a me/x --privat": "did you mean --private?",
    "pull me/x --revison a": "did you mean --revision?",
    "export a b --formt lora": "did you mean --format?",
    "demo --seeds 1": "did you mean --seed?",
    "env --nothing": "unknown option --nothing; --help",
    "sft --config missing.yaml": "'missing.yaml' does not exist",
    "run --config missing.yaml": "'missing.yaml' does not exist",
    "prompt --config broken.yaml": "'broken.yaml' is not valid YAML",
    "grpo --config bytes.yaml": "'bytes.yaml' is not valid YAML: 'utf-8'",
    "estimate --config bytes.yaml": "'bytes.yaml' is not valid YAML: 'utf-8'",
    "distill --config list.yaml": "must contain a YAML mapping",
    "sft --config grpo.yaml": "'num_generations' in the config file; it is a setting of vidtrl grpo",
    "distill --config sft.yaml": "'caption_dropout' in the config file; it is a setting of vidtrl sft",
    "prompt --config run.yaml": "'stages' in the config file; it is a setting of vidtrl run",
    "run --config sft.yaml": "unknown key caption_dropout; known are model",
    "sft --num_train_epochs many": "invalid float value: 'many'",
    "benchmark a --height tall": "invalid int value: 'tall'",
    "estimate --trainer sft --num_processes two": "--num_processes is a number of devices, not 'two'",
    "grpo --recipe flow-grp": "(choose from 'flash-grpo', 'flow-grpo'",
    "estimate --recipe flow-grp": "no recipe 'flow-grp': flash-grpo",
    "reward-server --reward toy-colr": "Did you mean 'toy-color'?",
    "check-model broken.yaml": "is a file; pass the directory",
    "check-model missing": "No such directory: 'missing'",
    "report missing": "give the output directory of a trainer",
    "compare missing other": "give a folder of mp4 files",
    "push missing me/x": "give what a trainer's save_model wrote",
    "export missing a --format comfyui": "'missing'",
}


def test_every_command_has_a_mistake_in_the_list():
    assert {line.split()[0] for line in MISTAKES} == set(COMMANDS)


@pytest.mark.parametrize("line", MISTAKES)
def test_a_mistake_ends_in_one_line_that_mends_it(line, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("broken.yaml").write_text("a: [1,\n")
    Path("bytes.yaml").write_bytes(b"\xff\xfe\x00")
    Path("list.yaml").write_text("- 1\n")
    Path("grpo.yaml").write_text("num_generations: 4\n")
    Path("sft.yaml").write_text("caption_dropout: 0.1\n")
    Path("run.yaml").write_text("stages: {}\n")
    assert main(line.split()) == 2
    out, err = capsys.readouterr()
    said = [text for text in err.splitlines() if text.startswith("vidtrl: error: ")]
    assert len(said) == 1 and MISTAKES[line] in said[0] and "Traceback" not in err and out == ""


def test_lora_arguments_become_a_peft_config():
    config = LoraArguments(use_peft=True, lora_r=8, lora_alpha=16, lora_dropout=0.1, use_dora=True).peft_config()
    assert (config.r, config.lora_alpha, config.lora_dropout, config.use_dora) == (8, 16, 0.1, True)
    assert config.task_type is None and config.target_modules is None
    assert LoraArguments().peft_config() is None and QuantizationArguments().quantization_config() is None


def test_quantisation_covers_both_denoisers():
    mapping = QuantizationArguments(load_in_8bit=True).quantization_config().quant_mapping
    assert set(mapping) == {"transformer", "transformer_2"} and mapping["transformer"].load_in_8bit


@pytest.mark.parametrize(
    ("name", "split", "message"),
    [
        ("./nowhere", "train", "dataset folder './nowhere' does not exist"),
        (__file__, "train", "is a file; give the folder"),
        (None, "nosplit", 'Unknown split "nosplit"'),
    ],
)
def test_dataset_mistakes(clips, name, split, message):
    script_args = type("Arguments", (), dict(dataset_config=None, dataset_streaming=False))()
    script_args.dataset_name = name or str(clips)
    with pytest.raises(UserError, match=message):
        load_split(script_args, split)


def test_dataset_splits_may_be_slices(clips):
    script_args = type("Arguments", (), dict(dataset_config=None, dataset_streaming=False, dataset_name=str(clips)))()
    assert len(load_split(script_args, "train[:75%]")) == 6 and len(load_split(script_args, "train[75%:]")) == 2


# ---- Errors and exit codes ----


def raise_here(error):
    raise error


def test_users_errors_are_one_line_and_bugs_keep_their_traceback(capsys):
    assert guarded(lambda argv: raise_here(UserError("a mistake\n  over two lines")), []) == 2
    assert capsys.readouterr().err == "vidtrl: error: a mistake over two lines\n"
    # a ValueError of vidtrl's own code speaks to the user, one from elsewhere (here: from this file) is a bug
    from vidtrl.toy import render

    assert guarded(lambda argv: render("a dog"), []) == 2
    out = capsys.readouterr().err
    assert out.startswith("vidtrl: error: cannot draw 'a dog'") and out.count("\n") == 1
    assert guarded(lambda argv: raise_here(ValueError("a bug")), []) == 1
    assert "Traceback" in capsys.readouterr().err
    assert guarded(lambda argv: raise_here(UserError("a mistake")), ["--debug"]) == 2
    assert "Traceback" in capsys.readouterr().err
    assert guarded(lambda argv: raise_here(Interrupted("go on so")), []) == 130
    assert capsys.readouterr().err == "\ninterrupted: go on so\n"
    for error, message in (
        (OSError(errno.ENOSPC, "No space left on device", "/data/x"), "the disk is full (/data/x)"),
        (torch.OutOfMemoryError("tried to allocate"), "--load_in_4bit"),
        (LocalTokenNotFoundError("no token"), "no token"),
    ):
        assert guarded(lambda argv, error=error: raise_here(error), []) == 2
        out = capsys.readouterr().err
        assert message in out and out.count("\n") == 1
    assert guarded(lambda argv: raise_here(OSError(errno.EIO, "bad disk")), []) == 1
    assert guarded(lambda argv: None, []) == 0 and guarded(lambda argv: 1, []) == 1


def test_help_is_fast_and_loads_nothing_heavy():
    code = (
        "import sys\nfrom vidtrl.cli.main import main\n"
        "try:\n    main(['--help'])\nfinally:\n    heavy = {'torch', 'diffusers', 'transformers', 'trl'} & set(sys.modules)\n"
        "    assert not heavy, heavy"
    )
    before = os.times()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    after = os.times()
    assert done.returncode == 0, done.stderr
    assert all(command in done.stdout for command in COMMANDS)
    # processor time: other tests may keep it waiting
    assert after.children_user + after.children_system - before.children_user - before.children_system < 1.0


def test_unknown_command_exits_with_two(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["sfft"])
    assert stop.value.code == 2 and "invalid choice: 'sfft'" in capsys.readouterr().err


def test_env_prints_versions_and_no_secret(capsys, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secretsecret")
    assert main(["env"]) == 0
    out = capsys.readouterr().out
    assert "torch: 2" in out and "diffusers: 0" in out and "Accelerator: " in out
    assert "hf_secret" not in out and str(Path.home()) not in out


# ---- check-model ----


def test_check_model_passes_and_fails_with_its_exit_code(base, tmp_path, capsys):
    sizes = ["--height", "16", "--width", "16", "--num_frames", "9"]
    sizes += ["--pipeline_kwargs", '{"max_sequence_length": 16}', "--device", "cpu"]
    assert main(["check-model", str(base), *sizes]) == 0
    assert "oracle" in capsys.readouterr().out.lower()
    damaged = tiny_pipelines.wan()[0]
    damaged.transformer.proj_out.weight.data.fill_(float("nan"))
    damaged.save_pretrained(tmp_path / "damaged")
    assert main(["check-model", str(tmp_path / "damaged"), *sizes]) == 1
    assert main(["check-model", str(tmp_path / "nothing")]) == 2
    assert main(["check-model", str(base), "--pipeline_kwargs", "{"]) == 2
    assert "is not JSON" in capsys.readouterr().err
    assert main(["check-model", str(base), "--height", "17", "--width", "16", "--num_frames", "9"]) == 2
    assert "nearest" in capsys.readouterr().err


# ---- Launching ----


def test_shipped_accelerate_configs_are_valid():
    from accelerate.commands.config.config_args import load_config_from_file

    assert shipped_configs() == ["fsdp2", "multi_gpu", "single", "zero2", "zero3"]
    for name in shipped_configs():
        command = launch_command("vidtrl.cli.sft", {"accelerate_config": name, "num_processes": "2"}, [])
        path = next(part.split("=", 1)[1] for part in command if part.startswith("--config_file="))
        load_config_from_file(path)


def test_launch_options_come_from_both_places(config, tmp_path):
    path = config(accelerate_config="fsdp2", num_processes=4)
    options, rest = split_launch_options(["--config", path, "--num-processes", "2", "--lora_r", "8"])
    assert options == {"accelerate_config": "fsdp2", "num_processes": "2"}
    assert rest == ["--config", path, "--lora_r", "8"]
    command = launch_command("vidtrl.cli.sft", options, rest)
    assert command[-6:] == ["--module", "vidtrl.cli.sft", "--config", path, "--lora_r", "8"]
    assert "--num_processes=2" in command
    parse("--config", path)  # the ranks know the options and ignore them
    with pytest.raises(UserError, match="neither a file nor one of fsdp2"):
        launch_command("m", {"accelerate_config": "fsdp9"}, [])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["multi_gpu", "fsdp2"])
def test_two_processes_train_together(config, name):
    path = config(max_steps=1)
    done = vidtrl("sft", "--config", path, "--accelerate_config", name, "--num_processes", "2")
    assert done.returncode == 0, done.stderr[-3000:]
    checkpoint = Path(yaml.safe_load(Path(path).read_text())["output_dir"]) / "checkpoint-1"
    # one process would write rng_state.pth
    assert sorted(f.name for f in checkpoint.glob("rng_state*")) == ["rng_state_0.pth", "rng_state_1.pth"]
    # and one that shards nothing optimizer.pt
    assert [f.name for f in checkpoint.glob("optimizer*")] == ["optimizer.bin" if name == "fsdp2" else "optimizer.pt"]


# ---- Training ----


def test_sft_trains_saves_and_resumes(config, tmp_path, capsys):
    path = config()
    assert main(["sft", "--config", path]) == 0
    out = tmp_path / "out"
    assert (out / "pytorch_lora_weights.safetensors").is_file() and (out / "checkpoint-2").is_dir()
    assert main(["sft", "--config", path, "--max_steps", "3", "--resume_from_checkpoint", "latest"]) == 0
    assert "resuming from" in capsys.readouterr().out
    state = json.loads((out / "checkpoint-3" / "trainer_state.json").read_text())
    assert state["global_step"] == 3 and [e["step"] for e in state["log_history"] if "loss" in e] == [1, 2, 3]


def test_users_mistakes_of_the_trainer_are_one_line(config, capsys):
    for change, message in (
        ({"num_frames": 8}, "nearest"),
        ({"lora_target_modules": ["no_such_layer"]}, "no_such_layer"),
        ({"model_name_or_path": "./no-model"}, "no-model"),
        ({"dataset_name": ...}, "--dataset_name is required"),
    ):
        assert main(["sft", "--config", config(**change)]) == 2, change
        err = [line for line in capsys.readouterr().err.splitlines() if line.startswith("vidtrl: error: ")]
        assert len(err) == 1 and message in err[0], (change, err)


def test_resume_point_and_hint(tmp_path):
    args = type("Arguments", (), dict(output_dir=str(tmp_path), process_index=0, resume_from_checkpoint=None))()
    assert resume_point(args) is None and "no checkpoint was written" in resume_hint(str(tmp_path))
    for spelling, expected in (("true", True), ("False", None), ("latest", None), ("out/checkpoint-1",) * 2):
        args.resume_from_checkpoint = spelling
        assert resume_point(args) == expected
    (tmp_path / "checkpoint-7").mkdir()
    args.resume_from_checkpoint = "latest"
    assert resume_point(args) == str(tmp_path / "checkpoint-7")
    assert resume_hint(str(tmp_path)).endswith(f"goes on from {tmp_path / 'checkpoint-7'}")


def test_ctrl_c_exits_130_with_a_hint(config, tmp_path):
    path = config(max_steps=100_000)
    process = subprocess.Popen(
        [sys.executable, "-m", "vidtrl.cli.main", "sft", "--config", path],
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


def test_example_config_parses():
    example = Path(__file__).parents[1] / "examples" / "sft_lora_wan" / "config.yaml"
    script, training, lora, *_ = parse("--config", example, "--bf16", "false", "--use_cpu")
    assert script.dataset_train_split == "train[:95%]" and lora.use_peft
    assert (training.height, training.width, training.num_frames, training.learning_rate) == (480, 832, 81, 1e-4)
