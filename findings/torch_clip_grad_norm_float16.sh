#!/bin/sh
# Finite float16 gradients, clipped by torch.nn.utils.clip_grad_norm_: what is left of them?
#
# One would guess gradients of norm max_norm, as of any other dtype: torch adds up squares of float16 in float32, and every
# element is finite. What happens: the norm is rounded to float16, and beyond 65,504 it is infinite. The factor max_norm / inf
# is 0, so all gradients become zeros, and the optimizer steps as if there were none; nothing is said unless
# error_if_nonfinite is asked for. A thousand by a thousand elements of 100 have such a norm. In bfloat16 the norm is finite and
# rounded to three digits. Here each dtype is clipped to a norm of 1,000, beside the same gradients in float32.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0
cat >"$folder/clips.py" <<'PYTHON'
import sys

import torch

left = {}
for dtype in (torch.float32, torch.bfloat16, torch.float16):
    parameter = torch.nn.Parameter(torch.zeros(1000, 1000, dtype=dtype))
    parameter.grad = torch.full_like(parameter, 100.0)
    norm = torch.nn.utils.clip_grad_norm_([parameter], 1000.0)
    left[dtype] = float(norm), float(parameter.grad.abs().max())
    print(f"  {str(dtype):14}: norm before {float(norm):.7g} ({norm.dtype}), every element after {left[dtype][1]:.4g}")
(norm32, after32), (norm16b, after16b), (norm16, after16) = left.values()
as_said = abs(norm32 - 1e5) < 100 and norm16b == 99840 and abs(after32 - 1) < 0.01 and abs(after16b - 1) < 0.01
sys.exit(not (as_said and norm16 == float("inf") and after16 == 0))
PYTHON
export OMP_NUM_THREADS=1 CUDA_VISIBLE_DEVICES=""
"$folder/env/bin/python" -c 'import sys, torch; print(f"torch {torch.__version__}, Python {sys.version.split()[0]}")' 2>/dev/null
"$folder/env/bin/python" "$folder/clips.py" || {
    echo "CHANGED: expected an infinite norm and gradients of zero in float16, and 99,840 in bfloat16"
    exit 1
}
echo "as described"
