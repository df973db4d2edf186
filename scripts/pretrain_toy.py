"""Build the toy pipeline that ships inside vidtrl from nothing: VAE, text encoder, tokenizer and transformer.

    python scripts/pretrain_toy.py                  # everything, into src/vidtrl/toy/pipeline and docs/
    python scripts/pretrain_toy.py --stage vae      # only one stage: vae | model | report

Three stages, each seeded. Measured on two CPU cores: see docs/toy.md.

1. `vae`: `AutoencoderKLWan` (8x8x4, 16 channels) as a plain autoencoder: posterior mode plus a little noise and a tiny
   L2 term. Sampling the posterior drowns the signal at first, and a crop of fewer frames makes colours drift later on.
2. `model`: `WanTransformer3DModel` and `UMT5EncoderModel` together, flow matching on latents of RAW clips.
3. `report`: generates from the saved pipeline with stock diffusers, measures pixels, writes numbers and contact sheets.
"""

import argparse
import copy
import json
import math
import time
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, WanPipeline, WanTransformer3DModel
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

from vidtrl.toy import world
from vidtrl.toy.measure import score


ROOT = Path(__file__).resolve().parent.parent
CAPTIONS = world.captions()


def clips(seeds, rng, raw_share):
    """Float clips (B, 3, F, H, W) in [-1, 1] with their captions."""
    videos, texts = [], []
    for seed in seeds:
        caption = CAPTIONS[rng.integers(len(CAPTIONS))]
        raw = rng.random() < raw_share
        videos.append(world.render(caption, "raw" if raw else "clean", int(seed)))
        texts.append(world.raw_caption(caption, int(seed)) if raw else caption)
    return torch.stack(videos).permute(0, 2, 1, 3, 4) / 127.5 - 1, texts


def to_unit(videos):  # (B, 3, F, H, W) in [-1, 1] -> list of (F, 3, H, W) in [0, 1]
    return list((videos.float().clamp(-1, 1) / 2 + 0.5).permute(0, 2, 1, 3, 4))


def train_vae(out, steps, batch_size=4, lr=2e-3, seed=0):
    torch.manual_seed(seed)
    rng = np.random.default_rng([seed, 1])
    vae = AutoencoderKLWan(
        base_dim=16, dim_mult=[1, 2, 4], temperal_downsample=[True, True], num_res_blocks=1, z_dim=16,
        patch_size=2, in_channels=12, out_channels=12, scale_factor_spatial=8, scale_factor_temporal=4,
        latents_mean=[0.0] * 16, latents_std=[1.0] * 16,
    )  # fmt: skip
    ema = copy.deepcopy(vae).requires_grad_(False)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=lr, weight_decay=1e-4, betas=(0.9, 0.99))
    held_out = [world.render(c, q, 10**8 + i) for i, c in enumerate(CAPTIONS) for q in ("clean", "raw")]
    held_out, start = torch.stack(held_out).permute(0, 2, 1, 3, 4) / 127.5 - 1, time.time()

    def evaluate():
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            y = torch.cat([ema.decode(ema.encode(x).latent_dist.mode()).sample for x in held_out.split(12)]).float()
        psnr = 10 * math.log10(4 / (y - held_out).square().mean())
        return psnr, score(to_unit(y[::2]), CAPTIONS), score(to_unit(y[1::2]), CAPTIONS)

    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1, (step + 1) / 50) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / steps)))
        x, _ = clips(range(step * batch_size, (step + 1) * batch_size), rng, raw_share=0.5)
        with torch.autocast("cpu", torch.bfloat16):
            z = vae.encode(x).latent_dist.mode()
            y = vae.decode(z + 0.05 * torch.randn_like(z)).sample
        # the shape covers a tenth of the picture: weigh the area that it passes through
        weight = 1 + 4 * ((x - x.amin((3, 4), keepdim=True)).abs().amax(1, keepdim=True) > 0.2)
        error = y.float() - x
        loss = (weight * (0.5 * error.abs() + error.square())).mean() + 1e-3 * z.float().square().mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        with torch.no_grad():
            decay = min(0.995, (1 + step) / (10 + step))
            torch._foreach_lerp_(list(ema.parameters()), list(vae.parameters()), 1 - decay)
        if (step + 1) % 250 == 0 or step + 1 == steps:
            psnr, clean, raw = evaluate()
            print(f"vae step {step + 1} {time.time() - start:.0f}s loss {loss.item():.4f} psnr {psnr:.2f} clean {clean} raw {raw}", flush=True)  # fmt: skip
            with torch.no_grad():
                x, _ = clips(range(2 * 10**8, 2 * 10**8 + 128), np.random.default_rng(0), raw_share=0.5)
                z = torch.cat([ema.encode(part).latent_dist.mode() for part in x.split(16)])
            done = copy.deepcopy(ema)
            done.register_to_config(
                latents_mean=z.mean((0, 2, 3, 4)).tolist(), latents_std=z.std((0, 2, 3, 4)).tolist()
            )
            done.to(torch.bfloat16).save_pretrained(out / "vae")
