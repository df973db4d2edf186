"""`vidtrl benchmark`, in a process of its own and, for mistakes, in this one."""

import json
import re
import subprocess
import sys

import pytest
import tiny_pipelines
from test_inference import ENV, write_adapter

from vidtrl import toy
from vidtrl.cli.main import main
from vidtrl.inference import write_distill_config


TINY = ["--height", "16", "--width", "16", "--num_frames", "13", "--torch_dtype", "float32", "--repeats", "1"]
TINY += ["--pipeline_kwargs", '{"max_sequence_length": 16}', "--prompt", "a red circle", "--device", "cpu"]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    tiny_pipelines.wan()[0].save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def student(tmp_path_factory, base):
    folder = tmp_path_factory.mktemp("student")
    write_adapter(folder, 1)
    write_distill_config(folder, base_model=base, denoising_steps=[1000, 500], shift=5.0)
    return str(folder)


@pytest.fixture(scope="module")
def causal(tmp_path_factory, base):
    folder = tmp_path_factory.mktemp("causal")
    write_adapter(folder, 1)
    write_distill_config(folder, base_model=base, denoising_steps=[1000, 500], shift=5.0, frames_per_block=2)
    return str(folder)


def runs(path):
    return json.loads(path.read_text())["runs"]


def test_the_toy_model_in_a_process_of_its_own(tmp_path):
    out = tmp_path / "results.json"
    command = [sys.executable, "-m", "vidtrl.cli.main", "benchmark", toy.pipeline_path(), "--steps", "3", "2"]
    command += ["--height", "64", "--width", "64", "--num_frames", "17", "--torch_dtype", "float32", "--device", "cpu"]
    command += ["--guidance_scale", "3", "--layerwise_casting", "float8_e4m3fn", "--repeats", "2", "--json", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, env=ENV)
    assert done.returncode == 0, done.stderr[-2000:]
    lines = done.stdout.splitlines()
    assert "17 frames of 64x64" in lines[0] and lines[1].split()[:3] == ["steps", "evaluations", "denoise"]
    assert [line.split()[:2] for line in lines[4:]] == [["optimised", "3"], ["optimised", "2"]]
    results = runs(out)
    assert [r["evaluations"] for r in results] == [6, 4, 6, 4]  # guidance doubles them
    for r in results:
        assert 0 < r["denoise_seconds"] and 0 < r["total_seconds"] and r["peak_memory"] > 50 * 2**20
    assert results[0]["psnr"] is None
    for r in results[2:]:
        assert 15 < r["psnr"] < 80 and 0.9 < r["cosine"] < 1
    arguments = json.loads(out.read_text())["arguments"]
    assert arguments["layerwise_casting"] == "float8_e4m3fn" and arguments["steps"] == [3, 2]


def test_a_student_brings_its_steps_and_guidance(tmp_path, student):
    assert main(["benchmark", student, *TINY, "--fuse_lora", "--json", str(tmp_path / "a.json")]) == 0
    plain, fused = runs(tmp_path / "a.json")
    assert plain["evaluations"] == fused["evaluations"] == plain["num_inference_steps"] == 2
    assert fused["psnr"] is None or fused["psnr"] > 80  # the same function up to rounding


def test_a_causal_student_is_measured_with_its_cache(tmp_path, causal):
    assert main(["benchmark", causal, *TINY, "--vae_slicing", "--json", str(tmp_path / "a.json")]) == 0
    assert [r["evaluations"] for r in runs(tmp_path / "a.json")] == [5, 5]  # 2 blocks of 2 steps, and one to remember


def test_adapters_are_stacked(tmp_path, base, student):
    for name, lora in (("plain", []), ("lora", ["--lora", student, student])):
        assert main(["benchmark", base, *TINY, "--steps", "2", *lora, "--json", str(tmp_path / f"{name}.json")]) == 0
    assert runs(tmp_path / "lora.json")[0]["evaluations"] == 4  # WanPipeline's default has guidance


@pytest.mark.parametrize(
    "model, options, message",
    [
        ("./nowhere", ["--steps", "2"], "nothing at './nowhere'"),
        ("base", [], "--steps is needed"),
        ("base", ["--steps", "0"], "--steps must be positive"),
        ("base", ["--steps", "2", "--lora", "./nowhere"], "--lora: there is nothing at './nowhere'"),
        ("base", ["--steps", "2", "--repeats", "0"], "at least 1"),
        ("base", ["--steps", "2", "--json", "nowhere/a.json"], "no directory"),
        ("base", ["--steps", "2", "--num_frames", "12"], "nearest is 13"),
        ("base", ["--steps", "2", "--pipeline_kwargs", "{"], "--pipeline_kwargs is not JSON"),
        ("base", ["--steps", "2", "--pipeline_kwargs", '{"max_length": 1}'], "did you mean|no argument 'max_length'"),
        ("base", ["--steps", "2", "--attention_backend", "flash"], "'flash' cannot be used"),
        ("base", ["--steps", "2", "--layerwise_casting", "fp8"], "try float8_e4m3fn"),
        ("base", ["--steps", "2", "--cache", "TeaCache"], "diffusers has .*FirstBlockCacheConfig"),
        ("base", ["--steps", "9", "--cache", "FirstBlockCacheConfig", "--cache_kwargs", '{"x": 1}'], "--cache_kwargs"),
        ("base", ["--steps", "4", "--cache", "FirstBlockCacheConfig"], "4 steps are too far apart"),
        ("base", ["--steps", "2", "--quantization", "{}"], "--quantization"),
        ("student", ["--steps", "4"], "2 steps and no guidance"),
        ("student", ["--lora", "base"], "leave out --lora"),
        ("causal", ["--num_frames", "17"], "do not divide into blocks"),
        ("causal", ["--cache", "FirstBlockCacheConfig"], "2 steps are too far apart"),
    ],
)
def test_mistakes_are_one_line(request, capsys, model, options, message):
    model = model if model.startswith(".") else request.getfixturevalue(model)
    options = [request.getfixturevalue("base") if o == "base" else o for o in options]
    assert main(["benchmark", model, *TINY, *options]) == 2
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("vidtrl: error:")]
    assert len(error) == 1
    assert re.search(message, error[0]), error
