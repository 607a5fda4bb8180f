#!/bin/sh
# Everything that is proven and measured on a GPU, by one command on a machine that has one and needs no network:
#
#     [WHEELS=folder] [PYTHON=python3] benchmarks/gpu.sh [--quick]
#
# WHEELS names a folder of wheels that came along for what the machine's Python lacks; they go into an environment of their own.
# Results lie in benchmarks/results/gpu-*.json, the device named in each. Exits 1 if one is not exact; 77 without a GPU, nothing measured.
set -u
cd "$(dirname "$0")/.." || exit 1
quick=${1:-}
python=${PYTHON:-python3}

if [ -n "${WHEELS:-}" ]; then
    "$python" -m venv --system-site-packages .gpu || exit 1
    .gpu/bin/pip install --quiet --no-index --find-links "$WHEELS" --no-deps "$WHEELS"/*.whl || exit 1
    python=$PWD/.gpu/bin/python
fi
export PYTHONPATH="$PWD/src${PYTHONPATH:+:$PYTHONPATH}"

if ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    echo "no GPU: nothing measured" >&2
    exit 77
fi
"$python" -c 'import torch; print(torch.cuda.get_device_name(), "torch", torch.__version__)'

worst=0
run() { # name, command...: goes on to the next whatever happens
    name=$1
    shift
    echo "== $name: $*"
    if "$@"; then echo "== $name: done"; else
        echo "== $name: FAILED with $?"
        worst=1
    fi
}
results=benchmarks/results
run kernels "$python" benchmarks/gpu_kernels.py --device cuda $quick --json "$results/gpu-kernels.json"
# a kernel that hangs must not hold up what comes after it
run expert_kernels timeout 600 "$python" benchmarks/expert_kernels.py --device cuda $quick --json "$results/gpu-expert_kernels.json"
run serve "$python" benchmarks/serve.py --device cuda $quick --json "$results/gpu-serve.json"
run moe_lora "$python" benchmarks/moe_lora.py --device cuda $quick --json "$results/gpu-moe_lora.json"
run grpo "$python" benchmarks/grpo.py --device cuda --no-peer $quick --json "$results/gpu-grpo.json"
exit $worst
