#!/usr/bin/env bash
# A prompt enhancer and Wan 2.1 T2V 1.3B, trained in turns, with the settings of config.yaml:
#
#   bash run.sh                     on every GPU of this machine
#   bash run.sh --rounds 2         options win over config.yaml
#   bash run.sh --smoke [DIR]       two updates of a toy model on the CPU; what it leaves stays in DIR
#
# PYTHON=... chooses an interpreter, ACCELERATE_CONFIG=... another accelerate file than vidtrl's single.yaml and
# multi_gpu.yaml, SMOKE_PROCESSES=2 a smoke run over two processes.
. "$(dirname "$0")/../launch.sh"
launch train.py --config "$config" "$@"
