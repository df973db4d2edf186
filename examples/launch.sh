# What the run.sh of all recipes do, each of which sources this file: with --smoke [DIR] as the first option, small settings on
# toy data (smoke.py), else those of the recipe's own folder. It leaves the caller in that folder, with `config`, its
# config.yaml, `smoke`, the DIR of a smoke run, the options that are left in "$@", and `launch`.
#
# PYTHON=... chooses an interpreter, ACCELERATE_CONFIG=... another accelerate file than vidtrl's single.yaml and
# multi_gpu.yaml, SMOKE_PROCESSES=2 a smoke run over two processes.
set -euo pipefail
python=${PYTHON:-python}
smoke=""
processes="" # one a GPU, unless run.sh says another number
if [ "${1:-}" = --smoke ]; then
    shift
    if [ $# -gt 0 ] && [ "${1#-}" = "$1" ]; then
        smoke=$1
        shift
    else
        smoke=$(mktemp -d)
    fi
    mkdir -p "$smoke"
    smoke=$(cd "$smoke" && pwd)
    processes=${SMOKE_PROCESSES:-1}
fi
cd "$(dirname "$0")"
config=${smoke:-.}/config.yaml
if [ -n "$smoke" ]; then
    for file in *.yaml; do
        "$python" ../smoke.py "$file" "$smoke/$file"
    done
fi

# Become `accelerate launch`, of the chosen interpreter; in parentheses where run.sh has more to do after it
launch() {
    processes=${processes:-$("$python" -c 'import torch; print(max(1, torch.accelerator.device_count()))')}
    local name configs port=""
    name=$([ "$processes" -gt 1 ] && echo multi_gpu || echo single)
    configs=$("$python" -c 'import vidtrl; print(vidtrl.__path__[0])')/accelerate_configs
    [ -z "$smoke" ] || port="--main_process_port 0"
    exec "$python" -m accelerate.commands.launch --config_file "${ACCELERATE_CONFIG:-$configs/$name.yaml}" \
        --num_processes "$processes" $port "$@"
}
