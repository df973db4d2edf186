#!/usr/bin/env bash
# All four stages, from config.yaml beside this file.
#
#   bash run.sh                 Wan 2.1 T2V 1.3B: needs clips/, prompts.txt and pairs.jsonl in this folder, and a GPU
#   bash run.sh --dry-run       every setting, the commands and the memory; starts nothing
#   bash run.sh --smoke [DIR]   the same stages on the toy model that ships with vidtrl, on a CPU, in about a minute
#
# Other arguments go to `vidtrl run`, such as --stages sft grpo, or --redo grpo. PYTHON=... chooses an interpreter.
. "$(dirname "$0")/../launch.sh"
exec "$python" -m vidtrl.cli.main run --config "$config" "$@"
