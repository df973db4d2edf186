#!/usr/bin/env bash
# All four stages, from pipeline.yaml beside this file.
#
#   bash run.sh                 Wan 2.1 T2V 1.3B: needs clips/, prompts.txt and pairs.jsonl in this folder, and a GPU
#   bash run.sh --dry-run       every setting, the commands and the memory; starts nothing
#   bash run.sh --smoke [DIR]   the same stages on the toy model that ships with vidtrl, on a CPU, in about a minute
#
# Other arguments go to `vidtrl run`, such as --stages sft grpo, or --redo grpo. PYTHON=... chooses an interpreter.
set -euo pipefail
python=${PYTHON:-python}
if [ "${1:-}" != --smoke ]; then
    cd "$(dirname "$0")"
    exec "$python" -m vidtrl.cli.main run --config pipeline.yaml "$@"
fi
shift
if [ $# -gt 0 ] && [ "${1#-}" = "$1" ]; then
    mkdir -p "$1"
    folder=$(cd "$1" && pwd)
    shift
else
    folder=$(mktemp -d)
fi
cd "$(dirname "$0")"
"$python" - "$folder" <<'END'
"""Toy data, and pipeline.yaml with the toy model, small videos and a few updates in place of Wan's."""
import json
import sys
from pathlib import Path

import yaml

from vidtrl.toy import captions, pipeline_path, write_dataset
from vidtrl.toy.paraphrases import enhancer_path, paraphrases

folder = Path(sys.argv[1])
if not (folder / "clips").exists():
    write_dataset(folder / "clips", num_clips=8, quality="clean", seed=0, fps=8)
pairs = [{"prompt": row["prompt"], "enhanced": row["caption"]} for row in paraphrases(8, "pairs")]
(folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, pairs)) + "\n")
(folder / "captions.txt").write_text("\n".join(captions()[::9]) + "\n")
(folder / "prompts.txt").write_text("\n".join(row["prompt"] for row in paraphrases(8, "prompts")) + "\n")

pipeline = yaml.safe_load(Path("pipeline.yaml").read_text())
pipeline |= {"model": pipeline_path(), "output_dir": str(folder / "out")}
pipeline["shared"] |= {
    "height": 32, "width": 32, "fps": 8, "max_sequence_length": 16, "save_steps": 1,
    "use_cpu": True, "gradient_checkpointing": False, "check_model": False,
}
few = {"use_cpu": True, "bf16": False, "gradient_checkpointing": False, "logging_steps": 1}
small = {"num_frames": 5, "lora_r": 8, "lora_alpha": 8, "gradient_accumulation_steps": 1, "max_steps": 2}
stages = pipeline["stages"]
halves = {"dataset_train_split": "train[:75%]", "dataset_test_split": "train[75%:]", "eval_steps": 1}
stages["sft"] |= small | halves | {"dataset_name": str(folder / "clips"), "per_device_train_batch_size": 2, "warmup_steps": 0}
stages["grpo"] |= small | halves | {
    "dataset_name": str(folder / "captions.txt"), "reward_funcs": ["toy-color", "toy-steadiness", "toy-presence"],
    "num_generations": 2, "per_device_train_batch_size": 4, "num_inference_steps": 4, "eval_num_inference_steps": 4,
}
stages["prompt"] |= {
    "model_name_or_path": enhancer_path(), "template": None, "lora_r": 8, "lora_alpha": 8, "num_frames": 5,
    "pairs_dataset_name": str(folder / "pairs.jsonl"), "dataset_name": str(folder / "prompts.txt"),
    "reward_funcs": ["vidtrl.toy.paraphrases:intent_reward"], "reward_weights": [1.0], "num_inference_steps": 2,
    "guidance_scale": 1.0, "pipeline_kwargs": {"max_sequence_length": 16},
}
stages["prompt"]["sft"] |= few | {"max_steps": 4}
stages["prompt"]["grpo"] |= few | {
    "max_steps": 2, "num_generations": 4, "gradient_accumulation_steps": 1, "save_steps": 1,
}
stages["distill"] |= small | {
    "dataset_name": str(folder / "prompts.txt"), "per_device_train_batch_size": 2, "fake_updates_per_student": 1,
    "teacher_guidance_scale": 1.5, "validation_steps": None, "cache_dir": str(folder / "cache"),
}
(folder / "pipeline.yaml").write_text(yaml.safe_dump(pipeline, sort_keys=False))
END
exec "$python" -m vidtrl.cli.main run --config "$folder/pipeline.yaml" "$@"
