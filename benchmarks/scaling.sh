#!/bin/sh
# Learning rates over width and depth, weight decay, AdamW's share and schedules: about twelve minutes on one core.
# Runs that are in benchmarks/results/scaling.jsonl already are not repeated.
#
#   benchmarks/scaling.sh
set -eu
cd "$(dirname "$0")/.."
export OMP_NUM_THREADS=1

kl="--optimizer kl_shampoo --set shampoo_exponent=0.5"  # the default when this was measured

compare() {
    ${PYTHON:-python} launch/compare.py --jobs "${JOBS:-1}" --results benchmarks/results/scaling.jsonl \
        --tokens-per-step 1024 --steps 400 --eval-every 100 --context 64 --heads 4 "$@" >/dev/null
}

for width in 32 64 128; do
    compare --layers 2 --width "$width" --run "$kl" --grid lr=3e-3,6e-3,1e-2,1.5e-2,2.2e-2,3.3e-2
done
for layers in 1 4 8; do
    compare --layers "$layers" --width 64 --run "$kl" --grid lr=6e-3,1e-2,1.5e-2,2.2e-2
done
for width in 64 128; do
    compare --layers 2 --width "$width" --run "$kl --lr 1.5e-2" --grid weight_decay=0.0,0.1,0.3,1.0
done
for best in "64 1.5e-2" "128 1e-2"; do
    compare --layers 2 --width "${best% *}" --run "$kl --lr ${best#* }" \
        --grid adamw_lr=1.25e-3,2.5e-3,5e-3,1e-2
done
compare --layers 2 --width 64 --run "$kl" --grid schedule=cosine,linear,wsd,constant \
    --grid lr=6e-3,1e-2,1.5e-2,2.2e-2
