#!/bin/sh
# The runs behind docs/finetuning.md, an hour on one core; those that are in benchmarks/results already are not repeated.
set -eu
cd "$(dirname "$0")/.."
export OMP_NUM_THREADS=1
kl="--optimizer kl_shampoo --set shampoo_exponent=0.5 polar=0"  # the default when this was measured

compare() {
    rank=$1
    shift
    ${PYTHON:-python} -m benchmarks.finetuning --results "benchmarks/results/lora-$rank.jsonl" --rank "$rank" "$@" >/dev/null
}

compare 8 --run "--optimizer adamw" --grid lr=2.5e-3,5e-3,1e-2,2e-2
compare 8 --run "$kl --long-side blocks" --run "$kl --long-side diagonal" --run "$kl --long-side identity" --grid lr=5e-3,1e-2,2e-2
compare 64 --run "--optimizer adamw" --grid lr=2.5e-3,3.5e-3,5e-3,1e-2,2e-2
compare 64 --run "$kl --long-side blocks" --run "$kl --long-side diagonal" --grid lr=2.5e-3,5e-3,1e-2,2e-2
compare 64 --run "$kl --long-side identity" --grid lr=5e-3,1e-2
# the best of three routes with another seed, LoRA+, and pieces as long as the rank
compare 8 --seeds 1 --run "--optimizer adamw" --run "$kl --long-side diagonal" --run "$kl --long-side blocks" --grid lr=1e-2
compare 64 --seeds 1 --run "--optimizer adamw" --run "$kl --long-side diagonal" --run "$kl --long-side blocks" --grid lr=5e-3
compare 8 --b-ratio 4 --run "--optimizer adamw" --run "$kl --long-side diagonal" --grid lr=5e-3
compare 8 --seeds 0 1 --run "$kl --long-side blocks --lr 1e-2" --grid max_preconditioner_dim=8,12
compare 8 --seeds 0 1 --run "$kl --long-side blocks --recipe compact --lr 1e-2" --grid max_preconditioner_dim=32,8192
# the exponent, on one base for both
${PYTHON:-python} -m benchmarks.finetuning --results benchmarks/results/lora-exponent.jsonl --rank 8 --run "--optimizer kl_shampoo --long-side blocks" \
    --run "$kl --long-side blocks" --run "--optimizer kl_shampoo --long-side blocks --set polar=0" --grid lr=1e-2,2e-2 >/dev/null
