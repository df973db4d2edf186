"""A rank of `accelerate launch`, of any trainer; one of the ranks may kill itself.

    accelerate launch --config_file FILE rank_worker.py '{"trainer": "sft", "out": ..., "kill": 3, "config": {...}}'

The first rank writes `<out>.json`: a digest of the trained weights, the losses, and the number of processes.
"""

import json
import os
import signal
import sys
from pathlib import Path

import distill_setup
import grpo_setup
import sft_setup
import torch
from datasets import load_from_disk
from transformers import TrainerCallback


class KillSecondRank(TrainerCallback):
    def __init__(self, step, note):
        self.step, self.note = step, note

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step + 1 == self.step and args.process_index == 1:
            self.note.touch()  # its time is when the rank died
            os.kill(os.getpid(), signal.SIGKILL)


def main(job):
    torch.set_num_threads(1)
    out, config = job["out"], job["config"]
    if job["trainer"] == "sft":
        trainer = sft_setup.make_trainer(out, load_from_disk(job["clips"]), job["cache"], **config)
    elif job["trainer"] == "grpo":
        trainer = grpo_setup.make_trainer(out, **config)
    else:
        trainer = distill_setup.make_trainer(out, job["cache"], **config)
    if job.get("kill"):
        trainer.add_callback(KillSecondRank(job["kill"], Path(f"{out}.killed")))
    trainer.train(resume_from_checkpoint=job.get("resume"))
    weights = sft_setup.trained_weights(trainer)
    result = {
        "norm": sum(w.double().square().sum().item() for w in weights.values()),
        "held": sft_setup.held(trainer),
        "num_processes": trainer.accelerator.num_processes,
        "digest": sft_setup.digest(weights),
        "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
    }
    if trainer.is_world_process_zero():
        Path(f"{out}.json").write_text(json.dumps(result))
    trainer.end()


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
