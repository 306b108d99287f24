#!/bin/sh
# torch.distributed.destroy_process_group() of a gloo group: are its threads gone afterwards?
#
# One would guess so: it is what a program calls so as to end cleanly. What happens: gloo's threads end with the C++ object
# of the group, and that lives for as long as anything in Python holds it, an optimizer, a model's parameters, a library's
# global. They are then still there when the interpreter ends, and on Python before 3.14 one that lets go of a tensor just
# then aborts the process ("terminate called without an active exception", exit code -6), after all its work was done and
# on some runs alone. Here a process counts its threads, with the group held and not held, and lets it go before the end.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0
cat >"$folder/threads.py" <<'PYTHON'
import sys
from pathlib import Path

import torch
import torch.distributed as dist


def threads_of_gloo():
    names = [path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")]
    return sum("gloo" in name for name in names)


def threads_after(holds):
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    held = dist.group.WORLD if holds else None
    dist.all_reduce(torch.ones(8))
    before = threads_of_gloo()
    dist.destroy_process_group()
    after = threads_of_gloo()
    del held
    return before, after, threads_of_gloo()


print(f"torch {torch.__version__}, Python {sys.version.split()[0]}")
found = {}
for holds in (False, True):
    found[holds] = threads_after(holds)
    told = "before destroy_process_group {}, after it {}, once nothing holds the group {}".format(*found[holds])
    print(f"  group held elsewhere: {holds}; threads of gloo: {told}")
began, outlived, at_last = found[True]  # how many they are is gloo's business
if not began or not outlived or at_last or found[False][1:] != (0, 0):
    print("CHANGED: expected them to outlive destroy_process_group where the group is held, and there alone")
    sys.exit(1)
print("as described")
PYTHON
GLOO_SOCKET_IFNAME=lo OMP_NUM_THREADS=1 CUDA_VISIBLE_DEVICES="" "$folder/env/bin/python" "$folder/threads.py" 2>"$folder/said" ||
    { cat "$folder/said"; exit 1; }
