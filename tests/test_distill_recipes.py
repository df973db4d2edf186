"""What makes each method of distillation: contexts, noise levels, targets, trajectories, streams, teachers, families."""

import dataclasses

import pytest
import torch
from distill_setup import PROMPTS, dataset, distance, history, make_trainer, other_size, weights
from sft_setup import digest
from test_distill_trainer import batch, calls

from vidtrl import VideoDistillTrainer
from vidtrl.diffusion import consistency as cm
from vidtrl.models.causal import KVCache
from vidtrl.trainer.distill_recipes import DEFAULTS, RECIPES
from vidtrl.trainer.distill_streams import Streams
from vidtrl.trainer.draws import generators, randn


SMALL = {  # what makes a recipe fit three latent frames
    "causvid": dict(frames_per_block=1),
    "self-forcing": dict(frames_per_block=1),
    "causal-forcing": dict(frames_per_block=1),
    "longlive": dict(frames_per_block=1, window=3, sink=1, stream_num_frames=7, stream_overlap=1),
    "lcm": dict(ema_decay=0.95),
    "rcm": dict(tangent_warmup_steps=2, max_steps=3),
}
STREAMED = dict(recipe="longlive", **SMALL["longlive"])


def rows_of(recipe, clips):
    return clips if RECIPES[recipe].get("rollout") == "data" else dataset()


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_trains(tmp_path, cache_dir, clips, recipe):
    config = {"recipe": recipe, "max_steps": 4, "ema_decay": None, **SMALL.get(recipe, {})}
    trainer = make_trainer(tmp_path, cache_dir, rows=rows_of(recipe, clips), **config)
    values = {**DEFAULTS, **RECIPES[recipe]}
    for name in ("loss_type", "rollout", "denoising_steps", "teacher_guidance_scale", "causal", "adam_beta1"):
        assert getattr(trainer.args, name) == values[name]
    before = weights(trainer)
    trainer.train()
    assert distance(before, weights(trainer)) > 1e-4
    assert all(loss == loss and abs(loss) < 200 for loss in history(trainer, "loss"))
    assert ("fake" in trainer.policies) == trainer.args.matches_distributions
    video = trainer.generate_videos(PROMPTS[:1], seeds=[0])[0]
    assert tuple(video.shape) == (9, 3, 16, 16)


def test_noise_levels_of_the_recipes(tmp_path, cache_dir, clips):
    def sigmas(**config):
        return make_trainer(tmp_path, cache_dir, rows=clips, **config).sigmas

    assert sigmas(recipe="self-forcing", frames_per_block=1) == pytest.approx([1, 0.9375, 5 / 6, 0.625])
    assert sigmas(recipe="causvid", frames_per_block=1) == pytest.approx([1, 0.757, 0.522], abs=1e-5)
    causvid = make_trainer(tmp_path, cache_dir, rows=clips, recipe="causvid", frames_per_block=1)
    assert causvid.noise_levels(torch.tensor(0.5)).item() == pytest.approx(8 / 9)  # where its scores are compared
    assert sigmas(shift=1.0) == pytest.approx([1, 0.75, 0.5, 0.25])
    assert sigmas() == pytest.approx([1, 0.9, 0.75, 0.5])  # the pipeline's own shift of 3


# ---- Clips: contexts and noise levels ----


class Watched(VideoDistillTrainer):
    """Keeps (role, latents, sigma) of every evaluation."""

    def __init__(self, *args, **kwargs):
        self.seen = []
        super().__init__(*args, **kwargs)

    def _velocity(self, role, x, sigma, condition, clean=None):
        self.seen.append((role, x.detach(), sigma, None if clean is None else clean.detach()))
        return super()._velocity(role, x, sigma, condition, clean)


def test_every_block_has_its_own_noise_level(tmp_path, cache_dir, clips):
    config = dict(recipe="causvid", frames_per_block=1, per_device_train_batch_size=4)
    trainer = make_trainer(tmp_path, cache_dir, rows=clips, cls=Watched, **config)
    trainer.train()
    levels = [sigma for role, _, sigma, _ in trainer.seen if role == "student"]
    assert all(sigma.shape == (4, 3) for sigma in levels)
    assert {round(s, 4) for sigma in levels for s in sigma.flatten().tolist()} == {1.0, 0.757, 0.522}
    assert any(len(set(row.tolist())) > 1 for sigma in levels for row in sigma)
    for role, _, sigma, clean in trainer.seen:  # the scores see whole clips at one level, without the causal context
        if role != "student":
            assert sigma.shape == (4,) and clean is None


def test_a_block_of_frames_shares_its_noise_level(tmp_path, cache_dir, clips):
    trainer = make_trainer(tmp_path, cache_dir, rows=clips, recipe="causvid", frames_per_block=3)
    index = trainer._draw_index(torch.zeros(5, 16, 6, 2, 2), generators(list(range(5))), 100)
    assert index.shape == (5, 6)
    assert (index[:, :3] == index[:, :1]).all() and (index[:, 3:] == index[:, 3:4]).all()
    assert (index[:, 0] != index[:, 3]).any()


TEACHERS = ["lora", "full", "another model"]


@pytest.mark.parametrize("teacher", TEACHERS)
def test_a_causal_teacher_sees_the_context_of_the_student(tmp_path, cache_dir, clips, teacher):
    """A noisy block sees itself and the clean blocks before it, in the teacher too."""
    arguments = dict(teacher_model=other_size()) if teacher == "another model" else {}
    config = dict(recipe="causal-forcing", frames_per_block=1, ema_decay=0.9, lora=teacher != "full")
    trainer = make_trainer(tmp_path, cache_dir, rows=clips, trainer=arguments, **config)
    inputs = batch(trainer)
    x, sigma = torch.randn(2, 16, 3, 2, 2), torch.full((2, 3), 0.8)

    def velocity(role, clean, x=x):
        with torch.no_grad():
            return trainer._velocity(role, x, sigma, inputs["condition"], clean)

    for role in ("student", "teacher"):
        plain = velocity(role, inputs["mean"])
        for frame in range(3):
            clean = inputs["mean"].clone()
            clean[:, :, frame] += 1
            changed = (velocity(role, clean) - plain).abs().amax((0, 1, 3, 4)) > 1e-6
            assert changed.tolist() == [frame < i for i in range(3)], role
        other = x.clone()
        other[:, :, 1] += 1
        changed = (velocity(role, inputs["mean"], other) - plain).abs().amax((0, 1, 3, 4)) > 1e-6
        assert changed.tolist() == [False, True, False]
    trainer.train()


def test_discrete_consistency_by_hand(tmp_path, cache_dir, clips):
    config = dict(recipe="lcm", consistency_weighting="mse", ema_decay=0.9, teacher_guidance_scale=2.0)
    trainer = make_trainer(tmp_path, cache_dir, rows=clips, cls=Watched, **config)
    for seed, values in enumerate((trainer.average.average, trainer.policies.parameters("student"))):
        generator = torch.Generator().manual_seed(seed)
        for value in values.values():
            value.data.copy_(0.2 * torch.randn(value.shape, generator=generator))
    inputs = batch(trainer)
    trainer.seen.clear()
    own = weights(trainer)
    loss, _ = trainer.student_loss(inputs)
    assert distance(own, weights(trainer)) == 0  # the average went out again
    assert [role for role, *_ in trainer.seen] == ["teacher", "teacher", "student", "student"]
    (_, x, sigma, _), _, (_, x_next, sigma_next, _), (_, again, _, _) = trainer.seen
    assert torch.equal(x, again) and (sigma_next < sigma).all()
    grid = trainer.noise_levels(torch.linspace(1, 0, 51)[:-1]).tolist() + [0.0]
    for a, b in zip(sigma.tolist(), sigma_next.tolist(), strict=True):
        assert grid.index(a) + 1 == grid.index(b)
    velocity = trainer._teacher_velocity(x, sigma, inputs)
    step = (sigma_next - sigma).reshape(-1, 1, 1, 1, 1)
    torch.testing.assert_close(x_next, x + step * velocity)
    with torch.no_grad():
        prediction = trainer._student_x0(x, sigma, inputs["condition"], None)
        with trainer.average.swapped_in():
            target = trainer._student_x0(x_next, sigma_next, inputs["condition"], None)
        same = trainer._student_x0(x_next, sigma_next, inputs["condition"], None)
    assert loss.item() == pytest.approx((prediction - target).square().mean().item(), rel=1e-5)
    assert loss.item() != pytest.approx((prediction - same).square().mean().item(), rel=1e-2)  # the student's own


def test_the_last_interval_of_consistency_ends_at_the_clip(tmp_path, cache_dir, clips):
    """There the target is the point of the trajectory itself, which anchors all the others."""
    trainer = make_trainer(tmp_path, cache_dir, rows=clips, cls=Watched, recipe="lcm", teacher_steps=1, ema_decay=0.9)
    trainer.student_loss(batch(trainer))
    assert [sigma.tolist() for _, _, sigma, _ in trainer.seen][2:] == [[0.0, 0.0], [1.0, 1.0]]


@pytest.mark.parametrize("causal", [False, True], ids=["at once", "causal"])
def test_the_dmd_term_of_consistency_is_on_samples_from_noise(tmp_path, cache_dir, clips, causal):
    config = (
        dict(recipe="causal-forcing", frames_per_block=1)
        if causal
        else dict(recipe="rcm", tangent="jvp", tangent_warmup_steps=1)
    )
    trainer = make_trainer(tmp_path, cache_dir, rows=clips, dmd_weight=3.0, ema_decay=0.9, **config)
    inputs = batch(trainer)
    trainer.state.global_step = 1
    total, x = trainer.student_loss(inputs)
    sources = generators(inputs["draws"])
    of_clips = trainer._discrete_loss if causal else trainer._continuous_loss
    first = of_clips(inputs, sources)
    matching, again = trainer._matching_loss(inputs, sources)
    assert torch.equal(x, again)
    assert total.item() == pytest.approx((first + 3 * matching).item(), rel=1e-6)
    del inputs["mean"], inputs["std"]  # no clip is looked at
    trainer.rollout(inputs, sources, grad=False)


def test_both_tangents_train_alike(tmp_path, cache_dir, clips):
    gradients = {}
    for tangent in ("finite_difference", "jvp"):
        config = dict(recipe="rcm", dmd_weight=0.0, tangent=tangent, tangent_warmup_steps=1)
        trainer = make_trainer(tmp_path / tangent, cache_dir, rows=clips, **config)
        for p in trainer.policies.parameters("student").values():
            p.data.copy_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1)))
        trainer.student_loss(batch(trainer))[0].backward()
        gradients[tangent] = torch.cat([p.grad.flatten() for p in trainer.policies.parameters("student").values()])
    a, b = gradients.values()
    assert torch.cosine_similarity(a, b, dim=0) > 0.999


def test_the_derivative_s_share_grows(tmp_path, cache_dir, clips, monkeypatch):
    shares = []
    original = cm.scm_loss
    monkeypatch.setattr(cm, "scm_loss", lambda *args, r, **kwargs: shares.append(r) or original(*args, r=r, **kwargs))
    config = dict(recipe="rcm", dmd_weight=0.0, tangent_warmup_steps=3, max_steps=4)
    make_trainer(tmp_path, cache_dir, rows=clips, **config).train()
    assert shares == pytest.approx([1 / 3, 2 / 3, 1, 1])


@pytest.mark.parametrize("schedule, after", [("exclusive", ["F", "F", "S"]), ("every_step", ["F", "SF", "F"])])
def test_the_dmd_term_begins_after_the_warm_up(tmp_path, cache_dir, clips, schedule, after):
    """As in rCM's code: the first steps are the student's, without the term; then the turns begin."""
    config = dict(tangent_warmup_steps=3, fake_updates_per_student=2, critic_schedule=schedule, tangent="jvp")
    trainer = make_trainer(tmp_path, cache_dir, rows=clips, recipe="rcm", ema_decay=0.5, max_steps=6, **config)
    turns, original = [], trainer.exchange_gradients
    trainer.exchange_gradients = lambda roles, **kwargs: (turns.append(roles), original(roles, **kwargs))
    trainer.train()
    assert ["".join(role[0].upper() for role in roles) for roles in turns] == ["S", "S", "S", *after]
    assert trainer.average.num_updates == sum("student" in roles for roles in turns) == 4
    with_term = [bool(entry.get("dmd_gradient")) for entry in trainer.state.log_history if "loss" in entry]
    assert with_term == [False] * 3 + ["S" in turn for turn in after]


def test_clips_that_are_not_cached(tmp_path, cache_dir, clips):
    """Latents and conditions are made anew in every step, and are the same up to the cache's float16."""
    losses = {}
    for cache in (True, False):
        config = dict(recipe="lcm", dmd_weight=0.1, cache=cache, max_steps=4, ema_decay=0.9)
        trainer = make_trainer(tmp_path / str(cache), cache_dir, rows=clips, **config)
        trainer.train()
        losses[cache] = history(trainer, "loss")
    assert losses[True] == pytest.approx(losses[False], rel=1e-2)


# ---- Self Forcing ----


def test_self_forcing_has_one_gradient_step_a_block(tmp_path, cache_dir):
    trainer = make_trainer(tmp_path, cache_dir, recipe="self-forcing", frames_per_block=1)
    trainer.model.train()
    inputs, found = batch(trainer), calls(trainer)
    x, mask = trainer._stream_window(inputs, generators(inputs["draws"]), exit_step=2, grad=True)
    block = [("student", False)] * 2 + [("student", True)]
    store = [("student", False)]
    assert found == block + store + block + store + block and mask is None
    assert x.shape == (2, *inputs["condition"].latent_shape)


def test_keys_and_values_of_earlier_blocks_are_constants(tmp_path, cache_dir, monkeypatch):
    trainer = make_trainer(tmp_path, cache_dir, recipe="self-forcing", frames_per_block=1)
    drawn = []

    def leaf(shape, sources):
        drawn.append(randn(shape, sources).requires_grad_())
        return drawn[-1]

    monkeypatch.setattr("vidtrl.trainer.distill_trainer.randn", leaf)
    inputs = batch(trainer)
    x, _ = trainer._stream_window(inputs, generators(inputs["draws"]), exit_step=0, grad=True)
    x[:, :, -1].square().sum().backward()
    per_frame = drawn[0].grad.abs().amax((0, 1, 3, 4))
    assert per_frame[:-1].max() == 0 < per_frame[-1]
    drawn[0].data[:, :, 0] += 1  # control: the first block does matter to the last
    monkeypatch.setattr("vidtrl.trainer.distill_trainer.randn", lambda shape, sources: drawn[0].detach())
    y, _ = trainer._stream_window(inputs, generators(inputs["draws"]), exit_step=0, grad=False)
    assert (x - y)[:, :, -1].abs().max() > 1e-4


# ---- Streams ----


def test_streams_by_themselves():
    streams = Streams(num_frames=11, new_frames=2, keep=4, sink=1, prompt_switch=True)
    frames = torch.arange(11.0).reshape(1, 1, 11, 1, 1).expand(2, 1, 11, 1, 1)
    assert streams.next(0, [0, 1]) is None
    streams.begin(0, [0, 1], frames[:, :, :5], seed=3)
    stream, switched = streams.streams[0], []
    switch_at = stream.switch_at
    assert switch_at in (5, 7, 9)
    for position in (5, 7, 9):
        assert streams.next(0, [2, position]) is stream and stream.position == position
        switched.append(stream.rows != [0, 1])
        streams.extend(0, frames[:, :, position : position + 2])
        assert stream.tail[0, 0, :, 0, 0].tolist() == list(range(position - 2, position + 2))
        assert stream.sink[0, 0, :, 0, 0].tolist() == [0]
    assert switched == [position >= switch_at for position in (5, 7, 9)] and stream.rows == [2, switch_at]
    assert streams.next(0, [0, 1]) is None  # full
    streams.begin(0, [0, 1], frames[:, :, :5], seed=3)
    assert streams.next(0, [0]) is None  # a smaller batch
    assert streams.next(1, [0, 1]) is None
    positions = dict.fromkeys(range(20))
    for seed in positions:
        streams.begin(0, [0], frames[:1, :, :5], seed)
        positions[seed] = streams.streams[0].switch_at
    assert set(positions.values()) == {5, 7, 9}


@pytest.mark.parametrize("sink", [0, 1])
def test_streams_are_saved_whole(tmp_path, sink):
    streams = Streams(num_frames=11, new_frames=2, keep=4, sink=sink, prompt_switch=True)
    streams.save(tmp_path / "empty")
    streams.begin(0, [4, 2], torch.randn(2, 3, 5, 2, 2), seed=1)
    streams.begin(3, [1, 0], torch.randn(2, 3, 5, 2, 2), seed=2)
    streams.save(tmp_path / "file")
    other = Streams(num_frames=11, new_frames=2, keep=4, sink=sink, prompt_switch=True)
    other.load(tmp_path / "file", torch.device("cpu"))
    for number, stream in streams.streams.items():
        for field in dataclasses.fields(stream):
            a, b = (getattr(s.streams[number], field.name) for s in (streams, other))
            assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
    other.load(tmp_path / "empty", torch.device("cpu"))
    assert other.streams == {}


def test_a_video_is_continued_from_step_to_step(tmp_path, cache_dir):
    class Watching(VideoDistillTrainer):
        windows = []

        def _stream_window(self, inputs, sources, exit_step, grad):
            x, mask = super()._stream_window(inputs, sources, exit_step, grad)
            stream = self.streams.streams[self._micro_step]
            rows = list(stream.rows)
            condition = self.rollout_condition(inputs)
            self.windows.append((stream.position, rows, inputs["index"], x.detach(), mask, condition))
            return x, mask

    Watching.windows = []
    config = dict(gradient_accumulation_steps=2, per_device_train_batch_size=2, max_steps=7, prompt_switch=False)
    trainer = make_trainer(tmp_path, cache_dir, cls=Watching, **{**STREAMED, **config})
    trainer.train()
    assert [position for position, *_ in Watching.windows] == [p for p in (3, 5, 7, 3, 5, 7, 3) for _ in range(2)]
    assert len(trainer.streams.streams) == 2
    followed = False
    for position, rows, index, x, mask, condition in Watching.windows:
        if position == 3:
            start = rows
            assert rows == index and mask is None and x.shape[2] == 3
            continue
        assert mask.flatten().tolist() == [0, 1, 1] and x.shape[2] == 3
        stored = [trainer.train_dataset.dataset[row]["condition"][0] for row in rows]
        for sample, tensors in zip(condition.samples, stored, strict=True):
            text = tensors["0.encoder_hidden_states"]
            assert torch.equal(sample["encoder_hidden_states"][:, : text.shape[1]], text)
        followed |= rows != index
    assert followed and start


def test_prompts_are_switched_inside_a_video(tmp_path, cache_dir):
    class Watching(VideoDistillTrainer):
        rows = []

        def _stream_window(self, inputs, *args):
            result = super()._stream_window(inputs, *args)
            stream = self.streams.streams[self._micro_step]
            self.rows.append((stream.switch_at, list(stream.rows), inputs["index"]))
            return result

    Watching.rows = []
    make_trainer(tmp_path, cache_dir, cls=Watching, max_steps=9, **STREAMED).train()
    switches = 0
    for (planned, before, _), (switch_at, rows, index) in zip(Watching.rows, Watching.rows[1:], strict=False):
        if planned and not switch_at:
            assert rows == index
            switches += rows != before
        elif not switch_at:
            assert rows == before
    assert switches > 1 and [w[0] == 0 for w in Watching.rows[2::3]] == [True] * 3  # once in each video


def test_only_new_frames_are_judged(tmp_path, cache_dir):
    trainer = make_trainer(tmp_path, cache_dir, **STREAMED)
    loader, kept = [trainer.prepare_batch(inputs) for inputs in trainer.get_train_dataloader()], []
    rollout = trainer.rollout

    def watched(*args, **kwargs):
        x, mask = rollout(*args, **kwargs)
        x.retain_grad()
        kept.append((x, mask))
        return x, mask

    trainer.rollout = watched
    trainer.model.train()
    trainer.student_loss(loader[0])
    tail = trainer.streams.streams[0].tail.clone()
    trainer.student_loss(loader[1])[0].backward()
    x, mask = kept[1]
    per_frame = x.grad.abs().amax((0, 1, 3, 4))
    assert per_frame[0] == 0 and per_frame[1:].min() > 0 and mask.flatten().tolist() == [0, 1, 1]
    assert kept[0][0].grad is None  # the window before is a constant
    videos = trainer.video_model.decode(tail)
    expected, _ = trainer.video_model.encode([video[-1:] for video in videos])
    torch.testing.assert_close(x[:, :, 0], expected[:, :, 0])
    assert (x[:, :, 0] - tail[:, :, -1]).abs().max() > 1e-3  # control: a latent in a video is another than an image's


@pytest.mark.parametrize("context_noise", [0.0, 0.3])
def test_what_is_remembered_is_what_the_rollout_had_cached(tmp_path, cache_dir, context_noise):
    config = {**STREAMED, "window": None, "sink": 0, "context_noise": context_noise}
    trainer = make_trainer(tmp_path, cache_dir, **config)
    inputs = batch(trainer)
    condition, x = inputs["condition"], torch.randn(2, 16, 5, 2, 2)
    trainer.streams.begin(0, inputs["index"], x[:, :, :3], seed=0)
    trainer.streams.extend(0, x[:, :, 3:])
    caches = KVCache(), KVCache(), KVCache()
    with torch.no_grad():
        for i in range(5):
            block = x[:, :, i : i + 1]
            if context_noise:
                block = torch.lerp(block, noises()[i], context_noise)
            with trainer.causal.cached(caches[0], store=True):
                trainer.video_model.velocity(block, context_noise, condition)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("vidtrl.trainer.distill_trainer.randn", lambda shape, sources: next(sources))
            trainer._remember(trainer.streams.streams[0], caches[1], condition, iter(noises()))
        caches[2].reset(5)  # control: at the same position without a past
        outputs = []
        for cache in caches:
            with trainer.causal.cached(cache):
                outputs.append(trainer.video_model.velocity(x[:, :, :1], 0.9, condition))
    torch.testing.assert_close(outputs[1], outputs[0], rtol=0, atol=1e-5)
    assert (outputs[2] - outputs[0]).abs().max() > 1e-3


def noises():
    generator = torch.Generator().manual_seed(5)
    return [torch.randn(2, 16, 1, 2, 2, generator=generator) for _ in range(5)]


def test_the_sink_and_the_tail_are_at_their_positions(tmp_path, cache_dir):
    trainer = make_trainer(tmp_path, cache_dir, **{**STREAMED, "stream_num_frames": 9})
    x = torch.randn(2, 16, 7, 2, 2)
    inputs = batch(trainer)
    trainer.streams.begin(0, inputs["index"], x[:, :, :3], seed=0)
    for start in (3, 5):
        trainer.streams.extend(0, x[:, :, start : start + 2])
    stream, cache = trainer.streams.streams[0], KVCache(3, 1)
    assert stream.tail.shape[2] == 1 and torch.equal(stream.tail, x[:, :, 6:])
    trainer._remember(stream, cache, inputs["condition"], None)
    assert cache.num_frames == 7 and [(b.start, b.stop) for b in cache.blocks] == [(0, 1), (6, 7)]


def test_a_broken_video_is_not_continued(tmp_path, cache_dir):
    class Broken(VideoDistillTrainer):
        def fake_loss(self, inputs, x=None):
            loss, x = super().fake_loss(inputs, x)
            return (loss * float("nan") if self.state.global_step == 0 else loss), x

    config = dict(max_steps=1, on_nan="skip", **STREAMED)
    trainer = make_trainer(tmp_path, cache_dir, cls=Broken, **config)
    trainer.train()
    assert trainer.streams.streams == {}


def test_streams_resume_bit_exactly(tmp_path, cache_dir):
    config = dict(STREAMED, max_steps=7, save_strategy="steps", save_steps=5, gradient_accumulation_steps=2)
    config |= dict(per_device_train_batch_size=1)
    whole = make_trainer(tmp_path / "whole", cache_dir, **config)
    whole.train()
    assert (tmp_path / "whole" / "checkpoint-5" / "streams-0.safetensors").is_file()
    resumed = make_trainer(tmp_path / "resumed", cache_dir, **config)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-5"))
    for role in ("student", "fake"):
        assert digest(weights(resumed, role)) == digest(weights(whole, role))
    assert [s.position for s in resumed.streams.streams.values()] == [3, 3]
