"""Block-causal attention over stock transformers, and the causal rollout."""

import copy
import functools
import itertools

import diffusers
import pytest
import tiny_pipelines
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from torch.utils.checkpoint import CheckpointError

from vidtrl.models import VideoModel
from vidtrl.models.causal import CausalAttention, KVCache, visible_frames
from vidtrl.models.roles import checkpoint_under
from vidtrl.rollout.causal import causal_rollout, recache


NAMES = ["wan", "wan22_ti2v", "skyreels", "ltx"]
PROMPT = "a red circle moving right"
SIGMAS = [1.0, 0.75, 0.5]
EXACT = 1e-5  # the rotary offset alone changes little, so a looser bound would miss it


def make(name="wan"):
    pipe, call = tiny_pipelines.ALL[name]()
    pipe.transformer.eval().requires_grad_(False)
    model = VideoModel(pipe)
    return model, CausalAttention(model), model.condition(PROMPT, **call)


setup = functools.cache(make)


def randn(condition, frames, batch=1, seed=0):
    channels, _, height, width = condition.latent_shape
    return torch.randn(batch, channels, frames, height, width, generator=torch.Generator().manual_seed(seed))


def distance(a, b):
    return float((a - b).abs().max())


@torch.no_grad()
def in_blocks(model, causal, condition, clean, noisy, sigmas, frames_per_block, cache=None, spoil=None):
    """Block by block: the velocity of each noisy block upon the cached clean ones before."""
    cache, parts = cache or KVCache(), []
    for x0, x, sigma in zip(clean.split(frames_per_block, 2), noisy.split(frames_per_block, 2), sigmas, strict=True):
        if spoil == "no past":
            cache.reset(cache.num_frames)
        if spoil == "no offset":
            cache.num_frames = 0
        with causal.cached(cache):
            parts.append(model.velocity(x, sigma, condition))
        with causal.cached(cache, store=True):
            model.velocity(x0, 0.0, condition)
    return torch.cat(parts, 2)


# ---- Off ----


@pytest.mark.parametrize("name", NAMES)
def test_off_is_stock_bit_for_bit(name):
    pipe, call = tiny_pipelines.ALL[name]()
    model = VideoModel(pipe)
    condition = model.condition(PROMPT, **call)
    x = randn(condition, condition.latent_shape[1], batch=2)
    sigma = torch.tensor([0.3, 0.8])
    with torch.no_grad():
        before = model.velocity(x, sigma, condition)
        causal = CausalAttention(model)
        after = model.velocity(x, sigma, condition)
        with causal.block_causal(1):
            changed = model.velocity(x, sigma, condition)
        again = model.velocity(x, sigma, condition)
    assert torch.equal(before, after) and torch.equal(before, again)
    assert distance(before, changed) > 1e-3


def test_a_second_instance_and_copies_of_the_denoiser():
    model, causal, condition = make()
    x = randn(condition, 4)
    twin = copy.deepcopy(model.denoisers["transformer"])
    with torch.no_grad(), causal.block_causal(2):
        masked = model.velocity(x, 0.5, condition)
        assert distance(masked, model.velocity(x, 0.5, condition, denoiser=twin)) > 1e-3  # the copy is off
    with torch.no_grad(), CausalAttention(model).block_causal(2):
        assert torch.equal(masked, model.velocity(x, 0.5, condition))


# ---- One noise level per frame ----


@pytest.mark.parametrize("name", NAMES)
def test_sigma_per_frame(name):
    model, _, condition = setup(name)
    x = randn(condition, condition.latent_shape[1], batch=2)
    sigma = torch.tensor([0.3, 0.8])
    with torch.no_grad():
        whole = model.velocity(x, sigma, condition)
        frames = sigma[:, None].repeat(1, x.shape[2])
        assert distance(whole, model.velocity(x, frames, condition)) < EXACT
        frames[:, -1] = 0.0
        assert distance(whole, model.velocity(x, frames, condition)) > 1e-2
    with pytest.raises(ValueError, match=r"\(B, f\)"):
        model.velocity(x, frames[:, :-1], condition)


def test_sigma_per_frame_refused():
    pipe, call = tiny_pipelines.ALL["cogvideox"]()
    model = VideoModel(pipe)
    condition = model.condition(PROMPT, **call)
    with pytest.raises(ValueError, match="one sigma per clip"):
        model.velocity(randn(condition, 3), torch.rand(1, 3), condition)
    pipe, call = tiny_pipelines.ALL["wan22"]()
    model = VideoModel(pipe)
    condition = model.condition(PROMPT, **call)
    with pytest.raises(ValueError, match="two experts"):
        model.velocity(randn(condition, 3), torch.rand(1, 3), condition)


# ---- One pass == block by block ----


@pytest.mark.parametrize("name", NAMES)
def test_block_causal_pass_equals_the_cache(name):
    model, causal, condition = setup(name)
    x = randn(condition, 6, batch=2)
    sigma = torch.rand(2, 3, generator=torch.Generator().manual_seed(1))
    with torch.no_grad(), causal.block_causal(2):
        one_pass = model.velocity(x, sigma.repeat_interleave(2, 1), condition)
    for spoil in (None, "no past", "no offset"):
        cache, parts = KVCache(), []
        for i, block in enumerate(x.split(2, 2)):
            if spoil == "no past":
                cache.reset(cache.num_frames)
            if spoil == "no offset":
                cache.num_frames = 0
            with torch.no_grad(), causal.cached(cache, store=True):
                parts.append(model.velocity(block, sigma[:, i], condition))
        off = distance(one_pass, torch.cat(parts, 2))
        assert off < EXACT if spoil is None else off > 20 * EXACT, spoil


@pytest.mark.parametrize("name", NAMES)
def test_teacher_forcing_pass_equals_the_cache(name):
    model, causal, condition = setup(name)
    clean, noisy = randn(condition, 6), randn(condition, 6, seed=1)
    sigmas = [0.9, 0.5, 0.2]
    levels = torch.tensor([[0.0] * 6 + [s for s in sigmas for _ in range(2)]])
    with torch.no_grad(), causal.teacher_forcing(2):
        one_pass = model.velocity(torch.cat([clean, noisy], 2), levels, condition)[:, :, 6:]
    for spoil in (None, "no past", "no offset"):
        off = distance(one_pass, in_blocks(model, causal, condition, clean, noisy, sigmas, 2, spoil=spoil))
        assert off < EXACT if spoil is None else off > 20 * EXACT, spoil


@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_windows(data):
    """Any block length, window and sink: both passes and the cache agree, and a window that excludes frames matters."""
    model, causal, condition = setup("wan")
    length = data.draw(st.integers(1, 3))
    frames = length * data.draw(st.integers(1, 5))
    sink = data.draw(st.integers(0, 3))
    window = data.draw(st.integers(sink + length, 12))
    clean, noisy = randn(condition, frames), randn(condition, frames, seed=1)
    levels = torch.tensor([[0.0] * frames + [0.6] * frames])
    with torch.no_grad():
        with causal.teacher_forcing(length, window=window, sink=sink):
            forced = model.velocity(torch.cat([clean, noisy], 2), levels, condition)
        with causal.block_causal(length, window=window, sink=sink):
            masked = model.velocity(clean, levels[:, :frames], condition)
        with causal.block_causal(length):
            everything = model.velocity(clean, levels[:, :frames], condition)
    cache, sigmas = KVCache(window, sink), [0.6] * (frames // length)
    by_block = in_blocks(model, causal, condition, clean, noisy, sigmas, length, cache)
    assert distance(forced[:, :, frames:], by_block) < EXACT
    assert distance(forced[:, :, :frames], masked) < EXACT
    assert (distance(masked, everything) > EXACT) == (frames > window)
    assert cache.num_frames == frames


@settings(max_examples=50, deadline=None)
@given(first=st.integers(0, 5), length=st.integers(1, 30), sink=st.integers(0, 4), room=st.none() | st.integers(1, 30))
def test_visible_frames(first, length, sink, room):
    stop, window = first + length, None if room is None else sink + room
    expected = {i for i in range(first, stop) if window is None or i < first + sink or i >= stop - (window - sink)}
    ranges = visible_frames(stop, window, sink, first)
    assert [i for a, b in ranges for i in range(a, b)] == sorted(expected)
    assert all(a < b for a, b in ranges)


def test_what_no_block_can_see_leaves_memory():
    model, causal, condition = setup("wan")
    cache = KVCache(window=6, sink=2)
    for _ in range(8):
        with torch.no_grad(), causal.cached(cache, store=True):
            model.velocity(randn(condition, 2), 0.0, condition)
    assert [(b.start, b.stop) for b in cache.blocks] == [(0, 2), (12, 14), (14, 16)]
    assert not any(t.requires_grad for block in cache.blocks for pair in block.layers for t in pair)
    with pytest.raises(ValueError, match="enlarge the window"), torch.no_grad(), causal.cached(cache):
        model.velocity(randn(condition, 5), 0.0, condition)
    for window, sink in ((3, 3), (2, 3), (None, -1)):
        with pytest.raises(ValueError, match="larger than sink"):
            KVCache(window, sink)


def test_skyreels_own_dense_mask_agrees():
    """The stock transformer with `num_frame_per_block`, loaded with the same weights, is the same causal model."""
    model, causal, condition = setup("wan")
    weights = model.denoisers["transformer"].state_dict()
    pipe, call = tiny_pipelines.ALL["skyreels"]()
    reference = pipe.transformer.eval()
    reference.load_state_dict(weights, strict=True)
    reference.register_to_config(num_frame_per_block=2)
    x, sigma = randn(condition, 6), torch.tensor([[0.9, 0.9, 0.5, 0.5, 0.1, 0.1]])
    with torch.no_grad():
        with causal.block_causal(2):
            ours = model.velocity(x, sigma, condition)
        other = VideoModel(pipe)
        theirs = other.velocity(x, sigma, other.condition(PROMPT, **call))
        reference.register_to_config(num_frame_per_block=1)
        unmasked = other.velocity(x, sigma, other.condition(PROMPT, **call))
    assert distance(ours, theirs) < EXACT < 1e-3 < distance(ours, unmasked)
    reference.register_to_config(num_frame_per_block=2)
    with pytest.raises(ValueError, match="register_to_config"):
        CausalAttention(other)


def test_bfloat16():
    model, causal, condition = make()
    model.denoisers["transformer"].to(torch.bfloat16)
    x = randn(condition, 6)
    with torch.no_grad(), causal.block_causal(2):
        one_pass = model.velocity(x, torch.full((1, 6), 0.5), condition)
    cache, parts = KVCache(), []
    for block in x.split(2, 2):
        with torch.no_grad(), causal.cached(cache, store=True):
            parts.append(model.velocity(block, 0.5, condition))
    assert cache.blocks[0].layers[0][0].dtype == torch.bfloat16
    assert distance(one_pass, torch.cat(parts, 2)) < 0.03 * float(one_pass.abs().max())


def test_attention_backend_of_the_user(attention_default):
    model, causal, condition = make()
    transformer, x = model.denoisers["transformer"], randn(condition, 4)
    with torch.no_grad(), causal.block_causal(2):
        expected = model.velocity(x, 0.5, condition)
        try:
            transformer.set_attention_backend("_native_math")
            backends = {p._attention_backend.value for p in transformer.attn_processors.values()}
            backends |= {p.stock._attention_backend.value for p in transformer.attn_processors.values()}
            got = model.velocity(x, 0.5, condition)
        finally:
            transformer.reset_attention_backend()
    assert backends == {"_native_math"} and distance(expected, got) < EXACT
    transformer.fuse_qkv_projections()
    with pytest.raises(ValueError, match="unfuse_qkv_projections"), causal.block_causal(2):
        model.velocity(x, 0.5, condition)


# ---- The prompt's keys and values ----


@pytest.mark.parametrize("name", NAMES)
def test_prompt_is_projected_once_and_again_after_a_switch(name):
    model, causal, first = make(name)
    _, call = tiny_pipelines.ALL[name]()
    second = model.condition("a blue square moves left", **call)
    x, calls = randn(first, 2), []
    for module_name, module in model.denoisers["transformer"].named_modules():
        if module_name.endswith("0.attn2.to_k"):
            module.register_forward_hook(lambda *_: calls.append(1))

    def velocity(condition, sigma, cache=None):
        with causal.cached(cache or KVCache()):
            return model.velocity(x, sigma, condition)

    cache, expected = KVCache(), {}
    with torch.no_grad():
        for condition, sigma in ((first, 0.9), (first, 0.5), (second, 0.5)):
            expected[id(condition), sigma] = velocity(condition, sigma)
        calls.clear()
        for condition, sigma, count in ((first, 0.9, 1), (first, 0.5, 1), (second, 0.5, 2), (first, 0.5, 3)):
            assert torch.equal(velocity(condition, sigma, cache), expected[id(condition), sigma])
            assert len(calls) == count
    assert distance(expected[id(first), 0.5], expected[id(second), 0.5]) > 1e-3
    velocity(first, 0.5, cache)  # with gradients the projection is trained
    assert len(calls) == 4


def test_clips_of_another_batch():
    model, causal, condition = setup("wan")
    cache = KVCache()
    with torch.no_grad(), causal.cached(cache, store=True):
        model.velocity(randn(condition, 2), 0.0, condition)
    with pytest.raises(ValueError, match="one cache per batch"), torch.no_grad(), causal.cached(cache):
        model.velocity(randn(condition, 2, batch=2), 0.5, condition)


# ---- Rollout ----


def draws(condition, frames_per_block=2, batch=1):
    return lambda block, step: randn(condition, frames_per_block, batch, seed=100 * block + step)


def roll(model, causal, condition, noise, sigmas=SIGMAS, **options):
    options = {"frames_per_block": 2, "draw": draws(condition, batch=len(noise)), **options}
    return list(causal_rollout(model, causal, condition, noise, sigmas, **options))


@torch.no_grad()
def by_hand(model, causal, condition, noise, sigmas, exit_step, sampler, context_noise):
    """The rollout without a cache: each step is one block-causal pass over the finished blocks and the present one."""
    draw, past, outputs = draws(condition), noise[:, :, :0], []
    for b, x in enumerate(noise.split(2, 2)):
        for i, sigma in enumerate(sigmas[: exit_step + 1]):
            levels = torch.tensor([[context_noise] * past.shape[2] + [sigma] * 2])
            with causal.block_causal(2):
                v = model.velocity(torch.cat([past, x], 2), levels, condition)[:, :, -2:]
            x0 = x - sigma * v
            if i < exit_step:
                e = draw(b, i + 1) if sampler == "renoise" else x + (1 - sigma) * v
                x = (1 - sigmas[i + 1]) * x0 + sigmas[i + 1] * e
        context = (1 - context_noise) * x0 + context_noise * draw(b, len(sigmas))
        past = torch.cat([past, context if context_noise else x0], 2)
        outputs.append(x0)
    return outputs


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("exit_step", "sampler", "context_noise"), [(2, "renoise", 0.0), (1, "renoise", 0.1), (2, "ode", 0.0)]
)
def test_rollout_is_what_it_says(name, exit_step, sampler, context_noise):
    model, causal, condition = setup(name)
    noise = randn(condition, 6, seed=5)
    got = roll(
        model,
        causal,
        condition,
        noise,
        exit_step=exit_step,
        sampler=sampler,
        context_noise=context_noise,
        grad_frames=2,
    )
    expected = by_hand(model, causal, condition, noise, SIGMAS, exit_step, sampler, context_noise)
    assert max(map(distance, got, expected)) < EXACT
    if sampler == "ode":  # the last step arrives at 0 as Euler does
        other = by_hand(model, causal, condition, noise, SIGMAS, exit_step, "renoise", context_noise)
        assert max(map(distance, got, other)) > 1e-2


def test_streams_are_lazy_and_continue():
    model, causal, condition = setup("wan")
    noise, counter = randn(condition, 8, seed=5), []
    handle = model.denoisers["transformer"].register_forward_pre_hook(
        lambda *_: counter.append(torch.is_grad_enabled())
    )
    whole = roll(model, causal, condition, noise, window=6, sink=2)
    assert len(counter) == 4 * 3 + 3  # three steps a block, one pass between two blocks
    assert not any(counter)
    counter.clear()
    endless = (noise[:, :, 2 * b : 2 * b + 2] for b in itertools.chain(range(4), itertools.repeat(0)))
    stream = causal_rollout(
        model, causal, condition, endless, SIGMAS, frames_per_block=2, draw=draws(condition), window=6, sink=2
    )
    assert not counter
    assert torch.equal(next(stream), whole[0]) and len(counter) == 3 and torch.is_grad_enabled()
    assert torch.equal(next(stream), whole[1]) and len(counter) == 7
    cache = KVCache(window=6, sink=2)
    first = roll(model, causal, condition, noise[:, :, :4], cache=cache, store_last=True)
    later = lambda block, step: draws(condition)(block + 2, step)  # noqa: E731
    second = roll(model, causal, condition, noise[:, :, 4:], cache=cache, draw=later)
    handle.remove()
    assert all(map(torch.equal, first + second, whole))
    lost = KVCache(window=6, sink=2)  # control: without the last block
    roll(model, causal, condition, noise[:, :, :4], cache=lost)
    assert distance(roll(model, causal, condition, noise[:, :, 4:], cache=lost, draw=later)[0], whole[2]) > 1e-3


def test_guidance_in_one_batch_equals_two_caches():
    model, causal, condition = setup("wan")
    negative = model.condition("", **tiny_pipelines.WAN_LIKE, negative=True)
    noise, scale = randn(condition, 4, batch=2, seed=5), 3.0
    got = roll(model, causal, condition, noise, sampler="ode", negative_condition=negative, guidance_scale=scale)
    caches = [KVCache(), KVCache()]
    for block, expected in zip(noise.split(2, 2), got, strict=True):
        x = block
        for sigma, sigma_next in zip(SIGMAS, [*SIGMAS[1:], 0.0], strict=True):
            v = []
            for c, cache in zip((condition, negative), caches, strict=True):
                with torch.no_grad(), causal.cached(cache):
                    v.append(model.velocity(x, sigma, c))
            x = x + (sigma_next - sigma) * (v[1] + scale * (v[0] - v[1]))
        assert distance(x, expected) < EXACT
        for c, cache in zip((condition, negative), caches, strict=True):
            with torch.no_grad(), causal.cached(cache, store=True):
                model.velocity(x, 0.0, c)
    with pytest.raises(ValueError, match="negative_condition"):
        roll(model, causal, condition, noise, guidance_scale=2.0)


@pytest.mark.parametrize("restart", [False, True])
def test_recache_after_a_prompt_switch(restart):
    model, causal, old = setup("wan")
    new = model.condition("a blue square moves left", **tiny_pipelines.WAN_LIKE)
    noise, cache = randn(old, 6, seed=5), KVCache(window=4)
    clean = roll(model, causal, old, noise, cache=cache, store_last=True)
    stale = roll(model, causal, new, noise[:, :, :2], cache=copy.copy(cache))[0]
    history = torch.cat(clean, 2)[:, :, -4:]
    recache(model, causal, new, history, cache, frames_per_block=2, start=0 if restart else 2)
    assert cache.num_frames == (4 if restart else 6)
    got = roll(model, causal, new, noise[:, :, :2], cache=cache)[0]
    assert distance(got, stale) > 1e-3
    fresh = KVCache(window=4)
    fresh.reset(0 if restart else 2)
    in_blocks(model, causal, new, history, history, [0.5, 0.5], 2, fresh)
    assert torch.equal(got, roll(model, causal, new, noise[:, :, :2], cache=fresh)[0])
    with pytest.raises(ValueError, match="do not divide"):
        recache(model, causal, new, history[:, :, 1:], cache, frames_per_block=2, start=0)


def test_positions_end():
    model, causal, condition = setup("wan")
    cache = KVCache(window=4)
    cache.reset(30)
    with torch.no_grad(), causal.cached(cache, store=True):
        model.velocity(randn(condition, 2), 0.0, condition)
    with pytest.raises(ValueError, match="32 positions"), torch.no_grad(), causal.cached(cache):
        model.velocity(randn(condition, 2), 0.5, condition)


# ---- Gradients ----


def test_gradients_reach_their_own_step_of_their_own_block():
    model, causal, condition = setup("wan")
    noise = randn(condition, 6, seed=5).requires_grad_()
    outputs = roll(model, causal, condition, noise, exit_step=0, grad_frames=4)
    assert [x.requires_grad for x in outputs] == [False, True, True]
    (gradient,) = torch.autograd.grad(outputs[2].square().sum(), noise)
    assert not gradient[:, :, :4].any() and float(gradient[:, :, 4:].abs().max()) > 1e-3
    late = roll(model, causal, condition, noise, exit_step=1, grad_frames=6)
    assert not any(x.requires_grad for x in late)  # the weights are frozen here, and the step before had no gradient


def lora_model(name="wan", wrapped=True, before=True):
    """A model with a LoRA, injected before or after the causal attention."""
    pipe, call = tiny_pipelines.ALL[name]()
    pipe.transformer.requires_grad_(False)
    model = VideoModel(pipe)
    condition = model.condition(PROMPT, **call)
    causal = None if before else CausalAttention(model)
    torch.manual_seed(0)
    config = LoraConfig(r=2, target_modules=["to_q", "to_k", "to_v", "to_out.0"], init_lora_weights=False)
    denoiser = pipe.transformer
    if wrapped:
        denoiser = get_peft_model(denoiser, config)
    else:
        denoiser.add_adapter(config)
    causal = causal or CausalAttention(model)
    return model, causal, condition, denoiser, [p for p in denoiser.parameters() if p.requires_grad]


@pytest.mark.parametrize("name", NAMES)
def test_checkpointing_a_rollout_changes_no_gradient(name):
    model, causal, condition, denoiser, weights = lora_model(name)
    noise = randn(condition, 6, seed=5)

    def gradients():
        outputs = roll(model, causal, condition, noise, exit_step=1, grad_frames=6, denoiser=denoiser)
        with causal.block_causal(3):  # whatever is active at the time of the backward pass
            return torch.autograd.grad(torch.cat(outputs, 2).square().sum(), weights)

    plain = gradients()
    assert all(float(g.abs().max()) > 0 for g in plain)
    base = model.denoisers["transformer"]
    base.enable_gradient_checkpointing(checkpoint_under(causal))
    for mine, expected in zip(gradients(), plain, strict=True):
        assert torch.equal(mine, expected)
    base.enable_gradient_checkpointing()
    with pytest.raises(RuntimeError, match="checkpoint_under"):
        gradients()


def test_checkpointing_teacher_forcing_changes_no_gradient():
    model, causal, condition, denoiser, weights = lora_model()
    x, levels = randn(condition, 8), torch.tensor([[0.0] * 4 + [0.7] * 4])

    def gradients():
        with causal.teacher_forcing(2):
            loss = model.velocity(x, levels, condition, denoiser=denoiser)[:, :, 4:].square().mean()
        return torch.autograd.grad(loss, weights)

    plain = gradients()
    model.denoisers["transformer"].enable_gradient_checkpointing(checkpoint_under(causal))
    assert all(map(torch.equal, gradients(), plain))
    model.denoisers["transformer"].enable_gradient_checkpointing()
    with pytest.raises(CheckpointError):
        gradients()


@pytest.mark.parametrize("wrapped", [False, True])
def test_lora_before_or_after(wrapped):
    results = []
    for before in (False, True):
        model, causal, condition, denoiser, _ = lora_model(wrapped=wrapped, before=before)
        results.append(torch.cat(roll(model, causal, condition, randn(condition, 4), denoiser=denoiser), 2))
    assert torch.equal(*results)
    bare = torch.cat(roll(*setup("wan"), randn(condition, 4)), 2)
    assert distance(bare, results[0]) > 1e-2


def test_autocast_keeps_the_gradient():
    """The weights that autocast casts in steps without gradient must not serve the step that has one."""
    model, causal, condition, denoiser, weights = lora_model()
    with torch.autocast("cpu", torch.bfloat16):
        outputs = roll(model, causal, condition, randn(condition, 4), grad_frames=2, denoiser=denoiser)
    assert all(g is not None for g in torch.autograd.grad(outputs[-1].sum(), weights))


# ---- Refusals ----


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("wan22", "two experts"),
        ("wan_i2v", "image condition"),
        ("wan22_ti2v_i2v", "image condition"),
        ("ltx_i2v", "image condition"),
        ("cogvideox", "text and video tokens attend to each other"),
        ("hunyuan", "text and video tokens attend to each other"),
        ("mochi", "text and video tokens attend to each other"),
        ("sana", "linear"),
        ("allegro", "no block-causal form"),
    ],
)
def test_families_that_cannot(name, reason):
    with pytest.raises(ValueError, match=f"cannot be made causal.*{reason}"):
        CausalAttention(VideoModel(tiny_pipelines.ALL[name]()[0]))


def test_foreign_processors_are_refused():
    pipe, _ = tiny_pipelines.ALL["wan"]()

    class Other(diffusers.models.transformers.transformer_wan.WanAttnProcessor.__base__):
        pass

    pipe.transformer.blocks[0].attn1.set_processor(Other())
    with pytest.raises(ValueError, match="attention processor Other"):
        CausalAttention(VideoModel(pipe))


def test_frames_that_do_not_divide():
    model, causal, condition = setup("wan")
    x = randn(condition, 5)
    message = r"5 latent frames \(17 video frames\).* 4 \(13 video frames\) and 6 \(21 video frames\)"
    with pytest.raises(ValueError, match=message), causal.block_causal(2):
        model.velocity(x, 0.5, condition)
    with pytest.raises(ValueError, match=message):
        roll(model, causal, condition, x)
    with pytest.raises(ValueError, match=message), causal.teacher_forcing(2):
        model.velocity(torch.cat([x, x], 2), torch.full((1, 10), 0.5), condition)
    with pytest.raises(ValueError, match="odd number"), causal.teacher_forcing(1):
        model.velocity(x, torch.full((1, 5), 0.5), condition)
    with pytest.raises(ValueError, match="at least 1"):
        causal.check_frames(5, 0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(sigmas=[0.5, 0.75]), "descend"),
        (dict(sigmas=[1.0, 0.0]), "descend"),
        (dict(sigmas=[]), "descend"),
        (dict(exit_step=3), "exit_step"),
        (dict(sampler="euler"), "renoise, ode"),
        (dict(draw=None), "pass draw"),
        (dict(draw=None, sampler="ode", context_noise=0.1), "pass draw"),
        (dict(context_noise=1.0), "context_noise"),
        (dict(cache=KVCache(), window=4), "belong to the cache"),
        (dict(noise=iter([]), grad_frames=2), "counts from the end"),
    ],
)
def test_rollout_arguments(options, message):
    model, causal, condition = setup("wan")
    options = {"noise": randn(condition, 4), "sigmas": SIGMAS, "draw": draws(condition), **options}
    with pytest.raises(ValueError, match=message):
        causal_rollout(model, causal, condition, frames_per_block=2, **options)


def test_blocks_of_another_length():
    model, causal, condition = setup("wan")
    blocks = iter([randn(condition, 2), randn(condition, 3)])
    stream = causal_rollout(model, causal, condition, blocks, SIGMAS, frames_per_block=2, draw=draws(condition))
    next(stream)
    with pytest.raises(ValueError, match="frames_per_block=2"):
        next(stream)
