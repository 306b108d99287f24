#!/bin/sh
# torch's FakeTensorMode with device="cuda" on a torch that was built without CUDA: which operations run?
#
# One would guess all of them: fake tensors have no memory, torch makes and adds them as of any device, and the mode is
# what tools plan with where no GPU is. What happens: making them, arithmetic in place, products, also into out=,
# reductions and views run, and say device "cuda:0"; but x.copy_(y) of two fake tensors on that device raises "PyTorch is
# not linked with support for cuda devices". So what copies into a buffer of its own, as optimizers do, cannot be traced so
# on such a build. The same runs on tensors of device "meta", which have no memory either.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0
cat >"$folder/fake.py" <<'PYTHON'
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

WORK = {
    "add_": lambda x, y: x.add_(y),
    "lerp_": lambda x, y: x.lerp_(y, 0.1),
    "bmm": lambda x, y: torch.bmm(x, y),
    "a norm": lambda x, y: torch.linalg.vector_norm(x),
    "copy_": lambda x, y: x.copy_(y),
    "bmm, out=": lambda x, y: torch.bmm(x, x, out=y),
    "mul, out=": lambda x, y: torch.mul(x, x, out=y),
}


def outcomes(device):
    found = {}
    for name, work in WORK.items():
        x, y = torch.zeros(2, 4, 4, device=device), torch.ones(2, 4, 4, device=device)
        try:
            work(x, y)
            found[name] = "runs"
        except RuntimeError as error:
            found[name] = str(error).splitlines()[0]
    return found


assert not torch.backends.cuda.is_built(), "this torch has CUDA: nothing to see here"
with FakeTensorMode():
    assert torch.zeros(1, device="cuda").device == torch.device("cuda:0")
    fake = outcomes("cuda")
meta = outcomes("meta")
print(f"torch {torch.__version__}, built without CUDA:")
for name in WORK:
    print(f"  {name}: fake cuda {fake[name]}; meta {meta[name]}")
refused = {name for name, outcome in fake.items() if "not linked with support for cuda" in outcome}
assert refused == {"copy_"}, refused
assert set(meta.values()) == {"runs"}
PYTHON
"$folder/env/bin/python" "$folder/fake.py"
