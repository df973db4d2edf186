"""One of the processes of a GRPO training; see sft_worker, whose start it shares.

Each job is a list of cases, trained one after the other: `<out>/<case>.safetensors` holds the trained weights and
`<out>/<case>.json` what was logged.
"""

import faulthandler
import json
import multiprocessing
import os
import sys
import traceback
from pathlib import Path

import torch
from accelerate.utils import gather_object
from grpo_setup import PROMPTS, Watching, brightness, dataset, make_trainer
from safetensors.torch import save_file
from sft_setup import digest, held, trained_weights


HANGS = 120  # seconds a case


def only_some(prompts, videos, **kwargs):
    """Nothing to learn from the second and third prompt."""
    rewards = brightness(videos)
    return [1.0 if p in PROMPTS[1:3] else r for p, r in zip(prompts, rewards, strict=True)]


class Broken(Watching):
    """The loss of the last process is not finite in the second step."""

    def compute_loss(self, *args, **kwargs):
        loss = super().compute_loss(*args, **kwargs)
        broken = self.state.global_step == 1 and self.args.process_index == self.args.world_size - 1
        return loss * float("nan") if broken else loss


REWARDS = {"brightness": brightness, "only_some": only_some}


def start(job, **environment):
    """Run a job in a process of its own; returns the process and the file of its output."""
    context = multiprocessing.get_context("forkserver")
    here = str(Path(__file__).parent)
    if here not in os.environ.get("PYTHONPATH", "").split(os.pathsep):
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [here, os.environ.get("PYTHONPATH")]))
    context.set_forkserver_preload(["grpo_worker"])
    log = Path(job["out"], f"log{environment.get('RANK', '')}")
    process = context.Process(target=_child, args=(job, environment, log))
    process.start()
    return process, log


def _child(job, environment, log):
    os.environ.update(environment)
    descriptor = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
    os.dup2(descriptor, 1), os.dup2(descriptor, 2)
    torch.set_num_threads(1)
    trainers = []
    for name, config in job["cases"].items():
        faulthandler.dump_traceback_later(HANGS, exit=True)  # a process that hangs says where, and fails
        try:
            trainers.append(train(Path(job["out"]), name, **config))
        except Exception:
            traceback.print_exc()
            sys.stderr.flush()
            os._exit(1)
    trainers[-1].end()
    os._exit(0)  # see sft_worker


def train(out: Path, name: str, *, rewards="brightness", evaluate=False, resume=None, one_level=False, **config):
    config = dict(optim="sgd", learning_rate=1.0, max_grad_norm=0.0) | config
    cls = Broken if config.get("on_nan") == "skip" else Watching
    arguments = dict(eval_dataset=dataset(3)) if evaluate else {}
    trainer = make_trainer(out / name, cls=cls, rewards=REWARDS[rewards], trainer=arguments, **config)
    trainer.video_model.per_sample_sigma = not one_level
    untrained = trained_weights(trainer)
    trainer.train(resume_from_checkpoint=resume)
    weights = trained_weights(trainer)
    everywhere = gather_object([digest(weights)])
    metrics = trainer.evaluate() if evaluate else {}
    useful = gather_object([[sum(bool(i.weight.any()) for i in g["items"]) for g in trainer.generations]])
    taught = gather_object(
        [
            [
                sum(
                    bool((item.weight * item.advantages).any())
                    for part in g["slices"]
                    for batch in part
                    for item in batch
                )
                for g in trainer.generations
            ]
        ]
    )
    if trainer.is_world_process_zero():
        save_file(weights, out / f"{name}.safetensors")
        result = {
            "num_processes": trainer.accelerator.num_processes,
            "held": held(trainer),
            "digests": everywhere,
            "items": useful,
            "taught": taught,
            "moved": max((weights[n] - untrained[n]).abs().max().item() for n in weights),
            "logs": [entry for entry in trainer.state.log_history if "loss" in entry],
            "eval_reward": metrics.get("eval_reward"),
        }
        (out / f"{name}.json").write_text(json.dumps(result))
    return trainer
