"""Products along the sides of a batch, in halves where that is cheaper, are those of the plain equations."""

import pytest
import torch

from kl_dist.methods import kronecker


@pytest.mark.parametrize("keep", [0.75, torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64)], ids=["one", "each"])
@pytest.mark.parametrize("side", [0, 1])
@pytest.mark.parametrize("d", [1, 95, 96, 97, 200])
def test_a_gram_that_is_computed_by_halves_is_whole(d, side, keep):
    """total <- keep total + 2 X_k X_k^T, from 96 rows on in several products."""
    generator = torch.Generator().manual_seed(d)
    x = torch.randn((3, d, 5) if side == 0 else (3, 5, d), generator=generator, dtype=torch.float64)
    total = torch.randn(3, d, d, generator=generator, dtype=torch.float64)
    total = total + total.mT
    rows = x if side == 0 else x.mT
    expected = (keep if isinstance(keep, float) else keep[:, None, None]) * total + 2 * rows @ rows.mT
    kronecker.add_gram(total, x, side, keep, 2.0)
    assert (total - expected).abs().max() < 1e-12
