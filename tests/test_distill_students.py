"""What a distillation leaves on disk: a complete student that samples elsewhere as the trainer does, and its card."""

import json
import re
import shutil
import subprocess
import sys

import pytest
import tiny_pipelines
import torch
from distill_setup import PROMPTS, distance, make_trainer, other_size, weights
from peft import LoraConfig
from safetensors.torch import load_file
from tiny_pipelines import wan

from vidtrl import VideoGRPOTrainer
from vidtrl.hub.upload import stage
from vidtrl.inference import CausalVideoPipeline, load_student
from vidtrl.inference.distill_config import read_distill_config
from vidtrl.trainer.lora import add_lora, save_adapter


CALL = dict(height=16, width=16, num_frames=9, max_sequence_length=16)
SEEDS = [3, 4]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A pipeline on disk, and the adapter that an earlier stage left."""
    root = tmp_path_factory.mktemp("base")
    wan()[0].save_pretrained(root / "pipe")
    for number in range(2):
        model = add_lora(wan()[0].transformer, LoraConfig(r=4, lora_alpha=8))
        with torch.no_grad():
            for seed, parameter in enumerate(model.parameters()):
                if parameter.requires_grad:
                    generator = torch.Generator().manual_seed(100 * number + seed)
                    parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
        (root / f"policy{number}").mkdir()
        save_adapter(model, root / f"policy{number}")
    return root


STUDENTS = {
    "few steps": dict(),
    "ode": dict(sampler="ode", shift=5.0, ema_decay=0.9),
    "all weights": dict(lora=False, learning_rate=1e-3),
    "on policies": dict(base_adapters=["policy0", "policy1"]),
    "causal": dict(recipe="self-forcing", frames_per_block=1, window=2, context_noise=0.1),
    "causal, all weights": dict(recipe="self-forcing", frames_per_block=1, lora=False, learning_rate=1e-3),
}

ELSEWHERE = """
import json, sys, torch
from safetensors.torch import save_file
from vidtrl.inference import CausalVideoPipeline, load_student
from vidtrl.inference.distill_config import read_distill_config

torch.set_num_threads(1)
job = json.loads(sys.argv[1])
videos = {}
for name, folder in job["students"].items():
    config = read_distill_config(folder)
    pipe = (CausalVideoPipeline.from_pretrained if config.causal else load_student)(folder)
    for prompt, seed in zip(job["prompts"], job["seeds"]):
        generator = torch.Generator().manual_seed(seed)
        if config.causal:
            video = pipe(prompt, generator=generator, **job["call"])
        else:
            steps = dict(num_inference_steps=len(config.denoising_steps), guidance_scale=1.0, output_type="pt")
            with torch.no_grad():
                video = pipe(prompt, generator=generator, **steps, **job["call"]).frames[0]
        videos[f"{name}.{seed}"] = video.contiguous()
assert "vidtrl.trainer.distill_trainer" not in sys.modules
save_file(videos, job["out"])

# without vidtrl, as the page of exports says
from diffusers import WanPipeline

for module in [name for name in sys.modules if name.partition(".")[0] == "vidtrl"]:
    del sys.modules[module]
sys.path.insert(0, job["students"]["few steps"] + "/scheduler")
from few_step_flow_scheduler import FewStepFlowScheduler

pipe = WanPipeline.from_pretrained(job["base"])
pipe.load_lora_weights(job["students"]["few steps"])
pipe.scheduler = FewStepFlowScheduler.from_pretrained(job["students"]["few steps"], subfolder="scheduler")
assert not any(name.startswith("vidtrl") for name in sys.modules)
with torch.no_grad():
    generator = torch.Generator().manual_seed(job["seeds"][0])
    video = pipe(
        job["prompts"][0], num_inference_steps=4, guidance_scale=1.0, output_type="pt", generator=generator, **job["call"]
    ).frames[0]
save_file({"video": video.contiguous()}, job["out"] + ".stock")
"""


def test_students_sample_elsewhere_as_in_the_trainer(tmp_path, cache_dir, base):
    videos, folders = {}, {}
    for name, config in STUDENTS.items():
        config = {"max_steps": 4, **config}
        if "base_adapters" in config:  # that are gone afterwards
            for adapter in config["base_adapters"]:
                shutil.copytree(base / adapter, tmp_path / adapter)
            config["base_adapters"] = [str(tmp_path / adapter) for adapter in config["base_adapters"]]
        trainer = make_trainer(tmp_path / name, cache_dir, pipe=str(base / "pipe"), **config)
        before = weights(trainer)
        trainer.train(), trainer.save_model()
        assert distance(before, weights(trainer)) > 1e-3
        folders[name] = str(tmp_path / name)
        for prompt, seed in zip(PROMPTS, SEEDS, strict=False):
            videos[f"{name}.{seed}"] = trainer.generate_videos([prompt], [seed])[0]
    for adapter in ("policy0", "policy1"):
        shutil.rmtree(tmp_path / adapter)
    moved = tmp_path / "moved"
    shutil.move(folders["on policies"], moved)
    folders["on policies"] = str(moved)
    job = dict(students=folders, prompts=PROMPTS[:2], seeds=SEEDS, call=CALL, base=str(base / "pipe"))
    job["out"] = str(tmp_path / "videos")
    done = subprocess.run([sys.executable, "-c", ELSEWHERE, json.dumps(job)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    found = load_file(tmp_path / "videos")
    assert found.keys() == videos.keys()
    for name, video in videos.items():
        torch.testing.assert_close(found[name], video, rtol=0, atol=2e-5, msg=lambda text, n=name: f"{n}: {text}")
    stock = load_file(tmp_path / "videos.stock")["video"]
    torch.testing.assert_close(stock, videos[f"few steps.{SEEDS[0]}"], rtol=0, atol=2e-5)
    for name in STUDENTS:  # control: students differ by more than that
        assert (videos[f"{name}.{SEEDS[0]}"] - videos[f"{name}.{SEEDS[1]}"]).abs().max() > 1e-3


def test_files_of_checkpoints_and_of_the_student(tmp_path, cache_dir, base):
    config = dict(
        max_steps=2, save_strategy="steps", save_steps=2, base_adapters=[str(base / "policy0")], ema_decay=0.9
    )
    trainer = make_trainer(tmp_path, cache_dir, pipe=str(base / "pipe"), **config)
    trainer.train(), trainer.save_model()
    student = {
        "pytorch_lora_weights.safetensors", "distill_config.json", "scheduler", "base_adapters", "training_args.json",
    }  # fmt: skip
    for folder in (tmp_path, tmp_path / "checkpoint-2"):
        assert student <= {p.name for p in folder.iterdir()}
        assert set(load_file(folder / "pytorch_lora_weights.safetensors")) == {
            f"transformer.{n.removeprefix('base_model.model.').replace('.default', '')}" for n in weights(trainer)
        }
    assert {"roles.safetensors", "training_weights.safetensors", "optimizer.pt", "vidtrl.json"} <= {
        p.name for p in (tmp_path / "checkpoint-2").iterdir()
    }
    config = read_distill_config(tmp_path)
    assert config.base_adapters == ["base_adapters/0"] and config.shift == 3.0
    assert config.denoising_steps == [1000, 750, 500, 250] and config.base_model == str(base / "pipe")
    saved = load_file(tmp_path / "base_adapters" / "0" / "pytorch_lora_weights.safetensors")
    given = load_file(base / "policy0" / "pytorch_lora_weights.safetensors")
    assert saved.keys() == given.keys() and all(torch.equal(saved[n], given[n]) for n in saved)
    fake = load_file(tmp_path / "checkpoint-2" / "roles.safetensors")
    assert all(torch.equal(fake[f"fake.{n}"], w) for n, w in weights(trainer, "fake").items())


@pytest.mark.parametrize("name, number", [("mine", 1), ("base_0", 0)])
def test_adapters_that_a_loaded_pipeline_carries_are_saved_too(tmp_path, cache_dir, base, name, number):
    pipe = wan()[0]
    pipe.load_lora_weights(str(base / "policy0"), adapter_name=name)
    trainer = make_trainer(tmp_path, cache_dir, pipe=pipe, base_adapters=[str(base / "policy1")] * number)
    trainer.train(), trainer.save_model()
    assert trainer.policies.adapters("teacher") == (name, "base_0")[: 1 + number]
    assert read_distill_config(tmp_path).base_adapters == ["base_adapters/0", "base_adapters/1"][: 1 + number]
    reloaded = load_student(tmp_path, base_model=str(base / "pipe"))
    video = trainer.generate_videos(PROMPTS[:1], [1])[0]
    with torch.no_grad():
        again = reloaded(
            PROMPTS[0], num_inference_steps=4, guidance_scale=1.0, output_type="pt",
            generator=torch.Generator().manual_seed(1), **CALL,
        ).frames[0]  # fmt: skip
    torch.testing.assert_close(again, video, rtol=0, atol=2e-5)


# ---- Model cards ----


def snippet(folder) -> str:
    text = (folder / "README.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    return code


def run_snippet(folder, monkeypatch):
    """Run the card's code, and return the video that it would write."""
    code, written = snippet(folder), {}
    code = code.replace("torch.bfloat16", "torch.float32").replace('"cuda" if torch.cuda.is_available() else ', "")
    monkeypatch.setattr(
        "diffusers.utils.encode_video", lambda video, fps, output_path: written.update(video=video, fps=fps)
    )
    monkeypatch.chdir(folder)
    torch.manual_seed(0)
    with torch.no_grad():
        exec(compile(code, "card", "exec"), {})
    return written


@pytest.mark.parametrize("name", ["few steps", "on policies", "causal", "all weights"])
def test_the_card_s_snippet_runs(tmp_path, cache_dir, base, monkeypatch, name):
    config = dict(STUDENTS[name])
    if "base_adapters" in config:
        config["base_adapters"] = [str(base / adapter) for adapter in config["base_adapters"]]
    trainer = make_trainer(tmp_path, cache_dir, pipe=str(base / "pipe"), max_steps=1, **config)
    trainer.train(), trainer.save_model(), trainer.create_model_card()
    seen = []
    for module in ("vidtrl.inference", "vidtrl.inference.causal_pipeline"):
        monkeypatch.setattr(f"{module}.load_student", lambda *a, **k: seen.append(load_student(*a, **k)) or seen[-1])
    written = run_snippet(tmp_path, monkeypatch)
    assert len(written["video"]) == 9 and written["fps"] == 16
    if name == "on policies":
        assert seen[0].get_active_adapters() == ["base_0", "base_1", "student"]
    assert ("CausalVideoPipeline" in snippet(tmp_path)) == (name == "causal")


@pytest.mark.parametrize("lora", [True, False], ids=["lora", "full"])
def test_the_card_of_a_student_on_a_vp_schedule(tmp_path, cache_dir, monkeypatch, lora):
    pipe, call = tiny_pipelines.cogvideox()
    pipe.save_pretrained(tmp_path / "pipe")
    config = {name: call[name] for name in ("height", "width", "num_frames")}
    trainer = make_trainer(tmp_path / "run", cache_dir, pipe=str(tmp_path / "pipe"), lora=lora, max_steps=1, **config)
    trainer.train(), trainer.save_model(), trainer.create_model_card()
    written = run_snippet(tmp_path / "run", monkeypatch)
    assert len(written["video"]) == 9
    assert json.loads((tmp_path / "run/scheduler/scheduler_config.json").read_text())["denoising_steps"] == [
        999, 750, 500, 250
    ]  # fmt: skip


def test_the_card_of_another_method_loads_its_base_adapters(tmp_path, cache_dir, base, monkeypatch):
    from grpo_setup import brightness, make_args

    args = make_args(tmp_path, base_adapters=[str(base / "policy0")], max_steps=1)
    trainer = VideoGRPOTrainer(
        str(base / "pipe"), brightness, args, train_dataset=rows(), peft_config=LoraConfig(r=4, lora_alpha=8)
    )
    trainer.train(), trainer.save_model(), trainer.create_model_card()
    import diffusers

    loaded = []
    original = diffusers.WanPipeline.load_lora_weights
    monkeypatch.setattr(
        diffusers.WanPipeline,
        "load_lora_weights",
        lambda self, *a, **k: loaded.append(self) or original(self, *a, **k),
    )
    assert len(run_snippet(tmp_path, monkeypatch)["video"]) == 9
    assert loaded[0].get_active_adapters() == ["base_0", "trained"]


def rows():
    from distill_setup import dataset

    return dataset()


def test_a_push_during_training_carries_a_whole_student(tmp_path, cache_dir, base):
    config = dict(max_steps=2, save_strategy="steps", save_steps=2, base_adapters=[str(base / "policy0")])
    config |= dict(loss_type="ode_regression", teacher_steps=4)
    trainer = make_trainer(tmp_path, cache_dir, pipe=str(base / "pipe"), **config)
    trainer.train()
    trainer.create_model_card()
    pushed = tmp_path / "pushed"
    stage(tmp_path / "checkpoint-2", pushed, "me/student", page=tmp_path)  # what is uploaded
    assert (pushed / "scheduler").is_dir() and read_distill_config(pushed).base_adapters == [
        "base_adapters/0/transformer.safetensors"
    ]
    load_student(pushed)
    names = {p.name for p in pushed.iterdir()}
    assert "README.md" in names and not any("trajector" in name or name.endswith(".pt") for name in names)


def test_a_student_of_another_size_of_teacher(tmp_path, cache_dir, base):
    """Nothing of a separate teacher is in the student's files."""
    trainer = make_trainer(
        tmp_path, cache_dir, pipe=str(base / "pipe"), trainer=dict(teacher_model=other_size()), max_steps=1
    )
    trainer.train(), trainer.save_model()
    load_student(tmp_path)
    assert read_distill_config(tmp_path).base_adapters == []


def test_causal_students_reload_with_their_window(tmp_path, cache_dir, base):
    config = dict(recipe="longlive", frames_per_block=1, window=3, sink=1, stream_num_frames=5, stream_overlap=1)
    trainer = make_trainer(tmp_path, cache_dir, pipe=str(base / "pipe"), max_steps=3, **config)
    trainer.train(), trainer.save_model()
    student = CausalVideoPipeline.from_pretrained(tmp_path)
    assert (student.config.window, student.config.sink, student.config.frames_per_block) == (3, 1, 1)
    video = student(PROMPTS[0], generator=torch.Generator().manual_seed(5), **CALL)
    torch.testing.assert_close(video, trainer.generate_videos(PROMPTS[:1], [5])[0], rtol=0, atol=2e-5)
