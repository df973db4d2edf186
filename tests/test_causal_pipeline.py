"""The causal pipeline: streams equal the rollout they are made of, and their frames those of the whole decoded video."""

import gc
import itertools
import weakref

import diffusers
import pytest
import tiny_pipelines
import torch
from test_inference import write_adapter

from vidtrl import toy
from vidtrl.inference import CausalVideoPipeline, FewStepFlowScheduler, StreamingDecoder, write_distill_config
from vidtrl.models import VideoModel
from vidtrl.models.causal import KVCache
from vidtrl.rollout.causal import causal_rollout


SETTINGS = dict(denoising_steps=[1000, 500], shift=5.0, frames_per_block=2)
SIZE = dict(height=16, width=16, max_sequence_length=16)
EXACT = 1e-5  # matrix products on the CPU repeat up to rounding
PROMPT, OTHER = "a red circle moving right", "a blue square moving up"


def seeded(*seeds):
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    return generators if len(seeds) > 1 else generators[0]


def make(name="wan", rope_max_seq_len=None, **changes):
    pipe, _ = tiny_pipelines.ALL[name]()
    if rope_max_seq_len is not None:
        transformer = type(pipe.transformer).from_config(pipe.transformer.config, rope_max_seq_len=rope_max_seq_len)
        transformer.load_state_dict(pipe.transformer.state_dict())
        pipe.transformer = transformer.eval()
    pipe.set_progress_bar_config(disable=True)
    return CausalVideoPipeline(pipe, **(SETTINGS | changes))


def distance(a, b):
    return float((a - b).abs().max())


def latents_of(stream, blocks=None):
    return torch.cat(list(itertools.islice(stream, blocks)), 2)


# ---- Decoding ----


@torch.no_grad()
@pytest.mark.parametrize("name", ["toy", "wan", "wan22_ti2v", "skyreels"])
@pytest.mark.parametrize("pieces", [(3, 3, 1), (1, 1, 1, 4)])
def test_a_video_decoded_piece_by_piece_is_the_video(name, pieces):
    pipe = (
        diffusers.WanPipeline.from_pretrained(toy.pipeline_path()) if name == "toy" else tiny_pipelines.ALL[name]()[0]
    )
    model = VideoModel(pipe)
    latents = torch.randn(2, pipe.vae.config.z_dim, 7, 4, 4, generator=seeded(0))
    whole = model.decode(latents)
    decode = StreamingDecoder(model)
    parts = [decode(part) for part in latents.split(pieces, 2)]
    assert [len(part[0]) for part in parts] == [4 * n - 3 * (i == 0) for i, n in enumerate(pieces)]
    for clip in range(2):
        assert distance(torch.cat([part[clip] for part in parts]), whole[clip]) < 1e-6
    apart = model.decode(latents[:, :, pieces[0] :])  # what vae.decode alone makes of the later latents
    assert distance(apart[0][-4:], whole[0][-4:]) > 1e-3


def test_other_decoders_are_refused():
    pipe = make("ltx")
    with pytest.raises(ValueError, match="AutoencoderKLLTXVideo cannot decode.*output_type='latent'"):
        pipe.stream("a cat", height=32, width=32, num_blocks=1, max_sequence_length=16)
    assert pipe("a cat", height=32, width=32, num_blocks=2, max_sequence_length=16).shape == (13, 3, 32, 32)


# ---- Streams ----


@pytest.mark.parametrize("sampler, context_noise", [("renoise", 0.0), ("ode", 0.0), ("renoise", 0.1)])
def test_a_stream_is_the_causal_rollout(sampler, context_noise):
    pipe = make(sampler=sampler, context_noise=context_noise)
    got = latents_of(pipe.stream(PROMPT, num_blocks=3, generator=seeded(0), output_type="latent", **SIZE))
    condition = pipe.model.condition(PROMPT, 16, 16, 21, max_sequence_length=16)
    generator = seeded(0)

    def draw(*_):
        return torch.randn(1, 16, 2, 2, 2, generator=generator)

    blocks = causal_rollout(
        pipe.model,
        pipe.causal,
        condition,
        (draw() for _ in range(3)),
        [1.0, 5 / 6],
        frames_per_block=2,
        draw=draw,
        sampler=sampler,
        context_noise=context_noise,
    )
    assert distance(got, torch.cat(list(blocks), 2)) < EXACT
    other = make(sampler=sampler, context_noise=context_noise, shift=1.0)
    assert (
        distance(
            got, latents_of(other.stream(PROMPT, num_blocks=3, generator=seeded(0), output_type="latent", **SIZE))
        )
        > 0.01
    )


def test_frames_arrive_block_by_block_and_equal_the_whole_video():
    pipe = make()
    stream = pipe.stream(PROMPT, num_frames=21, generator=seeded(0), **SIZE)
    frames = [next(stream) for _ in range(3)]
    assert [f.shape for f in frames] == [(5, 3, 16, 16), (8, 3, 16, 16), (8, 3, 16, 16)]
    assert all(f.dtype == torch.float32 and 0 <= f.min() and f.max() <= 1 and not f.requires_grad for f in frames)
    with pytest.raises(StopIteration):
        next(stream)
    whole = pipe(PROMPT, num_frames=21, generator=seeded(0), **SIZE)
    assert distance(torch.cat(frames), whole) < EXACT
    assert distance(whole, pipe(PROMPT, num_frames=21, generator=seeded(1), **SIZE)) > 1e-3


def test_one_block_is_a_few_step_video_of_the_stock_pipeline():
    pipe = make(sampler="ode")
    causal = pipe(PROMPT, num_blocks=1, generator=seeded(0), output_type="latent", **SIZE)
    pipe.pipe.scheduler = FewStepFlowScheduler(denoising_steps=[1000, 500], shift=5.0, sampler="ode")
    stock = dict(num_frames=5, num_inference_steps=2, guidance_scale=1.0, output_type="latent")
    assert distance(causal, pipe.pipe(PROMPT, generator=seeded(0), **stock, **SIZE).frames) < EXACT


def test_clips_of_a_batch_have_their_own_prompts_and_seeds():
    pipe = make()
    both = pipe([PROMPT, OTHER], num_blocks=2, generator=seeded(1, 2), **SIZE)
    assert isinstance(both, list) and both[0].shape == (13, 3, 16, 16)
    for clip, (prompt, seed) in enumerate([(PROMPT, 1), (OTHER, 2)]):
        alone = pipe(prompt, num_blocks=2, generator=seeded(seed), **SIZE)
        assert distance(both[clip], alone) < 1e-4
    assert distance(both[1], pipe(PROMPT, num_blocks=2, generator=seeded(2), **SIZE)) > 1e-3


def test_switching_is_a_schedule_and_recomputes_the_past():
    pipe = make()
    stream = pipe.stream(PROMPT, generator=seeded(0), output_type="latent", **SIZE)
    live = [next(stream) for _ in range(2)]
    stream.switch(OTHER)
    live += [next(stream) for _ in range(2)]
    live = torch.cat(live, 2)
    call = dict(num_blocks=4, generator=seeded(0), output_type="latent", **SIZE)
    assert distance(live, pipe({0: PROMPT, 2: OTHER}, **call)) < EXACT
    call["generator"] = seeded(0)
    unswitched = pipe(PROMPT, **call)
    assert (
        distance(live[:, :, :4], unswitched[:, :, :4]) < EXACT
        and distance(live[:, :, 4:], unswitched[:, :, 4:]) > 1e-3
    )

    # by hand: what precedes enters a new cache under the new prompt, at the positions it had
    generator = seeded(0)
    for _ in range(4):  # two blocks, noise and fresh noise
        torch.randn(1, 16, 2, 2, 2, generator=generator)
    condition, cache = pipe.model.condition(OTHER, 16, 16, 5, max_sequence_length=16), KVCache()
    for block in live[:, :, :4].split(2, 2):
        with torch.no_grad(), pipe.causal.cached(cache, store=True):
            pipe.model.velocity(block, 0.0, condition)

    def draw(*_):
        return torch.randn(1, 16, 2, 2, 2, generator=generator)

    options = dict(frames_per_block=2, draw=draw, cache=cache)
    blocks = causal_rollout(pipe.model, pipe.causal, condition, (draw() for _ in range(2)), pipe.sigmas, **options)
    assert distance(live[:, :, 4:], torch.cat(list(blocks), 2)) < EXACT


def test_a_switch_before_the_first_block_is_just_another_prompt():
    pipe = make()
    stream = pipe.stream(PROMPT, num_blocks=2, generator=seeded(0), output_type="latent", **SIZE)
    stream.switch(OTHER)
    assert torch.equal(
        latents_of(stream), pipe(OTHER, num_blocks=2, generator=seeded(0), output_type="latent", **SIZE)
    )


def test_text_is_projected_once_a_prompt():
    pipe = make(denoising_steps=[1000, 750, 500, 250])
    calls = []
    for name, module in pipe.pipe.transformer.named_modules():
        if name.endswith("attn2.to_k"):
            module.register_forward_hook(lambda *_, name=name: calls.append(name))
    stream = pipe.stream(PROMPT, generator=seeded(0), output_type="latent", **SIZE)
    latents_of(stream, 3)
    assert len(calls) == len(set(calls)) == 2  # one for each of the two layers; 14 denoiser calls
    stream.switch(OTHER)
    latents_of(stream, 2)
    # once to recompute the past, once for the blocks that follow
    assert len(calls) == 6


def test_endless_streams_keep_bounded_memory_and_outlive_the_models_positions():
    pipe = make(rope_max_seq_len=16, window=6, sink=2)
    stream = pipe.stream(PROMPT, generator=seeded(0), output_type="latent", **SIZE)
    cached, tensors = [], []
    for _, latents in zip(range(30), stream, strict=False):  # 60 latent frames through 16 positions
        tensors.append(weakref.ref(latents))
        cached.append(sum(k.numel() + v.numel() for block in stream._cache.blocks for k, v in block.layers))
        assert latents.isfinite().all() and stream._position <= 16
    del latents
    gc.collect()
    assert max(cached) == max(cached[:4]) and sum(ref() is not None for ref in tensors) <= 3
    within = make(window=6, sink=2).stream(PROMPT, generator=seeded(0), output_type="latent", **SIZE)
    again = make(rope_max_seq_len=16, window=6, sink=2).stream(
        PROMPT, generator=seeded(0), output_type="latent", **SIZE
    )
    within, again = latents_of(within, 10), latents_of(again, 10)
    assert distance(within[:, :, :16], again[:, :, :16]) < EXACT  # nothing changes before the positions run out
    changed = distance(within[:, :, 16:18], again[:, :, 16:18])
    assert EXACT < changed < distance(within[:, :, 14:16], again[:, :, 16:18])


def test_without_a_window_a_stream_ends_with_the_positions():
    stream = make(rope_max_seq_len=16).stream(PROMPT, generator=seeded(0), output_type="latent", **SIZE)
    assert latents_of(stream, 8).shape[2] == 16
    with pytest.raises(ValueError, match="knows 16 latent frames.*with a window"):
        next(stream)


def test_a_window_of_one_block_forgets_everything():
    pipe = make(window=2, rope_max_seq_len=16, sampler="ode")
    stream = pipe.stream(PROMPT, generator=seeded(0), output_type="latent", **SIZE)
    latents = latents_of(stream, 12)
    first = pipe(PROMPT, num_blocks=1, generator=seeded(0), output_type="latent", **SIZE)
    assert distance(latents[:, :, :2], first) < EXACT and latents.isfinite().all()


# ---- Loading and mistakes ----


def test_from_pretrained_reads_what_the_trainer_wrote(tmp_path):
    tiny_pipelines.wan()[0].save_pretrained(tmp_path / "base")
    write_adapter(tmp_path / "student", 1)
    fields = SETTINGS | dict(window=6, sink=2, sampler="ode")
    write_distill_config(tmp_path / "student", base_model=str(tmp_path / "base"), **fields)
    pipe = CausalVideoPipeline.from_pretrained(tmp_path / "student").to("cpu")
    assert pipe.config.window == 6 and pipe.pipe.get_active_adapters() == ["student"]
    got = pipe(PROMPT, num_blocks=2, generator=seeded(0), output_type="latent", **SIZE)
    base = make(window=6, sink=2, sampler="ode")
    base.pipe.load_lora_weights(tmp_path / "student")
    assert distance(got, base(PROMPT, num_blocks=2, generator=seeded(0), output_type="latent", **SIZE)) < EXACT
    base.pipe.unload_lora_weights()
    assert distance(got, base(PROMPT, num_blocks=2, generator=seeded(0), output_type="latent", **SIZE)) > 1e-2
    write_distill_config(tmp_path / "student", base_model=str(tmp_path / "base"), denoising_steps=[1000], shift=1.0)
    with pytest.raises(ValueError, match="bidirectional.*load_student"):
        CausalVideoPipeline.from_pretrained(tmp_path / "student")


@pytest.mark.parametrize("name", ["wan22_ti2v", "skyreels", "ltx"])
def test_other_causal_families(name):
    pipe = make(name)
    size = dict(height=32, width=32, max_sequence_length=16)
    latents = pipe.stream("a cat", generator=seeded(0), output_type="latent", **size)
    latents = latents_of(latents, 3)
    assert latents.shape[2] == 6 and latents.isfinite().all()
    again = pipe("a cat", num_blocks=3, generator=seeded(0), output_type="latent", **size)
    assert distance(latents, again) < EXACT


@pytest.mark.parametrize(
    "call, message",
    [
        ({"num_frames": 17}, "5 latent frames .* blocks of 2; .*4 .13 video frames. and 6 .21 video frames"),
        ({"num_frames": 20}, "nearest is 21"),
        ({"num_frames": 21, "num_blocks": 3}, "not both"),
        ({"num_blocks": 0}, "at least 1"),
        ({"height": 20}, "16x16"),
        ({"prompt": {1: PROMPT}}, "block 0"),
        ({"output_type": "pil"}, "'pt' or 'latent'"),
        ({"max_length": 16}, "no argument 'max_length'"),
    ],
)
def test_mistakes_in_a_call(call, message):
    pipe = make()
    call = {"prompt": PROMPT, **SIZE, **call}
    with pytest.raises(ValueError, match=message):
        pipe.stream(**call)


def test_mistakes_on_the_way():
    pipe = make()
    with pytest.raises(ValueError, match="num_frames or num_blocks"):
        pipe(PROMPT, **SIZE)
    stream = pipe.stream([PROMPT, OTHER], num_blocks=1, generator=seeded(0), **SIZE)
    for prompt in ([PROMPT], PROMPT):
        with pytest.raises(ValueError, match="2 clips"):
            stream.switch(prompt)
    with pytest.raises(ValueError, match="3 generators|Got 3"):
        next(pipe.stream([PROMPT, OTHER], num_blocks=1, generator=seeded(0, 1, 2), **SIZE))


@pytest.mark.parametrize(
    "name, changes, message",
    [
        ("wan", {"window": 1}, "at least sink"),
        ("wan", {"denoising_steps": [500, 1000]}, "descending"),
        ("wan", {"frames_per_block": 0}, "at least 1"),
        ("hunyuan", {}, "cannot be made causal"),
        ("wan22", {}, "two experts"),
    ],
)
def test_students_that_cannot_be(name, changes, message):
    with pytest.raises(ValueError, match=message):
        make(name, **changes)
