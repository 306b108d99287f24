#!/bin/sh
# torch.distributed.checkpoint, loading in place into a nested dictionary whose keys are integers: is the value at the key
# replaced by what was saved?
#
# One would guess so: load() fills what it is given, and does that for tensors and for string keys. What happens: saved keys
# are strings, and a value that is no tensor is put beside the old one under the string. {1: 5} becomes {1: 5, "1": 2}, and
# who reads key 1 goes on with what was there before. It is written into the very dictionary that was handed over, so one
# that is shared (a default, a constant of a module) is changed for everybody.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0
cat >"$folder/keys.py" <<'PYTHON'
import sys

import torch
import torch.distributed.checkpoint as dcp

SAVED, HERE = {"options": {"parts": {1: 2}, "name": "saved"}}, {"options": {"parts": {1: 5}, "name": "here"}}
inner = HERE["options"]["parts"]
dcp.save(SAVED, checkpoint_id=sys.argv[1])
dcp.load(HERE, checkpoint_id=sys.argv[1])
print(f"torch {torch.__version__}: {SAVED} loaded into parts {{1: 5}}, name 'here' gives {HERE}")
as_described = inner == {1: 5, "1": 2} and HERE["options"]["name"] == "saved"
print("as described" if as_described else "CHANGED: expected {1: 5, '1': 2} beside the name that was saved")
sys.exit(not as_described)
PYTHON
OMP_NUM_THREADS=1 "$folder/env/bin/python" "$folder/keys.py" "$folder/checkpoint" 2>"$folder/said" || { cat "$folder/said"; exit 1; }
