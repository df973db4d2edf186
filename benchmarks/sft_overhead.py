"""What a step of `VideoSFTTrainer` costs beyond its forward, backward and optimizer step.

    OMP_NUM_THREADS=1 python benchmarks/sft_overhead.py

A randomly initialised Wan of about 30 M parameters is fully fine-tuned on cached 17x64x64 clips. After each step of the
trainer, in the same process, a bare loop does one step on a copy of the model: batch in memory, noise, forward, backward,
gradient clipping, the same optimizer. The time of a trainer step runs from the end of one bare step to the start of the
next, so it holds everything: reading the cache, drawing, logging, callbacks. Exit code 1 if the median ratio of the pairs
exceeds the target.
"""

import argparse
import copy
import os
import string
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from datasets import load_dataset
from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, WanPipeline, WanTransformer3DModel
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast, Trainer, TrainerCallback, UMT5Config, UMT5EncoderModel
from transformers.utils import logging

from vidtrl import VideoSFTConfig, VideoSFTTrainer
from vidtrl.toy import write_dataset


TARGET = 1.05
WARM_UP = 5  # steps left out: allocation, first touch of the optimizer's state


def build_pipeline() -> WanPipeline:
    """A `WanPipeline` with a 30 M-parameter denoiser and a tiny VAE and text encoder, all random."""
    torch.manual_seed(0)
    vocab = {t: i for i, t in enumerate(["<pad>", "</s>", "<unk>", *string.ascii_lowercase])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return WanPipeline(
        tokenizer=PreTrainedTokenizerFast(
            tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=64
        ),
        text_encoder=UMT5EncoderModel(
            UMT5Config(vocab_size=64, d_model=64, d_kv=16, d_ff=128, num_layers=1, num_heads=4)
        ).eval(),
        vae=AutoencoderKLWan(
            base_dim=3, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True]
        ).eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        transformer=WanTransformer3DModel(
            patch_size=(1, 2, 2),
            num_attention_heads=8,
            attention_head_dim=64,
            in_channels=16,
            out_channels=16,
            text_dim=64,
            freq_dim=256,
            ffn_dim=2432,
            num_layers=6,
            cross_attn_norm=True,
            rope_max_seq_len=64,
        ),
    )


class BareLoop:
    """One step of plain PyTorch on a copy of the denoiser, with the batch already in memory."""

    def __init__(self, transformer, batch: dict, args: VideoSFTConfig):
        self.transformer, self.args, self.shift = transformer, args, 3.0
        optimizer_class, kwargs = Trainer.get_optimizer_cls_and_kwargs(args, transformer)
        self.optimizer = optimizer_class(transformer.parameters(), **kwargs)
        self.mean, self.std = batch["mean"], batch["std"]
        ((_, tensors),) = batch["condition"].batches()
        self.text = tensors["encoder_hidden_states"]

    def step(self) -> None:
        x0 = self.mean + self.std * torch.randn_like(self.mean)
        noise = torch.randn_like(x0)
        u = torch.rand(len(x0))
        sigma = self.shift * u / (1 + (self.shift - 1) * u)
        weight = sigma.view(-1, 1, 1, 1, 1)
        velocity = self.transformer(
            hidden_states=(1 - weight) * x0 + weight * noise,
            timestep=sigma * 1000,
            encoder_hidden_states=self.text,
            return_dict=False,
        )[0]
        loss = (velocity - (noise - x0)).square().mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.transformer.parameters(), self.args.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()


class Interleave(TrainerCallback):
    """After each trainer step, time one bare step."""

    def __init__(self, bare: BareLoop):
        self.bare, self.pairs, self.mark = bare, [], None

    def on_train_begin(self, args, state, control, **kwargs):
        self.mark = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        now = time.perf_counter()
        trainer_seconds, start = now - self.mark, time.perf_counter()
        self.bare.step()
        self.mark = time.perf_counter()
        self.pairs.append((trainer_seconds, self.mark - start))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--batch_size", type=int, default=4)
    options = parser.parse_args()
    logging.set_verbosity_error()
    with tempfile.TemporaryDirectory() as folder:
        clips = write_dataset(Path(folder) / "clips", num_clips=8 * options.batch_size)
        pipe = build_pipeline()
        parameters = sum(p.numel() for p in pipe.transformer.parameters())
        copied = copy.deepcopy(pipe.transformer).train()
        args = VideoSFTConfig(
            output_dir=f"{folder}/out",
            cache_dir=f"{folder}/cache",
            height=64,
            width=64,
            num_frames=17,
            max_sequence_length=16,
            per_device_train_batch_size=options.batch_size,
            max_steps=options.steps + WARM_UP,
            gradient_checkpointing=False,
            check_model=False,
            sigma_sampling="uniform",
            save_strategy="no",
            report_to="none",
            use_cpu=True,
            dataloader_pin_memory=False,
        )
        dataset = load_dataset(str(clips), split="train", cache_dir=f"{folder}/datasets")
        trainer = VideoSFTTrainer(model=pipe, args=args, train_dataset=dataset)
        batch = next(iter(trainer.get_train_dataloader()))
        bare = BareLoop(copied, batch, args)
        interleave = Interleave(bare)
        trainer.add_callback(interleave)
        trainer.train()

    pairs = np.array(interleave.pairs[WARM_UP:])
    ratios = pairs[:, 0] / pairs[:, 1]
    picks = np.random.default_rng(0).integers(0, len(ratios), (4000, len(ratios)))
    low, high = np.percentile(np.median(ratios[picks], axis=1), [2.5, 97.5])
    ratio = float(np.median(ratios))
    print(f"{parameters / 1e6:.1f} M parameters, batch {options.batch_size}, {torch.get_num_threads()} thread(s)")
    print(f"load average {os.getloadavg()[0]:.2f} on {os.cpu_count()} cores")
    print(
        f"trainer step: median {np.median(pairs[:, 0]) * 1e3:.0f} ms; bare step: {np.median(pairs[:, 1]) * 1e3:.0f} ms"
    )
    print(
        f"ratio, median of {len(ratios)} pairs: {ratio:.3f} (95 % interval {low:.3f} to {high:.3f}; target <= {TARGET})"
    )
    return int(ratio > TARGET)


if __name__ == "__main__":
    sys.exit(main())
