"""One of the processes of a distillation; see grpo_worker, which starts processes in the same way.

Each job is a list of cases, trained one after the other: `<out>/<case>.safetensors` holds the trained weights of both roles
and `<out>/<case>.json` what was logged.
"""

import faulthandler
import json
import multiprocessing
import os
import signal
import sys
import traceback
from pathlib import Path

import torch
from accelerate.utils import gather_object
from datasets import load_from_disk
from distill_setup import dataset, make_trainer, other_size, weights
from safetensors.torch import save_file
from sft_setup import digest, held, moved
from transformers import TrainerCallback

from vidtrl import VideoDistillTrainer


HANGS = 120  # seconds a case


class Killed(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_substep_end(self, args, state, control, **kwargs):
        if state.global_step + 1 == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


class Broken(VideoDistillTrainer):
    """The loss of a role is not finite in some (step, micro-step) of the last process."""

    broken = {}

    def _broken(self, role, loss):
        last = self.args.process_index == self.args.world_size - 1
        here = [self.state.global_step, self._micro_step] in self.broken.get(role, [])
        return loss * float("nan") if last and here and self.model.training else loss

    def student_loss(self, inputs):
        loss, x = super().student_loss(inputs)
        return self._broken("student", loss), x

    def fake_loss(self, inputs, x=None):
        loss, x = super().fake_loss(inputs, x)
        return self._broken("fake", loss), x


def start(job, **environment):
    """Run a job in a process of its own; returns the process and the file of its output."""
    context = multiprocessing.get_context("forkserver")
    here = str(Path(__file__).parent)
    if here not in os.environ.get("PYTHONPATH", "").split(os.pathsep):
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [here, os.environ.get("PYTHONPATH")]))
    context.set_forkserver_preload(["distill_worker"])
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
            trainers.append(train(job, name, **config))
        except Exception:
            traceback.print_exc()
            sys.stderr.flush()
            os._exit(1)
    trainers[-1].end()
    os._exit(0)  # see sft_worker


def roles(trainer) -> dict:
    names = [name for name in ("student", "fake") if name in trainer.policies]
    return {f"{role}.{name}": w for role in names for name, w in weights(trainer, role).items()}


def train(job, name, *, clips=False, evaluate=False, teacher=False, resume=None, kill=None, broken=None, **config):
    out = Path(job["out"])
    rows = load_from_disk(job["clips"]) if clips else dataset()
    arguments = dict(eval_dataset=rows.select(range(3))) if evaluate else {}
    arguments |= dict(teacher_model=other_size()) if teacher else {}
    cls = VideoDistillTrainer if broken is None else Broken
    trainer = make_trainer(out / name, job["cache"], rows=rows, cls=cls, trainer=arguments, **config)
    trainer.broken = broken
    if kill is not None:
        trainer.add_callback(Killed(kill))
    untrained = roles(trainer)
    trainer.train(resume_from_checkpoint=resume)
    trained = roles(trainer)
    everywhere = gather_object([digest(trained)])
    metrics = trainer.evaluate() if evaluate else {}
    if trainer.is_world_process_zero():
        save_file(trained, out / f"{name}.safetensors")
        result = {
            "num_processes": trainer.accelerator.num_processes,
            "held": held(trainer),
            "held apart": {role: held(trainer, model) for role, model in trainer.models_apart().items()},
            "digests": everywhere,
            "moved": moved(untrained, trained),
            "logs": [entry for entry in trainer.state.log_history if "loss" in entry],
            "metrics": {n: v for n, v in metrics.items() if "loss" in n or "generated" in n},
        }
        (out / f"{name}.json").write_text(json.dumps(result))
    return trainer
