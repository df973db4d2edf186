"""Does an enhancer, trained with stock TRL, make the toy's video model understand words that it has never seen?

    python benchmarks/toy_prompts.py                               # about 10 minutes on two quiet cores
    python benchmarks/toy_prompts.py --adapter demo/sft --seeds 1  # with the video model of a finished `vidtrl demo`

The frozen video model is the shipped base with the adapter of the demo's SFT stage, 20 steps, no guidance. Users' prompts are
held-out paraphrases: no word for an attribute and no sentence of theirs is in a pair or a prompt of the training. Each is
rendered once, from its own initial noise, the same for every row of the table; "all right" is the share of clips whose colour,
shape and direction are those that the user's words ask for.

Rows: no enhancer; the prompt in a fixed sentence (template only); the shipped language model with eight pairs before the
prompt (few-shot); after SFT on pairs; after SFT and GRPO; and the true captions, which no enhancer can beat on average.
Writes toy_prompts.json, with each clip as 0 or 1.
"""

import argparse
import dataclasses
import json
import logging
import time
import warnings
from pathlib import Path

import torch
from datasets import disable_progress_bars
from diffusers.utils import logging as diffusers_logging
from rich.console import Console

from vidtrl import toy
from vidtrl.cli.demo_settings import DemoSettings
from vidtrl.cli.demo_stages import fine_tune as fine_tune_video
from vidtrl.cli.demo_stages import load_fused, write_clips
from vidtrl.prompts import PromptEnhancer, PromptFallbackWarning, PromptTemplate
from vidtrl.report import mean_interval, paired_difference
from vidtrl.toy.enhancement import (
    EnhancementSettings,
    fine_tune,
    load_enhancer,
    make_video_reward,
    reinforce,
    right_clips,
)
from vidtrl.toy.paraphrases import TIERS, caption_of, paraphrases


TARGETS = {"none": ("<=", 0.35), "trained": (">=", 0.70), "gain of GRPO": (">=", 0.05)}


def right_captions(enhancer, seed):
    """Share of answers that are the caption, by tier: what the language model alone gets right."""
    shares = {}
    for tier in TIERS:
        rows = paraphrases(300, tier, seed)
        texts = enhancer([row["prompt"] for row in rows])
        shares[tier] = sum(t == row["caption"] for t, row in zip(texts, rows, strict=True)) / len(rows)
    return shares


def few_shot(seed):
    """The shipped model, untrained, with eight pairs before the prompt."""
    enhancer = load_enhancer()
    pairs = [{"prompt": r["prompt"], "enhanced": r["caption"]} for r in paraphrases(8, "pairs", seed)]
    template = dataclasses.replace(enhancer.template, examples=pairs)
    return PromptEnhancer(enhancer.model, enhancer.tokenizer, template=template, max_new_tokens=12, temperature=0.0,
                          num_retries=0, batch_size=64)  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--adapter", type=Path, help="folder with pytorch_lora_weights.safetensors; trained if not given"
    )
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--num_prompts", type=int, default=144, help="held-out paraphrases")
    parser.add_argument("--num_pairs", type=int, help="default: that of EnhancementSettings")
    parser.add_argument("--training_only", action="store_true", help="leave out the rows that need no training")
    parser.add_argument("--output", type=Path, default=Path("toy_prompts"))
    args = parser.parse_args()
    warnings.simplefilter("ignore", PromptFallbackWarning)
    disable_progress_bars()
    diffusers_logging.disable_progress_bar()
    logging.getLogger("transformers").setLevel(logging.ERROR)
    if args.adapter is None:
        settings, console = DemoSettings(), Console()
        write_clips(args.output, 0, settings)
        fine_tune_video(args.output, 0, toy.pipeline_path(), settings, console)
        args.adapter = args.output / "sft"
    pipe = load_fused(toy.pipeline_path(), args.adapter)
    prompts = [row["prompt"] for row in paraphrases(args.num_prompts, "held_out", seed=10_000)]
    renders = make_video_reward(pipe, PromptEnhancer(None), num_inference_steps=20, cache_size=10_000)
    reward = make_video_reward(pipe, PromptEnhancer(None))
    hits: dict[str, list[list[bool]]] = {}
    words, seconds = {}, {}

    def measure(name, texts):
        hits.setdefault(name, []).append(right_clips(renders, prompts, texts))
        print(f"{name}: {sum(hits[name][-1]) / len(prompts):.3f}", *list(words.get(name, [""]))[-1:], flush=True)

    learning = EnhancementSettings()
    if args.num_pairs is not None:
        learning = dataclasses.replace(learning, num_pairs=args.num_pairs)
    template = PromptEnhancer(None, template=PromptTemplate(system="", static="a video of the {prompt}"))
    if not args.training_only:
        measure("none", prompts)
        measure("template only", template(prompts))
        measure("few-shot", few_shot(0)(prompts))
        measure("true captions", [caption_of(p) for p in prompts])
    for seed in range(args.seeds):
        enhancer = load_enhancer()
        for name in ("SFT", "SFT + GRPO"):
            start = time.perf_counter()
            if name == "SFT":
                fine_tune(enhancer, args.output / "lm_sft", seed, learning, disable_tqdm=True)
            else:
                # what an earlier seed has rendered is not rendered again: the first one's time is what a run takes
                reinforce(enhancer, pipe, args.output / "lm_grpo", seed, learning, reward, disable_tqdm=True)
            seconds.setdefault(name, []).append(round(time.perf_counter() - start, 1))
            words.setdefault(name, []).append(right_captions(enhancer, seed=10_001))
            measure(name, enhancer(prompts))
    result = {"num_prompts": len(prompts), "seeds": args.seeds, "settings": dataclasses.asdict(learning)}
    result |= {"threads": torch.get_num_threads(), "seconds": seconds, "captions_right": words}
    table = {}
    for name, runs in hits.items():
        interval = mean_interval([sum(hit) / len(runs) for hit in zip(*runs, strict=True)])
        table[name] = {"all_right": [sum(run) / len(run) for run in runs], **interval._asdict()}
        table[name]["hits"] = ["".join(str(int(hit)) for hit in run) for run in runs]
    mean = {name: [sum(hit) / len(runs) for hit in zip(*runs, strict=True)] for name, runs in hits.items()}
    gain = paired_difference(mean["SFT"], mean["SFT + GRPO"])  # over prompts; the seeds' spread is printed beside it
    result |= {"table": table, "gain of GRPO": gain._asdict()}
    print(f"\n{'':16}all right (95 % over {len(prompts)} prompts)   each seed")
    for name, row in table.items():
        each = " ".join(f"{x:.3f}" for x in row["all_right"])
        print(f"{name:16}{row['value']:.3f} ({row['low']:.3f} to {row['high']:.3f})   {each}")
    print(f"gain of GRPO    {gain.value:+.3f} ({gain.low:+.3f} to {gain.high:+.3f})")
    reached = {"trained": table["SFT + GRPO"]["value"], "gain of GRPO": gain.value}
    if not args.training_only:
        reached["none"] = table["none"]["value"]
    for name in reached:
        sign, bound = TARGETS[name]
        good = reached[name] <= bound if sign == "<=" else reached[name] >= bound
        print(f"{name}: {reached[name]:.3f}, wanted {sign} {bound}: {'reached' if good else 'MISSED'}")
    for name, rows in words.items():
        print(
            f"{name}: captions right", {t: round(sum(r[t] for r in rows) / len(rows), 3) for t in TIERS}, seconds[name]
        )
    (args.output / "toy_prompts.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
