#!/bin/sh
# Accelerator(cpu=True, fsdp_plugin=FullyShardedDataParallelPlugin(fsdp_version=2)) on two processes: is the model sharded?
#
# One would guess so, or an error: torch's fully_shard runs on CPUs with gloo. What happens: the plugin is dropped without a
# warning. prepare() wraps the model in DistributedDataParallel, every process keeps all of it, and save_state writes DDP's
# files. And to have two processes takes torchrun: `accelerate launch --cpu --num_processes 2` starts a single one.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0
"$folder/env/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 accelerate==1.15.0
cat >"$folder/sharded.py" <<'PYTHON'
import sys
import warnings

import accelerate
import torch
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from torch.distributed.tensor import DTensor

plugin = FullyShardedDataParallelPlugin(fsdp_version=2, auto_wrap_policy="no_wrap", cpu_ram_efficient_loading=False)
with warnings.catch_warnings(record=True) as heard:
    accelerator = Accelerator(cpu=True, fsdp_plugin=plugin)
    model = torch.nn.Linear(8, 8)
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters()))
sharded = any(isinstance(p, DTensor) for p in model.parameters())
about = [str(one.message) for one in heard if "fsdp" in str(one.message).lower()]
if accelerator.is_main_process:
    print(f"torch {torch.__version__}, accelerate {accelerate.__version__}: {accelerator.num_processes} process(es)")
    print(f"  {accelerator.distributed_type}, {type(model).__name__}, sharded: {sharded}, warnings about it: {about}")
expected = sys.argv[1:]
found = [str(accelerator.num_processes), type(model).__name__]
if found != expected or sharded or about:
    print(f"CHANGED: expected {expected}, not sharded, without a warning")
    sys.exit(1)
if accelerator.is_main_process:
    print("as described")
PYTHON
export OMP_NUM_THREADS=1 CUDA_VISIBLE_DEVICES=""
"$folder/env/bin/torchrun" --standalone --nproc-per-node 2 "$folder/sharded.py" 2 DistributedDataParallel 2>"$folder/said" ||
    { cat "$folder/said"; exit 1; }
"$folder/env/bin/accelerate" launch --cpu --num_processes 2 "$folder/sharded.py" 1 Linear 2>"$folder/said" ||
    { cat "$folder/said"; exit 1; }
