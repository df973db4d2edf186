"""Generate videos with plain diffusers: this file imports torch, diffusers and av, and nothing of vidtrl.

`vidtrl demo` copies it into its output folder and runs it there in fresh processes, so that the videos it measures are
what any diffusers user gets from the base model, and from the base model with the trained LoRAs:

    python generate.py --pipeline BASE --jobs jobs.json --output videos/base
    python generate.py --pipeline BASE --lora sft --jobs jobs.json --output videos/sft
    python generate.py --pipeline BASE --lora sft grpo --jobs jobs.json --output videos/grpo
    python generate.py --pipeline BASE --lora sft grpo distill --scheduler distill/scheduler --jobs jobs.json \
        --num_inference_steps 4 --guidance_scale 1 --output videos/distill

`jobs.json` is a list of {"prompt", "seed", "file"}. Files that exist are kept, so an interrupted run goes on. Each
finished file is announced on stdout.
"""

import argparse
import json
import sys
from fractions import Fraction
from pathlib import Path

import av
import torch
from diffusers import DiffusionPipeline


def write_mp4(path: Path, frames, fps: int, crf: int) -> None:
    """Write frames, uint8 (F, H, W, 3), as h264; the name appears when the file is complete."""
    partial = path.with_name(path.name + ".partial")
    with av.open(str(partial), "w", format="mp4") as container:
        # cpu-independent: without it about one clip in a hundred differs from run to run
        options = {"crf": str(crf), "x264-params": "cpu-independent=1"}
        stream = container.add_stream("libx264", rate=Fraction(fps), options=options)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        for image in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode())
    partial.replace(path)


def load(pipeline: str, loras: list[str], scheduler: str | None = None) -> DiffusionPipeline:
    """The base pipeline with these adapters stacked, all of them active, and a student's scheduler if there is one."""
    pipe = DiffusionPipeline.from_pretrained(pipeline, dtype=torch.float32)
    names = [f"stage_{i + 1}" for i in range(len(loras))]
    for folder, name in zip(loras, names, strict=True):
        pipe.load_lora_weights(folder, adapter_name=name)
    if names:
        pipe.set_adapters(names)
    if scheduler:
        sys.path.insert(0, scheduler)  # its source lies beside its configuration
        from few_step_flow_scheduler import FewStepFlowScheduler

        pipe.scheduler = FewStepFlowScheduler.from_pretrained(scheduler)
    return pipe


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(description="Generate videos with plain diffusers.")
    parser.add_argument("--pipeline", required=True, help="directory or Hub id of the base pipeline")
    parser.add_argument(
        "--lora",
        nargs="+",
        default=[],
        metavar="DIR",
        help="with pytorch_lora_weights.safetensors; several are stacked",
    )
    parser.add_argument("--scheduler", metavar="DIR", help="of a few-step student")
    parser.add_argument("--jobs", required=True, type=Path, help='JSON list of {"prompt", "seed", "file"}')
    parser.add_argument("--output", required=True, type=Path)
    parser.add_argument("--height", type=int, default=64)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--num_frames", type=int, default=17)
    parser.add_argument("--fps", type=int, default=8)
    parser.add_argument("--crf", type=int, default=10, help="x264 quality; low, so that the file hides no flicker")
    parser.add_argument("--num_inference_steps", type=int, default=20)
    parser.add_argument("--guidance_scale", type=float, default=3.0)
    parser.add_argument("--max_sequence_length", type=int, default=16)
    parser.add_argument("--batch_size", type=int, default=12)
    parser.add_argument("--threads", type=int, help="torch threads")
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args(argv)
    if args.threads:
        torch.set_num_threads(args.threads)

    args.output.mkdir(parents=True, exist_ok=True)
    jobs = [job for job in json.loads(args.jobs.read_text()) if not (args.output / job["file"]).exists()]
    if not jobs:
        return
    pipe = load(args.pipeline, args.lora, args.scheduler).to(args.device)
    pipe.set_progress_bar_config(disable=True)
    for start in range(0, len(jobs), args.batch_size):
        batch = jobs[start : start + args.batch_size]
        # one generator a clip: its noise does not depend on the batch it is in
        videos = pipe(
            prompt=[job["prompt"] for job in batch],
            generator=[torch.Generator("cpu").manual_seed(job["seed"]) for job in batch],
            height=args.height,
            width=args.width,
            num_frames=args.num_frames,
            num_inference_steps=args.num_inference_steps,
            guidance_scale=args.guidance_scale,
            max_sequence_length=args.max_sequence_length,
            output_type="np",
        ).frames
        for job, video in zip(batch, videos, strict=True):
            write_mp4(args.output / job["file"], (video.clip(0, 1) * 255).round().astype("uint8"), args.fps, args.crf)
            print(job["file"], flush=True)


if __name__ == "__main__":
    main()
