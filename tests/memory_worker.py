"""One of the processes of a fine-tuning whose memory is measured; see test_memory_sharded.py.

    python memory_worker.py '{"out": ..., "clips": ..., "runs": {"name": [rank of the adapter or null, {...}]}}'

The first rank writes `<out>/<name>.json`: the number of processes, and its peak in bytes.
"""

import gc
import json
import sys
from pathlib import Path

import torch
from datasets import load_dataset
from peft import LoraConfig
from test_memory import SIZE, allocations
from torch.distributed.tensor import DTensor
from torch.profiler import ProfilerActivity, profile
from transformers import TrainerCallback

from vidtrl import VideoSFTConfig, VideoSFTTrainer, toy


def alive() -> int:
    """Bytes of all tensors that there are."""
    gc.collect()
    tensors = [x for x in gc.get_objects() if isinstance(x, torch.Tensor)]
    storages = [(x.to_local() if isinstance(x, DTensor) else x).untyped_storage() for x in tensors if not x.is_meta]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


class Measure(TrainerCallback):
    """The peaks of updates after the first, before which optimizer states are there and all shards in their places."""

    def __init__(self):
        self.peaks = []

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step > 0:
            self.before = alive()
            self.profile = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
            self.profile.start()

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step > 1:
            self.profile.stop()
            self.peaks.append(self.before + allocations(self.profile))


def main(job):
    torch.set_num_threads(1)
    clips = load_dataset("videofolder", data_dir=job["clips"], split="train", cache_dir=f"{job['out']}/datasets")
    for name, (rank, config) in job["runs"].items():
        args = VideoSFTConfig(
            f"{job['out']}/{name}", **SIZE, max_steps=4, report_to=[], use_cpu=True, disable_tqdm=True, save_strategy="no",
            check_model=False, cache_dir=f"{job['out']}/cache", **config,
        )  # fmt: skip
        lora = None if rank is None else LoraConfig(r=rank)
        trainer = VideoSFTTrainer(toy.pipeline_path(), args, clips, peft_config=lora)
        trainer.add_callback(measure := Measure())
        trainer.train()
        if trainer.is_world_process_zero():
            # DDP lays its buckets out anew in the second update; FSDP's wait where the other process is late
            largest_or_smallest = min if trainer.is_fsdp_enabled else max
            result = {"peak": largest_or_smallest(measure.peaks), "num_processes": trainer.accelerator.num_processes}
            Path(job["out"], f"{name}.json").write_text(json.dumps(result))
    trainer.end()


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
