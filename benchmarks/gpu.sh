#!/bin/sh
# Everything that is proven and measured on a GPU, by one command on a machine that has one and needs no network, in 25 minutes:
#
#     [WHEELS=folder] [PYTHON=python3] [MINUTES=25] [RESULTS=benchmarks/results] benchmarks/gpu.sh [--quick] [PART ...]
#     DRY=1 benchmarks/gpu.sh       the same on a CPU at tiny shapes: whether every part runs
#
# WHEELS names a folder of wheels that came along for what the machine's Python lacks, peers among them (gpu_wheels.py collects them); they
# go into a folder of their own, before the machine's packages: one environment above another would not see those of a third. Parts run in
# the order below, the most valuable first, each for at most so many seconds and all until MINUTES are over; one that fails or is cut off
# leaves the next alone. What each found goes at once into RESULTS/DEVICE/DATE.json, with the commit ($COMMIT where there is no repository),
# and beside it as a table. PART: only these, into the same file. Exits 1 if a part fails; 77 without a GPU, nothing measured.
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
    "$python" -m pip install --quiet --no-index --no-deps --no-compile --upgrade --target .gpu "$WHEELS"/*.whl || exit 1
    PYTHONPATH=$PWD/.gpu${PYTHONPATH:+:$PYTHONPATH}
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
# a dry run asks whether every part runs, on a machine that may be busy
slower=1
[ -n "$dry" ] && slower=4
end=$(($(date +%s) + ${MINUTES:-25} * 60 * slower))
run() { # name, seconds at most, script and its arguments
    name=$1 limit=$(($2 * slower))
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
run kernels 120 $here/gpu_kernels.py --device $device --quick
run expert_kernels 150 $here/expert_kernels.py --device $device $quick
run train 100 $here/gpu_train.py --device $device
run layers 270 $here/moe_lora.py --device $device ${tiny:-$quick} --layers-only
for limit in 12 16 24; do
    run "gpu_$limit" 170 $here/small_gpu.py --device $device $quick --limit-gb $limit
done
run models 300 $here/moe_lora.py --device $device ${tiny:-$quick} --models-only
run memory 60 $here/memory.py --device $device --quick
run loss_bands 100 $here/loss_bands.py --quick ${dry:+--steps 4 --rows "int8;experts computed again"}
run grpo "${GRPO_SECONDS:-100}" $here/grpo.py --device $device --no-peer $quick
run serve 100 $here/serve.py --device $device $quick ${dry:+--only qwen3 --dtype float32}
"$python" $here/gpu_results.py show "$file"
exit $worst
