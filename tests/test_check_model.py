"""Every family passes; every deliberately broken row is caught."""

from dataclasses import replace

import diffusers
import pytest
import tiny_pipelines
import torch

from vidtrl.models import FAMILIES, VideoModel, check_model
from vidtrl.models.families import find_family


BROKEN = {  # name -> (pipeline, change of its row)
    "sign": ("wan", dict(sign=-1)),
    "sign, mochi": ("mochi", dict(sign=1)),
    "normalisation, mean and std": ("wan", dict(normalize=False)),
    "normalisation, buffers": ("ltx", dict(normalize=False)),
    "normalisation, scaling factor": ("hunyuan", dict(normalize=False)),
    "layout, wan": ("wan", dict(layout="BFCHW")),
    "layout, cogvideox": ("cogvideox", dict(layout="BCFHW")),
    "layout, kandinsky5": ("kandinsky5", dict(layout="BFCHW")),
    "layout, ltx": ("ltx", dict(layout="BCFHW")),
    "pixels in [0, 1]": ("wan", dict(pixel_range=(0.0, 1.0))),
    "pixels in [0, 1], cogvideox": ("cogvideox", dict(pixel_range=(0.0, 1.0))),
    "timestep": ("wan", dict(timestep="clean")),
    "sigma grid": ("mochi", dict(grid="uniform")),
    "dynamic shift": ("ltx", dict(mu=None)),
    "wrong dynamic shift": ("ltx", dict(mu=1.0)),
    "flow map timestep": ("anyflow", dict(tie_to_timestep=())),
    "negative prompt": ("sana", dict(negative_call={})),
}


@pytest.mark.parametrize("name", tiny_pipelines.ALL)
def test_every_family_agrees_with_its_stock_pipeline(name):
    pipe, call = tiny_pipelines.ALL[name]()
    report = check_model(pipe, **call)
    assert report.ok, str(report)
    for row in report.rows:
        assert row.check.startswith("gradient") or row.value <= 1e-4
    checks = [row.check for row in report.rows]
    for wanted in (
        "oracle, latents",
        "parity, guidance 1",
        "parity, guidance 3",
        "per-sample sigma",
        "gradient, transformer",
    ):
        assert wanted in checks


def linear_shift():
    return diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, time_shift_type="linear")


def cogvideox_dpm():
    pipe, _ = tiny_pipelines.cogvideox()
    return diffusers.CogVideoXDPMScheduler.from_config(pipe.scheduler.config)


OTHER_SCHEDULERS = {
    "wan, UniPC": ("wan", lambda: tiny_pipelines.flow_unipc(5.0)),
    "wan, DPM": (
        "wan",
        lambda: diffusers.DPMSolverMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=5.0
        ),
    ),
    "ltx, static shift": ("ltx", lambda: diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)),
    "motif, linear time shift": ("motif", linear_shift),
    "cogvideox, DPM": ("cogvideox", cogvideox_dpm),
    "allegro, Euler ancestral": ("allegro", lambda: diffusers.EulerAncestralDiscreteScheduler()),
    "allegro, Euler ancestral, fractional timesteps": (
        "allegro",
        lambda: diffusers.EulerAncestralDiscreteScheduler(timestep_spacing="linspace", num_train_timesteps=999),
    ),
}


@pytest.mark.parametrize("name", OTHER_SCHEDULERS)
def test_other_schedulers_of_a_family(name):
    pipeline, scheduler = OTHER_SCHEDULERS[name]
    pipe, call = tiny_pipelines.ALL[pipeline]()
    pipe.scheduler = scheduler()
    report = check_model(pipe, **call)
    assert report.ok, str(report)


def test_every_row_has_a_tiny_pipeline():
    built = {type(build()[0]).__name__ for build in tiny_pipelines.ALL.values()}
    assert built == {name for family in FAMILIES for name in family.pipelines}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_row_is_caught(name):
    pipeline, change = BROKEN[name]
    pipe, call = tiny_pipelines.ALL[pipeline]()
    model = VideoModel(pipe, family=replace(find_family(type(pipe).__name__), **change))
    report = check_model(model, **call)
    assert not report.ok, str(report)
    with pytest.raises(ValueError, match="FAILED"):
        report.raise_if_failed()


@pytest.mark.parametrize(("pipeline", "prediction"), [("cogvideox", "epsilon"), ("allegro", "v_prediction")])
def test_wrong_prediction_type_is_caught_twice(pipeline, prediction):
    pipe, call = tiny_pipelines.ALL[pipeline]()
    row = find_family(type(pipe).__name__)
    with pytest.raises(ValueError, match="prediction_type"):  # the scheduler already contradicts the row
        VideoModel(pipe, family=replace(row, prediction=prediction))
    model = VideoModel(pipe)
    model.family = replace(row, prediction=prediction)  # and the oracle sees it without the scheduler's help
    report = check_model(model, **call)
    assert not next(r for r in report.rows if r.check == "oracle, latents").ok


class FirstSigmaOnly(diffusers.WanTransformer3DModel):
    """A denoiser that is silently wrong for mixed noise levels."""

    def forward(self, hidden_states, timestep, **kwargs):
        return super().forward(hidden_states, timestep[:1].expand_as(timestep), **kwargs)


def test_per_sample_sigma_claim_is_checked():
    pipe, call = tiny_pipelines.wan()
    pipe.transformer = tiny_pipelines.tiny_wan_transformer(cls=FirstSigmaOnly)
    failed = [row.check for row in check_model(pipe, **call).rows if not row.ok]
    assert failed == ["per-sample sigma"]
    honest = VideoModel(pipe, family=replace(find_family("WanPipeline"), per_sample_sigma=False))
    report = check_model(honest, **call)
    assert report.ok and "per-sample sigma" not in [row.check for row in report.rows]


def test_dead_denoiser_is_caught():
    pipe, call = tiny_pipelines.wan()
    with torch.no_grad():
        pipe.transformer.proj_out.weight.zero_()
        pipe.transformer.patch_embedding.weight.fill_(float("nan"))
    failed = [row.check for row in check_model(pipe, **call).rows if not row.ok]
    assert "gradient, transformer" in failed and "parity, guidance 1" in failed


def test_report_reads_well_and_sizes_are_chosen():
    pipe, _ = tiny_pipelines.wan()
    report = check_model(pipe, max_sequence_length=16)
    text = str(report)
    assert "WanPipeline" in text and "9 frames, 64x80" in text and text.endswith("agree with the stock pipeline.")
    report.raise_if_failed()


def test_without_a_text_encoder():
    pipe, call = tiny_pipelines.wan()
    generator = torch.Generator().manual_seed(0)
    embeds, negative = (torch.randn(1, 7, 32, generator=generator) for _ in range(2))
    pipe.register_modules(text_encoder=None, tokenizer=None)
    size = {k: v for k, v in call.items() if k != "max_sequence_length"}
    report = check_model(pipe, prompt=None, prompt_embeds=embeds, negative_prompt_embeds=negative, **size)
    assert report.ok, str(report)


def test_default_sizes_of_special_checkpoints():
    parts, scheduler = tiny_pipelines._cogvideox_parts(
        attention_head_dim=16, use_rotary_positional_embeddings=True, use_learned_positional_embeddings=True
    )
    pipe = diffusers.CogVideoXPipeline(**parts, scheduler=diffusers.CogVideoXDDIMScheduler(**scheduler))
    report = check_model(pipe, max_sequence_length=16)
    assert report.ok and "9 frames, 16x16" in report.title
    pipe, _ = tiny_pipelines.kandinsky5()
    assert VideoModel(pipe).pixel_multiple == 16
    pipe.transformer.register_to_config(attention_type="nabla")  # blocks of 8 x 8 tokens
    assert VideoModel(pipe).pixel_multiple == 128


def test_timestep_conditioned_decoder():
    """LTX 0.9.1 and later: vae.decode takes a timestep."""
    pipe, call = tiny_pipelines.ltx()
    config = {**pipe.vae.config, "timestep_conditioning": True}
    pipe.register_modules(vae=diffusers.AutoencoderKLLTXVideo.from_config(config).eval())
    report = check_model(pipe, **call)
    assert report.ok, str(report)


def test_two_experts_with_an_image():
    pipe, call = tiny_pipelines.wan_i2v()
    parts = {k: v for k, v in pipe.components.items() if k != "transformer_2"}
    low = tiny_pipelines.tiny_wan_transformer((36, 16), seed=1)
    pipe = diffusers.WanImageToVideoPipeline(**parts, transformer_2=low, boundary_ratio=0.9)
    report = check_model(pipe, **call)
    assert report.ok and "gradient, transformer_2" in [row.check for row in report.rows], str(report)


def test_model_is_left_as_it_was():
    pipe, call = tiny_pipelines.wan()
    pipe.transformer.train()
    pipe.transformer.requires_grad_(False)
    pipe.transformer.proj_out.weight.requires_grad_(True)
    before = {k: v.clone() for k, v in pipe.transformer.state_dict().items()}
    scheduler, attributes = pipe.scheduler, set(vars(pipe))
    random_state = torch.get_rng_state()
    check_model(pipe, **call)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert pipe.transformer.training and pipe.scheduler is scheduler
    assert [n for n, p in pipe.transformer.named_parameters() if p.requires_grad] == ["proj_out.weight"]
    assert all(torch.equal(v, before[k]) for k, v in pipe.transformer.state_dict().items())
    assert all(p.grad is None for p in pipe.transformer.parameters())
    assert not pipe.transformer._forward_pre_hooks and "forward" not in vars(pipe.transformer)
    assert "decode" not in vars(pipe.vae) and "progress_bar" not in set(vars(pipe)) - attributes


@pytest.mark.parametrize("name", ["wan", "wan22", "hunyuan15", "cogvideox", "mochi", "kandinsky5"])
def test_bfloat16(name, tmp_path):
    pipe, call = tiny_pipelines.ALL[name]()
    for part in ("transformer", "transformer_2"):  # reloading keeps the modules in float32 that must be
        if pipe.components.get(part) is not None:
            component = pipe.components[part]
            component.save_pretrained(tmp_path / part)
            reloaded = type(component).from_pretrained(tmp_path / part, torch_dtype=torch.bfloat16)
            pipe.register_modules(**{part: reloaded})
    for part in ("text_encoder", "text_encoder_2", "vae"):
        if pipe.components.get(part) is not None:
            pipe.components[part].to(torch.bfloat16)
    report = check_model(pipe, **call)
    assert report.ok, str(report)
    wrong = VideoModel(pipe)
    wrong.family = replace(wrong.family, sign=-wrong.family.sign)
    assert not check_model(wrong, **call).ok  # the wider limit still tells right from wrong


@pytest.mark.parametrize("name", ["pixels in [0, 1]", "flow map timestep", "negative prompt", "wrong dynamic shift"])
def test_subtle_errors_show_in_bfloat16_too(name):
    pipeline, change = BROKEN[name]
    pipe, call = tiny_pipelines.ALL[pipeline]()
    for part in ("transformer", "text_encoder", "vae"):
        pipe.components[part].to(torch.bfloat16)
    assert check_model(pipe, **call).ok
    assert not check_model(VideoModel(pipe, family=replace(find_family(type(pipe).__name__), **change)), **call).ok


def test_under_autocast():
    pipe, call = tiny_pipelines.wan()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        report = check_model(pipe, **call)
    assert report.ok and report.rows[0].limit == 0.1, str(report)


def test_invalid_sizes_and_arguments_are_errors():
    pipe, call = tiny_pipelines.wan()
    with pytest.raises(ValueError, match="nearest is 9"):
        check_model(pipe, **dict(call, num_frames=10))
    with pytest.raises(ValueError, match="did you mean 'max_sequence_length'"):
        check_model(pipe, max_sequence_lenght=16)
