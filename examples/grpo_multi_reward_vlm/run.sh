#!/usr/bin/env bash
# GRPO of Wan 2.1 T2V 1.3B with several rewards, one of them a vision-language model, with the settings of config.yaml:
#
#   bash run.sh                     the judge on the last GPU, training on the others (one GPU: both on it)
#   bash run.sh --max_steps 100     options win over config.yaml
#   bash run.sh --smoke [DIR]       two updates of a toy model, judged by a tiny one, on the CPU; what it leaves stays in DIR
#
# JUDGE=... chooses the judge, an image-text-to-text model; NO_JUDGE=1 starts none, for one that serves already. PYTHON=...
# chooses an interpreter, ACCELERATE_CONFIG=... another accelerate file than vidtrl's, SMOKE_PROCESSES=2 a smoke run over two.
. "$(dirname "$0")/../launch.sh"
if [ -n "$smoke" ]; then
    judge=$smoke/judge
    device=cpu
else
    judge=${JUDGE:-Qwen/Qwen3-VL-2B-Instruct}
    gpus=$("$python" -c 'import torch; print(torch.cuda.device_count())')
    processes=$((gpus > 1 ? gpus - 1 : 1))
    device=$([ "$gpus" -gt 0 ] && echo "cuda:$((gpus - 1))" || echo cpu)
fi

if [ -z "${NO_JUDGE:-}" ]; then
    port=$(grep -oE 'http://127\.0\.0\.1:[0-9]+' "$config" | head -n 1 | cut -d: -f3)
    "$python" -m vidtrl.cli.main reward-server --reward remote_vlm_judge.py:get_judge --batch_size 8 --port "$port" \
        --device "$device" --kwargs "{\"model_id\": \"$judge\", \"device\": \"$device\"}" &
    server=$!
    trap 'kill "$server" 2> /dev/null || true; wait "$server" 2> /dev/null || true' EXIT
    until "$python" -c "import urllib.request as u; u.urlopen('http://127.0.0.1:$port/health', timeout=5)" 2> /dev/null; do
        kill -0 "$server" 2> /dev/null || { echo "the judge did not start" >&2; exit 1; }
        sleep 1
    done
fi
(launch train.py --config "$config" "$@")
