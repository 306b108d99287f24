#!/bin/sh
# Over batch at 400 steps each, so that batch and length do not change together, then over length at the small batch: about
# two hours on two cores. Runs that are in benchmarks/results already are not repeated, so it can be stopped and started
# again.
#
#   benchmarks/batches.sh [1024x400] [8192x400] [32768x400] [1024x2000] [1024x10000] [choices]      bytes a step x steps
set -eu
cd "$(dirname "$0")/.."
export OMP_NUM_THREADS=1

compare() {
    ${PYTHON:-python} ${job:-launch/compare.py} --jobs "${JOBS:-2}" --results benchmarks/results/batches.jsonl \
        --tokens-per-step "$batch" --steps "$steps" --eval-every $((steps / 8)) \
        --layers 2 --width 64 --heads 4 --context 64 "$@" >/dev/null
}

# Three learning rates, and more where the best of three was at an edge; kl_muon is Muon on the engine's square blocks.
over_batch() {
    compare --run "--optimizer muon" --run "--optimizer kl_muon" --grid lr=1.5e-2,2.2e-2,3.3e-2
    [ "$batch" -gt 8192 ] || compare --run "--optimizer muon" --grid lr=5e-2
    compare --run "--optimizer kl_shampoo" --run "--optimizer kl_shampoo --set polar=3" --grid lr=1e-2,1.5e-2,2.2e-2
    [ "$batch" -gt 8192 ] || compare --run "--optimizer soap" --run "--optimizer kl_soap" --grid lr=1e-2,1.5e-2,2.2e-2
    [ "$batch" -gt 8192 ] || compare --run "--optimizer adamw" --grid lr=1e-3,2e-3,4e-3,8e-3
    seeds="--seeds 1 2"
    [ "$batch" -gt 8192 ] || compare $seeds --run "--optimizer kl_shampoo --lr 1.5e-2" --run "--optimizer kl_muon --lr 2.2e-2"
}

over_length() {
    compare --run "--optimizer kl_shampoo" --grid lr=6e-3,1e-2,1.5e-2
    compare --run "--optimizer kl_muon" --grid lr=1e-2,1.5e-2,2.2e-2
    compare --run "--optimizer muon" --grid lr=1.5e-2,2.2e-2
    compare --run "--optimizer adamw" --grid lr=1e-3,2e-3
    [ "$steps" -gt 2000 ] || compare --run "--optimizer soap" --run "--optimizer kl_soap" --grid lr=1e-2,1.5e-2
    [ "$steps" -gt 2000 ] || compare --run "--optimizer kl_shampoo --set polar=3" --grid lr=1e-2,1.5e-2
}

# KL-Shampoo with one thing otherwise, two seeds
over_choices() {
    compare --seeds 0 1 --run "--optimizer kl_shampoo --lr 1.5e-2" --grid recipe=fresh,sooner,clipped
    compare --seeds 0 1 --run "--optimizer kl_shampoo --lr 1.5e-2 --precondition-frequency 1"
    compare --seeds 0 1 --run "--optimizer kl_shampoo --lr 1.5e-2" --grid "betas=(0.9,0.8),(0.95,0.9),(0.85,0.9)"
}

for arena in ${*:-1024x400 8192x400 32768x400 1024x2000 1024x10000 choices}; do
    if [ "$arena" = choices ]; then
        for steps in 150 400; do batch=1024 job="-m benchmarks.variants" over_choices; done
        continue
    fi
    batch=${arena%x*} steps=${arena#*x}
    if [ "$steps" -gt 400 ]; then over_length; else over_batch; fi
done
