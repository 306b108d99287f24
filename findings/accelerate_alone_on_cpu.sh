#!/bin/sh
# Accelerator() in two processes that torchrun started on a machine without a GPU: do they train together?
#
# One would guess so: Accelerator() makes torch's process group of both, by gloo, and torch.distributed says that there
# are two ranks. What happens: accelerate itself takes each process for the only one. num_processes is 1, both are the
# main process, prepare() wraps nothing in DistributedDataParallel and divides no data, and no warning says so. Each trains
# a model of its own, and both save to the same folder. Accelerator(cpu=True) is what makes them one job.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0
"$folder/env/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 accelerate==1.15.0
cat >"$folder/together.py" <<'PYTHON'
import sys
import warnings

import accelerate
import torch
import torch.distributed as dist
from accelerate import Accelerator

asked = "cpu" in sys.argv
with warnings.catch_warnings(record=True) as heard:
    warnings.simplefilter("always")
    accelerator = Accelerator(cpu=True) if asked else Accelerator()
    torch.manual_seed(0)
    model = torch.nn.Linear(4, 1)
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
rank, ranks = dist.get_rank(), dist.get_world_size()
accelerator.backward(model(torch.full((1, 4), float(rank + 1))).sum())  # other data on each
optimizer.step()
found = [torch.empty(4) for _ in range(ranks)]
dist.all_gather(found, next(model.parameters()).detach().flatten().contiguous())
same = torch.equal(found[0], found[1])
if rank == 0:
    print(f"torch {torch.__version__}, accelerate {accelerate.__version__}, Accelerator({'cpu=True' if asked else ''}):")
    print(f"  torch has {ranks} ranks; accelerate says {accelerator.distributed_type}, {accelerator.num_processes} process(es),")
    print(f"  the model is a {type(model).__name__}, weights after a step are {'the same' if same else 'different'}")
    about = [str(one.message) for one in heard if "process" in str(one.message) or "cpu" in str(one.message).lower()]
    print(f"  warnings about it: {about}")
together = accelerator.num_processes == ranks and same
if ranks != 2 or together != asked:
    print(f"CHANGED: expected two ranks of torch, and training {'together' if asked else 'apart'}")
    sys.exit(1)
dist.destroy_process_group()
PYTHON
export OMP_NUM_THREADS=1 CUDA_VISIBLE_DEVICES=""
for asked in "" cpu; do
    "$folder/env/bin/torchrun" --standalone --nproc-per-node 2 "$folder/together.py" $asked
done
echo "as described"
