#!/bin/sh
# torch.backends.mkldnn.matmul.fp32_precision = "bf16" on an AMD CPU with AVX-512: what becomes of a float32 product?
#
# One would guess that it gets less precise, as its name says, and perhaps faster; or that without AMX nothing changes.
# What happens: the error stays float32's, and the product takes half the time. torch multiplies float32 by MKL, which
# keeps to AVX2 on AMD's CPUs; the switch sends it to oneDNN, which takes AVX-512, and makes bfloat16 of it with AMX alone.
# "ieee", the default, and "tf32" leave it to MKL. The same by torch.set_float32_matmul_precision("medium"). On a CPU
# that is not AMD's, or has no AVX-512, this says so and tells nothing.
set -eu
if ! grep -q AuthenticAMD /proc/cpuinfo || ! grep -q avx512f /proc/cpuinfo; then
    echo "not an AMD CPU with AVX-512: nothing to see here"
    exit 0
fi
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0
cat >"$folder/product.py" <<'PYTHON'
import time

import torch

torch.set_num_threads(1)
generator = torch.Generator().manual_seed(0)
x, y = torch.randn(2, 4, 768, 768, generator=generator)
exact = x.double() @ y.double()
found = torch.empty_like(x)
seconds, errors = {}, {}
for precision in ("ieee", "tf32", "bf16"):
    torch.backends.mkldnn.matmul.fp32_precision = precision
    times = []
    for _ in range(12):
        began = time.process_time()
        torch.bmm(x, y, out=found)
        times.append(time.process_time() - began)
    seconds[precision] = sorted(times[1:])[5]
    errors[precision] = float((found - exact).abs().max() / exact.abs().max())
print(f"torch {torch.__version__}, one thread, four products of 768 x 768 in float32:")
for precision, took in seconds.items():
    print(f"  {precision}: {4 * 2 * 768**3 / took / 1e9:.0f} Gflop/s, off by {errors[precision]:.0e} of the largest element")
assert max(errors.values()) < 1e-5, "bfloat16's error is about 3e-3"
assert seconds["bf16"] < 0.75 * seconds["ieee"], "as fast as by the default"
assert seconds["tf32"] > 0.75 * seconds["ieee"], "tf32 is faster too"
PYTHON
"$folder/env/bin/python" "$folder/product.py"
