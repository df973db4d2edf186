"""A training process for tests that kill it, resume it, or start two of it.

    python sft_worker.py '{"out": ..., "clips": ..., "cache": ..., "config": {...}, "kill": "training@3"}'

writes `<out>/result.json`: a digest of the trained weights, the losses, and the number of processes.
"""

import json
import os
import resource
import signal
import sys
from pathlib import Path

from datasets import load_from_disk
from peft import LoraConfig
from sft_setup import digest, make_args, trained_weights
from tiny_pipelines import wan
from transformers import TrainerCallback

from vidtrl import VideoSFTTrainer


class KilledWhileTraining(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_substep_end(self, args, state, control, **kwargs):
        if state.global_step + 1 == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


class Trainer(VideoSFTTrainer):
    kill_while_saving = None
    full_disk = None

    def _save_rng_state(self, output_dir):  # weights and optimizer are written, the rest is not
        if self.state.global_step == self.kill_while_saving:
            os.kill(os.getpid(), signal.SIGKILL)
        super()._save_rng_state(output_dir)

    def _save_optimizer_and_scheduler(self, output_dir):
        if self.state.global_step == self.full_disk:  # a real write error: no file may grow beyond 4 KiB
            resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
        super()._save_optimizer_and_scheduler(output_dir)


def main(job):
    trainer = Trainer(
        wan()[0],
        make_args(job["out"], job["cache"], **job.get("config", {})),
        load_from_disk(job["clips"]),
        peft_config=LoraConfig(r=4, lora_alpha=8, lora_dropout=0.1) if job.get("lora", True) else None,
    )
    what, _, step = (job.get("kill") or "").partition("@")
    if what == "training":
        trainer.add_callback(KilledWhileTraining(int(step)))
    elif what == "saving":
        trainer.kill_while_saving = int(step)
    elif what == "full disk":
        trainer.full_disk = int(step)
    trainer.train(resume_from_checkpoint=job.get("resume"))
    weights = trained_weights(trainer)
    result = {
        "digest": digest(weights),
        "norm": sum(w.double().square().sum().item() for w in weights.values()),
        "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
        "num_processes": trainer.accelerator.num_processes,
    }
    if trainer.is_world_process_zero():
        Path(job["out"], "result.json").write_text(json.dumps(result))
    trainer.end()


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
