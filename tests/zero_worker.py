"""One of the processes of `accelerate launch` with DeepSpeed (or the only one, without): trainings one after the other.

    accelerate launch --config_file FILE zero_worker.py '{"out": ..., "clips": ..., "cache": ..., "cases": {name: {...}}}'

`<out>/<case>.safetensors` holds the trained weights, of all roles, and `<out>/<case>.json` what was logged.
"""

import faulthandler
import json
import os
import sys
from pathlib import Path

import distill_setup
import grpo_setup
import sft_setup
import torch
from accelerate.utils import gather_object
from datasets import load_from_disk
from peft import LoraConfig
from safetensors.torch import save_file
from transformers import training_args


HANGS = 240  # seconds a case


def whole(trainer) -> dict:
    """All trained weights; all processes must call it."""
    roles = [role for role in ("policy", "student", "fake") if role in trainer.policies]
    weights = {f"{role}.{n}": p for role in roles for n, p in trainer.policies.parameters(role).items()}
    if not trainer.is_deepspeed_enabled:
        return {name: p.detach().clone() for name, p in weights.items()}
    import deepspeed

    with deepspeed.zero.GatheredParameters(list(weights.values())):
        return {name: p.detach().clone() for name, p in weights.items()}


def make_trainer(job, name, *, trainer, clips=False, evaluate=False, teacher=False, lora=True, **config):
    out, rows = Path(job["out"], name), load_from_disk(job["clips"])
    lora = LoraConfig(**lora) if isinstance(lora, dict) else lora
    if trainer == "sft":
        return sft_setup.make_trainer(out, rows, job["cache"], lora=lora, eval_clips=rows.select(range(3)), **config)
    if trainer == "grpo":
        return grpo_setup.make_trainer(out, lora=lora, **config)
    rows = rows if clips else distill_setup.dataset()
    arguments = dict(eval_dataset=rows.select(range(3))) if evaluate else {}
    arguments |= dict(teacher_model=distill_setup.other_size()) if teacher else {}
    return distill_setup.make_trainer(out, job["cache"], rows=rows, lora=lora, trainer=arguments, **config)


def train(job, name, *, resume=None, **case):
    trainer = make_trainer(job, name, **case)
    if trainer.is_deepspeed_enabled:
        # ZeRO-3 does not shard weights below a size that no weight of a tiny model reaches
        shards = trainer.accelerator.state.deepspeed_plugin.deepspeed_config["zero_optimization"]
        shards["stage3_param_persistence_threshold"] = 0
    untrained = whole(trainer)
    trainer.train(resume_from_checkpoint=resume)
    trained = whole(trainer)
    everywhere = gather_object([sft_setup.digest(trained)])
    held = sft_setup.held(trainer)
    metrics = trainer.evaluate() if trainer.eval_dataset is not None else {}
    if trainer.is_world_process_zero():
        save_file({n: w.contiguous() for n, w in trained.items()}, Path(job["out"], f"{name}.safetensors"))
        result = {
            "num_processes": trainer.accelerator.num_processes,
            "held": held,
            "digests": everywhere,
            "moved": sft_setup.moved(untrained, trained),
            "logs": [entry for entry in trainer.state.log_history if "loss" in entry],
            "metrics": {n: v for n, v in metrics.items() if "loss" in n or "generated" in n},
        }
        Path(job["out"], f"{name}.json").write_text(json.dumps(result))
    return trainer


def main(job):
    torch.set_num_threads(1)
    if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
        import deepspeed

        # it would compile this at the start of a run on a CPU, for minutes
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        # a CPU can, and is only asked with use_cpu, with which there is no DeepSpeed
        training_args.is_torch_bf16_gpu_available = lambda: True
    for name, case in job["cases"].items():
        faulthandler.dump_traceback_later(HANGS, exit=True)  # a process that hangs says where, and fails
        trainer = train(job, name, **case)
    faulthandler.cancel_dump_traceback_later()
    trainer.end()


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
