"""Products of batches of matrices, in the precision that a group's option `compute_dtype` asks for.

An operand becomes a sum of parts of fewer bits, and a product the sum of the parts' products, added up in float32:

    float32    x itself
    tf32       x rounded to the 10 bits of TF32: 5e-4 of an element
    bfloat16   x rounded to the 7 bits of bfloat16: 4e-3
    bf16x3     hi + lo, both in bfloat16, 16 bits: 1e-5; hi hi + hi lo + lo hi, three products

CUDA devices have units for these. Elsewhere operands are rounded and multiplied in float32: the same products, for more
time, so that a run in any of them can be tried on a CPU. None is TF32 on CUDA devices that have it and float32
elsewhere. Float64 is always multiplied as it is.

[Note: oneDNN] On AMD's CPUs MKL, which torch multiplies with, keeps to AVX2. Where they have AVX-512, oneDNN is twice
as fast (benchmarks/products.py). torch goes there when it may make float32 products of bfloat16 ones, by the switch of
`matmul_precision`, which oneDNN does on CPUs with units for these (AMX) alone; on others float32 stays float32. That it
does is tried once in a process, at import, and the switch is set for each step where it holds.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

COMPUTE_DTYPES = ("float32", "tf32", "bfloat16", "bf16x3")
DROPPED = 13  # of the 23 bits of float32's mantissa, in TF32


AS_IT_IS = contextlib.nullcontext()


class Operand(NamedTuple):
    """A matrix (B, m, n) as it is multiplied."""

    parts: tuple[Tensor, ...]  # what they add up to, the largest first
    tf32: bool  # whether the device rounds, to TF32

    def rows(self, start: int, stop: int) -> Operand:
        return Operand(tuple(part[:, start:stop] for part in self.parts), self.tf32)

    @property
    def mT(self) -> Operand:  # noqa: N802 (torch's name)
        return Operand(tuple(part.mT for part in self.parts), self.tf32)


def operand(x: Tensor, compute_dtype: str | None) -> Operand:
    """x, of whose memory the parts are where nothing is rounded."""
    if _is_multiplied_as_it_is(x, compute_dtype):
        return Operand((x,), False)
    by_device = x.is_cuda and _has_tf32(x.device)
    if by_device and compute_dtype in (None, "tf32"):
        return Operand((x,), True)
    if compute_dtype is None:
        return Operand((x,), False)
    if compute_dtype == "tf32":
        return Operand((_to_tf32(x),), False)
    wide = torch.bfloat16 if x.is_cuda else torch.float32  # the CPU has no product of bfloat16 added up in float32
    high = x.bfloat16()
    if compute_dtype == "bfloat16":
        return Operand((high.to(wide),), False)
    return Operand((high.to(wide), (x - high).bfloat16().to(wide)), False)


def product(left: Tensor, right: Tensor, compute_dtype: str | None, out: Tensor) -> Tensor:
    """L R (B, m, n) of L (B, m, k) and R (B, k, n), written to `out`."""
    if _is_multiplied_as_it_is(left, compute_dtype):
        torch.bmm(left, right, out=out)
    else:
        add_product(out, operand(left, compute_dtype), operand(right, compute_dtype), 0.0, 1.0)
    return out


def add_product(total: Tensor, left: Operand, right: Operand, keep: float, share: float) -> None:
    """total <- keep total + share L R, in place; what `total` held is not read where keep is 0."""
    with _in_tf32() if left.tf32 else AS_IT_IS:
        for i, first in enumerate(left.parts):
            for second in right.parts[: len(right.parts) - i]:  # lo lo is less than what was rounded away
                if first.dtype != total.dtype:
                    added: Any = torch.bmm(first, second, out_dtype=total.dtype)
                    (total.mul_(keep) if keep else total.zero_()).add_(added, alpha=share)
                elif keep == 0 and share == 1:
                    torch.bmm(first, second, out=total)
                else:
                    torch.baddbmm(total, first, second, beta=keep, alpha=share, out=total)
                keep = 1.0


def check_device(compute_dtype: str | None, device: torch.device) -> None:
    """Raises ValueError where bfloat16's products cannot be added up in float32: on CUDA, torch before 2.8."""
    narrow = compute_dtype in ("bfloat16", "bf16x3")
    if narrow and device.type == "cuda" and "dtype" not in torch.ops.aten.bmm.overloads():
        raise ValueError(f'compute_dtype {compute_dtype!r} on CUDA needs torch 2.8 or later: update, or take "tf32"')


def _is_multiplied_as_it_is(x: Tensor, compute_dtype: str | None) -> bool:
    return x.dtype != torch.float32 or compute_dtype == "float32" or (compute_dtype is None and not x.is_cuda)


def _to_tf32(x: Tensor) -> Tensor:
    """x (float32) rounded to TF32, to even."""
    bits = x.view(torch.int32)
    last = (bits >> DROPPED) & 1
    return ((bits + (2 ** (DROPPED - 1) - 1) + last) & -(2**DROPPED)).view(torch.float32)


@lru_cache
def _has_tf32(device: torch.device) -> bool:
    return torch.version.hip is None and torch.cuda.get_device_capability(device) >= (8, 0)


HAS_SWITCHES = hasattr(torch.backends.cuda.matmul, "fp32_precision")
"""Whether this torch is 2.9 or later, where `matmul_precision` works, and mixing it with the older switches raises."""


def _in_tf32() -> contextlib.AbstractContextManager[None]:
    """The engine has switched TF32 off for all that is not asked for here."""
    if HAS_SWITCHES:
        return matmul_precision(torch.backends.cuda, "tf32")
    return _switched(torch.backends.cuda.matmul, "allow_tf32", True)


def matmul_precision(backend: Any, name: str) -> contextlib.AbstractContextManager[None]:
    """torch's switch of a backend's float32 products, "ieee", "tf32" or "bf16", and back; of torch 2.9 and later."""
    return _switched(backend.matmul, "fp32_precision", name)


@contextlib.contextmanager
def _switched(matmul: Any, name: str, value: str | bool) -> Iterator[None]:
    before = getattr(matmul, name)
    setattr(matmul, name, value)
    try:
        yield
    finally:
        setattr(matmul, name, before)


def of_onednn() -> str:
    """The precision to ask oneDNN for, so that products of float32 are just that, and fast: [Note: oneDNN]."""
    if not HAS_SWITCHES:
        return "ieee"
    return "bf16" if _mkl_leaves_avx512_unused() and _is_float32(torch.backends.mkldnn, "bf16") else "ieee"


def _mkl_leaves_avx512_unused() -> bool:
    if not torch.backends.mkl.is_available() or torch.backends.cpu.get_cpu_capability() != "AVX512":
        return False
    cpuinfo = Path("/proc/cpuinfo")
    return cpuinfo.exists() and "AuthenticAMD" in cpuinfo.read_text()


def _is_float32(backend: Any, name: str) -> bool:
    """Whether products of float32 are exact to its rounding under a backend's switch: bfloat16's are off by 1e-3."""
    for d in (64, 512):
        generator = torch.Generator("cpu").manual_seed(d)
        x = torch.randn(1, d, d, generator=generator, dtype=torch.float32, device="cpu")
        with matmul_precision(backend, name):
            found = torch.bmm(x, x)
        exact = torch.bmm(x.double(), x.double())
        if (found - exact).abs().max() > 1e-5 * exact.abs().max():
            return False
    return True
