"""A training process for tests that kill it, resume it, or start two of it.

    python sft_worker.py '{"out": ..., "clips": ..., "cache": ..., "config": {...}, "kill": "training@3"}'

or [`start`] in a process forked from one that has imported everything,

writes `<out>/result.json`: a digest of the trained weights, the losses, and the number of processes.
"""

import faulthandler
import json
import multiprocessing
import os
import resource
import signal
import sys
import traceback
from pathlib import Path

import torch
from datasets import load_from_disk
from peft import LoraConfig
from sft_setup import digest, held, make_args, trained_weights
from tiny_pipelines import ALL
from transformers import TrainerCallback

from vidtrl import VideoSFTTrainer


HANGS = 240  # seconds


class KilledWhileTraining(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_substep_end(self, args, state, control, **kwargs):
        if state.global_step + 1 == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


class Trainer(VideoSFTTrainer):
    kill_while_saving = None
    full_disk = None
    broken = None  # a clip

    def clean_latents(self, inputs):
        mean, std, condition = super().clean_latents(inputs)
        if self.model.training and any(name.startswith(f"{self.broken}.") for name in inputs["sample_ids"]):
            mean = mean * float("nan")
        return mean, std, condition

    def _save_rng_state(self, output_dir):  # weights and optimizer are written, the rest is not
        if self.state.global_step == self.kill_while_saving:
            os.kill(os.getpid(), signal.SIGKILL)
        super()._save_rng_state(output_dir)

    def _save_optimizer_and_scheduler(self, output_dir):
        if self.state.global_step == self.full_disk:  # a real write error: no file may grow beyond 4 KiB
            resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
        super()._save_optimizer_and_scheduler(output_dir)


def start(job, **environment):
    """Run a job in a process of its own; returns the process and the file of its output."""
    context = multiprocessing.get_context("forkserver")
    here = str(Path(__file__).parent)
    if here not in os.environ.get("PYTHONPATH", "").split(os.pathsep):  # for the server, which is started once
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [here, os.environ.get("PYTHONPATH")]))
    context.set_forkserver_preload(["sft_worker"])
    log = f"{job['out']}{environment.get('RANK', '')}.log"
    process = context.Process(target=_child, args=(job, environment, log))
    process.start()
    return process, Path(log)


def _child(job, environment, log):
    os.environ.update(environment)
    descriptor = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
    os.dup2(descriptor, 1), os.dup2(descriptor, 2)
    torch.set_num_threads(1)
    faulthandler.dump_traceback_later(HANGS, exit=True)  # a process that hangs says where, and fails
    try:
        trainer = main(job)
    except Exception:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)
    # Leave with the trainer alive: the destructor of a gloo process group waits, holding the interpreter's lock, for a
    # thread that may be waiting for this lock (torch 2.13)
    assert trainer is not None
    os._exit(0)


def main(job):
    clips = load_from_disk(job["clips"])
    trainer = Trainer(
        ALL[job.get("pipe", "wan")]()[0],
        make_args(job["out"], job["cache"], **job.get("config", {})),
        clips,
        clips.select(range(3)),
        # dropout draws from the process's own generator, which a checkpoint must restore
        peft_config=None
        if job.get("lora") is False
        else LoraConfig(r=4, lora_alpha=8, lora_dropout=0.0 if job.get("lora") == "no dropout" else 0.1),
    )
    trainer.broken = job.get("broken")
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
        "num_skipped_batches": [entry.get("num_skipped_batches") for entry in trainer.state.log_history],
        "eval_loss": trainer.evaluate()["eval_loss"],
        "num_processes": trainer.accelerator.num_processes,
        "held": held(trainer),
    }
    if trainer.is_world_process_zero():
        Path(job["out"], "result.json").write_text(json.dumps(result))
    trainer.end()
    return trainer


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
