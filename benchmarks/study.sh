#!/bin/sh
# The study behind docs/learning.md, from nothing: about two hours on two cores. Runs that are in benchmarks/results
# already are not repeated, so it can be stopped and started again; without arguments it makes all parts in turn.
#
#   benchmarks/study.sh [grid] [regression] ...
set -eu
cd "$(dirname "$0")/.."
export OMP_NUM_THREADS=1
results=benchmarks/results

compare() {
    ${PYTHON:-python} launch/compare.py --jobs 2 "$@" >/dev/null
}

# Five learning rates for every optimizer, each about a factor 1.5 from the next: 400 steps of the demo's model.
grid() {
    text="compare --results $results/text.jsonl"
    $text --run "--optimizer adamw" --grid lr=1e-3,1.5e-3,2e-3,3e-3,4e-3
    $text --run "--optimizer kl_shampoo" --grid lr=4e-3,6e-3,1e-2,1.5e-2,2.2e-2
    $text --run "--optimizer muon" --grid lr=1e-2,2e-2,3e-2,4.5e-2,7e-2
    $text --run "--optimizer muon --set adjust_lr_fn=match_rms_adamw" --grid lr=4e-3,6e-3,1e-2,1.5e-2,2.2e-2
    $text --run "--optimizer soap" --grid lr=4e-3,6e-3,1e-2,1.5e-2,2.2e-2
    $text --run "--optimizer kl_soap" --grid lr=4e-3,6e-3,1e-2,1.5e-2,2.2e-2
    $text --run "--optimizer shampoo" --grid lr=1.5e-3,3e-3,4.5e-3,6e-3,1e-2
    $text --run "--optimizer kl_shampoo --recipe paper" --grid lr=6e-3,1e-2,1.5e-2,2.2e-2,3e-2
    $text --run "--optimizer soap --recipe paper" --grid lr=2e-3,3e-3,4.5e-3,6e-3,1e-2
}

for part in "${@:-grid}"; do
    "$part"
done
