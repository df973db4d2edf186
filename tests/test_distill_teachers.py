"""Teachers of all kinds, their trajectories, other model families, and mistakes that are refused."""

import copy

import pytest
import tiny_pipelines
import torch
from datasets import Dataset
from distill_setup import PROMPTS, dataset, distance, history, make_trainer, other_size, weights
from peft import LoraConfig
from sft_setup import SIZE, digest
from test_distill_trainer import batch
from tiny_pipelines import tiny_umt5, tiny_wan_vae, wan

from vidtrl import VideoSFTTrainer
from vidtrl.models import VideoModel
from vidtrl.models.causal import CausalAttention
from vidtrl.rollout import few_step_rollout
from vidtrl.trainer.distill_teacher import trajectory_grid, trajectory_names
from vidtrl.trainer.draws import draw_seed, generators, randn
from vidtrl.trainer.lora import add_lora, save_adapter


def guided(model, x, sigma, prompts, scale, **call):
    """The velocity of a pipeline, made with nothing of the trainer."""
    text = model.condition(prompts, **call)
    none = model.condition("", negative=True, **call)
    with torch.no_grad():
        v, u = model.velocity(x, sigma, text), model.velocity(x, sigma, none)
    return u + scale * (v - u)


def prompts_of(inputs) -> list[str]:
    return [PROMPTS[row] for row in inputs["index"]]


# ---- Separate teachers ----


def other_text_encoder():
    torch.manual_seed(7)
    encoder = tiny_umt5()
    with torch.no_grad():
        encoder.shared.weight.add_(torch.randn(encoder.shared.weight.shape))
    return other_size(text_encoder=encoder)


@pytest.mark.parametrize("lora", [True, False], ids=["lora", "full"])
@pytest.mark.parametrize("make", [other_size, other_text_encoder])
def test_a_teacher_of_its_own(tmp_path, cache_dir, make, lora):
    config = dict(teacher_guidance_scale=3.0, lora=lora)
    trainer = make_trainer(tmp_path, cache_dir, trainer=dict(teacher_model=make()), **config)
    inputs = batch(trainer)
    x, sigma = torch.randn(2, 16, 3, 2, 2), torch.tensor([0.4, 0.8])
    with torch.no_grad():
        found = trainer._teacher_velocity(x, sigma, inputs)
    torch.testing.assert_close(found, guided(VideoModel(make()), x, sigma, prompts_of(inputs), 3.0, **SIZE))
    assert (found - guided(VideoModel(wan()[0]), x, sigma, prompts_of(inputs), 3.0, **SIZE)).abs().max() > 1e-2
    assert ("teacher_condition" in inputs) == (make is other_text_encoder)
    teacher = trainer.policies._roles["teacher"].module
    before = digest(teacher.state_dict())
    trainer.train()
    assert digest(teacher.state_dict()) == before and not any(p.requires_grad for p in teacher.parameters())
    modules = {id(role.module) for role in trainer.policies._roles.values()}
    assert len(modules) == (2 if lora else 3)
    assert trainer.teacher.offloaded  # text encoder and VAE have left memory


def test_a_teacher_from_a_path(tmp_path, cache_dir):
    other_size().save_pretrained(tmp_path / "teacher")
    trainer = make_trainer(tmp_path / "run", cache_dir, trainer=dict(teacher_model=str(tmp_path / "teacher")))
    assert len(trainer.teacher.denoisers["transformer"].blocks) == 3 and trainer.teacher.pipe.vae is None
    trainer.train()
    assert trainer.evaluate(dataset(2))["eval_loss"] > 0


def test_a_teacher_that_is_told_other_things_gets_its_own_conditions(tmp_path, cache_dir):
    """The same encoders, but a transformer whose rotary embedding the pipeline computes."""
    size = dict(height=16, width=16, num_frames=9)
    student, teacher = tiny_pipelines.cogvideox()[0], tiny_pipelines.cogvideox()[0]
    parts, _ = tiny_pipelines._cogvideox_parts(attention_head_dim=16, use_rotary_positional_embeddings=True)
    teacher.register_modules(transformer=parts["transformer"])
    trainer = make_trainer(tmp_path, cache_dir, pipe=student, trainer=dict(teacher_model=teacher), **size)
    inputs = batch(trainer)
    assert "image_rotary_emb" in inputs["teacher_condition"].shared
    assert "image_rotary_emb" not in inputs["condition"].shared
    trainer.train()


def other_vae():
    pipe = wan()[0]
    vae = copy.deepcopy(pipe.vae)
    with torch.no_grad():
        next(vae.parameters()).add_(1)
    pipe.register_modules(vae=vae)
    return pipe


def other_normalisation():
    pipe = wan()[0]
    pipe.vae.register_to_config(latents_std=[2.0] * 16)
    return pipe


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: tiny_pipelines.wan22_ti2v()[0], "spatial factor 16 instead of 8"),
        (lambda: tiny_pipelines.ltx()[0], "do not share a latent space"),
        (lambda: tiny_pipelines.hunyuan()[0], "4 channels instead of 16"),
        (other_normalisation, "another normalisation of the latents"),
        (other_vae, "a VAE with other weights.*Take a teacher with the student's VAE"),
        (lambda: tiny_pipelines.wan22()[0], "two experts.*a teacher has one denoiser"),
    ],
)
def test_a_teacher_with_other_latents_is_refused(tmp_path, cache_dir, make, message):
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, cache_dir, trainer=dict(teacher_model=make()))


def test_the_student_as_its_own_teacher_model_is_refused(tmp_path, cache_dir):
    pipe = wan()[0]
    with pytest.raises(ValueError, match="the student's own denoiser: leave it out"):
        make_trainer(tmp_path, cache_dir, pipe=pipe, trainer=dict(teacher_model=pipe))


# ---- Adapters of earlier stages ----


@pytest.fixture
def policy(tmp_path):
    """What an earlier stage leaves."""
    model = add_lora(wan()[0].transformer, LoraConfig(r=4, lora_alpha=8))
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    (tmp_path / "policy").mkdir()
    save_adapter(model, tmp_path / "policy")
    return str(tmp_path / "policy")


def test_the_teacher_is_the_model_after_earlier_stages(tmp_path, cache_dir, policy):
    trainer = make_trainer(tmp_path / "run", cache_dir, base_adapters=[policy], teacher_guidance_scale=3.0)
    inputs = batch(trainer)
    merged = wan()[0]
    merged.load_lora_weights(policy)
    merged.fuse_lora()
    merged.unload_lora_weights()
    x, sigma = torch.randn(2, 16, 3, 2, 2), torch.tensor([0.4, 0.8])
    expected = guided(VideoModel(merged), x, sigma, prompts_of(inputs), 3.0, **SIZE)
    with torch.no_grad():
        found = trainer._teacher_velocity(x, sigma, inputs)
        student = trainer._velocity("student", x, sigma, inputs["condition"])
        plain = VideoModel(merged).velocity(x, sigma, inputs["condition"])
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(student, plain, rtol=0, atol=1e-5)  # where it starts
    frozen = {n: p.detach().clone() for n, p in trainer.model.named_parameters() if "base_0" in n}
    trainer.train()
    assert frozen and all(torch.equal(p, frozen[n]) for n, p in trainer.model.named_parameters() if n in frozen)


def test_a_student_that_starts_from_an_adapter(tmp_path, cache_dir, policy):
    trainer = make_trainer(tmp_path / "run", cache_dir, init_adapter=policy, ema_decay=0.9)
    inputs = batch(trainer)
    x, sigma = torch.randn(2, 16, 3, 2, 2), torch.tensor([0.4, 0.8])
    loaded = wan()[0]
    loaded.load_lora_weights(policy)
    with torch.no_grad():
        expected = VideoModel(loaded).velocity(x, sigma, inputs["condition"])
        outputs = {
            role: trainer._velocity(role, x, sigma, inputs["condition"]) for role in ("student", "fake", "teacher")
        }
        torch.testing.assert_close(outputs["student"], expected, rtol=0, atol=1e-6)
        with trainer.average.swapped_in():
            averaged = trainer._velocity("student", x, sigma, inputs["condition"])
    assert torch.equal(averaged, outputs["student"])
    assert torch.equal(outputs["fake"], outputs["teacher"])  # it is no part of these
    assert (outputs["student"] - outputs["teacher"]).abs().max() > 1e-2
    trainer.train()


def test_an_adapter_that_would_mean_something_else_is_refused(tmp_path, cache_dir, policy):
    with pytest.raises(ValueError, match=r"lora_alpha=8 \(this run has 4\): pass that in peft_config"):
        make_trainer(tmp_path / "1", cache_dir, init_adapter=policy, lora=LoraConfig(r=4, lora_alpha=4))
    with pytest.raises(ValueError, match="there is no pytorch_lora_weights.safetensors in"):
        make_trainer(tmp_path / "2", cache_dir, init_adapter=str(tmp_path))
    with pytest.raises(ValueError, match=r"the one adapter .*base_adapters=\[...\] .*add_weighted_adapter"):
        make_trainer(tmp_path / "5", cache_dir, init_adapter=[policy, policy])
    with pytest.raises(ValueError, match="pass peft_config as well"):
        make_trainer(tmp_path / "3", cache_dir, init_adapter=policy, lora=False)
    with pytest.raises(ValueError, match="pass a peft_config to train another one on top"):
        make_trainer(tmp_path / "4", cache_dir, base_adapters=[policy], lora=False)


def test_an_adapter_with_the_name_of_the_fake_score_is_refused(tmp_path, cache_dir, policy):
    pipe = wan()[0]
    pipe.load_lora_weights(policy, adapter_name="fake")
    with pytest.raises(ValueError, match="'fake' is the name of the fake score's adapter.*another adapter_name"):
        make_trainer(tmp_path / "run", cache_dir, pipe=pipe)


# ---- Trajectories ----


def test_trajectories_by_hand_once_and_again_after_resuming(tmp_path, cache_dir):
    config = dict(loss_type="ode_regression", teacher_steps=8, teacher_guidance_scale=2.0, max_steps=6)
    config |= dict(save_strategy="steps", save_steps=3)
    made = []

    def watch(trainer):
        original = trainer._teacher_trajectories
        trainer._teacher_trajectories = lambda inputs, which: (
            made.extend(inputs["index"][i] for i in which) or original(inputs, which)
        )
        return trainer

    whole = watch(make_trainer(tmp_path / "run", cache_dir, **config))
    whole.train()
    assert sorted(made) == [0, 1, 2, 3]  # in three epochs
    resumed = watch(make_trainer(tmp_path / "run", cache_dir, **config))
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-3"))
    assert len(made) == 4 and digest(weights(resumed)) == digest(weights(whole))
    changed = watch(make_trainer(tmp_path / "run", cache_dir, **{**config, "teacher_guidance_scale": 3.0}))
    changed.train()
    assert len(made) == 8

    inputs = batch(whole)
    assert len(list(whole.trajectories.directory.glob("*.safetensors"))) == 4
    states = whole._teacher_trajectories(inputs, [1])
    row, model = inputs["index"][1], VideoModel(wan()[0])
    grid, where = trajectory_grid([1000, 750, 500, 250], 8)
    sigmas = [3 * u / (1 + 2 * u) for u in grid.tolist()]
    x, expected = randn((16, 3, 2, 2), generators([draw_seed(whole.args.seed, row)])), []
    for i, sigma in enumerate(sigmas):
        expected += [x] if i in where else []
        if sigma:
            v = guided(model, x, sigma, [PROMPTS[row]], 2.0, **SIZE)
            x = x + (sigmas[i + 1] - sigma) * v
    torch.testing.assert_close(states, torch.stack(expected, 1), rtol=1e-4, atol=1e-5)
    assert states.shape == (1, 5, 16, 3, 2, 2)
    # what is trained on is what was made, in float16
    stored = whole.trajectories.get(trajectory_names(inputs["index"], inputs["condition"]), None)
    torch.testing.assert_close(stored[1], states[0], rtol=1e-3, atol=1e-3)


def test_held_out_prompts_have_trajectories_of_their_own(tmp_path, cache_dir):
    config = dict(loss_type="ode_regression", teacher_steps=4)
    trainer = make_trainer(tmp_path, cache_dir, **config)
    trainer.train()
    other = Dataset.from_list([{"prompt": "the robot"}, {"prompt": "a fast dog"}])
    losses = [trainer.evaluate(rows)["eval_loss"] for rows in (other, dataset(2), other)]
    assert losses[0] == losses[2] != losses[1]
    assert len(list(trainer.trajectories.directory.glob("*.safetensors"))) == 6


@pytest.mark.parametrize("causal", ["diffusion_forcing", "teacher_forcing"])
def test_causal_regression(tmp_path, cache_dir, causal):
    config = dict(loss_type="ode_regression", teacher_steps=4, causal=causal, frames_per_block=1, shift=5.0)
    trainer = make_trainer(tmp_path, cache_dir, **config)
    trainer.train()
    assert history(trainer, "loss")[0] > 0 and trainer.generate_videos(PROMPTS[:1], [0])[0].shape[0] == 9


def test_the_stages_of_a_streaming_student(tmp_path, cache_dir, clips):
    """Causal fine-tuning, then Self Forcing from its adapter, with the bidirectional base as teacher."""
    from sft_setup import make_args as sft_args

    args = sft_args(tmp_path / "sft", cache_dir, causal="teacher_forcing", frames_per_block=1, max_steps=2)
    sft = VideoSFTTrainer(wan()[0], args, clips, peft_config=LoraConfig(r=4, lora_alpha=8))
    sft.train(), sft.save_model()
    config = dict(recipe="self-forcing", frames_per_block=1, init_adapter=str(tmp_path / "sft"))
    trainer = make_trainer(tmp_path / "run", cache_dir, **config)
    ours, theirs = (list(weights.values()) for weights in (weights(trainer), sft_weights(sft)))
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    trainer.train()


def sft_weights(trainer):
    return {n: p.detach() for n, p in trainer.model.named_parameters() if p.requires_grad}


# ---- Families ----


def rows_for(call) -> Dataset:
    return Dataset.from_list([{"prompt": p, **({"image": call["image"]} if "image" in call else {})} for p in PROMPTS])


@pytest.mark.parametrize(
    "family", ["ltx", "cogvideox", "wan_i2v", "skyreels", "mochi", "kandinsky5", "wan22_ti2v_i2v"]
)
def test_families(tmp_path, cache_dir, family):
    pipe, call = getattr(tiny_pipelines, family)()
    config = {name: call[name] for name in ("height", "width", "num_frames")}
    trainer = make_trainer(tmp_path, cache_dir, pipe=pipe, rows=rows_for(call), max_steps=4, **config)
    before = weights(trainer)
    trainer.train()
    assert distance(before, weights(trainer)) > 1e-4
    images = [call["image"]] if "image" in call else None
    videos = [trainer.generate_videos(PROMPTS[:1], [seed], images)[0] for seed in (1, 1, 2)]
    assert torch.equal(videos[0], videos[1]) and not torch.equal(videos[0], videos[2])
    assert videos[0].shape[0] == call["num_frames"]
    assert trainer.evaluate(rows_for(call).select([0]))["eval_loss"] > 0


def test_a_vp_student_is_sampled_at_its_timesteps(tmp_path, cache_dir):
    pipe, call = tiny_pipelines.cogvideox()
    config = {name: call[name] for name in ("height", "width", "num_frames")}
    trainer = make_trainer(tmp_path, cache_dir, pipe=pipe, **config)
    trainer.train()
    assert trainer.sigmas[0] == 1.0 and all(a > b for a, b in zip(trainer.sigmas, trainer.sigmas[1:], strict=False))
    model, source = trainer.video_model, [torch.Generator().manual_seed(3)]
    condition = batch(trainer)["condition"][:1]
    prompt = PROMPTS[batch(trainer)["index"][0]]
    native = model.pack(torch.zeros(1, *condition.latent_shape)).shape

    def draw(step=0):
        return model.unpack(torch.randn(native, generator=source[0]), condition.latent_shape)

    with torch.no_grad():
        x = few_step_rollout(model, condition, draw(), trainer.sigmas, draw=draw)
    video = trainer.generate_videos([prompt], [3])[0]
    model.restore_encoders()
    torch.testing.assert_close(model.decode(x)[0], video, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "family, shift", [("ltx", "auto"), ("kandinsky5", "auto"), ("wan", 5.0), ("wan22_ti2v", "auto")]
)
def test_the_pipeline_visits_the_noise_levels_of_training(tmp_path, cache_dir, family, shift):
    pipe, call = getattr(tiny_pipelines, family)()
    config = {name: call[name] for name in ("height", "width", "num_frames")}
    trainer = make_trainer(tmp_path, cache_dir, pipe=pipe, denoising_steps=[1000, 700, 400], shift=shift, **config)
    seen, original = [], trainer.video_model.denoisers["transformer"].forward

    def forward(*args, **kwargs):
        seen.append(kwargs["timestep"].flatten()[0].item() / 1000)
        return original(*args, **kwargs)

    trainer.video_model.denoisers["transformer"].forward = forward
    trainer.generate_videos(PROMPTS[:1], [0])
    assert seen == pytest.approx(trainer.sigmas, abs=1e-3 if family == "kandinsky5" else 1e-4)
    seen.clear()
    with torch.no_grad():
        trainer._few_steps(batch(trainer)["condition"], generators([0, 1]))
    assert seen == pytest.approx(trainer.sigmas, abs=1e-4)


def test_guidance_of_image_to_video_keeps_the_image(tmp_path, cache_dir):
    pipe, call = tiny_pipelines.wan_i2v()
    trainer = make_trainer(tmp_path, cache_dir, pipe=pipe, rows=rows_for(call))
    inputs = batch(trainer)
    both = inputs["condition"].samples[0], inputs["negative_condition"].samples[0]
    assert torch.equal(both[0]["hidden_states"], both[1]["hidden_states"])
    assert not torch.equal(both[0]["encoder_hidden_states"], both[1]["encoder_hidden_states"])


@pytest.mark.parametrize("family", ["wan22_ti2v_i2v", "cogvideox"])
def test_consistency_of_other_families(tmp_path, cache_dir, clips, family):
    """Also in the last interval, where given frames have no velocity."""
    pipe, call = getattr(tiny_pipelines, family)()
    config = {name: call[name] for name in ("height", "width", "num_frames")} | dict(recipe="lcm", ema_decay=0.9)
    trainer = make_trainer(tmp_path, cache_dir, pipe=pipe, rows=clips, teacher_steps=2, max_steps=4, **config)
    before = weights(trainer)
    trainer.train()
    assert all(loss > 0 for loss in history(trainer, "loss")) and distance(before, weights(trainer)) > 1e-4


def test_buckets(tmp_path, cache_dir, clips):
    config = dict(
        recipe="lcm", ema_decay=0.9, height=None, width=None, num_frames=None, buckets=["9x16x16", "5x32x16"]
    )
    config |= dict(max_steps=3, per_device_train_batch_size=1, validation_steps=3, num_validation_videos=1)
    trainer = make_trainer(tmp_path, cache_dir, rows=clips, **config)
    trainer.train()
    pipe, call = tiny_pipelines.wan_i2v()
    rows = clips.map(lambda row: row)
    trainer = make_trainer(tmp_path / "image", cache_dir, pipe=pipe, rows=rows, **config)
    trainer.train()
    assert list((tmp_path / "image" / "validation" / "step_000003").glob("*.mp4"))
    pipe, call = tiny_pipelines.ltx()
    config |= dict(buckets=["9x32x32"], validation_steps=None)
    with pytest.raises(ValueError, match="depends on the size.*set shift to a number"):
        make_trainer(tmp_path / "ltx", cache_dir, pipe=pipe, rows=clips, **config)
    make_trainer(tmp_path / "ltx", cache_dir, pipe=pipe, rows=clips, shift=3.0, **config).train()


@pytest.mark.parametrize("family", ["ltx", "skyreels", "wan22_ti2v"])
def test_causal_families(tmp_path, cache_dir, family):
    pipe, call = getattr(tiny_pipelines, family)()
    config = {name: call[name] for name in ("height", "width", "num_frames")}
    config |= dict(recipe="self-forcing", frames_per_block=1, gradient_checkpointing=True)
    trainer = make_trainer(tmp_path, cache_dir, pipe=pipe, **config)
    trainer.train()
    videos = trainer.generate_videos(PROMPTS[:2], [1, 2], batch_size=2)
    alone = trainer.generate_videos(PROMPTS[1:2], [2])[0]
    torch.testing.assert_close(videos[1], alone, rtol=0, atol=1e-4)


# ---- Mistakes ----


@pytest.mark.parametrize(
    "config, message",
    [
        (dict(recipe="self-forcin"), "no recipe 'self-forcin'; did you mean 'self-forcing'"),
        (dict(recipe="x"), r"no recipe 'x'\. Valid names: dmd2"),
        (dict(loss_type="gan"), "loss_type must be one of 'dmd', 'sid', 'consistency', 'ode_regression', not 'gan'"),
        (dict(denoising_steps=[1000, 250, 500]), "strictly decreasing.*sort them"),
        (dict(denoising_steps=[1000, 0]), "leave the final 0 out"),
        (dict(shift="big"), "shift must be 'auto' or a positive number"),
        (dict(shift=-1.0), "shift must be 'auto' or a positive number"),
        (dict(score_range=[0.9, 0.1]), "score_range must be two increasing noise levels"),
        (dict(fake_updates_per_student=0), "fake_updates_per_student must be at least 1"),
        (dict(loss_type="sid", rollout="data"), "set rollout='backward_simulation'"),
        (dict(loss_type="consistency"), "learns from clips: set rollout='data'"),
        (dict(recipe="self-forcing", loss_type="ode_regression"), "causal='diffusion_forcing' for a causal student"),
        (dict(causal="teacher_forcing", frames_per_block=1), "set rollout='self_forcing' and leave causal unset"),
        (dict(recipe="self-forcing", causal="teacher_forcing"), "leave causal unset"),
        (dict(rollout="self_forcing"), "needs frames_per_block, such as 3"),
        (dict(frames_per_block=3), "are for causal students"),
        (dict(recipe="longlive", window=6, sink=3), "window=6 must hold.*at least 9"),
        (dict(recipe="longlive", window=11), "window=11 must be a multiple of frames_per_block=3"),
        (dict(recipe="longlive", stream_overlap=0), "stream_overlap=0 must be at least one block"),
        (dict(recipe="causvid", window=9), "window and sink are for rollout='self_forcing'"),
        (dict(recipe="self-forcing", prompt_switch=True), "prompt_switch needs stream_num_frames"),
        (dict(stream_num_frames=9), "set rollout='self_forcing'"),
        (dict(recipe="self-forcing", context_noise=1.0), r"context_noise is a noise level in \[0, 1\)"),
        (dict(recipe="rcm", time_distribution=[0.7]), "a mean and a positive standard deviation"),
        (dict(recipe="rcm", dmd_weight=-1.0), "dmd_weight must not be negative"),
        (dict(dmd_weight=1.0), "dmd_weight is the weight of a term beside"),
        (dict(recipe="lcm", ema_decay=0.0), "consistency_target='ema' needs ema_decay"),
        (dict(recipe="causal-forcing", consistency="continuous"), "set consistency='discrete'"),
        (dict(fp16=True), "fp16 overflows.*use bf16=True"),
    ],
)  # fmt: skip
def test_refused_configurations(tmp_path, cache_dir, config, message):
    from distill_setup import make_args

    with pytest.raises(ValueError, match=message):
        make_args(tmp_path, cache_dir, **{"ema_decay": 0.9, **config})


@pytest.mark.parametrize(
    "family, config, message",
    [
        ("wan", dict(recipe="self-forcing", frames_per_block=2), r"3 latent frames \(9 video frames\) do not divide.*nearest"),
        ("cogvideox", dict(recipe="self-forcing", frames_per_block=1), "CogVideoXPipeline cannot be made causal"),
        ("wan_i2v", dict(recipe="self-forcing", frames_per_block=1), "use the text-to-video pipeline"),
        ("wan22", dict(), "two experts here.*distil a model with one denoiser"),
        ("hunyuan", dict(), "guidance is distilled into this HunyuanVideoPipeline: set teacher_guidance_scale=1.0"),
        ("wan", dict(recipe="longlive", **{"frames_per_block": 3, "stream_overlap": 3}), "must bring new frames"),
        ("wan", dict(recipe="longlive", frames_per_block=1, stream_overlap=1, window=4, sink=1, stream_num_frames=4),
         "no second window.*at least 5"),
        ("wan", dict(recipe="longlive", frames_per_block=1, stream_overlap=1, window=4, sink=1), "the 32 positions"),
        ("wan", dict(num_frames=10), "the nearest is 9"),
        ("wan", dict(resolution=[16], height=None, width=None), "are for clips: set height, width and num_frames"),
    ],
)  # fmt: skip
def test_refused_models(tmp_path, cache_dir, family, config, message):
    pipe, call = getattr(tiny_pipelines, family)()
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, cache_dir, pipe=pipe, rows=rows_for(call), **config)


@pytest.mark.parametrize(
    "lora, message",
    [
        (LoraConfig(r=4, lora_dropout=0.1), "lora_dropout must be 0"),
        (LoraConfig(r=4, bias="all"), "weights that the roles share"),
        (LoraConfig(r=4, init_lora_weights="pissa"), "init_lora_weights='pissa' changes the base"),
    ],
)
def test_refused_adapters(tmp_path, cache_dir, lora, message):
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, cache_dir, lora=lora)


def test_continuous_consistency_needs_exact_arithmetic(tmp_path, cache_dir, clips):
    with pytest.raises(ValueError, match="needs float32.*tangent='jvp'"):
        make_trainer(tmp_path, cache_dir, rows=clips, recipe="rcm", bf16=True)
    pipe, _ = tiny_pipelines.cogvideox()
    with pytest.raises(ValueError, match="set consistency='discrete'"):
        make_trainer(tmp_path, cache_dir, pipe=pipe, rows=clips, recipe="rcm")


def test_consistency_without_clips_is_refused(tmp_path, cache_dir):
    with pytest.raises(ValueError, match="video"):
        make_trainer(tmp_path, cache_dir, recipe="lcm", ema_decay=0.9)


def test_refused_arguments(tmp_path, cache_dir):
    from sft_setup import make_args as sft_args

    from vidtrl import VideoDistillTrainer

    with pytest.raises(TypeError, match="must be a VideoDistillConfig, not VideoSFTConfig"):
        VideoDistillTrainer(wan()[0], args=sft_args(tmp_path, cache_dir), train_dataset=dataset())
    with pytest.raises(ValueError, match="train_dataset is required: a datasets.Dataset with the column prompt"):
        VideoDistillTrainer(wan()[0])


def test_roles_share_the_causal_state_of_copies():
    model = VideoModel(wan()[0])
    causal = CausalAttention(model)
    twin = causal.copied(model.denoisers["transformer"])
    condition, x = model.condition(PROMPTS[:1], **SIZE), torch.randn(1, 16, 3, 2, 2)
    with torch.no_grad():
        plain = model.velocity(x, 0.5, condition, denoiser=twin)
        with causal.block_causal(1):
            ours, theirs = model.velocity(x, 0.5, condition), model.velocity(x, 0.5, condition, denoiser=twin)
    assert torch.equal(ours, theirs) and (ours - plain).abs().max() > 1e-4
    assert twin.blocks[0].attn1.to_q.weight is not model.denoisers["transformer"].blocks[0].attn1.to_q.weight


def test_vae_of_tiny_pipelines_is_seeded():
    """What the comparison of latent spaces rests on in these tests."""
    assert digest(tiny_wan_vae().state_dict()) == digest(wan()[0].vae.state_dict())
