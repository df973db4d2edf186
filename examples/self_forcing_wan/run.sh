#!/usr/bin/env bash
# A student of Wan 2.1 T2V 1.3B that streams: causal fine-tuning (causal_sft.yaml), then Self-Forcing (config.yaml):
#
#   bash run.sh                     on every GPU of this machine; the first step where wan-causal-sft is missing
#   bash run.sh --max_steps 100     options win over config.yaml
#   bash run.sh --smoke [DIR]       two updates of each step on a toy model, on the CPU; what it leaves stays in DIR
#
# PYTHON=... chooses an interpreter, ACCELERATE_CONFIG=... another accelerate file than vidtrl's single.yaml and
# multi_gpu.yaml, SMOKE_PROCESSES=2 a smoke run over two processes.
set -euo pipefail
python=${PYTHON:-python}
if [ "${1:-}" = --smoke ]; then
    folder=${2:-$(mktemp -d)}
    mkdir -p "$folder"
    folder=$(cd "$folder" && pwd)
    causal=$folder/causal_sft.yaml
    config=$folder/config.yaml
    processes=${SMOKE_PROCESSES:-1}
    flags="--main_process_port 0"
    cd "$(dirname "$0")"
    "$python" ../smoke.py causal_sft.yaml "$causal"
    "$python" ../smoke.py config.yaml "$config"
    set --
else
    cd "$(dirname "$0")"
    causal=causal_sft.yaml
    config=config.yaml
    processes=$("$python" -c 'import torch; print(max(1, torch.accelerator.device_count()))')
    flags=""
fi
name=$([ "$processes" -gt 1 ] && echo multi_gpu || echo single)
configs=$("$python" -c 'import vidtrl; print(vidtrl.__path__[0])')/accelerate_configs
# `accelerate launch`, of the chosen interpreter
launch="-m accelerate.commands.launch --num_processes $processes $flags"
accelerate_config=${ACCELERATE_CONFIG:-$configs/$name.yaml}

if [ ! -f "$(sed -n 's/^init_adapter: *\([^ ]*\).*/\1/p' "$config")/pytorch_lora_weights.safetensors" ]; then
    "$python" $launch --config_file "$accelerate_config" --module vidtrl.cli.sft --config "$causal"
fi
exec "$python" $launch --config_file "$accelerate_config" train.py --config "$config" "$@"
