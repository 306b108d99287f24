#!/bin/sh
# Over batch and length, the part of docs/learning.md that says who is ahead where: about two hours on two cores. Runs that
# are in benchmarks/results already are not repeated, so it can be stopped and started again.
#
#   benchmarks/batches.sh [batches] [edges] [lengths] [seeds]
set -eu
cd "$(dirname "$0")/.."
export OMP_NUM_THREADS=1

compare() {
    ${PYTHON:-python} launch/compare.py --jobs 2 --results benchmarks/results/batches.jsonl \
        --layers 2 --width 64 --heads 4 --context 64 "$@" >/dev/null
}

small() { compare --tokens-per-step 1024 --steps 400 --eval-every 50 "$@"; }
middle() { compare --tokens-per-step 8192 --steps 150 --eval-every 25 "$@"; }
large() { compare --tokens-per-step 32768 --steps 100 --eval-every 20 "$@"; }

# Three learning rates around what each was best at before; kl_muon is Muon on the engine's square blocks.
batches() {
    for batch in small middle large; do
        $batch --run "--optimizer adamw" --grid lr=2e-3,4e-3,8e-3
        $batch --run "--optimizer muon" --run "--optimizer kl_muon" --grid lr=2.2e-2,3.3e-2,5e-2
        $batch --run "--optimizer soap" --run "--optimizer kl_soap" --run "--optimizer kl_shampoo" \
            --run "--optimizer kl_shampoo --set polar=3" --run "--optimizer kl_shampoo --set polar=5" --grid lr=1e-2,1.5e-2,2.2e-2
    done
}

# Where the best of three was at an edge.
edges() {
    :
}

# The small batch for longer.
lengths() {
    for steps in 2000 10000; do
        long="compare --tokens-per-step 1024 --steps $steps --eval-every 250"
        $long --run "--optimizer muon" --run "--optimizer kl_muon" --grid lr=1.5e-2,2.2e-2
        $long --run "--optimizer kl_shampoo" --run "--optimizer kl_shampoo --set polar=3" --grid lr=1e-2,1.5e-2
    done
}

# The best setting of each on two seeds more.
seeds() {
    :
}

for part in ${*:-batches edges lengths seeds}; do
    "$part"
done
