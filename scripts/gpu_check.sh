#!/bin/sh
# Checks and benchmarks on a machine with an NVIDIA GPU, from a bare checkout: torch (2.11 or newer) and triton (3.6 or newer) are enough.
#
#   sh scripts/gpu_check.sh [--budget-s 500] [--no-flex] [--only WORD]...
#
# Results lie in evals/results/gpu/<device>-<date>.json and .md, complete after every benchmark; copies go to $OUT where that is set.
# PYTHON chooses the interpreter. Nothing is installed, and nothing is fetched.
set -u

cd "$(dirname "$0")/.."
PYTHON="${PYTHON:-$(command -v python3 || command -v python)}"
BUDGET=500
if [ "${1:-}" = --budget-s ]; then
    BUDGET="$2"
    shift 2
fi
START=$(date +%s)
left() { echo $((BUDGET - $(date +%s) + START)); }

# `accel` is the folder in this checkout; its parts lie beside it, behind links
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
export PYTHONUNBUFFERED=1
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-8}"
# a kernel made under the interpreter would be a slow one
unset TRITON_INTERPRET

"$PYTHON" -c 'import torch, triton; print("torch", torch.__version__, "triton", triton.__version__)' || exit 2
"$PYTHON" -c 'import sys, torch; sys.exit(0 if torch.cuda.is_available() else "no CUDA device: nothing was checked or measured")' || exit 2
command -v nvidia-smi >/dev/null && nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader

STATUS=0
# the kills come after the budgets only where a kernel hangs: what was found before is on disk
CHECKS=$(mktemp -d)
trap 'rm -rf "$CHECKS"' EXIT
OUT="" timeout -k 10 $((BUDGET * 2 / 5 + 20)) "$PYTHON" -m accel.evals.gpu --check --budget-s $((BUDGET * 2 / 5)) --folder "$CHECKS" || STATUS=1
timeout -k 10 $(($(left) + 30)) "$PYTHON" -m accel.evals.gpu --bench --budget-s "$(left)" --tests "$CHECKS" "$@" || STATUS=$?
exit $STATUS
