#!/usr/bin/env bash
# What only a GPU can tell, on a machine with one: about eight minutes.
#
#   launch/gpu.sh [--small] [tests] [step] [refresh] [huggingface] [study]
#
# Without parts, all of them in turn. Results go to benchmarks/results, or to $OUT. --small does the same in miniature, on
# a machine without a GPU too: to see that it runs.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python}
out=${OUT:-benchmarks/results}
small=false
if [ "${1:-}" = --small ]; then
    small=true
    shift
fi
mkdir -p "$out"

# 90 s: every method as on a CPU, GradScaler, DeepSpeed, Lightning.
tests() {
    if "$small"; then
        "$python" -m pytest -q tests/test_cuda.py --collect-only
    else
        "$python" -m pytest -q tests/test_cuda.py
    fi
}

# 60 s: what a step of GPT-2 124M costs.
step() {
    if "$small"; then
        "$python" -m benchmarks.step --shapes 8x4 --repeats 2 --warmup 1 --gpu none --no-peers --out "$out/step-gpu.jsonl"
    else
        "$python" -m benchmarks.step --shapes 64x64 --gpu gpt2-124m --no-peers --out "$out/step-gpu.jsonl"
    fi
}

# 20 s: the ways to make a refresh's parts.
refresh() {
    if "$small"; then
        "$python" -m benchmarks.refresh --shapes 2x8 --repeats 1 --out "$out/refresh-gpu.jsonl"
    else
        "$python" -m benchmarks.refresh --shapes 2x64 --out "$out/refresh-gpu.jsonl"
    fi
}

# 60 s: transformers' Trainer under FSDP2, which accelerate has on GPUs alone; it learns, stops and goes on.
huggingface() {
    trainer="$python -m torch.distributed.run --standalone --nproc-per-node 1 launch/hf_trainer.py"
    if "$small"; then
        set -- --parallel ddp --layers 1 --width 32 --heads 2 --context 32 --log_every 1
    else
        set -- --parallel fsdp2
    fi
    folder=$(mktemp -d)
    $trainer "$@" --out "$folder" --steps 8 --save_every 4
    rm -r "$folder/checkpoint-8"
    $trainer "$@" --out "$folder" --steps 8 --save_every 4 --resume true
    rm -r "$folder"
}

# 4 minutes: which optimizer gets how far at 32,768 bytes a step, 25.6 million parameters.
study() {
    if "$small"; then
        set -- --layers 1 --width 32 --heads 2 --context 32 --tokens-per-step 64 --steps 2
    else
        set -- --layers 8 --width 512 --heads 8 --context 256 --tokens-per-step 32768 --steps 600
    fi
    "$python" launch/compare.py --jobs 1 --results "$out/text-gpu.jsonl" "$@" \
        --run "--optimizer muon --lr 8e-3 --adamw-lr 3e-3" \
        --run "--optimizer kl_shampoo --lr 3e-3 --adamw-lr 2e-3"
}

[ $# -gt 0 ] || set -- tests step refresh huggingface study
for part in "$@"; do
    "$part"
done
