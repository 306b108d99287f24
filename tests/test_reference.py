"""The references are right: they follow the released codes, and they have the symmetries and the demands of the spec.

The paper recipe is held against trajectories of the released codes (golden/*.npz, float32). The
fresh recipe has no released code; it is held against the four demands (a) to (d) that it was made for.
"""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import tests.reference
from tests.reference import METHODS, paper, reference

GOLDEN = sorted((Path(__file__).parent / "golden").glob("*.npz"))
OPTIONS = dict(lr=1e-2, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.01, precondition_frequency=3)
EVERY = sorted(METHODS)
FRESH = [method for method, recipe in EVERY if recipe == "fresh"]
WITH_FACTORS = [pair for pair in EVERY if pair[0] != "muon"]
WITH_BASIS = [pair for pair in WITH_FACTORS if pair[0] != "shampoo"]


def gradients(shape: tuple[int, ...], steps: int = 20, seed: int = 0) -> Tensor:
    """Full-rank gradients (steps, *shape) with an anisotropic scale on the last side."""
    noise = torch.randn(steps, *shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return noise * torch.logspace(0, -1.5, shape[-1], dtype=torch.float64)


def low_rank_gradients(m: int, n: int, rank: int, steps: int) -> Tensor:
    """Gradients (steps, m, n) of the given rank, in a new subspace each step."""
    return gradients((m, rank), steps, seed=1) @ gradients((rank, n), steps, seed=2)


def run(ref, grads: Tensor, W: Tensor | None = None) -> Tensor:
    """All weights on the way, (steps + 1, *shape), from W (zeros)."""
    path = [torch.zeros_like(grads[0]) if W is None else W]
    for G in grads:
        path.append(ref.step(path[-1], G))
    return torch.stack(path)


def distance(a: Tensor, b: Tensor) -> float:
    """max |a - b| relative to the distance that b travels."""
    return float((a - b).abs().max() / (b[-1] - b[0]).abs().max())


def arbitrary_signs(orthogonal):
    """`orthogonal` with every column of its result multiplied by +1 or -1 at random."""
    generator = torch.Generator().manual_seed(0)

    def signed(A: Tensor) -> Tensor:
        signs = torch.randint(0, 2, (A.shape[-1],), generator=generator) * 2 - 1
        return orthogonal(A) * signs

    return signed


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("file", GOLDEN, ids=lambda file: file.stem)
def test_paper_references_follow_the_released_code(file: Path, dtype: torch.dtype):
    golden = np.load(file)
    config = json.loads(str(golden["config"]))
    names = ("lr", "betas", "eps", "weight_decay", "precondition_frequency")
    ref = reference(config["method"], "paper", config["shape"], **{k: config[k] for k in names}, dtype=dtype)
    assert config.get("shampoo_beta", -1) == -1
    snapshots = torch.from_numpy(golden["snapshots"]).double()
    path = run(ref, torch.from_numpy(golden["grads"]).to(dtype), snapshots[0].to(dtype)).double()
    deviation = distance(path[golden["snapshot_steps"]], snapshots)
    # The spec allows 1e-4 (KL methods) and 2e-3 (SOAP); the most that was measured is 1.5e-5.
    assert deviation < 3e-5


@pytest.mark.parametrize(("method", "recipe"), WITH_BASIS)
@pytest.mark.parametrize("shape", [(6, 6), (9, 4), (4, 9), (3, 4, 5), (2, 3, 4, 3)], ids=str)
def test_signs_of_basis_vectors_are_immaterial(method, recipe, shape, monkeypatch):
    grads = gradients(shape)
    before = run(reference(method, recipe, shape, **OPTIONS), grads)
    for module in (paper, tests.reference.fresh):
        for name in ("orthogonal_factor", "eigenvectors_descending"):
            if hasattr(module, name):
                monkeypatch.setattr(module, name, arbitrary_signs(getattr(module, name)))
    assert distance(run(reference(method, recipe, shape, **OPTIONS), grads), before) < 1e-11


@pytest.mark.parametrize(("method", "recipe"), WITH_FACTORS)
@pytest.mark.parametrize("axes", [(1, 0), (2, 0, 1), (3, 0, 2, 1)], ids=str)
def test_sides_are_treated_alike(method, recipe, axes):
    """Permuting the sides of every gradient permutes the weights, save where the released 3-D code has its order."""
    if recipe == "paper" and method.startswith("kl") and len(axes) == 3:
        pytest.skip("the released 3-D code treats its sides differently")
    shape = (3, 4, 5, 6)[: len(axes)]
    grads = gradients(shape)
    permuted = grads.permute(0, *(1 + axis for axis in axes))
    path = run(reference(method, recipe, shape, **OPTIONS), grads).permute(0, *(1 + axis for axis in axes))
    assert distance(run(reference(method, recipe, permuted.shape[1:], **OPTIONS), permuted), path) < 1e-10


@pytest.mark.parametrize(("method", "recipe"), WITH_BASIS)
@pytest.mark.parametrize("phase", [0, 1, 2])
def test_phase_staggers_the_refreshes(method, recipe, phase):
    ref = reference(method, recipe, (5, 4), **OPTIONS, phase=phase)
    refreshed, W = [], torch.zeros(5, 4, dtype=torch.float64)
    for G in gradients((5, 4)):
        basis, t = getattr(ref, "Q", None), ref.t
        before = None if basis is None else [q.clone() for q in basis]
        W = ref.step(W, G)
        if before is not None and ref.t > t and not torch.equal(before[0], ref.Q[0]):
            refreshed.append(ref.t)
    assert refreshed and all((t + phase) % 3 == 0 for t in refreshed)


@pytest.mark.parametrize("method", [method for method, recipe in WITH_FACTORS if recipe == "paper"])
def test_first_call_of_the_paper_recipe_leaves_the_weights(method):
    ref = reference(method, "paper", (5, 4), **OPTIONS)
    path = run(ref, gradients((5, 4), steps=2), torch.ones(5, 4, dtype=torch.float64))
    assert torch.equal(path[1], path[0]) and not torch.equal(path[2], path[1])
    assert ref.t == 1


@pytest.mark.parametrize("method", FRESH)
@pytest.mark.parametrize("scale", [1e-6, 1e-3, 1e3, 1e6])
def test_fresh_does_not_see_the_scale_of_the_gradients(method, scale):
    """Demand (a)."""
    grads = gradients((8, 5), steps=50)
    path = run(reference(method, "fresh", (8, 5), **OPTIONS), grads)
    assert distance(run(reference(method, "fresh", (8, 5), **OPTIONS), scale * grads), path) < 1e-10


@pytest.mark.parametrize("method", FRESH)
@pytest.mark.parametrize("shape", [(6, 6), (40, 6), (6, 40), (3, 4, 5), (2, 3, 4, 3)], ids=str)
def test_fresh_first_step_moves_and_is_bounded(method, shape):
    """Demand (b)."""
    options = OPTIONS | dict(lr=1.0, weight_decay=0.0)
    U = -reference(method, "fresh", shape, **options).step(torch.zeros(shape), gradients(shape)[0])
    assert 0.05 < U.square().mean().sqrt() < 1.5


@pytest.mark.parametrize("method", FRESH)
@pytest.mark.parametrize("live_rows", [1.0, 0.5], ids=["all rows", "half of the rows zero"])
@pytest.mark.parametrize("rank", [1, 2])
@pytest.mark.parametrize("shape", [(12, 12), (30, 6)], ids=str)
def test_fresh_is_continuous_under_rank_deficient_gradients(method, shape, rank, live_rows):
    """Demand (c)."""
    grads = low_rank_gradients(*shape, rank, steps=50)
    grads[:, int(shape[0] * live_rows) :] = 0
    noisy = grads * (1 + 1e-15 * gradients(shape, steps=50, seed=3).sign())
    path = run(reference(method, "fresh", shape, **OPTIONS), grads)
    assert (run(reference(method, "fresh", shape, **OPTIONS), noisy) - path).abs().max() < 1e-10


@pytest.mark.parametrize("method", FRESH)
def test_fresh_starts_at_the_first_gradient_that_is_not_zero(method):
    """Demand (d), first half: until then the weights only decay."""
    grads, W = gradients((8, 5)), torch.ones(8, 5, dtype=torch.float64)
    late = run(reference(method, "fresh", (8, 5), **OPTIONS), torch.cat([torch.zeros(4, 8, 5), grads]), W)
    decayed = W * (1 - 1e-4) ** 4
    assert torch.allclose(late[4], decayed, rtol=1e-14)
    assert torch.allclose(late[4:], run(reference(method, "fresh", (8, 5), **OPTIONS), grads, decayed), rtol=1e-12)


@pytest.mark.parametrize("method", FRESH)
def test_fresh_is_not_stalled_by_a_tiny_first_gradient(method):
    """Demand (d): after a first gradient of a millionth of the usual size, updates are bounded and soon as usual."""
    grads = gradients((24, 24), steps=100)
    options = OPTIONS | dict(lr=1.0, weight_decay=0.0)
    usual = run(reference(method, "fresh", (24, 24), **options), grads).diff(dim=0).square().mean((1, 2)).sqrt()
    grads[0] *= 1e-6
    U = run(reference(method, "fresh", (24, 24), **options), grads).diff(dim=0).square().mean((1, 2)).sqrt()
    off = (U / usual - 1).abs()
    assert off[5:].max() < 2 and off[15:].max() < 2 / 3


@pytest.mark.parametrize("method", FRESH)
@pytest.mark.parametrize("jump", [1e-3, 1e3])
def test_fresh_recovers_from_a_jump_of_scale_as_adam_does(method, jump):
    """Demand (d), second half: RMS(U) below 10, and within a factor 3 of steady when Adam's is.

    After a fall by 1,000 both take some 110 steps. Five more are allowed, as the steady level, which the factor 3
    refers to, is a few percent higher here than Adam's.
    """
    grads = gradients((24, 24), steps=400)
    grads[100:] *= jump
    options = OPTIONS | dict(lr=1.0, weight_decay=0.0, betas=(0.9, 0.9))  # the start is over by step 50
    U = run(reference(method, "fresh", (24, 24), **options), grads).diff(dim=0).square().mean((1, 2)).sqrt()
    assert U.max() < 10
    assert last_step_off(U) <= last_step_off(adam_updates(grads, *options["betas"])) + 5


def adam_updates(grads: Tensor, beta1: float, beta2: float) -> Tensor:
    """RMS of Adam's update at each step, with Nesterov momentum as the fresh methods have it."""
    m, v, sizes = torch.zeros_like(grads[0]), torch.zeros_like(grads[0]), []
    for t, G in enumerate(grads, start=1):
        m, v = beta1 * m + (1 - beta1) * G, beta2 * v + (1 - beta2) * G.square()
        N = (beta1 * m + (1 - beta1) * G) / (1 - beta1 ** (t + 1))
        sizes.append((N / (v / (1 - beta2**t)).sqrt()).square().mean().sqrt())
    return torch.stack(sizes)


def last_step_off(sizes: Tensor) -> int:
    """The last step whose update is more than a factor 3 off the steady size before the jump (at step 100)."""
    steady = sizes[60:100].median()
    off = (sizes > 3 * steady) | (sizes < steady / 3)
    return int(off.nonzero().max()) if off.any() else 0
