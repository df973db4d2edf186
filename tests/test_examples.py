"""The recipes in examples/: their files, their settings, and each one's smoke run through `accelerate launch`."""

import os
import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pandas
import pytest
import torch
import yaml
from safetensors.torch import load_file

from vidtrl import toy
from vidtrl.cli.errors import UserError
from vidtrl.cli.grpo import resolve_reward


EXAMPLES = Path(__file__).parent.parent / "examples"
COMMANDS = {  # the command that takes the recipe's file as it is
    "sft_lora_wan": "sft",
    "sft_wan22_a14b": "sft",
    "i2v_lora_wan": "sft",
    "grpo_flash_wan": "grpo",
    "grpo_multi_reward_vlm": "grpo",
    "diffusion_nft_wan": "grpo",
    "distill_4_steps_wan": "distill",
    "self_forcing_wan": "distill",
    "prompt_enhancer": "prompt",
}
SCRIPTS = [*COMMANDS, "joint_prompt_video"]
RECIPES = [*SCRIPTS, "four_stages_wan"]  # whose run.sh starts `vidtrl run`
HERE = [
    "--output_dir",
    "out",
    "--use_cpu",
    "True",
    "--bf16",
    "False",
    "--report_to",
    "none",
]  # a machine without a GPU
ENV = {**os.environ, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
ADAPTER = "pytorch_lora_weights.safetensors"
CALL = {"height": 64, "width": 64, "num_frames": 17, "max_sequence_length": 16, "num_inference_steps": 2}


def parse(recipe, *options, file="config.yaml", command=None):
    command = command or COMMANDS[recipe]
    parser = import_module(f"vidtrl.cli.{command}").make_parser()
    options = [*(HERE if command != "prompt" else []), *options]
    return parser.parse_args_and_config(["--config", str(EXAMPLES / recipe / file), *options])


# ---- Files ----


def test_every_recipe_is_here():
    folders = {path.name for path in EXAMPLES.iterdir() if path.is_dir() and path.name != "__pycache__"}
    assert folders == set(RECIPES)
    assert not list(EXAMPLES.glob("*.yaml"))


@pytest.mark.parametrize("recipe", RECIPES)
def test_files(recipe):
    folder = EXAMPLES / recipe
    assert all((folder / name).is_file() for name in ("README.md", "config.yaml", "train.py", "run.sh"))
    script = (folder / "train.py").read_text()
    assert len(script.splitlines()) <= 150 and "smoke" not in script  # the smoke run is the script itself
    run = (folder / "run.sh").read_text()
    assert ("launch train.py --config" if recipe in SCRIPTS else "vidtrl.cli.main run --config") in run
    assert os.access(folder / "run.sh", os.X_OK)
    subprocess.run(["bash", "-n", str(folder / "run.sh")], check=True)
    # a copy of the folder lacks what the recipes share: the README has the plain line
    assert "accelerate launch train.py --config config.yaml" in (folder / "README.md").read_text()
    comments = [line for line in (folder / "config.yaml").read_text().splitlines() if "#" in line]
    assert len(comments) > 8  # why a value is what it is


@pytest.mark.parametrize("recipe", RECIPES)
def test_commands_and_links_of_the_readme(recipe):
    """What a README tells to type names files and options that exist."""
    folder, text = EXAMPLES / recipe, (EXAMPLES / recipe / "README.md").read_text()
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", text):
        assert target.startswith("http") or (folder / target).exists(), target
    lines = [line for block in re.findall(r"```bash\n(.*?)```", text, re.DOTALL) for line in block.splitlines()]
    assert lines
    for line in lines:
        words = line.split("#")[0].split()
        for option, value in zip(words, words[1:], strict=False):
            if option in ("--config", "bash") or value.endswith(".py"):
                assert (folder / value).is_file(), line
        if words[:1] == ["vidtrl"] and words[1] in ("sft", "grpo", "distill"):
            parse(recipe, *words[4:], file=words[3], command=words[1])
        assert not re.match(r"vidtrl (?!sft|grpo|distill|prompt|estimate|run|reward-server)", line), line


def test_the_index_names_every_recipe():
    page = (EXAMPLES.parent / "docs" / "examples.md").read_text()
    for recipe in RECIPES:
        assert f"examples/{recipe}" in page, recipe


# ---- Settings ----


@pytest.mark.parametrize("recipe", COMMANDS)
def test_settings(recipe, tmp_path, monkeypatch):
    """The command's own parser takes the file; a misspelt key would be an error."""
    script, *rest = parse(recipe)
    assert script.model_name_or_path and script.dataset_name or script.pairs_dataset_name
    if COMMANDS[recipe] != "prompt":
        training, lora = rest[:2]
        assert lora.use_peft and training.num_frames % 4 == 1 and training.gradient_checkpointing
        videos = training.per_device_train_batch_size * training.gradient_accumulation_steps
        assert videos % getattr(training, "num_generations", 1) == 0
    bad = tmp_path / "config.yaml"
    bad.write_text((EXAMPLES / recipe / "config.yaml").read_text().replace("seed: 42", "sede: 42"))
    with pytest.raises(UserError, match="unknown key 'sede' in the config file; did you mean seed"):
        import_module(f"vidtrl.cli.{COMMANDS[recipe]}").make_parser().parse_args_and_config(["--config", str(bad)])
    # rewards exist, those of train.py among them; nobody serves at the judge's address
    monkeypatch.chdir(EXAMPLES / recipe)
    monkeypatch.setattr(sys, "path", [str(EXAMPLES / recipe), *sys.path])
    sys.modules.pop("train", None)
    for name in getattr(script, "reward_funcs", None) or []:
        assert name.startswith("http") or resolve_reward(name)
    sys.modules.pop("train", None)


def test_settings_that_the_recipes_are_about():
    _, training, *_ = parse("sft_wan22_a14b")
    assert training.experts == "both"
    _, training, lora, *_ = parse("grpo_flash_wan")
    assert (training.sde_schedule, training.timestep_weighting, training.guidance_scale) == ("single", "tgr", 4.5)
    assert (lora.lora_r, lora.lora_alpha, training.num_frames) == (16, 32, 81)
    script, training, *_ = parse("grpo_multi_reward_vlm")
    assert script.reward_funcs[0].startswith("http://127.0.0.1:") and len(script.reward_funcs) == 4
    assert len(training.reward_weights) == 4
    _, training, *_ = parse("diffusion_nft_wan")
    assert (training.loss_type, training.guidance_scale, training.learning_rate) == ("nft", 1.0, 3e-4)
    _, training, *_ = parse("distill_4_steps_wan")
    assert training.rollout == "backward_simulation" and len(training.denoising_steps) == 4
    script, training, lora, *_ = parse("self_forcing_wan")
    assert (training.rollout, training.frames_per_block) == ("self_forcing", 3)
    assert (training.learning_rate, training.fake_learning_rate, training.shift) == (1e-4, 2e-5, 5.0)
    # the student starts from the adapter that the first step leaves
    _, causal, causal_lora, *_ = parse("self_forcing_wan", file="causal_sft.yaml", command="sft")
    assert (
        yaml.safe_load((EXAMPLES / "self_forcing_wan/causal_sft.yaml").read_text())["output_dir"]
        == training.init_adapter
    )
    assert causal.causal == "teacher_forcing" and causal.frames_per_block == training.frames_per_block
    assert (causal_lora.lora_r, causal_lora.lora_alpha) == (lora.lora_r, lora.lora_alpha)


def test_sections_of_the_joint_recipe():
    """Its file is read by its script alone: what it hands to three configurations must be theirs."""
    import trl

    from vidtrl import VideoGRPOConfig

    config = yaml.safe_load((EXAMPLES / "joint_prompt_video" / "config.yaml").read_text())
    cpu = {"use_cpu": True, "bf16": False, "report_to": "none"}
    trl.SFTConfig("out", **config["sft"] | cpu)
    assert trl.GRPOConfig("out", **config["grpo"] | cpu).generation_batch_size == 8
    shape = {name: config[name] for name in ("height", "width", "num_frames", "num_inference_steps", "guidance_scale")}
    assert VideoGRPOConfig("out", **shape | config["video"] | cpu).num_generations == 8
    script = (EXAMPLES / "joint_prompt_video" / "train.py").read_text()
    for key in config:
        assert f"args.{key}" in script or f'"{key}"' in script, key


def test_the_reward_of_the_judged_recipe(monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES / "grpo_multi_reward_vlm")
    sys.modules.pop("train", None)
    no_cuts = import_module("train").no_cuts
    sys.modules.pop("train")
    steady = toy.render("a red square moving up") / 255
    cut = torch.cat([steady[:8], 1 - steady[8:]])
    assert no_cuts(["a", "b"], [steady, cut]) == [1.0, 0.0]


# ---- Launches ----


@pytest.fixture
def launched(tmp_path):
    """Runs a run.sh with a Python that prints what `accelerate launch` would get; returns one list for each launch."""
    python = tmp_path / "python"
    python.write_text(
        '#!/usr/bin/env bash\nif [ "${2:-}" = accelerate.commands.launch ]; then shift 2; printf "[%s]" "$@"; echo\n'
        f'elif [[ "${{2:-}}" == *device_count* ]]; then echo 2\nelse exec {sys.executable} "$@"; fi\n'
    )
    python.chmod(0o755)

    def run(recipe, *options, **env):
        command = ["bash", str(EXAMPLES / recipe / "run.sh"), *options]
        env = {**ENV, "PYTHON": str(python), **env}
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        return [line[1:-1].split("][") for line in done.stdout.splitlines() if line.startswith("[--config_file")]

    return run


def test_a_recipe_is_launched_on_every_device(launched):
    import vidtrl

    (words,) = launched("i2v_lora_wan", "--max_steps", "3 4")
    file = str(Path(vidtrl.__file__).parent / "accelerate_configs" / "multi_gpu.yaml")
    script = ["train.py", "--config", "./config.yaml", "--max_steps", "3 4"]
    assert words == ["--config_file", file, "--num_processes", "2", *script]
    (words,) = launched(
        "grpo_multi_reward_vlm", NO_JUDGE="1", ACCELERATE_CONFIG="mine.yaml"
    )  # the last one is the judge's
    assert words == ["--config_file", "mine.yaml", "--num_processes", "1", "train.py", "--config", "./config.yaml"]


def test_a_recipe_of_two_steps_launches_both(launched, tmp_path):
    first, second = launched("self_forcing_wan", "--smoke", "made", "--max_steps", "1", SMOKE_PROCESSES="2")
    folder = tmp_path / "made"
    assert first[2:] == [
        "--num_processes", "2", "--main_process_port", "0",
        "--module", "vidtrl.cli.sft", "--config", str(folder / "causal_sft.yaml"),
    ]  # fmt: skip
    assert second[6:] == ["train.py", "--config", str(folder / "config.yaml"), "--max_steps", "1"]
    assert (folder / "causal_sft.yaml").is_file() and (folder / "config.yaml").is_file()


# ---- Smoke runs ----


def smoke(recipe, folder, processes=1):
    """`bash run.sh --smoke`: what it printed, the settings that it ran with, and where its output is."""
    command = ["bash", str(EXAMPLES / recipe / "run.sh"), "--smoke", str(folder)]
    done = subprocess.run(
        command,
        env={**ENV, "SMOKE_PROCESSES": str(processes)},
        capture_output=True,
        text=True,
        timeout=600,
        cwd=folder,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert f"processes: {processes}," in done.stdout  # `accelerate launch` has started as many as it was asked for
    return done.stdout, yaml.safe_load((folder / "config.yaml").read_text()), folder / "out"


def changes_samples(pipe, folder, name=ADAPTER, **kwargs) -> bool:
    """Whether stock diffusers takes the adapter, and what it then generates is finite and different."""
    image = kwargs.pop("image", {})
    call = {**CALL, **image, "output_type": "latent", "guidance_scale": 1.0}
    sample = lambda: pipe(prompt="a red circle moving up", **call, generator=torch.Generator().manual_seed(0)).frames  # noqa: E731
    before = sample()
    pipe.load_lora_weights(str(folder), weight_name=name, **kwargs)
    after = sample()
    return bool(torch.isfinite(after).all()) and not torch.equal(before, after)


def toy_pipe():
    from diffusers import WanPipeline

    return WanPipeline.from_pretrained(toy.pipeline_path())


def test_smoke_sft(tmp_path):
    """Two processes."""
    _, config, out = smoke("sft_lora_wan", tmp_path, processes=2)
    assert config["max_steps"] == 2 and config["lora_r"] == 32  # everything else is the recipe's
    assert changes_samples(toy_pipe(), out)


@pytest.mark.slow
def test_smoke_two_experts(tmp_path):
    from diffusers import WanPipeline

    said, config, out = smoke("sft_wan22_a14b", tmp_path)
    assert "for transformer and transformer_2" in said
    pipe = WanPipeline.from_pretrained(config["model_name_or_path"])
    assert changes_samples(pipe, out, ADAPTER.replace(".", "_high_noise."))
    assert pipe.transformer_2 is not None and pipe.config.boundary_ratio == 0.875
    low = {"load_into_transformer_2": True, "adapter_name": "low"}
    assert changes_samples(pipe, out, ADAPTER.replace(".", "_low_noise."), **low)


@pytest.mark.slow
def test_smoke_image_to_video(tmp_path):
    from diffusers import WanImageToVideoPipeline
    from PIL import Image

    _, config, out = smoke("i2v_lora_wan", tmp_path)
    pipe = WanImageToVideoPipeline.from_pretrained(config["model_name_or_path"])
    assert changes_samples(pipe, out, image={"image": Image.new("RGB", (64, 64), "white")})


def test_smoke_flash_grpo(tmp_path):
    """Two processes."""
    said, _, out = smoke("grpo_flash_wan", tmp_path, processes=2)
    assert "videos an update: 8" in said and list((out / "completions").iterdir())
    assert changes_samples(toy_pipe(), out)


@pytest.mark.slow
def test_smoke_diffusion_nft(tmp_path):
    _, _, out = smoke("diffusion_nft_wan", tmp_path)
    assert changes_samples(toy_pipe(), out)


@pytest.mark.slow
def test_smoke_judged_grpo(tmp_path):
    """A judge in a process of its own scores every video, and is gone afterwards."""
    from vidtrl.rewards import RewardUnavailable, get_reward

    said, config, out = smoke("grpo_multi_reward_vlm", tmp_path)
    address = config["reward_funcs"][0]
    assert f"Serving get_judge on {address}" in said
    scores = pandas.read_parquet(next((out / "completions").glob("*.parquet")))
    assert len(scores) == 4 and scores["get_judge"].between(0, 1).all() and scores["get_judge"].nunique() > 1
    assert {"motion-magnitude", "temporal-smoothness", "no_cuts"} < set(scores.columns)
    with pytest.raises(RewardUnavailable):
        get_reward(address).check()
    assert changes_samples(toy_pipe(), out)


def test_smoke_distillation(tmp_path):
    """Two processes; the student is sampled by the stock pipeline in its four steps."""
    from vidtrl import load_student

    _, _, out = smoke("distill_4_steps_wan", tmp_path, processes=2)
    pipe = load_student(str(out))
    call = {**CALL, "num_inference_steps": 4, "guidance_scale": 1.0, "output_type": "pt"}
    assert type(pipe).__name__ == "WanPipeline" and pipe("a red circle moving up", **call).frames.shape[1] == 17
    assert changes_samples(toy_pipe(), out)


@pytest.mark.slow
def test_smoke_self_forcing(tmp_path):
    from vidtrl import CausalVideoPipeline

    _, config, out = smoke("self_forcing_wan", tmp_path)
    first, student = load_file(Path(config["init_adapter"]) / ADAPTER), load_file(out / ADAPTER)
    assert first.keys() == student.keys() and any(not torch.equal(first[name], student[name]) for name in first)
    pipe = CausalVideoPipeline.from_pretrained(str(out))
    call = {name: value for name, value in CALL.items() if name != "num_inference_steps"}
    assert pipe("a red circle moving up", **call).shape == (17, 3, 64, 64)


@pytest.mark.slow
def test_smoke_prompt_enhancer(tmp_path):
    from vidtrl.prompts import PromptEnhancer

    said, _, out = smoke("prompt_enhancer", tmp_path)
    assert "done: sft" in said and "done: grpo" in said
    assert isinstance(PromptEnhancer.from_pretrained(out)("please make something red, a coin"), str)


@pytest.mark.slow
def test_smoke_joint(tmp_path):
    from vidtrl.prompts import PromptEnhancer

    done = subprocess.run(
        ["bash", str(EXAMPLES / "joint_prompt_video" / "run.sh"), "--smoke", str(tmp_path)],
        env=ENV, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    assert len(re.findall(r"round \d, (?:prompts|video): reward", done.stdout)) == 4
    assert isinstance(PromptEnhancer.from_pretrained(tmp_path / "out" / "enhancer")("a red coin"), str)
    pipe = toy_pipe()
    for number in range(2):
        pipe.load_lora_weights(str(tmp_path / "out" / f"round-{number}" / "video"), adapter_name=f"round-{number}")
    pipe.set_adapters(["round-0", "round-1"])


def test_smoke_plan_of_four_stages(tmp_path):
    command = ["bash", str(EXAMPLES / "four_stages_wan" / "run.sh"), "--smoke", str(tmp_path), "--dry-run"]
    done = subprocess.run(command, env=ENV, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-4000:]
    assert f"4 stages, in {tmp_path / 'out'}" in done.stdout and "missing" not in done.stdout
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_smoke_stage_of_four(tmp_path):
    """One of them, as run.sh starts each: a process of its own under `accelerate launch`. All four: test_cli_run.py."""
    command = ["bash", str(EXAMPLES / "four_stages_wan" / "run.sh"), "--smoke", str(tmp_path), "--stages", "sft"]
    done = subprocess.run(command, env=ENV, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert "accelerate.commands.launch" in (tmp_path / "out" / "logs" / "sft.log").read_text()
    assert not (tmp_path / "out" / "grpo").exists() and changes_samples(toy_pipe(), tmp_path / "out" / "sft")


@pytest.mark.slow
def test_smoke_four_stages_in_one_job(tmp_path):
    from vidtrl import load_student
    from vidtrl.prompts import PromptEnhancer

    folder, config = EXAMPLES / "four_stages_wan", tmp_path / "config.yaml"
    small = [sys.executable, str(EXAMPLES / "smoke.py"), "config.yaml", str(config)]
    subprocess.run(small, env=ENV, check=True, capture_output=True, timeout=600, cwd=folder)
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "1", "--cpu", "train.py"]
    said = []
    for _ in range(2):
        command = [*launch, "--config", str(config)]
        done = subprocess.run(command, env=ENV, capture_output=True, text=True, timeout=600, cwd=folder)
        assert done.returncode == 0, done.stderr[-4000:]
        said.append(re.findall(r"^(?:processes: 1, done: )?(\w+)(?:: done before)?$", done.stdout, re.MULTILINE))
        assert done.stdout.count(": done before") == (4 if len(said) == 2 else 0)
    assert said[0] == said[1] == ["sft", "grpo", "prompt", "distill"]
    assert load_student(str(tmp_path / "out" / "distill")).get_active_adapters() == ["base_0", "base_1", "student"]
    assert isinstance(PromptEnhancer.from_pretrained(tmp_path / "out" / "prompt")("a red coin"), str)
