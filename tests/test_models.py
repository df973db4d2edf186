"""VideoModel, Condition and sampling on tiny pipelines."""

import functools
import json
from dataclasses import replace
from pathlib import Path

import diffusers
import pytest
import tiny_pipelines
import torch
from diffusers import AdaptiveProjectedGuidance, DDIMScheduler, DiffusionPipeline
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from vidtrl.diffusion import flow
from vidtrl.models import FAMILIES, UNSUPPORTED, Condition, VideoModel
from vidtrl.models.families import find_family
from vidtrl.rollout import sample


PROMPTS = ["a red circle", "a blue square moves left slowly up the video"]
NAMES = list(tiny_pipelines.ALL)


def build(name="wan"):
    pipe, call = tiny_pipelines.ALL[name]()
    return VideoModel(pipe), call


build_once = functools.cache(build)


@pytest.fixture(scope="module")
def wan():
    return build("wan")


def noise(model, batch, shape, seed=0):
    return torch.randn(batch, *shape, generator=torch.Generator().manual_seed(seed))


def two_conditions(model, call):
    call = dict(call)
    image = call.pop("image", None)
    return model.condition(PROMPTS, image=None if image is None else [image] * 2, **call)


def equal(a, b):
    return len(a) == len(b) and all(
        x.keys() == y.keys() and all(torch.equal(x[k], y[k]) for k in x)
        for x, y in zip(a.samples, b.samples, strict=True)
    )


@pytest.mark.parametrize("name", NAMES)
def test_conditions_batch_store_and_train(name, tmp_path):
    model, call = build(name)
    both = two_conditions(model, call)
    shape = both.latent_shape
    x, sigma = noise(model, 2, shape), torch.tensor([0.6, 0.3] if model.boundary is None else [0.6, 0.5])
    assert model.per_sample_sigma
    with torch.no_grad():
        batch = model.velocity(x, sigma, both)
        single = [model.velocity(x[i : i + 1], float(sigma[i]), both[i]) for i in range(2)]
    assert batch.dtype == torch.float32 and batch.shape == x.shape
    torch.testing.assert_close(batch, torch.cat(single), atol=1e-5, rtol=1e-4)

    # different prompts give different answers, in the right order
    with torch.no_grad():
        swapped = model.velocity(x, sigma, both[[1, 0]])
    assert (swapped - batch).abs().max() > 1e-5 * batch.abs().max()

    # through a file and back, exactly
    tensors, meta = both.state()
    save_file(tensors, tmp_path / "condition.safetensors")
    loaded = Condition.from_state(load_file(tmp_path / "condition.safetensors"), json.loads(json.dumps(meta)))
    assert equal(both, loaded)
    with torch.no_grad():
        assert torch.equal(model.velocity(x, sigma, loaded), batch)

    # one training step: the gradient reaches the denoiser and the loss falls on this batch
    denoiser = model.denoisers[model.expert(0.5)]
    optimizer = torch.optim.SGD(denoiser.parameters(), lr=1e-3)
    x0, eps = noise(model, 2, shape, 1), noise(model, 2, shape, 2)

    def loss():
        velocity = model.velocity(flow.add_noise(x0, eps, 0.5), 0.5, both)
        return (velocity - flow.velocity_target(x0, eps)).square().mean()

    before = loss()
    before.backward()
    gradients = [p.grad.norm() for p in denoiser.parameters() if p.grad is not None]
    assert gradients and all(g.isfinite() for g in gradients) and max(gradients) > 0
    optimizer.step()
    assert loss() < before


@pytest.mark.parametrize("name", ["wan", "wan22", "ltx", "cogvideox", "mochi", "hunyuan15"])
def test_decode_inverts_normalisation_and_sizes_agree(name):
    model, call = build(name)
    size = call["num_frames"], call["height"], call["width"]
    shape = model.latent_shape(*size)
    video = torch.rand(2, call["num_frames"], 3, call["height"], call["width"])
    mean, std = model.encode(video)
    assert mean.shape == std.shape == (2, *shape) and mean.dtype == std.dtype == torch.float32 and (std > 0).all()
    torch.testing.assert_close(model.normalize(model.denormalize(mean)), mean, atol=1e-5, rtol=1e-4)
    # a list of clips, one at a time, and chunked decoding give the same
    torch.testing.assert_close(model.encode([video[1]])[0], mean[1:], atol=1e-5, rtol=1e-4)
    together, chunked = model.decode(mean), model.decode(mean, chunk_size=1)
    for a, b in zip(together, chunked, strict=True):
        assert a.shape == video[0].shape and a.dtype == torch.float32 and 0 <= a.min() and a.max() <= 1
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


def test_posterior_std_is_in_normalised_units():
    model, call = build("hunyuan")
    video = torch.rand(1, call["num_frames"], 3, call["height"], call["width"])
    posterior = model.pipe.vae.encode((video * 2 - 1).transpose(1, 2)).latent_dist
    torch.testing.assert_close(model.encode(video)[1], posterior.std * model.pipe.vae.config.scaling_factor)


def test_sample_equals_the_stock_pipeline(wan):
    """FlowMatchEuler is first order, so here our latents are the pipeline's own, guidance included."""
    model, call = wan
    latents = noise(model, 2, model.latent_shape(9, 16, 16))
    condition, negative = model.condition(PROMPTS, **call), model.condition("slowly", negative=True, **call)
    own = sample(model, condition, negative, guidance_scale=4.0, num_inference_steps=5, latents=latents)
    stock = model.pipe(
        prompt=PROMPTS,
        negative_prompt="slowly",
        latents=latents,
        guidance_scale=4.0,
        num_inference_steps=5,
        output_type="latent",
        **call,
    ).frames
    torch.testing.assert_close(own, stock, atol=1e-5, rtol=1e-5)
    unguided = sample(model, condition, num_inference_steps=5, latents=latents)
    assert (unguided - stock).abs().max() > 1e-3


def test_sample_arguments(wan):
    model, call = wan
    condition = model.condition(PROMPTS, **call)
    seeds = [torch.Generator().manual_seed(s) for s in (1, 2)]
    x = sample(model, condition, num_inference_steps=2, generator=seeds)
    alone = sample(model, condition[1], num_inference_steps=2, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(x[1:], alone, atol=1e-5, rtol=1e-5)
    steps = []
    sample(model, condition, num_inference_steps=3, callback=lambda i, latents: steps.append((i, latents.shape)))
    assert steps == [(i, x.shape) for i in range(3)]
    with pytest.raises(ValueError, match="negative_condition"):
        sample(model, condition, guidance_scale=3.0, num_inference_steps=2)
    with pytest.raises(ValueError, match="latents must have shape"):
        sample(model, condition, num_inference_steps=2, latents=torch.zeros(1))
    with pytest.raises(ValueError, match="generators"):
        sample(model, condition, num_inference_steps=2, generator=seeds[:1])


def test_condition_slices_and_joins(wan):
    model, call = wan
    both = model.condition(PROMPTS, **call)
    assert len(both) == 2 and len(both[0]) == 1 and len(both[:1]) == 1 and len(both[[1, 1, 0]]) == 3
    assert equal(Condition.cat([both[0], both[1]]), both)
    assert equal(both, model.condition(PROMPTS, **call))  # deterministic
    with pytest.raises(ValueError, match="one bucket"):
        Condition.cat([both, model.condition("a cat", **dict(call, height=32))])
    ltx, call = build("ltx")
    with pytest.raises(ValueError, match="rope_interpolation_scale"):
        Condition.cat([ltx.condition("a cat", fps=fps, **call) for fps in (8, 16)])
    moved = both.to("cpu", torch.bfloat16)
    assert moved.samples[0]["encoder_hidden_states"].dtype == torch.bfloat16
    assert equal(Condition.cat([moved[0], both[1]]), moved)


def test_state_trims_padding_only():
    model, call = build("wan")
    condition = model.condition("a red circle", **call)
    tensors, meta = condition.state()
    assert tensors["0.encoder_hidden_states"].shape[1] == 4  # three words and the end mark, of 16
    assert meta["padded"] == {"0.encoder_hidden_states": 16}
    with pytest.raises(ValueError, match="rebuild the cache"):
        Condition.from_state(tensors, dict(meta, format=0))
    empty = model.condition("", **call)
    assert equal(Condition.from_state(*empty.state()), empty)


def test_text_length_default_is_the_pipelines_own():
    model, call = build("wan")
    call = {k: v for k, v in call.items() if k != "max_sequence_length"}
    assert model.condition("a cat", **call).samples[0]["encoder_hidden_states"].shape[1] == 512


def test_embedded_guidance_is_one():
    model, call = build("hunyuan")
    assert model.condition("a cat", **call).samples[0]["guidance"].tolist() == [1000.0]


@pytest.mark.parametrize("name", ["wan_i2v", "wan22_ti2v_i2v", "ltx_i2v"])
def test_image_condition_matters_and_given_frames_stay(name):
    model, call = build(name)
    other = dict(call, image=call["image"].transpose(0))
    a, b = model.condition("a cat", **call), model.condition("a cat", **other)
    x = noise(model, 1, a.latent_shape)
    with torch.no_grad():
        assert (model.velocity(x, 0.5, a) - model.velocity(x, 0.5, b)).abs().max() > 1e-4
    if "fixed_mask" in a.samples[0]:
        fixed = a.samples[0]["fixed_mask"].expand(x.shape) > 0
        clean = sample(model, a, num_inference_steps=3, latents=x)
        torch.testing.assert_close(clean[fixed], a.samples[0]["fixed_latents"][fixed], atol=1e-5, rtol=1e-5)
        assert bool(fixed.any()) and not bool(fixed.all())
    with pytest.raises(ValueError, match="needs an image"):
        model.condition("a cat", **{k: v for k, v in call.items() if k != "image"})


def test_image_for_a_text_model_is_an_error(wan):
    model, call = wan
    with pytest.raises(ValueError, match="takes no image"):
        model.condition("a cat", image=tiny_pipelines.tiny_image(16), **call)


@given(st.integers(1, 300), st.integers(1, 300), st.integers(1, 300))
@settings(max_examples=20, deadline=None)
def test_nearest_size_is_valid_and_nearest(frames, height, width):
    for name in ("wan", "mochi", "allegro"):
        model, _ = build_once(name)
        n, (h, w) = model.nearest_frames(frames), model.nearest_size(height, width)
        model.latent_shape(n, h, w)  # valid
        valid = [v for v in range(1, 400) if (v - model.frame_offset) % model.frame_multiple == 0 and v >= 1]
        assert abs(n - frames) == min(abs(v - frames) for v in valid)
        m = model.pixel_multiple
        assert abs(h - height) == min(abs(k * m - height) for k in range(1, 30))
        if n != frames:
            with pytest.raises(ValueError, match=f"the nearest is {n}"):
                model.latent_shape(frames, h, w)
        if w != width:
            with pytest.raises(ValueError, match=f"the nearest is {h}x{w}"):
                model.latent_shape(n, h, width)


def test_unknown_pipeline_arguments(wan):
    model, call = wan
    with pytest.raises(ValueError, match="did you mean 'max_sequence_length'"):
        model.condition("a cat", 16, 16, 9, max_sequence_lenght=16)
    with pytest.raises(ValueError, match="output_type cannot be given"):
        model.condition("a cat", output_type="pt", **call)
    with pytest.raises(ValueError, match="2 prompts and 1 images"):
        model.condition(PROMPTS, image=[None], **call)


def test_errors_of_the_pipeline_pass_through_and_hooks_are_gone():
    model, call = build("wan")
    attributes = set(vars(model.pipe))
    with pytest.raises(ValueError, match="callback_on_step_end_tensor_inputs"):  # WanPipeline.check_inputs' own
        model.condition("a cat", callback_on_step_end_tensor_inputs=["nonsense"], **call)
    assert not model.pipe.transformer._forward_pre_hooks
    assert set(vars(model.pipe)) == attributes and "progress_bar" not in attributes
    model.condition("a cat", **call)
    assert not model.pipe.transformer._forward_pre_hooks


def test_experts_and_boundary():
    model, call = build("wan22")
    assert model.boundary == 0.875
    assert [model.expert(s) for s in (1.0, 0.875, 0.8749, 0.1)] == ["transformer"] * 2 + ["transformer_2"] * 2
    condition = model.condition(PROMPTS, **call)
    x = noise(model, 2, condition.latent_shape)
    with torch.no_grad():
        low = model.velocity(x, 0.5, condition)
        assert torch.equal(low, model.velocity(x, 0.5, condition, denoiser=model.denoisers["transformer_2"]))
        assert not torch.equal(low, model.velocity(x, 0.5, condition, denoiser=model.denoisers["transformer"]))
        model.velocity(x, torch.tensor([0.9, 0.95]), condition)
    with pytest.raises(ValueError, match="both experts"):
        model.velocity(x, torch.tensor([0.9, 0.5]), condition)


def test_one_sigma_per_batch_where_the_row_says_so():
    pipe, call = tiny_pipelines.wan()
    model = VideoModel(pipe, family=replace(find_family("WanPipeline"), per_sample_sigma=False))
    condition = model.condition(PROMPTS, **call)
    x = noise(model, 2, condition.latent_shape)
    model.velocity(x, torch.tensor([0.5, 0.5]), condition)
    with pytest.raises(ValueError, match="one sigma per batch"):
        model.velocity(x, torch.tensor([0.5, 0.6]), condition)
    with pytest.raises(ValueError, match="2 latents but 3 conditions"):
        model.velocity(x, 0.5, condition[[0, 0, 1]])


def test_one_condition_serves_a_group(wan):
    model, call = wan
    condition = model.condition("a cat", **call)
    x = noise(model, 3, condition.latent_shape)
    with torch.no_grad():
        torch.testing.assert_close(model.velocity(x, 0.5, condition), model.velocity(x, 0.5, condition[[0, 0, 0]]))


class Wrapper(torch.nn.Module):  # what DDP does to a module: forward only, no attributes
    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, *args, **kwargs):
        return self.module(*args, **kwargs)


def test_wrapped_and_peft_denoisers():
    model, call = build("wan")
    condition = model.condition(PROMPTS, **call)
    x = noise(model, 2, condition.latent_shape)
    plain = model.velocity(x, 0.5, condition)
    torch.testing.assert_close(model.velocity(x, 0.5, condition, denoiser=Wrapper(model.pipe.transformer)), plain)
    peft_model = get_peft_model(
        model.pipe.transformer, LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False)
    )
    adapted = model.velocity(x, 0.5, condition, denoiser=Wrapper(peft_model))
    assert not torch.allclose(adapted, plain)
    adapted.square().mean().backward()
    trained = [n for n, p in peft_model.named_parameters() if p.grad is not None]
    assert trained and all("lora" in n for n in trained)


@pytest.mark.parametrize("name", NAMES)
def test_sigma_grid_and_training_sigma(name):
    model, call = build(name)
    shape = model.latent_shape(call["num_frames"], call["height"], call["width"])
    scheduler = model.pipe.scheduler
    before = scheduler.timesteps.clone() if scheduler.timesteps is not None else None
    grid = model.sigmas(7, shape)
    assert grid.dtype == torch.float32 and grid.shape == (8,) and grid[-1] == 0 and (grid.diff() < 0).all()
    assert before is None or torch.equal(scheduler.timesteps, before)  # the pipeline's own scheduler is untouched
    u = torch.linspace(0, 0.999, 50)
    sigma = model.training_sigma(u, shape)
    assert sigma.dtype == torch.float32 and (sigma.diff() >= 0).all() and 0 <= sigma.min() and sigma.max() <= 1
    weight = model.native_weight(sigma)
    assert weight.shape == sigma.shape and (weight >= 0).all()
    assert bool((weight == 1).all()) == (model.family.prediction == "flow")


def test_training_sigma_uses_the_models_shift():
    wan, _ = build("wan")
    u = torch.tensor([0.25, 0.5])
    torch.testing.assert_close(wan.training_sigma(u), flow.shift_sigma(u, 3.0))
    torch.testing.assert_close(wan.training_sigma(u, shift=1.0), u)
    skyreels, _ = build("skyreels")
    torch.testing.assert_close(skyreels.training_sigma(u), flow.shift_sigma(u, 8.0))
    ltx, _ = build("ltx")
    with pytest.raises(ValueError, match="pass latent_shape"):
        ltx.training_sigma(u)
    assert (ltx.training_sigma(u, (8, 40, 64, 64)) > ltx.training_sigma(u, (8, 3, 8, 8))).all()
    cog, _ = build("cogvideox")
    table = flow.vp_to_flow_sigma(cog.pipe.scheduler.alphas_cumprod.double()).float()
    assert torch.equal(cog.training_sigma(torch.tensor([0.0, 0.5, 0.999])), table[[0, 500, 999]])
    assert torch.equal(cog.timestep(table[[3, 500, 999]]), torch.tensor([3.0, 500.0, 999.0]))


def test_integer_timesteps_survive_float32():
    """int(1000 * sigma) as the scheduler computed it in float64, for every grid a user may pick."""
    model, _ = build("skyreels")
    for steps in range(2, 60):
        model.pipe.scheduler.set_timesteps(steps)
        grid = model.sigmas(steps, (16, 3, 2, 2))
        assert torch.equal(model.timestep(grid[:-1]).long(), model.pipe.scheduler.timesteps), steps


def test_stateful_guiders_are_refused():
    for name in ("hunyuan15", "motif"):
        pipe, _ = tiny_pipelines.ALL[name]()
        pipe.guider = AdaptiveProjectedGuidance(guidance_scale=6.0, adaptive_projected_guidance_momentum=-0.5)
        with pytest.raises(ValueError, match="momentum"):
            VideoModel(pipe)


def test_missing_components_are_refused():
    for name in ("vae", "transformer"):
        pipe, _ = tiny_pipelines.wan()
        pipe.register_modules(**{name: None})
        with pytest.raises(ValueError, match="load the pipeline with its"):
            VideoModel(pipe)


def test_foreign_scheduler_is_refused():
    pipe, _ = tiny_pipelines.wan()
    pipe.scheduler = DDIMScheduler()
    with pytest.raises(ValueError, match="DDIMScheduler"):
        VideoModel(pipe)


def test_from_pretrained(tmp_path):
    pipe, call = tiny_pipelines.wan()
    pipe.save_pretrained(tmp_path / "tiny-wan")
    model = VideoModel.from_pretrained(tmp_path / "tiny-wan", torch_dtype=torch.bfloat16)
    assert model.pipe.transformer.dtype == torch.bfloat16
    condition = model.condition("a cat", **call)
    assert condition.dtype == torch.bfloat16
    x = noise(model, 1, condition.latent_shape)
    assert model.velocity(x, 0.5, condition).dtype == torch.float32
    assert VideoModel.from_pretrained(pipe).pipe is pipe
    with pytest.raises(ValueError, match="loaded pipeline"):
        VideoModel.from_pretrained(pipe, torch_dtype=torch.bfloat16)
    with pytest.raises(TypeError, match="Hub id"):
        VideoModel.from_pretrained(3)


def test_wrong_paths_get_one_clear_line(tmp_path):
    (tmp_path / "tiny-wan").mkdir()
    cases = {
        str(tmp_path / "tiny-wann"): "did you mean .*tiny-wan'",
        str(tmp_path / "tiny-wan"): "no model_index.json",
        "nothing-like-it": "No such directory",
        "./some/where/else": "No such directory",
        "some-org/no-such-model": "Hub",  # offline here
    }
    for path, message in cases.items():
        with pytest.raises(ValueError, match=message) as error:
            VideoModel.from_pretrained(path)
        assert "\n" not in str(error.value)


def test_unsupported_pipelines_say_why(tmp_path):
    (tmp_path / "model_index.json").write_text(
        json.dumps({"_class_name": "LTX2Pipeline", "_diffusers_version": "0.42"})
    )
    with pytest.raises(ValueError, match="audio"):
        VideoModel.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="Supported: AllegroPipeline"):
        find_family("StableDiffusionPipeline")
    listed = {name for family in FAMILIES for name in family.pipelines}
    assert not listed & UNSUPPORTED.keys()
    assert all(len(reason) > 20 for reason in UNSUPPORTED.values())


@pytest.mark.parametrize("loaded", [True, False])
def test_offload_and_restore_encoders(tmp_path, loaded):
    pipe, call = tiny_pipelines.wan()
    pipe.save_pretrained(tmp_path)
    model = VideoModel.from_pretrained(tmp_path) if loaded else VideoModel(pipe)
    video = torch.rand(1, 9, 3, 16, 16)
    condition, (mean, _) = model.condition("a cat", **call), model.encode(video)
    x = noise(model, 1, condition.latent_shape)
    with torch.no_grad():
        velocity = model.velocity(x, 0.5, condition)
    transformer = model.pipe.transformer
    model.offload_encoders()
    assert model.pipe.vae is None and model.pipe.text_encoder is None
    with torch.no_grad():
        assert torch.equal(model.velocity(x, 0.5, condition), velocity)
    assert model.latent_shape(9, 16, 16) == condition.latent_shape
    with pytest.raises(ValueError, match="restore_encoders"):
        model.encode(video)
    model.offload_encoders()  # twice is harmless
    model.restore_encoders()
    assert model.pipe.transformer is transformer
    assert equal(model.condition("a cat", **call), condition)
    assert torch.equal(model.encode(video)[0], mean)
    model.pipe.save_pretrained(tmp_path / "again")  # the index still names every component
    assert DiffusionPipeline.from_pretrained(tmp_path / "again").vae is not None


def test_docs_list_every_family():
    text = (Path(__file__).parents[1] / "docs" / "models.md").read_text()
    for name in [*(f.name for f in FAMILIES), *(p for f in FAMILIES for p in f.pipelines)]:
        assert f"`{name}`" in text, name  # every refusal: test_model_table.py
    assert all(hasattr(diffusers, name) for name in UNSUPPORTED)
