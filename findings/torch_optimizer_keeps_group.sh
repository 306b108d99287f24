#!/bin/sh
# A torch optimizer that is made after init_process_group, and dropped: does destroy_process_group end the group?
#
# One would guess so: an optimizer knows nothing of process groups, and nothing in the program holds one. What happens: the
# first optimizer has torch import torch.distributed.nn.functional (by way of torch._dynamo and FSDP), whose functions have
# `group=group.WORLD` for a default argument. That is the default group of just then, so the group stays, and gloo's threads
# with it, until the process ends, where on some runs they abort it (torch_gloo_threads.sh). Imported before
# init_process_group the default is None, which means the group that there is. Here a process counts its threads.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0
cat >"$folder/keeps.py" <<'PYTHON'
import gc
import sys
from pathlib import Path

import torch
import torch.distributed as dist


def make_optimizer():
    torch.optim.AdamW([torch.nn.Parameter(torch.ones(2))])


def threads_of_gloo():
    names = [path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")]
    return sum("gloo" in name for name in names)


when = sys.argv[1]
if when == "before":
    make_optimizer()
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
if when == "after":
    make_optimizer()
dist.destroy_process_group()
gc.collect()
left = threads_of_gloo()
made = when != "never"
kept = made and sys.modules["torch.distributed.nn.functional"].all_reduce.__defaults__[-1] is not None
print(f"  optimizer made {when:6}: threads of gloo after destroy_process_group {left}, a default argument keeps it: {kept}")
sys.exit(not (left > 0) == kept == (when == "after"))
PYTHON
export GLOO_SOCKET_IFNAME=lo OMP_NUM_THREADS=1 CUDA_VISIBLE_DEVICES=""
"$folder/env/bin/python" -c 'import sys, torch; print(f"torch {torch.__version__}, Python {sys.version.split()[0]}")' 2>/dev/null
for when in never before after; do
    "$folder/env/bin/python" "$folder/keeps.py" "$when" 2>"$folder/said" || {
        cat "$folder/said"
        echo "CHANGED: expected the group to be kept where the optimizer is made after init_process_group, and there alone"
        exit 1
    }
done
echo "as described"
