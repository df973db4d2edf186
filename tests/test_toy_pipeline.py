"""The shipped pipeline: small, loadable by stock diffusers, good through its VAE, and with headroom as a base model."""

from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKLWan, WanPipeline, WanTransformer3DModel
from transformers import UMT5EncoderModel

from vidtrl import check_model, toy


CAPTIONS = toy.captions()


@pytest.fixture(scope="module")
def pipe():
    pipe = WanPipeline.from_pretrained(toy.pipeline_path())
    pipe.set_progress_bar_config(disable=True)
    return pipe


def sample(pipe, prompts, seed=0, **kwargs):
    call = dict(height=64, width=64, num_frames=17, num_inference_steps=20, guidance_scale=3.0, output_type="pt")
    return list(pipe(prompts, generator=torch.Generator().manual_seed(seed), **(call | kwargs)).frames.float())


def test_is_small_and_stock(pipe):
    files = [f for f in Path(toy.pipeline_path()).rglob("*") if f.is_file()]
    assert sum(f.stat().st_size for f in files) <= 12e6
    assert all(f.suffix in (".json", ".safetensors") for f in files)
    assert isinstance(pipe.transformer, WanTransformer3DModel) and isinstance(pipe.vae, AutoencoderKLWan)
    assert isinstance(pipe.text_encoder, UMT5EncoderModel)
    assert 1e6 <= sum(p.numel() for p in pipe.transformer.parameters()) <= 4e6


def test_passes_check_model():
    report = check_model(toy.pipeline_path(), max_sequence_length=16)
    assert report.ok, str(report)


@pytest.mark.parametrize("quality", ["clean", "raw"])
def test_attributes_survive_the_vae(pipe, quality):
    clips = [toy.render(c, quality, seed=7 * 10**8 + i) / 255 for i, c in enumerate(CAPTIONS)]
    x = torch.stack(clips).permute(0, 2, 1, 3, 4) * 2 - 1
    with torch.no_grad():
        y = torch.cat([pipe.vae.decode(pipe.vae.encode(p).latent_dist.mode()).sample for p in x.split(12)])
    seen = toy.score(list((y.clamp(-1, 1) / 2 + 0.5).permute(0, 2, 1, 3, 4)), CAPTIONS)
    assert seen["color"] == seen["direction"] == seen["present"] == 1.0, seen
    assert seen["shape"] >= 0.95, seen
    if quality == "clean":
        assert seen["flicker"] < 0.03, seen
    else:
        assert seen["flicker"] > 0.06, seen


def test_base_follows_prompts_with_headroom_and_flickers(pipe):
    videos = [v for i in range(0, 72, 12) for v in sample(pipe, CAPTIONS[i : i + 12], seed=i, max_sequence_length=16)]
    seen = toy.score(videos, CAPTIONS)
    assert seen["present"] >= 0.97 and seen["color"] >= 0.85 and seen["direction"] >= 0.85, seen
    assert 0.35 <= seen["all"] <= 0.85, seen  # 72 clips: the interval stated in docs/toy.md, widened by sampling error
    assert seen["flicker"] > 0.04, seen
    wrong = toy.score(videos, CAPTIONS[41:] + CAPTIONS[:41])
    assert wrong["all"] < 0.05, wrong


def test_the_default_number_of_text_tokens_works_too(pipe):
    seen = toy.score(sample(pipe, CAPTIONS[::6]), CAPTIONS[::6])  # 512 tokens, nearly all of them padding
    assert seen["present"] >= 0.9 and seen["color"] >= 0.75, seen
