#!/bin/sh
# Over batch, at 400 steps each, so that batch and length do not change together: about an hour on two cores. Runs that are
# in benchmarks/results already are not repeated, so it can be stopped and started again.
#
#   benchmarks/batches.sh [1024] [8192] [32768]
set -eu
cd "$(dirname "$0")/.."
export OMP_NUM_THREADS=1

compare() {
    ${PYTHON:-python} launch/compare.py --jobs 2 --results benchmarks/results/batches.jsonl --tokens-per-step "$batch" \
        --steps 400 --eval-every 50 --layers 2 --width 64 --heads 4 --context 64 "$@" >/dev/null
}

# Three learning rates, and more where the best of three was at an edge; kl_muon is Muon on the engine's square blocks.
for batch in ${*:-1024 8192 32768}; do
    compare --run "--optimizer muon" --run "--optimizer kl_muon" --grid lr=1.5e-2,2.2e-2,3.3e-2
    [ "$batch" -gt 8192 ] || compare --run "--optimizer muon" --grid lr=5e-2
    compare --run "--optimizer kl_shampoo" --run "--optimizer kl_shampoo --set polar=3" --grid lr=1e-2,1.5e-2,2.2e-2
    [ "$batch" -gt 8192 ] || compare --run "--optimizer soap" --run "--optimizer kl_soap" --grid lr=1e-2,1.5e-2,2.2e-2
    [ "$batch" -gt 8192 ] || compare --run "--optimizer adamw" --grid lr=1e-3,2e-3,4e-3
done
