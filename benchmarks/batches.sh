#!/bin/sh
# Over batch at 400 steps each, so that batch and length do not change together; over length at the small batch; and at
# that, KL-Shampoo with one thing otherwise: about eight hours on two cores. Runs that are in benchmarks/results already are
# not repeated, so it can be stopped and started again.
#
#   benchmarks/batches.sh [1024x400] [8192x400] [32768x400] [1024x2000] [1024x10000] [choices] [spikes] [beginning]
set -eu
cd "$(dirname "$0")/.."
export OMP_NUM_THREADS=1

half="shampoo_exponent=0.5 final_beta1=0 polar=0"  # the default when most of this was measured

compare() {
    ${PYTHON:-python} ${job:-launch/compare.py} --jobs "${JOBS:-2}" --results benchmarks/results/${results:-batches}.jsonl \
        --tokens-per-step "$batch" --steps "$steps" --eval-every "$((steps > 400 ? steps / 8 : 50))" \
        --layers 2 --width 64 --heads 4 --context 64 "$@" >/dev/null
}

# The best two learning rates of each, and those that once were, with three seeds.
best() {
    muon=2.2e-2,3.3e-2 squares=2.2e-2,3.3e-2 adamw=1e-3,2e-3
    case "$batch" in
    8192) muon=3.3e-2,5e-2 squares=2.2e-2,3.3e-2,5e-2,7e-2 adamw=2e-3,4e-3 ;;
    32768) muon=3.3e-2,5e-2 squares=5e-2,7e-2 ;;
    esac
    compare --seeds 0 1 2 --run "--optimizer kl_shampoo" --run "--optimizer kl_shampoo --set polar=3" \
        --run "--optimizer kl_soap" --run "--optimizer soap" --grid lr=1.5e-2,2.2e-2
    compare --seeds 0 1 2 --run "--optimizer muon" --grid lr=$muon
    compare --seeds 0 1 2 --run "--optimizer kl_muon" --grid lr=$squares
    compare --seeds 0 1 2 --run "--optimizer adamw" --grid lr=$adamw
}

# Three learning rates and more, until the best is at no edge; kl_muon is Muon on the engine's square blocks.
over_batch() {
    best
    compare --run "--optimizer muon" --run "--optimizer kl_muon" --grid lr=1.5e-2,2.2e-2,3.3e-2,5e-2,7e-2
    compare --run "--optimizer kl_shampoo --lr 3.3e-2" --run "--optimizer kl_shampoo --set polar=3 --lr 1e-2"
    compare --run "--optimizer kl_shampoo --set $half" --grid lr=1e-2,1.5e-2
    compare --seeds 0 1 2 --run "--optimizer kl_shampoo --set polar=0 --lr 2.2e-2"
    compare --run "--optimizer kl_shampoo --set final_beta1=0 polar=0" --grid lr=1.5e-2,2.2e-2
    compare --run "--optimizer kl_soap --set polar=0" --run "--optimizer soap --set polar=0" --grid lr=1e-2,1.5e-2,2.2e-2
    compare --run "--optimizer adamw" --grid lr=1e-3,2e-3,4e-3,8e-3
    if [ "$batch" -gt 8192 ]; then
        compare --run "--optimizer kl_muon --lr 1e-1" --run "--optimizer kl_shampoo --lr 1.5e-2 --set polar=0"
        compare --run "--optimizer kl_soap --set polar=0" --run "--optimizer soap --set polar=0" --grid lr=3.3e-2
        compare --seeds 0 1 2 --run "--optimizer kl_shampoo" --run "--optimizer kl_soap" --run "--optimizer soap" --grid lr=3.3e-2
        compare --run "--optimizer kl_shampoo --lr 5e-2"
        return 0
    fi
    compare --run "--optimizer soap" --run "--optimizer kl_soap" --grid lr=3.3e-2
    compare --run "--optimizer kl_shampoo --lr 2.2e-2 --set $half"
    compare --run "--optimizer kl_shampoo --set $half polar=3" --grid lr=1e-2,1.5e-2,2.2e-2
    compare --seeds 1 2 --run "--optimizer kl_shampoo --lr 1.5e-2 --set $half"
    [ "$batch" -le 1024 ] || return 0
    compare --seeds 0 1 2 --run "--optimizer kl_shampoo --lr 1.5e-2 --set polar=0"
    compare --run "--optimizer adamw --lr 2e-3" --grid "betas=(0.9,0.99),(0.95,0.95),(0.8,0.95),(0.9,0.9)"
    compare --run "--optimizer adamw --warmup 80" --grid lr=2e-3,9e-3,1.3e-2
    compare --seeds 0 1 2 --run "--optimizer adamw --warmup 80" --grid lr=4e-3,6e-3
    compare --run "--optimizer adamw --warmup 80 --lr 4e-3 --set betas=(0.8,0.95)"
    compare --run "--optimizer kl_shampoo --warmup 80 --lr 1.5e-2 --set $half"
    compare --run "--optimizer kl_shampoo --lr 1.5e-2 --set final_beta1=0 polar=0" --grid shampoo_exponent=0.6,0.8
    compare --run "--optimizer kl_shampoo --lr 3.3e-2 --set final_beta1=0 polar=0"
}

over_length() {
    compare --seeds 0 1 2 --run "--optimizer kl_shampoo" --run "--optimizer kl_shampoo --set polar=0" \
        --run "--optimizer kl_shampoo --set polar=3" --run "--optimizer kl_soap" --run "--optimizer soap" \
        --run "--optimizer kl_shampoo --set final_beta1=0 polar=0" --grid lr=1e-2,1.5e-2
    compare --seeds 3 4 --run "--optimizer kl_shampoo --lr 1e-2" --run "--optimizer kl_shampoo --lr 1e-2 --set polar=0"
    compare --run "--optimizer kl_shampoo --lr 2.2e-2" --run "--optimizer kl_shampoo --set polar=3 --lr 2.2e-2" \
        --run "--optimizer kl_soap --lr 6e-3" --run "--optimizer soap --lr 6e-3"
    compare --seeds 0 1 2 --run "--optimizer kl_muon" --grid lr=1.5e-2,2.2e-2
    compare --seeds 0 1 2 --run "--optimizer muon --lr 2.2e-2" --run "--optimizer adamw --lr 4e-3" --run "--optimizer adamw --lr 8e-3"
    compare --run "--optimizer kl_shampoo --set final_beta1=0 polar=0 --lr 6e-3"
    compare --run "--optimizer kl_shampoo --set $half" --grid lr=6e-3,1e-2,1.5e-2
    compare --run "--optimizer kl_muon" --grid lr=1e-2,3.3e-2,5e-2,7e-2
    compare --run "--optimizer kl_muon --set final_beta1=0.99" --grid lr=1.5e-2,2.2e-2
    compare --run "--optimizer muon" --grid lr=1.5e-2,3.3e-2,5e-2
    compare --run "--optimizer adamw" --grid lr=1e-3,2e-3,1.6e-2
    compare --run "--optimizer soap --set polar=0" --run "--optimizer kl_soap --set polar=0" --grid lr=1e-2,1.5e-2
    compare --run "--optimizer kl_shampoo --set $half polar=3" --grid lr=1e-2,1.5e-2
    compare --run "--optimizer kl_shampoo --lr 1.5e-2 --precondition-frequency 1 --set $half"
    compare --seeds 1 2 --run "--optimizer kl_shampoo --set $half" --run "--optimizer kl_soap --set polar=0" \
        --run "--optimizer soap --set polar=0" --run "--optimizer kl_shampoo --set $half polar=3" --grid lr=1.5e-2
    job="-m benchmarks.variants" compare --seeds 0 1 2 --run "--optimizer kl_shampoo --lr 1.5e-2 --set $half" --grid recipe=zero_staleness,online
}

over_a_long_run() {
    compare --seeds 0 1 2 --run "--optimizer kl_shampoo" --grid lr=1e-2,1.5e-2,2.2e-2
    compare --seeds 0 1 2 --run "--optimizer kl_muon" --grid lr=1e-2,1.5e-2
    compare --seeds 0 1 2 --run "--optimizer adamw" --grid lr=2e-3,4e-3,8e-3
    compare --seeds 0 1 2 --run "--optimizer muon" --grid lr=1.5e-2,2.2e-2
    compare --seeds 0 1 2 --run "--optimizer kl_soap" --run "--optimizer soap" --run "--optimizer kl_shampoo --set polar=3" --grid lr=1e-2,1.5e-2
    compare --run "--optimizer adamw" --grid lr=1e-3,1.6e-2
    compare --seeds 0 1 2 --run "--optimizer muon" --run "--optimizer kl_muon" --grid lr=5e-2
    compare --seeds 1 2 --run "--optimizer muon --lr 3.3e-2"
    compare --run "--optimizer muon" --grid lr=1e-2,3.3e-2,7e-2,1e-1
    compare --run "--optimizer kl_muon" --grid lr=3.3e-2,7e-2
    compare --run "--optimizer kl_shampoo" --grid lr=3.3e-2,5e-2
    compare --run "--optimizer kl_shampoo --set polar=3 --lr 2.2e-2" \
        --run "--optimizer kl_soap --lr 6e-3" --run "--optimizer soap --lr 6e-3"
    compare --run "--optimizer kl_shampoo --set polar=0" --grid lr=1e-2,1.5e-2,2.2e-2
    compare --run "--optimizer kl_shampoo --set $half" --run "--optimizer kl_soap --set polar=0" --grid lr=6e-3,1e-2,1.5e-2
    compare --run "--optimizer kl_muon" --grid lr=6e-3,2.2e-2
    compare --seeds 1 --run "--optimizer kl_shampoo --set $half" --grid lr=1e-2
    compare --seeds 1 2 3 --run "--optimizer kl_shampoo --lr 1.5e-2 --set polar=0"
    compare --run "--optimizer kl_shampoo --lr 6e-3 --set final_beta1=0 polar=0"
    compare --seeds 0 1 2 --run "--optimizer kl_muon --lr 1e-2 --set final_beta1=0.99"
    compare --seeds 0 1 --run "--optimizer kl_shampoo --set final_beta1=0 polar=0" --grid lr=1e-2,1.5e-2
    job="-m benchmarks.variants" compare --seeds 0 1 --run "--optimizer kl_shampoo --lr 1e-2 --set final_beta1=0 polar=0" --grid recipe=longer_memory
    compare --run "--optimizer kl_muon --lr 1e-2" --grid "betas=(0.95,0.95)"
    compare --width 96 --seeds 0 1 --run "--optimizer kl_shampoo" --run "--optimizer kl_muon" --grid lr=1e-2
}

over_choices() {
    job="-m benchmarks.variants" compare --seeds 0 1 --run "--optimizer kl_shampoo --lr 1.5e-2 --set $half" \
        --grid recipe=fresh,sooner,clipped,zero_staleness,online
    compare --seeds 0 1 --run "--optimizer kl_shampoo --lr 1.5e-2 --precondition-frequency 1 --set $half"
    compare --seeds 0 1 --run "--optimizer kl_shampoo --lr 1.5e-2 --set $half" --grid "betas=(0.9,0.8),(0.95,0.9),(0.85,0.9)"
}

# What the first steps are made otherwise for, and what is left of it later.
over_the_beginning() {
    for arena in 1024x150 1024x400 8192x150 8192x400 1024x2000; do
        batch=${arena%x*} steps=${arena#*x} lr=2.2e-2 seeds="0 1 2"
        [ "$steps" -lt 2000 ] || lr=1e-2
        [ "$batch" -lt 8192 ] || seeds="0 1"
        old="final_beta1=0 polar=0"
        job="-m benchmarks.variants" compare --seeds $seeds --run "--optimizer kl_shampoo --lr $lr --set $old" --grid recipe=fresh,sooner_yet
        compare --seeds 0 1 2 --run "--optimizer kl_shampoo --lr $lr"
    done
    for batch in 1024 8192; do
        steps=150
        compare --seeds 0 1 2 --run "--optimizer kl_shampoo" --grid lr=1.5e-2,3.3e-2
        compare --seeds 0 1 2 --run "--optimizer kl_muon" --grid lr=3.3e-2,5e-2,7e-2
    done
    compare --seeds 0 1 2 --run "--optimizer kl_muon --lr 1e-1"
    compare --run "--optimizer soap" --run "--optimizer kl_soap" --run "--optimizer soap --set polar=0" \
        --run "--optimizer kl_soap --set polar=0" --grid lr=1.5e-2
    batch=32768 steps=150
    compare --run "--optimizer kl_muon" --grid lr=3.3e-2,5e-2,7e-2
    compare --run "--optimizer kl_shampoo --set $half" --grid lr=1e-2,1.5e-2,2.2e-2
    compare --run "--optimizer kl_shampoo" --grid lr=2.2e-2,3.3e-2
    compare --run "--optimizer kl_shampoo --set final_beta1=0 polar=0" --grid lr=1.5e-2,2.2e-2,3.3e-2
    compare --run "--optimizer kl_shampoo --lr 2.2e-2 --set polar=3"
    batch=8192
    compare --seeds 0 1 --run "--optimizer kl_shampoo --lr 2.2e-2 --set polar=3"
}

# With spikes cut down, as batches.jsonl's earlier runs were without.
over_spikes() {
    results=spikes compare --seeds 0 1 2 --run "--optimizer kl_shampoo --lr 1.5e-2 --set final_beta1=0 polar=0" \
        --run "--optimizer kl_soap --lr 1.5e-2 --set polar=0" --run "--optimizer soap --lr 1.5e-2 --set polar=0" --run "--optimizer kl_muon --lr 2.2e-2"
}

for part in ${*:-1024x400 8192x400 32768x400 1024x2000 choices}; do
    if [ "$part" = spikes ]; then
        batch=1024 steps=400
        over_spikes
        continue
    fi
    if [ "$part" = beginning ]; then
        over_the_beginning
        continue
    fi
    if [ "$part" = choices ]; then
        batch=1024
        for steps in 150 400; do over_choices; done
        continue
    fi
    batch=${part%x*} steps=${part#*x}
    if [ "$steps" -gt 2000 ]; then over_a_long_run; elif [ "$steps" -gt 400 ]; then over_length; else over_batch; fi
done
