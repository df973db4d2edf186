#!/usr/bin/env bash
# A student of Wan 2.1 T2V 1.3B that streams: causal fine-tuning (causal_sft.yaml), then Self-Forcing (config.yaml):
#
#   bash run.sh                     on every GPU of this machine; the first step where wan-causal-sft is missing
#   bash run.sh --max_steps 100     options win over config.yaml
#   bash run.sh --smoke [DIR]       two updates of each step on a toy model, on the CPU; what it leaves stays in DIR
#
# PYTHON=... chooses an interpreter, ACCELERATE_CONFIG=... another accelerate file than vidtrl's single.yaml and
# multi_gpu.yaml, SMOKE_PROCESSES=2 a smoke run over two processes.
. "$(dirname "$0")/../launch.sh"
if [ ! -f "$(sed -n 's/^init_adapter: *\([^ ]*\).*/\1/p' "$config")/pytorch_lora_weights.safetensors" ]; then
    (launch --module vidtrl.cli.sft --config "${smoke:-.}/causal_sft.yaml")
fi
launch train.py --config "$config" "$@"
