"""Few-step students of models that predict on a VP schedule (CogVideoX, Allegro) or in reversed time (Mochi)."""

import json
import shutil
import subprocess
import sys

import pytest
import tiny_pipelines
import torch
from distill_setup import PROMPTS, distance, make_trainer, weights
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from vidtrl.inference import (
    FewStepFlowScheduler,
    FewStepVPScheduler,
    StudentConfig,
    export_student,
    load_student,
)
from vidtrl.inference.export import student_scheduler
from vidtrl.models import VideoModel
from vidtrl.rollout import few_step_rollout


STEPS = [1000, 750, 500, 250]
TABLE = torch.linspace(0.999, 0.01, 100).tolist()


def setup(family):
    pipe, call = tiny_pipelines.ALL[family]()
    pipe.set_progress_bar_config(disable=True)
    return pipe, {name: call[name] for name in ("height", "width", "num_frames")}, call


@torch.no_grad()
@pytest.mark.parametrize("shift", [1.0, 5.0])
@pytest.mark.parametrize(
    "family, sampler", [("cogvideox", "ode"), ("cogvideox", "renoise"), ("allegro", "renoise"), ("mochi", "ode")]
)
def test_the_stock_pipeline_follows_the_loop_of_training(family, sampler, shift):
    """In its own coordinates and with its own scheduler calls, to the rounding of float32."""
    pipe, size, call = setup(family)
    model = VideoModel(pipe)
    condition = model.condition("a red circle", **call)
    u = torch.tensor(STEPS) / 1000
    sigmas = model.training_sigma(u, condition.latent_shape, shift).tolist()
    noise = torch.randn(1, *condition.latent_shape, generator=torch.Generator().manual_seed(0))
    native = model.pack(noise)

    def loop(noise, seed):
        source = torch.Generator().manual_seed(seed)
        draw = lambda step: model.unpack(torch.randn(native.shape, generator=source), condition.latent_shape)  # noqa: E731
        return few_step_rollout(model, condition, noise, sigmas, sampler=sampler, draw=draw)

    expected, other = loop(noise, 5), loop(-noise, 6)
    pipe.scheduler = student_scheduler(StudentConfig("base", STEPS, shift, sampler), model.family, pipe.scheduler)
    rest = {name: value for name, value in call.items() if name not in size}
    with model.guidance(1.0) as off:
        got = pipe(
            "a red circle", latents=native, num_inference_steps=4, generator=torch.Generator().manual_seed(5),
            output_type="latent", **off, **model.call_arguments(**size, pipeline_kwargs=rest),
        ).frames  # fmt: skip
    scale = expected.abs().max()
    assert (model.unpack(got, condition.latent_shape) - expected).abs().max() < 1e-5 * scale
    assert (other - expected).abs().max() > 1e-2 * scale  # control
    assert VideoModel(pipe).sigmas(4, condition.latent_shape)[:-1].tolist() == pytest.approx(sigmas, abs=1e-6)


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.integers(0, 99), min_size=1, max_size=6, unique=True).map(lambda s: sorted(s, reverse=True)),
    st.sampled_from(["v_prediction", "epsilon"]),
    st.sampled_from(["renoise", "ode"]),
    st.integers(0, 2**31 - 1),
)
def test_a_model_that_knows_the_answer_arrives_at_it(steps, prediction, sampler, seed):
    """On the way every sample is a x0 + b e, with the one noise (ode) or new noise of unit variance (renoise)."""
    scheduler = FewStepVPScheduler(TABLE, steps, prediction, sampler)
    x0, e = torch.randn(2, 1, 4, 3, 8, 8, generator=torch.Generator().manual_seed(seed)).double()
    scheduler.set_timesteps(len(steps))
    x = None
    for i, t in enumerate(scheduler.timesteps):
        a, b = TABLE[t] ** 0.5, (1 - TABLE[t]) ** 0.5
        if x is None:
            x = a * x0 + b * e
        noise = (x - a * x0) / b
        assert noise.square().mean() == pytest.approx(e.square().mean() if sampler == "ode" else 1, abs=0.25)
        output = noise if prediction == "epsilon" else a * noise - b * x0
        x = scheduler.step(output, t, x, return_dict=False)[0]
        assert (i == len(steps) - 1) == bool((x - x0).abs().max() < 1e-3)


def test_what_the_scheduler_refuses(tmp_path):
    with pytest.raises(ValueError, match="descending timesteps of the model, 0 to 99"):
        FewStepVPScheduler(TABLE, [100, 50])
    with pytest.raises(ValueError, match="sampler must be"):
        FewStepVPScheduler(TABLE, [50], sampler="euler")
    with pytest.raises(ValueError, match="prediction_type must be"):
        FewStepVPScheduler(TABLE, [50], "flow")
    scheduler = FewStepVPScheduler(TABLE, [90, 20], "epsilon", integer_timesteps=False)
    with pytest.raises(ValueError, match="num_inference_steps=2"):
        scheduler.set_timesteps(4)
    scheduler.save_pretrained(tmp_path)
    again = FewStepVPScheduler.from_pretrained(tmp_path)
    assert all(again.config[name] == scheduler.config[name] for name in scheduler.config if name[0] != "_")
    assert torch.equal(again.timesteps, scheduler.timesteps)
    assert again.timesteps.dtype == torch.float32 and again.config.num_train_timesteps == 100


ELSEWHERE = """
import json, sys, torch
from safetensors.torch import save_file
from vidtrl.inference import load_student

torch.set_num_threads(1)
job, videos = json.loads(sys.argv[1]), {}

def sample(pipe, call, seed):
    source = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        return pipe(
            job["prompt"], generator=source, num_inference_steps=4, guidance_scale=1.0, output_type="pt", **call
        ).frames[0].contiguous()

for name, (folder, call) in job["students"].items():
    for seed in (3, 4):
        videos[f"{name}.{seed}"] = sample(load_student(folder), call, seed)

# without vidtrl, from what export_student wrote
import diffusers

for module in [name for name in sys.modules if name.partition(".")[0] == "vidtrl"]:
    del sys.modules[module]
sys.path.insert(0, job["exported"] + "/scheduler")
from few_step_flow_scheduler import FewStepVPScheduler

pipe = diffusers.CogVideoXPipeline.from_pretrained(job["base"])
pipe.load_lora_weights(job["exported"])
pipe.scheduler = FewStepVPScheduler.from_pretrained(job["exported"], subfolder="scheduler")
assert not any(name.startswith("vidtrl") for name in sys.modules)
videos["exported.3"] = sample(pipe, job["students"]["cogvideox"][1], 3)
save_file(videos, job["out"])
"""


def test_students_sample_in_a_fresh_process_as_in_the_trainer(tmp_path, cache_dir):
    videos, students = {}, {}
    for name, lora in (("cogvideox", True), ("cogvideox, all weights", False), ("mochi", True)):
        family = name.partition(",")[0]
        pipe, size, call = setup(family)
        pipe.save_pretrained(tmp_path / "pipes" / name)
        folder = str(tmp_path / "pipes" / name)
        rest = {name: value for name, value in call.items() if name not in size}
        config = {"lora": lora, "learning_rate": 1e-2 if lora else 1e-3, "max_steps": 4, **size}
        trainer = make_trainer(tmp_path / name, cache_dir, pipe=folder, pipeline_kwargs=rest, **config)
        before = weights(trainer)
        trainer.train(), trainer.save_model()
        assert distance(before, weights(trainer)) > 1e-4
        for seed in (3, 4):
            videos[f"{name}.{seed}"] = trainer.generate_videos(PROMPTS[:1], [seed])[0]
        students[name] = (str(tmp_path / name), {**call, **trainer.video_model.family.call})
    exported = tmp_path / "exported"
    export_student(students["cogvideox"][0], exported)
    videos["exported.3"] = videos["cogvideox.3"]
    job = dict(students=students, prompt=PROMPTS[0], exported=str(exported), base=str(tmp_path / "pipes/cogvideox"))
    job["out"] = str(tmp_path / "videos")
    done = subprocess.run([sys.executable, "-c", ELSEWHERE, json.dumps(job)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    found = load_file(job["out"])
    assert found.keys() == videos.keys()
    for name, video in videos.items():
        torch.testing.assert_close(found[name], video, rtol=0, atol=2e-5, msg=lambda text, n=name: f"{n}: {text}")
    for name in students:  # control: another seed
        assert (videos[f"{name}.3"] - videos[f"{name}.4"]).abs().max() > 1e-3
    shutil.rmtree(tmp_path / "cogvideox" / "scheduler")  # load_student makes it anew from the base model's table
    assert isinstance(load_student(tmp_path / "cogvideox").scheduler, FewStepVPScheduler)
    assert isinstance(load_student(tmp_path / "mochi").scheduler, FewStepFlowScheduler)


REFUSED = {
    "divides by zero for one step": ("mochi", dict(denoising_steps=[1000])),
    "meet in the whole timesteps": ("cogvideox", dict(denoising_steps=[1000, 500.4, 500])),
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_cannot_be_sampled_is_refused_before_training(tmp_path, cache_dir, message):
    family, config = REFUSED[message]
    pipe, size, _ = setup(family)
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, cache_dir, pipe=pipe, **size, **config)
