#!/bin/sh
# Everything that is proven and measured on a GPU, by one command on a machine that has one and needs no network, in 25 minutes:
#
#     [WHEELS=folder] [PYTHON=python3] [MINUTES=25] [RESULTS=benchmarks/results] benchmarks/gpu.sh [--quick] [PART ...]
#     DRY=1 benchmarks/gpu.sh       the same on a CPU at tiny shapes: whether every part runs
#
# WHEELS names a folder of wheels that came along for what the machine's Python lacks, peers among them; they go into an environment of
# their own. Parts run in the order below, the most valuable first, each for at most so many seconds and all until MINUTES are over; one that
# fails or is cut off leaves the next alone. What each found goes at once into RESULTS/DEVICE/DATE.json, with the commit ($COMMIT where
# there is no repository). PART: only these, into the same file. Exits 1 if a part fails; 77 without a GPU, nothing measured.
set -u
cd "$(dirname "$0")/.." || exit 1
here=benchmarks
python=${PYTHON:-python3}
dry=${DRY:-}
quick=
parts=
for word in "$@"; do
    case $word in
    --quick) quick=--quick ;;
    -*) echo "$word is no option of gpu.sh; --quick is, and names of parts" >&2; exit 2 ;;
    *) parts="$parts $word" ;;
    esac
done

if [ -n "${WHEELS:-}" ]; then
    "$python" -m venv --system-site-packages .gpu || exit 1
    .gpu/bin/pip install --quiet --no-index --find-links "$WHEELS" --no-deps "$WHEELS"/*.whl || exit 1
    python=$PWD/.gpu/bin/python
fi
export PYTHONPATH="$PWD/src${PYTHONPATH:+:$PYTHONPATH}"

device=cuda
results=${RESULTS:-$here/results}
if [ -n "$dry" ]; then
    device=cpu quick=--quick results=${RESULTS:-$(mktemp -d)}
fi
file=$("$python" $here/gpu_results.py begin --device $device --results "$results" ${dry:+--dry-run}) || exit 77
echo "== into $file"

worst=0
end=$(($(date +%s) + ${MINUTES:-25} * 60))
run() { # name, seconds at most, script and its arguments
    name=$1 limit=$2
    shift 2
    if [ -n "$parts" ]; then
        case " $parts " in *" $name "*) ;; *) return ;; esac
    fi
    begun=$(date +%s)
    left=$((end - begun))
    if [ "$left" -le 10 ]; then
        echo "== $name: no time left"
        "$python" $here/gpu_results.py add "$file" "$name" --status "no time left"
        return
    fi
    [ "$limit" -gt "$left" ] && limit=$left
    echo "== $name: $*"
    # a part writes as it goes, so that what is cut off is not lost
    timeout -k 10 "$limit" "$python" "$@" --json "$file.part"
    code=$?
    spent=$(($(date +%s) - begun))
    echo "== $name: ended with $code after $spent s"
    [ $code -ne 0 ] && worst=1
    "$python" $here/gpu_results.py add "$file" "$name" --status $code --seconds $spent --found "$file.part"
    rm -f "$file.part"
}

tiny=
[ -n "$dry" ] && tiny=--dry-run
run kernels 150 $here/gpu_kernels.py --device $device --quick
run expert_kernels 240 $here/expert_kernels.py --device $device $quick
run layers 330 $here/moe_lora.py --device $device ${tiny:-$quick} --layers-only
for limit in 24 16 12; do
    run "gpu_$limit" 200 $here/small_gpu.py --device $device $quick --limit-gb $limit
done
run models 330 $here/moe_lora.py --device $device ${tiny:-$quick} --models-only
run grpo "${GRPO_SECONDS:-150}" $here/grpo.py --device $device --no-peer $quick ${dry:+--steps 2}
run serve 150 $here/serve.py --device $device $quick ${dry:+--only qwen3 --dtype float32}
exit $worst
