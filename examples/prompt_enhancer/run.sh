#!/usr/bin/env bash
# A prompt enhancer for Wan 2.1 T2V 1.3B, with the settings of config.yaml:
#
#   bash run.sh                     on every GPU of this machine
#   bash run.sh --steps grpo       options win over config.yaml
#   bash run.sh --smoke [DIR]       two updates of a toy model on the CPU; what it leaves stays in DIR
#
# PYTHON=... chooses an interpreter, ACCELERATE_CONFIG=... another accelerate file than vidtrl's single.yaml and
# multi_gpu.yaml, SMOKE_PROCESSES=2 a smoke run over two processes.
set -euo pipefail
python=${PYTHON:-python}
if [ "${1:-}" = --smoke ]; then
    folder=${2:-$(mktemp -d)}
    mkdir -p "$folder"
    config=$(cd "$folder" && pwd)/config.yaml
    processes=${SMOKE_PROCESSES:-1}
    flags="--main_process_port 0"
    cd "$(dirname "$0")"
    "$python" ../smoke.py config.yaml "$config"
    set --
else
    cd "$(dirname "$0")"
    config=config.yaml
    processes=$("$python" -c 'import torch; print(max(1, torch.accelerator.device_count()))')
    flags=""
fi
name=$([ "$processes" -gt 1 ] && echo multi_gpu || echo single)
configs=$("$python" -c 'import vidtrl; print(vidtrl.__path__[0])')/accelerate_configs
# `accelerate launch`, of the chosen interpreter
exec "$python" -m accelerate.commands.launch --config_file "${ACCELERATE_CONFIG:-$configs/$name.yaml}" \
    --num_processes "$processes" $flags train.py --config "$config" "$@"
