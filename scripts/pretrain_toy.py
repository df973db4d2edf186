"""Build the toy pipeline that ships inside vidtrl from nothing: VAE, text encoder, tokenizer and transformer.

    python scripts/pretrain_toy.py                  # everything, into src/vidtrl/toy/pipeline and docs/
    python scripts/pretrain_toy.py --stage vae      # only one stage: vae | model | report
    python scripts/pretrain_toy.py --device cuda

Three stages, each seeded; the time each takes on two CPU cores is in docs/toy.md.

1. `vae`: `AutoencoderKLWan` (8x8x4, 16 channels) as a plain autoencoder, on images, then clips, then the decoder alone:
   posterior mode plus a little noise and a tiny L2 term. Sampling the posterior drowns the signal at first, and a crop of fewer frames makes colours drift later on.
2. `model`: `WanTransformer3DModel` and `UMT5EncoderModel` together, flow matching on latents of RAW clips: first with
   captions whose shapes are right, then, shortly, with unreliable ones. Like a web-scale base, the model has seen what
   it is asked for and does not reliably give it: post-training can win that back, from pixels or from rewards.
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
from PIL import Image, ImageDraw
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

from vidtrl.toy import world
from vidtrl.toy.measurement import score


ROOT = Path(__file__).resolve().parent.parent
CAPTIONS = world.captions()


def clips(seeds, rng, raw_share, wrong_shape=world.RAW_WRONG_SHAPE):
    """Float clips (B, 3, F, H, W) in [-1, 1] with their captions."""
    videos, texts = [], []
    for seed in seeds:
        caption = CAPTIONS[rng.integers(len(CAPTIONS))]
        raw = rng.random() < raw_share
        videos.append(world.render(caption, "raw" if raw else "clean", int(seed)))
        texts.append(world.raw_caption(caption, int(seed), wrong_shape) if raw else caption)
    return torch.stack(videos).permute(0, 2, 1, 3, 4) / 127.5 - 1, texts


def to_unit(videos):  # (B, 3, F, H, W) in [-1, 1] -> list of (F, 3, H, W) in [0, 1]
    return list((videos.float().clamp(-1, 1) / 2 + 0.5).permute(0, 2, 1, 3, 4))


def build_vae():
    """8x8x4 compression to 16 channels. Time starts as a copy of space: every temporal kernel looks at the newest frame
    alone, temporal downsampling averages and upsampling repeats, so that what images taught holds for clips. The noise
    is essential: an exact average cancels flicker, and neither half of the network would ever learn about it."""
    vae = AutoencoderKLWan(
        base_dim=16, dim_mult=[1, 2, 4], temperal_downsample=[True, True], num_res_blocks=1, z_dim=16,
        patch_size=2, in_channels=12, out_channels=12, scale_factor_spatial=8, scale_factor_temporal=4,
        latents_mean=[0.0] * 16, latents_std=[1.0] * 16,
    )  # fmt: skip
    with torch.no_grad():
        for name, module in vae.named_modules():
            if not isinstance(module, torch.nn.Conv3d):
                continue
            if name.endswith("time_conv"):
                eye = torch.eye(module.in_channels)
                module.weight.zero_()
                module.bias.zero_()
                if module.stride[0] == 2:
                    module.weight[:, :, 1:, 0, 0] = eye[..., None] / 2
                else:
                    module.weight[:, :, -1, 0, 0] = torch.cat([eye, eye])
                module.weight.add_(torch.randn_like(module.weight) * 0.5 / (3 * module.in_channels) ** 0.5)
            elif module.kernel_size[0] == 3:
                module.weight[:, :, :2] = 0
    return vae


def train_vae(out, image_steps, video_steps, decoder_steps, device, seed=0):
    """Images first (cheap, and where colour and outline are learned), then clips, then the decoder alone."""
    torch.manual_seed(seed)
    rng = np.random.default_rng([seed, 1])
    vae = build_vae() if image_steps else AutoencoderKLWan.from_pretrained(out / "vae", torch_dtype=torch.float32)
    vae.to(device)
    ema = copy.deepcopy(vae).requires_grad_(False)
    held_out = [world.render(c, q, 10**8 + i) for i, c in enumerate(CAPTIONS) for q in ("clean", "raw")]
    held_out, start = torch.stack(held_out).permute(0, 2, 1, 3, 4) / 127.5 - 1, time.time()

    def reconstruct(model, x):
        with torch.no_grad(), torch.autocast(device.type, torch.bfloat16):
            parts = [model.decode(model.encode(p.to(device)).latent_dist.mode()).sample.cpu() for p in x.split(12)]
        return torch.cat(parts).float()

    def fit(steps, lr, batches, label):
        optimizer = torch.optim.AdamW((p for p in vae.parameters() if p.requires_grad), lr=lr, betas=(0.9, 0.99))
        for step in range(steps):
            for group in optimizer.param_groups:
                cosine = 0.5 * (1 + math.cos(math.pi * step / steps))
                group["lr"] = lr * min(1, (step + 1) / 50) * (0.02 + 0.98 * cosine)
            x, z = batches(step)
            x = x.to(device)
            with torch.autocast(device.type, torch.bfloat16):
                z = vae.encode(x).latent_dist.mode() if z is None else z
                y = vae.decode(z + 0.05 * torch.randn_like(z)).sample
            # the shape covers a tenth of the picture: weigh the area that it passes through
            weight = 1 + 4 * ((x - x.amin((3, 4), keepdim=True)).abs().amax(1, keepdim=True) > 0.2)
            error = y.float() - x
            loss = (weight * (0.5 * error.abs() + error.square())).mean() + 1e-3 * z.float().square().mean()
            # pixels say little about flicker; the brightness of whole frames says it all
            loss = loss + 50 * error.mean((3, 4)).square().mean()
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
            optimizer.step()
            with torch.no_grad():
                decay = min(0.995, (1 + step) / (10 + step))
                torch._foreach_lerp_(list(ema.parameters()), list(vae.parameters()), 1 - decay)
            if (step + 1) % 200 == 0 or step + 1 == steps:
                x = held_out[:, :, 8:9] if label == "image" else held_out
                y = reconstruct(ema, x)
                psnr = 10 * math.log10(4 / (y - x).square().mean())
                quality = ""
                if label != "image":
                    quality = {q: score(to_unit(y[i::2]), CAPTIONS) for i, q in enumerate(("clean", "raw"))}
                    save_vae(ema, out / "vae")
                print(f"vae {label} step {step + 1} {time.time() - start:.0f}s loss {loss.item():.4f} psnr {psnr:.2f} {quality}", flush=True)  # fmt: skip

    if image_steps:
        frames = clips(range(5 * 10**8, 5 * 10**8 + 400), rng, 0.5)[0].permute(0, 2, 1, 3, 4).flatten(0, 1)
        fit(image_steps, 3e-3, lambda _: (frames[torch.randint(len(frames), (24,))][:, :, None], None), "image")
    if video_steps:
        fit(video_steps, 1.5e-3, lambda i: (clips(range(4 * i, 4 * i + 4), rng, 0.5)[0], None), "video")
    if decoder_steps:  # latents stay as they are, so a model may be trained on them meanwhile
        vae.load_state_dict(ema.state_dict())
        vae.requires_grad_(False)
        vae.decoder.requires_grad_(True)
        vae.post_quant_conv.requires_grad_(True)
        x = torch.cat([clips(range(4 * 10**8 + i, 4 * 10**8 + i + 20), rng, 0.5)[0] for i in range(0, 1600, 20)])
        with torch.no_grad(), torch.autocast(device.type, torch.bfloat16):
            z = torch.cat([vae.encode(part.to(device)).latent_dist.mode() for part in x.split(20)]).float()

        def pick(_):
            index = torch.randint(len(x), (4,))
            return x[index], z[index.to(device)]

        fit(decoder_steps, 1.5e-3, pick, "decoder")


@torch.no_grad()
def save_vae(vae, path):
    """With the per-channel statistics by which the pipeline normalises latents."""
    x, _ = clips(range(2 * 10**8, 2 * 10**8 + 128), np.random.default_rng(0), raw_share=0.5)
    z = torch.cat([vae.encode(part.to(vae.device)).latent_dist.mode() for part in x.split(16)])
    vae = copy.deepcopy(vae)
    # the decoder was trained on the mode plus noise of 0.05: that is the posterior (the first half of the channels is
    # its mean, the second half its log-variance, which training left alone)
    vae.quant_conv.weight[16:] = 0
    vae.quant_conv.bias[16:] = 2 * math.log(0.05)
    vae.register_to_config(latents_mean=z.mean((0, 2, 3, 4)).tolist(), latents_std=z.std((0, 2, 3, 4)).tolist())
    vae.to(torch.bfloat16).save_pretrained(path)


def forget_paths(out):
    """Loading writes the directory into a model's config; what is shipped names no directory of this machine."""
    for path in out.glob("*/config.json"):
        config = json.loads(path.read_text())
        config.pop("_name_or_path", None)
        path.write_text(json.dumps(config, indent=2) + "\n")


def build_tokenizer():
    words = ["<pad>", "</s>", "<unk>", "a", "an", "the", "moving", "shape", "and", "video", "of", "on", "background"]
    words += [*world.COLORS, *world.SHAPES, *world.DIRECTIONS]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=512
    )


def embed(tokenizer, text_encoder, texts, length):
    """(B, length, D): what WanPipeline.encode_prompt makes, zeros behind the true length included."""
    tokens = tokenizer(texts, padding="max_length", max_length=16, truncation=True, return_tensors="pt")
    tokens = tokens.to(text_encoder.device)
    mask = tokens.attention_mask
    hidden = text_encoder(tokens.input_ids, mask).last_hidden_state * mask[..., None]
    return torch.nn.functional.pad(hidden, (0, 0, 0, length - 16))


def train_model(out, steps, wrong_shape, device, num_clips=4000, batch_size=16, lr=1.5e-3, seed=0, resume=False):
    torch.manual_seed(seed)
    rng = np.random.default_rng([seed, 2])
    vae = AutoencoderKLWan.from_pretrained(out / "vae", torch_dtype=torch.float32).to(device).eval()
    statistics = vae.config.latents_mean, vae.config.latents_std
    mean, std = (torch.tensor(v, device=device).view(1, -1, 1, 1, 1) for v in statistics)
    start, latents, texts = time.time(), [], []
    for first in range(0, num_clips, 20):
        x, captions = clips(range(10**9 + first, 10**9 + first + 20), rng, 1.0, wrong_shape)
        with torch.no_grad(), torch.autocast(device.type, torch.bfloat16):
            latents.append((vae.encode(x.to(device)).latent_dist.mode().float() - mean) / std)
        texts += captions
    latents = torch.cat(latents)
    print(f"encoded {len(latents)} clips in {time.time() - start:.0f}s, std {latents.std():.3f}", flush=True)

    tokenizer = build_tokenizer()
    text_encoder = UMT5EncoderModel(
        UMT5Config(
            vocab_size=64, d_model=64, d_kv=16, d_ff=128, num_layers=1, num_heads=4, dropout_rate=0.0,
            relative_attention_num_buckets=8, relative_attention_max_distance=16, feed_forward_proj="gated-gelu",
            pad_token_id=0, eos_token_id=1, decoder_start_token_id=0,
        )
    )  # fmt: skip
    transformer = WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=4, attention_head_dim=32, in_channels=16, out_channels=16,
        text_dim=64, freq_dim=64, ffn_dim=512, num_layers=4, cross_attn_norm=True,
        qk_norm="rms_norm_across_heads", rope_max_seq_len=32,
    )  # fmt: skip
    torch.nn.init.zeros_(transformer.proj_out.weight)
    torch.nn.init.zeros_(transformer.proj_out.bias)
    for block in transformer.blocks:  # open the gates: adaLN starts at 1, not at noise
        block.scale_shift_table.data.zero_()
        block.scale_shift_table.data[:, [2, 5]] = 1.0
    torch.nn.init.zeros_(transformer.condition_embedder.time_proj.bias)
    transformer.condition_embedder.time_proj.weight.data.mul_(0.5)

    if resume:  # another round from the weights that are there, with a fresh optimizer and schedule
        transformer = WanTransformer3DModel.from_pretrained(out / "transformer", torch_dtype=torch.float32).train()
        text_encoder = UMT5EncoderModel.from_pretrained(out / "text_encoder", dtype=torch.float32).train()
    nets = torch.nn.ModuleList([transformer, text_encoder]).to(device)
    ema = copy.deepcopy(nets).requires_grad_(False).eval()
    optimizer = torch.optim.AdamW(nets.parameters(), lr=lr, betas=(0.9, 0.99), weight_decay=0.01)
    start, running = time.time(), None
    for step in range(steps):
        for group in optimizer.param_groups:  # constant, then linear to zero over the last 40 %
            group["lr"] = lr * min(1, (step + 1) / 100) * min(1, max(0.02, (1 - step / steps) / 0.4))
        picked = rng.integers(len(latents), size=batch_size)
        x0 = latents[torch.from_numpy(picked).to(device)]
        batch = [texts[i] if rng.random() > 0.1 else "" for i in picked]  # caption dropout, for guidance
        # the pipeline pads with zeros to 512 tokens by default: some batches show them, so that any length works
        length = int(rng.choice([16, 64, 512], p=[0.85, 0.1, 0.05]))
        u = torch.rand(batch_size, device=device)
        sigma = 3 * u / (1 + 2 * u)
        s, noise = sigma.view(-1, 1, 1, 1, 1), torch.randn_like(x0)
        prompt_embeds = embed(tokenizer, text_encoder, batch, length)
        v = transformer((1 - s) * x0 + s * noise, sigma * 1000, prompt_embeds, return_dict=False)[0]
        loss = (v - (noise - x0)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(nets.parameters(), 1.0)
        optimizer.step()
        decay = min(0.999, (1 + step) / (20 + step))
        with torch.no_grad():
            torch._foreach_lerp_(list(ema.parameters()), list(nets.parameters()), 1 - decay)
        running = loss.item() if running is None else 0.99 * running + 0.01 * loss.item()
        if (step + 1) % 1000 == 0 or step + 1 == steps:
            pipe = WanPipeline(
                tokenizer=tokenizer, text_encoder=ema[1], vae=vae, transformer=ema[0],
                scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
            )  # fmt: skip
            videos, prompts = generate(pipe, CAPTIONS[step % 2 :: 2], seed=step)
            print(f"model step {step + 1} {time.time() - start:.0f}s loss {running:.4f} {score(videos, prompts)}", flush=True)  # fmt: skip
            tokenizer.save_pretrained(out / "tokenizer")
            copy.deepcopy(ema[1]).to(torch.bfloat16).save_pretrained(out / "text_encoder")
            copy.deepcopy(ema[0]).to(torch.bfloat16).save_pretrained(out / "transformer")
            pipe.scheduler.save_pretrained(out / "scheduler")
            pipe.save_config(out)


@torch.no_grad()
def generate(pipe, prompts, seed, num_inference_steps=20, guidance_scale=3.0, **kwargs):
    """Videos (list of (F, 3, H, W) in [0, 1]) from a stock WanPipeline, with one generator a prompt."""
    pipe.set_progress_bar_config(disable=True)
    videos = []
    for i in range(0, len(prompts), 12):
        part = prompts[i : i + 12]
        generators = [torch.Generator().manual_seed(seed * 100_003 + i + j) for j in range(len(part))]
        videos += pipe(
            part, height=64, width=64, num_frames=17, num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale, max_sequence_length=16, generator=generators, output_type="pt", **kwargs,
        ).frames.float().cpu()  # fmt: skip
    return videos, prompts


def contact_sheet(rows, path, columns=9, left=190):
    """One line a clip: (label, clip (F, 3, H, W) in [0, 1]), evenly spaced frames, enlarged twice."""
    side = 2 * world.SIZE
    sheet = Image.new("RGB", (left + columns * (side + 2), len(rows) * (side + 2)), (60, 60, 60))
    draw = ImageDraw.Draw(sheet)
    for i, (label, clip) in enumerate(rows):
        draw.text((4, i * (side + 2) + side // 2 - 6), label, fill=(255, 255, 255))
        for j, frame in enumerate(np.linspace(0, len(clip) - 1, columns).round().astype(int)):
            pixels = (clip[frame].clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()
            picture = Image.fromarray(pixels).resize((side, side), Image.Resampling.NEAREST)
            sheet.paste(picture, (left + j * (side + 2), i * (side + 2)))
    sheet.save(path, optimize=True)


@torch.no_grad()
def report(out, docs, device):
    """Measure the saved pipeline as a user meets it, and write docs/toy_pipeline.{json,png} and docs/toy_vae.png."""
    pipe = WanPipeline.from_pretrained(out, torch_dtype=torch.float32).to(device)
    rows, numbers = [], {"size_mb": round(sum(f.stat().st_size for f in out.rglob("*") if f.is_file()) / 1e6, 2)}
    numbers["parameters"] = {n: sum(p.numel() for p in getattr(pipe, n).parameters()) for n in MODULES}
    for quality in world.QUALITIES:
        held_out = torch.stack([world.render(c, quality, 3 * 10**8 + i) for i, c in enumerate(CAPTIONS)]) / 255
        x = held_out.permute(0, 2, 1, 3, 4) * 2 - 1
        parts = (pipe.vae.encode(part.to(device)).latent_dist.mode() for part in x.split(12))
        y = torch.cat([pipe.vae.decode(z).sample.cpu() for z in parts])
        numbers[f"vae_{quality}"] = score(to_unit(y), CAPTIONS)
        numbers[f"vae_{quality}"]["psnr"] = 10 * math.log10(4 / (y - x).square().mean())
        for i in (1, 29, 43, 62):
            rows += [(f"{CAPTIONS[i]}\n{quality}", held_out[i]), ("through the VAE", to_unit(y)[i])]
    contact_sheet(rows, docs / "toy_vae.png")

    start = time.time()
    videos, prompts = generate(pipe, CAPTIONS * 2, seed=1)
    numbers["base_cfg3_20_steps"] = {**score(videos, prompts), "seconds": round(time.time() - start, 1)}
    contact_sheet([(prompts[i], videos[i]) for i in range(0, 144, 9)], docs / "toy_pipeline.png")
    default_length = pipe(
        CAPTIONS[::6], height=64, width=64, num_frames=17, num_inference_steps=20, guidance_scale=3.0,
        generator=torch.Generator().manual_seed(0), output_type="pt",
    ).frames.float().cpu()  # fmt: skip
    numbers["base_512_text_tokens"] = score(list(default_length), CAPTIONS[::6])
    text = json.dumps(numbers, indent=2)
    (docs / "toy_pipeline.json").write_text(text + "\n")
    print(text)


MODULES = ("transformer", "text_encoder", "vae")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=ROOT / "src/vidtrl/toy/pipeline")
    parser.add_argument("--docs", type=Path, default=ROOT / "docs", help="where the numbers and pictures go")
    parser.add_argument("--stage", choices=["all", "vae", "model", "report"], default="all")
    parser.add_argument("--image_steps", type=int, default=900)
    parser.add_argument("--video_steps", type=int, default=1800)
    parser.add_argument("--decoder_steps", type=int, default=1200)
    parser.add_argument("--model_steps", type=int, default=7000)
    parser.add_argument("--noisy_steps", type=int, default=600, help="with unreliable captions, after the model_steps")
    parser.add_argument("--resume", action="store_true", help="stage model: go on from the saved weights")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"), help="default: %(default)s")
    args = parser.parse_args()
    for folder in (args.output, args.docs):  # before an hour of training, not after it
        folder.mkdir(parents=True, exist_ok=True)
    if args.stage in ("all", "vae"):
        train_vae(args.output, args.image_steps, args.video_steps, args.decoder_steps, args.device, args.seed)
    if args.stage in ("all", "model"):
        if args.model_steps:
            train_model(args.output, args.model_steps, 0.0, args.device, seed=args.seed, resume=args.resume)
        wrong = world.RAW_WRONG_SHAPE
        noisy = {"num_clips": 1500, "lr": 5e-4, "seed": args.seed + 1, "resume": True}
        train_model(args.output, args.noisy_steps, wrong, args.device, **noisy)
    forget_paths(args.output)
    if args.stage in ("all", "report"):
        report(args.output, args.docs, args.device)
