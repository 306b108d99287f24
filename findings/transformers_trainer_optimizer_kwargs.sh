#!/bin/sh
# transformers' Trainer with optimizer_cls_and_kwargs=(cls, {"params": groups, ..}): does an optimizer that is made a second
# time from the same tuple, by another Trainer, have the same parameter groups?
#
# One would guess so: the tuple is configuration. What happens: create_optimizer takes "params" (and "model") out of the
# caller's own dictionary with pop. The second optimizer is made of the Trainer's own two groups, decayed and not, with
# neither the groups' options nor a word about it. A search for hyperparameters makes its optimizers from one such tuple.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0
"$folder/env/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 transformers==5.24.0 accelerate==1.15.0
cat >"$folder/twice.py" <<'PYTHON'
import sys

import torch
import transformers
from transformers import Trainer, TrainingArguments


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)

    def forward(self, x, labels):
        return {"loss": self.second(self.first(x)).mean()}


model = Model()
groups = [{"params": [p], "lr": 1e-3 * (i + 1)} for i, p in enumerate(model.parameters())]
given = (torch.optim.AdamW, {"lr": 1e-3, "params": groups})
print(f"torch {torch.__version__}, transformers {transformers.__version__}")
counts = []
for number in ("first", "second"):
    arguments = TrainingArguments(sys.argv[1], use_cpu=True, report_to=[])
    optimizer = Trainer(model=model, args=arguments, optimizer_cls_and_kwargs=given).create_optimizer()
    counts.append(len(optimizer.param_groups))
    print(f"  the {number} Trainer's optimizer has {counts[-1]} groups; the dictionary now has {sorted(given[1])}")
as_described = counts == [4, 2] and sorted(given[1]) == ["lr"]
print("as described" if as_described else "CHANGED: expected 4 groups, then 2, and no more 'params'")
sys.exit(not as_described)
PYTHON
OMP_NUM_THREADS=1 CUDA_VISIBLE_DEVICES="" "$folder/env/bin/python" "$folder/twice.py" "$folder/run" 2>"$folder/said" ||
    { cat "$folder/said"; exit 1; }
