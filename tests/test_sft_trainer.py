"""VideoSFTTrainer: the loss, every option, and bad input."""

import json
import math
import re

import pytest
import tiny_pipelines
import torch
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from safetensors import safe_open
from sft_setup import SIZE, digest, make_args, make_trainer, trained_weights, write_clips
from tiny_pipelines import wan

from vidtrl import VideoSFTConfig, VideoSFTTrainer
from vidtrl.diffusion import flow
from vidtrl.toy.world import render
from vidtrl.trainer.checkpoint import weights_fingerprint
from vidtrl.trainer.clip_data import collate
from vidtrl.trainer.draws import DrawDataset, DrawSampler, draw_seed, generators, randn
from vidtrl.trainer.ema import WeightAverage


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


# ---- The loss ----


def test_loss_is_the_flow_matching_error(clips, cache_dir, tmp_path):
    trainer = make_trainer(tmp_path, clips, cache_dir, caption_dropout=0.0)
    batch = collate([trainer.train_dataset[(i, 100 + i)] for i in (0, 3)])
    loss, outputs = trainer.compute_loss(trainer.model, batch, return_outputs=True)

    expected = []
    for row in range(2):  # by hand, one clip at a time, through the transformer itself
        source = generators(batch["draws"])[row]
        x0 = batch["mean"][row] + batch["std"][row] * torch.randn(batch["mean"][row].shape, generator=source)
        noise = torch.randn(x0.shape, generator=source)
        u = flow.sample_u("logit_normal", 1, generators(batch["draws"])[row])
        sigma = 3 * u / (1 + 2 * u)  # the scheduler's shift is 3
        out = trainer.video_model.pipe.transformer(
            hidden_states=((1 - sigma) * x0 + sigma * noise)[None],
            timestep=sigma * 1000,
            encoder_hidden_states=batch["condition"].samples[row]["encoder_hidden_states"],
            return_dict=False,
        )[0][0]
        expected.append((out - (noise - x0)).square().mean())
        assert outputs["sigma"][row] == pytest.approx(sigma.item(), rel=1e-6)
    torch.testing.assert_close(outputs["error"], torch.stack(expected), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(loss, torch.stack(expected).mean(), rtol=1e-5, atol=1e-6)
    assert loss.dtype == torch.float32


def test_training_lowers_the_held_out_loss(clips, cache_dir, tmp_path):
    trainer = make_trainer(tmp_path, clips, cache_dir, eval_clips=clips, max_steps=30, per_device_train_batch_size=3)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < 0.97 * before


def test_posterior_is_sampled_afresh(clips, cache_dir, tmp_path):
    trainer = make_trainer(tmp_path, clips, cache_dir)
    errors = set()
    for draw in (1, 1, 2):
        batch = collate([trainer.train_dataset[(0, draw)]])
        errors.add(trainer.compute_loss(trainer.model, batch).item())
    assert len(errors) == 2  # the same draw gives the same loss, another one another


def test_caption_dropout(clips, cache_dir, tmp_path):
    trainer = make_trainer(tmp_path, clips, cache_dir, caption_dropout=0.3)
    items = [trainer.train_dataset[(1, draw_seed(0, i))] for i in range(400)]
    dropped = [item for item in items if item["prompt"] == ""]
    assert 0.2 < len(dropped) / len(items) < 0.4

    def text(item):
        return collate([item])["condition"].samples[0]["encoder_hidden_states"]

    empty = trainer.video_model
    empty.restore_encoders()
    expected = empty.condition("", **SIZE).samples[0]["encoder_hidden_states"]
    kept = next(item for item in items if item["prompt"])
    torch.testing.assert_close(text(dropped[0]), expected)
    assert not torch.allclose(text(kept), expected)
    never = make_trainer(tmp_path / "never", clips, cache_dir, caption_dropout=0.0)
    assert all(never.train_dataset[(1, draw_seed(0, i))]["prompt"] for i in range(100))


def test_dropped_captions_change_the_uncached_condition_too(clips, cache_dir, tmp_path):
    trainer = make_trainer(tmp_path, clips, cache_dir, caption_dropout=1.0, cache=False)
    _, _, condition = trainer.clean_latents(collate([trainer.train_dataset[(1, 5)]]))
    expected = trainer.video_model.condition("", **SIZE)
    torch.testing.assert_close(
        condition.samples[0]["encoder_hidden_states"], expected.samples[0]["encoder_hidden_states"]
    )


def test_cache_hit_equals_cache_miss(clips, tmp_path):
    digests = []
    for name in ("miss", "hit"):
        trainer = make_trainer(tmp_path / name, clips, tmp_path / "cache")
        trainer.train()
        digests.append(digest(trained_weights(trainer)))
    assert digests[0] == digests[1]


def test_uncached_equals_cached_up_to_the_cache_precision(clips, cache_dir, tmp_path):
    cached = make_trainer(tmp_path / "cached", clips, cache_dir)
    uncached = make_trainer(tmp_path / "uncached", clips, cache_dir, cache=False)
    assert cached.video_model.pipe.text_encoder is None and uncached.video_model.pipe.text_encoder is not None
    cached.train(), uncached.train()
    assert losses(uncached) == pytest.approx(losses(cached), rel=2e-3)  # float16 posterior


def test_validation_and_evaluation_leave_no_trace(clips, cache_dir, tmp_path):
    watching = dict(
        eval_clips=clips.select(range(2)),
        eval_strategy="steps",
        eval_steps=1,
        validation_steps=1,
        validation_prompts=["a red circle"],
        validation_num_inference_steps=1,
    )
    digests = []
    for name, config in (("plain", {}), ("watched", watching)):
        # dropout draws from the process's generator
        lora = LoraConfig(r=4, lora_alpha=8, lora_dropout=0.3)
        trainer = make_trainer(tmp_path / name, clips, cache_dir, lora=lora, **config)
        trainer.train()
        digests.append(digest(trained_weights(trainer)))
    assert digests[0] == digests[1]


@given(seed=st.integers(0, 2**31), epoch=st.integers(0, 1000), position=st.integers(0, 10**6))
@settings(max_examples=50, deadline=None)
def test_draws_belong_to_samples(seed, epoch, position):
    key = draw_seed(seed, epoch, position)
    assert 0 <= key < 2**63
    assert key != draw_seed(seed, epoch, position + 1) and key != draw_seed(seed, epoch + 1, position)
    alone, together = randn((3,), generators([key])), randn((3,), generators([1, key]))
    assert torch.equal(alone[0], together[1])


# ---- Every option trains ----

OPTIONS = {
    "defaults": {},
    "full": dict(lora=False),
    "dora": dict(lora=LoraConfig(r=4, lora_alpha=8, use_dora=True)),
    "named targets": dict(lora=LoraConfig(r=4, target_modules=["to_q", "to_v"])),
    "all-linear": dict(lora=LoraConfig(r=2, target_modules="all-linear")),
    "uniform": dict(sigma_sampling="uniform"),
    "mode": dict(sigma_sampling="mode"),
    "shift": dict(shift=1.0),
    "shift as text": dict(shift="5"),
    "cosmap": dict(loss_weighting="cosmap"),
    "min_snr": dict(loss_weighting="min_snr"),
    "bell": dict(loss_weighting="bell"),
    "no dropout": dict(caption_dropout=0.0),
    "ema": dict(ema_decay=0.99),
    "ema full": dict(ema_decay=0.99, lora=False),
    "gradient checkpointing": dict(gradient_checkpointing=True),
    "gradient checkpointing full": dict(gradient_checkpointing=True, lora=False),
    "bf16": dict(bf16=True),
    "bf16 full": dict(bf16=True, lora=False),
    "uncached": dict(cache=False),
    "skip nan": dict(on_nan="skip"),
    "buckets": dict(height=None, width=None, num_frames=None, buckets=["5x16x16", "9x16x16"]),
    "resolution": dict(height=None, width=None, num_frames=9, resolution=[16]),
    "token budget": dict(height=None, width=None, num_frames=None, resolution=[16], token_budget=12),
    "all windows": dict(num_frames=5, windows="all"),
    "center window": dict(num_frames=5, windows="center"),
    "fps": dict(num_frames=5, fps=4),
    "no clips lost": dict(max_bad_fraction=0.0),
    "pipeline kwargs": dict(max_sequence_length=None, pipeline_kwargs={"max_sequence_length": 12}),
    "two workers": dict(dataloader_num_workers=2),
    "data seed": dict(data_seed=7),
    "check": dict(check_model=True),
}


@pytest.mark.parametrize("option", OPTIONS)
def test_option_trains(clips, cache_dir, tmp_path, option):
    trainer = make_trainer(tmp_path, clips, cache_dir, max_steps=2, **OPTIONS[option])
    frozen = {name: p.clone() for name, p in trainer.model.named_parameters() if not p.requires_grad}
    start = trained_weights(trainer)
    trainer.train()
    assert all(math.isfinite(loss) for loss in losses(trainer)) and len(losses(trainer)) == 2
    for name, before in start.items():
        assert not torch.equal(before, trainer.model.get_parameter(name)), name
    for name, before in frozen.items():
        assert torch.equal(before, trainer.model.get_parameter(name)), name


def test_options_matter(clips, cache_dir, tmp_path):
    """Options that change the objective change the losses."""
    seen = {}
    for option in ("defaults", "uniform", "mode", "shift", "cosmap", "min_snr", "bell"):
        trainer = make_trainer(tmp_path / option, clips, cache_dir, max_steps=1, **OPTIONS[option])
        trainer.train()
        seen[option] = round(losses(trainer)[0], 7)
    assert len(set(seen.values())) == len(seen), seen


@pytest.mark.slow
def test_compiled_blocks_train_alike(clips, cache_dir, tmp_path):
    trainers = []
    for compiled in (True, False):
        pipe = wan()[0]
        del pipe.transformer.blocks[1:]  # the C++ compiler takes half a minute a block
        trainers.append(
            make_trainer(
                tmp_path / str(compiled), clips, cache_dir, pipe=pipe, max_steps=2, compile_repeated_blocks=compiled
            )
        )
        trainers[-1].train()
    assert losses(trainers[0]) == pytest.approx(losses(trainers[1]), rel=1e-4)
    trainers[0].save_model()
    assert (tmp_path / "True" / "pytorch_lora_weights.safetensors").is_file()


def test_default_targets_are_the_linear_layers_of_the_blocks(clips, cache_dir, tmp_path):
    trainer = make_trainer(tmp_path, clips, cache_dir)
    adapted = {name.split(".lora_A")[0] for name in trained_weights(trainer) if ".lora_A" in name}
    transformer = wan()[0].transformer
    blocks = {f"base_model.model.{n}" for n, m in transformer.named_modules() if isinstance(m, torch.nn.Linear)}
    assert adapted == {name for name in blocks if ".blocks." in name}
    assert adapted < blocks  # time and text embedders are left alone


def test_ema_is_what_the_trainer_holds_afterwards():
    layer = torch.nn.Linear(1, 1, bias=False)
    average = WeightAverage(layer, decay=0.5)
    start = layer.weight.item()
    values, expected = [1.0, 3.0], start
    for i, value in enumerate(values):
        with torch.no_grad():
            layer.weight.fill_(value)
        average.update()
        decay = min(0.5, (1 + i) / (10 + i))
        expected = decay * expected + (1 - decay) * value
    with average.swapped_in():
        assert layer.weight.item() == pytest.approx(expected, rel=1e-6)
    assert layer.weight.item() == 3.0
    with pytest.raises(ValueError, match="float32"):
        WeightAverage(torch.nn.Linear(1, 1).bfloat16(), 0.9)


def test_ema_training_ends_with_the_average(clips, cache_dir, tmp_path):
    raw = make_trainer(tmp_path / "raw", clips, cache_dir, save_strategy="steps", save_steps=3)
    averaged = make_trainer(tmp_path / "ema", clips, cache_dir, save_strategy="steps", save_steps=3, ema_decay=0.9)
    raw.train(), averaged.train()
    assert losses(raw) == losses(averaged)  # training itself goes on with its own weights
    assert digest(trained_weights(raw)) != digest(trained_weights(averaged))


# ---- Numerical failures ----


class Poisoned(DrawDataset):
    def __getitem__(self, key):
        item = super().__getitem__(key)
        if item["sample_id"].startswith("2."):
            item["mean"] = item["mean"] * float("nan")
        return item


def test_nan_stops_and_names_step_and_samples(clips, cache_dir, tmp_path):
    trainer = make_trainer(tmp_path, clips, cache_dir)
    trainer.train_dataset = Poisoned(trainer.train_dataset.dataset)
    with pytest.raises(ValueError, match=r"nan at step \d, samples .*2\.mp4"):
        trainer.train()


def test_nan_is_skipped_and_counted(clips, cache_dir, tmp_path):
    trainer = make_trainer(tmp_path, clips, cache_dir, on_nan="skip", per_device_train_batch_size=1, max_steps=6)
    trainer.train_dataset = Poisoned(trainer.train_dataset.dataset)
    trainer.train()
    assert trainer.num_skipped_batches == 1
    assert trainer.state.log_history[-2]["num_skipped_batches"] == 1
    assert all(p.isfinite().all() for p in trained_weights(trainer).values())


class Recorded(VideoSFTTrainer):
    def compute_loss(self, model, inputs, **kwargs):
        loss = super().compute_loss(model, inputs, **kwargs)
        if not inputs["sample_ids"][0].startswith("2."):
            self.counted.append(loss.item())
        return loss


def test_logged_loss_is_the_mean_of_what_counted(clips, cache_dir, tmp_path):
    config = dict(on_nan="skip", per_device_train_batch_size=1, gradient_accumulation_steps=2, logging_steps=3)
    args = make_args(tmp_path, cache_dir, **config)
    trainer = Recorded(wan()[0], args, clips, peft_config=LoraConfig(r=4))
    trainer.counted, trainer.train_dataset = [], Poisoned(trainer.train_dataset.dataset)
    trainer.train()
    assert len(trainer.counted) == 5  # of six micro-batches
    assert losses(trainer) == [pytest.approx(sum(trainer.counted) / 5, rel=1e-5)]
    # the step whose only batch was skipped has no loss
    config |= dict(gradient_accumulation_steps=1, logging_steps=1, max_steps=6)
    args = make_args(tmp_path / "one", cache_dir, **config)
    trainer = Recorded(wan()[0], args, clips, peft_config=LoraConfig(r=4))
    trainer.counted, trainer.train_dataset = [], Poisoned(trainer.train_dataset.dataset)
    trainer.train()
    assert losses(trainer) == pytest.approx(trainer.counted) and len(trainer.counted) == 5


class InfiniteGradient(VideoSFTTrainer):
    def compute_loss(self, model, inputs, **kwargs):
        loss = super().compute_loss(model, inputs, **kwargs)
        if self.state.global_step == 1:
            weight = next(p for p in model.parameters() if p.requires_grad)
            loss = loss + (weight * 0).abs().sqrt().sum()  # adds 0, with the derivative 0 * inf
        return loss


def test_infinite_gradient_never_reaches_the_weights(clips, cache_dir, tmp_path):
    for on_nan in ("raise", "skip"):
        args = make_args(tmp_path / on_nan, cache_dir, on_nan=on_nan)
        trainer = InfiniteGradient(wan()[0], args, clips, peft_config=LoraConfig(r=4))
        if on_nan == "raise":
            with pytest.raises(ValueError, match="gradient is nan at step 2"):
                trainer.train()
        else:
            trainer.train()
            assert trainer.num_skipped_batches == 1
        assert all(p.isfinite().all() for p in trained_weights(trainer).values())


# ---- Bad input gets a clear error ----


def test_wrong_types(clips, cache_dir, tmp_path):
    args = make_args(tmp_path, cache_dir)
    with pytest.raises(TypeError, match="whole pipeline"):
        VideoSFTTrainer(wan()[0].transformer, args, clips)
    with pytest.raises(TypeError, match="LoraConfig"):
        VideoSFTTrainer(wan()[0], args, clips, peft_config={"r": 4})
    with pytest.raises(TypeError, match="datasets.Dataset"):
        VideoSFTTrainer(wan()[0], args, "clips")
    with pytest.raises(TypeError, match="VideoSFTConfig"):
        VideoSFTTrainer(wan()[0], {"output_dir": "x"}, clips)
    with pytest.raises(ValueError, match="train_dataset is required"):
        VideoSFTTrainer(wan()[0], args)
    with pytest.raises(ValueError, match="quantization_config is used while loading"):
        VideoSFTTrainer(wan()[0], args, clips, quantization_config=object())


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (dict(num_frames=8), "nearest .* 9"),
        (dict(height=20), "nearest size is height=16, width=16"),
        (dict(height=None, width=None, num_frames=None), "state the training shape"),
        (dict(experts="low"), "needs a model with two denoisers"),
        (dict(pipeline_kwargs={"max_sequence_lenght": 3}), "did you mean 'max_sequence_length'"),
        (dict(lora=LoraConfig(r=4, target_modules=["to_qq"])), "'to_qq' matches no layer.*blocks.N.attn1.to_q"),
        (dict(lora=LoraConfig(r=4, target_modules=["to_q", "nothing"])), "'nothing' matches no layer"),
        (dict(validation_steps=1, ema_decay=0.5, model_init_kwargs="{broken"), "JSON"),
    ],
)
def test_bad_arguments_name_the_fix(clips, cache_dir, tmp_path, config, message):
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, clips, cache_dir, **config)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (dict(on_nan="ignore"), "on_nan"),
        (dict(sigma_sampling="gauss"), "sigma_sampling"),
        (dict(loss_weighting="x"), "loss_weighting"),
        (dict(windows="x"), "windows"),
        (dict(shift="strong"), "shift"),
        (dict(shift=-1.0), "shift"),
        (dict(caption_dropout=1.5), "caption_dropout"),
        (dict(ema_decay=1.0), "ema_decay"),
        (dict(experts="middle"), "experts"),
        (dict(height=-16), "height"),
        (dict(validation_steps=0), "validation_steps"),
        (dict(report_to=["mlflow"]), "trackio, wandb or tensorboard"),
    ],
)
def test_bad_configuration(config, message):
    with pytest.raises(ValueError, match=message):
        VideoSFTConfig("x", use_cpu=True, **config)


def test_bad_columns(clips, cache_dir, tmp_path):
    with pytest.raises(ValueError, match='Did you mean "vidoe"'):
        make_trainer(tmp_path, clips.rename_column("video", "vidoe"), cache_dir)
    with pytest.raises(ValueError, match="empty"):
        make_trainer(tmp_path, Dataset.from_list([{**clips[0], "prompt": " "}]), cache_dir)


def test_one_broken_clip_costs_one_clip(cache_dir, tmp_path):
    clips = write_clips(tmp_path, 6)
    path = tmp_path / "0.mp4"
    path.write_bytes(path.read_bytes()[:200])
    trainer = make_trainer(tmp_path / "run", clips, cache_dir, max_bad_fraction=0.2)
    trainer.train()
    assert len(trainer.train_dataset) == 5
    report = json.loads((tmp_path / "run" / "plan_train.json").read_text())
    assert report["counts"]["dropped"] == 1
    with pytest.raises(ValueError, match="max_bad_fraction"):
        make_trainer(tmp_path / "strict", clips, cache_dir, max_bad_fraction=0.1)


def test_plan_is_printed_and_written(clips, cache_dir, tmp_path, capsys):
    make_trainer(tmp_path, clips, cache_dir)
    assert "6 kept" in capsys.readouterr().out
    assert json.loads((tmp_path / "plan_train.json").read_text())["counts"]["kept"] == 6


# ---- Two experts, other families, paths, streaming ----


@pytest.mark.parametrize("expert", ["high", "low"])
def test_experts_train_where_they_are_used(clips, cache_dir, tmp_path, expert):
    from tiny_pipelines import wan22

    pipe, _ = wan22()
    names = {"high": "transformer", "low": "transformer_2"}
    other = {"high": "transformer_2", "low": "transformer"}[expert]
    trainer = make_trainer(tmp_path, clips, cache_dir, pipe=pipe, experts=expert, eval_clips=clips.select(range(2)))
    assert trainer.denoiser_name == names[expert]
    before = {name: p.clone() for name, p in getattr(pipe, other).named_parameters()}
    sigma = trainer.sample_sigma(list(range(200)), (16, 3, 2, 2))
    boundary = trainer.video_model.boundary
    assert (sigma >= boundary - 1e-3).all() if expert == "high" else (sigma < boundary).all()
    metrics = trainer.evaluate()
    assert ("eval_loss_sigma_0.9" in metrics) == (expert == "high")
    assert ("eval_loss_sigma_0.1" in metrics) == (expert == "low")
    trainer.train()
    trainer.save_model()
    assert all(torch.equal(before[name], p) for name, p in getattr(pipe, other).named_parameters())

    call = dict(SIZE, num_inference_steps=6, guidance_scale=1.0, output_type="latent")

    def sample(pipe):
        return pipe("a red circle", generator=torch.Generator().manual_seed(0), **call).frames

    fresh, _ = wan22()
    untrained = sample(fresh)
    fresh.load_lora_weights(str(tmp_path), load_into_transformer_2=expert == "low")
    torch.testing.assert_close(sample(fresh), sample(trainer.pipe), rtol=0, atol=1e-5)
    assert (untrained - sample(fresh)).abs().max() > 1e-3


def test_one_process_loads_from_a_path_and_restores_the_encoders(clips, cache_dir, tmp_path):
    wan()[0].save_pretrained(tmp_path / "model")
    trainer = make_trainer(tmp_path / "run", clips, cache_dir, pipe=str(tmp_path / "model"))
    pipe = trainer.video_model.pipe
    assert pipe.text_encoder is None and pipe.vae is None  # dropped after caching
    trainer.train()
    frames = trainer.pipe("a red circle", **SIZE, num_inference_steps=1, output_type="pt").frames
    assert frames.shape == (1, 9, 3, 16, 16)


def test_bfloat16_base_with_float32_adapter(clips, cache_dir, tmp_path):
    wan()[0].to(torch.bfloat16).save_pretrained(tmp_path / "model")
    trainer = make_trainer(tmp_path / "run", clips, cache_dir, pipe=str(tmp_path / "model"), bf16=True, ema_decay=0.9)
    dtypes = {p.requires_grad: p.dtype for p in trainer.model.parameters() if p.ndim > 1}
    assert dtypes == {True: torch.float32, False: torch.bfloat16}
    trainer.train()
    assert all(math.isfinite(loss) for loss in losses(trainer))
    trainer.pipe("a red circle", **SIZE, num_inference_steps=1)


def test_quantization_config_reaches_diffusers(clips, cache_dir, tmp_path):
    from diffusers import PipelineQuantizationConfig

    wan()[0].save_pretrained(tmp_path / "model")
    config = PipelineQuantizationConfig(
        quant_backend="bitsandbytes_4bit",
        quant_kwargs={"load_in_4bit": True},
        components_to_quantize=["transformer"],
    )
    args = make_args(tmp_path / "run", cache_dir)
    with pytest.raises(ImportError, match="bitsandbytes"):  # not installed here: it got as far as diffusers
        VideoSFTTrainer(str(tmp_path / "model"), args, clips, quantization_config=config)


def test_quantised_base_trains_saves_and_resumes(clips, cache_dir, tmp_path):
    pytest.importorskip("torchao")
    from diffusers import PipelineQuantizationConfig, TorchAoConfig
    from torchao.quantization import Int8WeightOnlyConfig

    wan()[0].to(torch.bfloat16).save_pretrained(tmp_path / "model")
    config = PipelineQuantizationConfig(quant_mapping={"transformer": TorchAoConfig(Int8WeightOnlyConfig())})
    args = make_args(tmp_path / "run", cache_dir, bf16=True, check_model=True, save_strategy="steps", save_steps=2)
    runs = []
    for checkpoint in (None, str(tmp_path / "run" / "checkpoint-2")):
        trainer = VideoSFTTrainer(
            str(tmp_path / "model"), args, clips, quantization_config=config, peft_config=LoraConfig(r=4)
        )
        assert type(trainer.video_model.pipe.transformer.blocks[0].attn1.to_q.weight).__name__ == "Int8Tensor"
        start = trained_weights(trainer)
        trainer.train(resume_from_checkpoint=checkpoint)
        assert all(not torch.equal(start[name], value) for name, value in trained_weights(trainer).items())
        runs.append(digest(trained_weights(trainer)))
    assert runs[0] == runs[1]
    wan()[0].load_lora_weights(str(tmp_path / "run" / "checkpoint-3"))


class Sealed(torch.Tensor):
    """Like a quantised weight of torchao: it cannot be flattened."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function is torch.Tensor.flatten:
            raise TypeError("unimplemented operator")
        return super().__torch_function__(function, types, args, kwargs or {})


def test_identity_of_weights_that_cannot_be_looked_into():
    layer = torch.nn.Linear(2, 2)
    plain = weights_fingerprint(layer)
    layer.weight = torch.nn.Parameter(layer.weight.detach().as_subclass(Sealed))
    assert weights_fingerprint(layer) == weights_fingerprint(layer) != plain
    before = weights_fingerprint(layer)
    with torch.no_grad():
        layer.bias += 1  # the others still tell models apart
    assert weights_fingerprint(layer) != before


def test_streaming_dataset_trains(clips, cache_dir, tmp_path):
    trainer = make_trainer(tmp_path, clips.to_iterable_dataset(), cache_dir)
    trainer.train()
    assert len(trainer.train_dataset) == 6


def test_a_pipeline_that_carries_an_adapter_is_refused(clips, cache_dir, tmp_path):
    pipe = wan()[0]
    make_trainer(tmp_path / "first", clips, cache_dir, pipe=pipe, cache=False)
    with pytest.raises(ValueError, match="already carries an adapter"):
        make_trainer(tmp_path / "second", clips, cache_dir, pipe=pipe)


def test_evaluating_other_clips_later(clips, cache_dir, tmp_path):
    trainer = make_trainer(tmp_path, clips, cache_dir, max_steps=1)
    first = trainer.evaluate(clips.select([0]))["eval_loss"]
    assert first != trainer.evaluate(clips.select([4]))["eval_loss"]
    assert trainer.video_model.pipe.vae is None


def test_several_evaluation_sets(clips, cache_dir, tmp_path):
    eval_clips = {"seen": clips.select(range(2)), "new": clips.select(range(3, 6))}
    trainer = make_trainer(
        tmp_path, clips, cache_dir, eval_clips=eval_clips, eval_strategy="steps", eval_steps=3, max_steps=3
    )
    trainer.train()
    logged = {name for entry in trainer.state.log_history for name in entry}
    assert {"eval_seen_loss", "eval_new_loss_sigma_0.5"} <= logged


def test_default_arguments_name_the_run_after_the_model(clips, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="training shape"):  # it got as far as planning
        VideoSFTTrainer(wan()[0], train_dataset=clips)
    assert VideoSFTConfig("x", use_cpu=True).learning_rate == 1e-4


def test_draw_sampler_pairs_order_with_seeds():
    from vidtrl.data import BucketSampler

    sampler = DrawSampler(BucketSampler([0] * 5, batch_size=1), seed=3)
    first = list(sampler)
    assert list(sampler) == first and sorted(i for i, _ in first) == list(range(5)) and len(sampler) == 5
    sampler.set_epoch(1)
    second = list(sampler)
    assert not {draw for _, draw in first} & {draw for _, draw in second}


QUICK = ("wan_i2v", "ltx", "cogvideox", "hunyuan15")


@pytest.mark.parametrize(
    "family", [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in tiny_pipelines.ALL]
)
def test_every_family_trains_caches_and_saves(tmp_path, family):
    """One LoRA step from real clips through the cache, validation videos, and a file that fits a fresh denoiser."""
    from vidtrl.trainer.lora import ADAPTER_FILE, PREFIX, active_adapters

    pipe, call = tiny_pipelines.ALL[family]()
    call = dict(call)
    size = {name: call.pop(name) for name in ("height", "width", "num_frames")}
    image = call.pop("image", None)  # the trainer takes the clip's first frame
    sequence = call.pop("max_sequence_length", None)
    if family == "easyanimate":
        call["negative_prompt"] = ""  # its pipeline cannot do without
    clips = Dataset.from_list(
        [
            {"video": render(caption, seed=i).numpy(), "prompt": caption}
            for i, caption in enumerate(["a red circle moving right", "a blue square moving up"])
        ]
    )
    trainer = make_trainer(
        tmp_path,
        clips,
        tmp_path / "cache",
        pipe=pipe,
        **{**size, "max_sequence_length": sequence},
        pipeline_kwargs=call,
        max_steps=1,
        eval_clips=clips,
        validation_steps=1,
        num_validation_videos=1,
        validation_num_inference_steps=2,
        **({"experts": "high"} if family == "wan22" else {}),  # both of them: test_experts.py
    )
    assert (image is not None) == trainer.video_model.family.image
    before = trained_weights(trainer)
    trainer.train()
    moved = [name for name, value in before.items() if not torch.equal(value, trainer.model.get_parameter(name))]
    # only B gets a gradient in the first step, and not where a family's last block has no use for its text stream
    assert len(moved) > len(before) / 3
    assert math.isfinite(trainer.evaluate()["eval_loss"])
    trainer.save_model()
    with safe_open(tmp_path / ADAPTER_FILE, "pt") as file:
        names = set(file.keys())
    assert names and all(name.startswith(PREFIX) for name in names)
    assert len(list((tmp_path / "validation").rglob("*.mp4"))) == 2

    trainer.create_model_card()
    card = (tmp_path / "README.md").read_text()
    assert ("image-to-video" if image is not None else "text-to-video") in card
    fresh, _ = tiny_pipelines.ALL[family]()
    # the card's own lines; four of these pipelines have no loader in diffusers, and two of their denoisers neither
    exec(re.search(r"^pipe = .*?\n(.*)^pipe\.to", card, re.MULTILINE | re.DOTALL).group(1), {"pipe": fresh})
    (name_in_fresh,) = active_adapters(fresh.transformer)
    loaded = {name: p for name, p in fresh.transformer.named_parameters() if ".lora_" in name}
    for name, value in trained_weights(trainer).items():
        reloaded = loaded.pop(re.sub(r"\.default\.", f".{name_in_fresh}.", name.removeprefix("base_model.model.")))
        assert torch.equal(reloaded, value)
    assert not loaded
    scalings = {m.scaling[name_in_fresh] for m in fresh.transformer.modules() if isinstance(m, LoraLayer)}
    assert scalings == {2.0}  # alpha 8, rank 4
