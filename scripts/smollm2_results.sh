#!/bin/sh
# The project's own results on its embedded language model: every text task, FlexPrefill at three shares of the attention, PowerAttention, and
# controls at the density of the first, beside dense. `sh scripts/smollm2_results.sh [LENGTH SAMPLES]…`, such as `2k 8 4k 4 8k 2`, the default.
# A run that was stopped goes on with the same call. Hours, on a CPU; TASKS=needle,code begins it with fewer tasks, PROCESSES=2 shares them out, a thread
# each. runs/smollm2-LENGTH holds samples, tables and reports of a length, runs/smollm2 all lengths side by side.
set -eu
TASKS=${TASKS:-all}
PROCESSES=${PROCESSES:-1}
[ $# -gt 0 ] || set -- 2k 8 4k 4 8k 2
FLEX=min_budget=256,min_seq_len=0

run() {
    if [ "$PROCESSES" -gt 1 ]; then
        OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive accelerate launch --multi_gpu --num_processes "$PROCESSES" -m accel run --device cpu "$@"
    else
        accel run "$@"
    fi
}

folders=
while [ $# -gt 1 ]; do
    out=runs/smollm2-$1
    if [ -f "$out/config.yaml" ]; then
        run --out "$out" --resume --samples "$2"
    else
        run --model smollm2 --tasks "$TASKS" --lengths "$1" --samples "$2" --out "$out" \
            --method flexprefill:gamma=0.95,$FLEX --method flexprefill:gamma=0.9,$FLEX --method flexprefill:gamma=0.8,$FLEX \
            --method powerattention:block_size=64,min_seq_len=0
    fi
    folders="$folders $out"
    shift 2
done
# shellcheck disable=SC2086    # several folders
accel compare $folders --out runs/smollm2
