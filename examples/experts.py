"""A mixture of experts: stacked weights, each entry a matrix of its own.        python examples/experts.py"""

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from kl_dist import KLShampoo


class Experts(nn.Module):
    """Each input goes through the expert that its router prefers."""

    def __init__(self, experts: int, width: int, hidden: int) -> None:
        super().__init__()
        self.router = nn.Linear(width, experts, bias=False)
        self.up = nn.Parameter(torch.randn(experts, width, hidden) / width**0.5)
        self.down = nn.Parameter(torch.randn(experts, hidden, width) / hidden**0.5)

    def forward(self, x: Tensor) -> Tensor:
        weight, chosen = self.router(x).softmax(-1).max(-1)
        hidden = torch.einsum("bi,bih->bh", x, self.up[chosen]).relu()
        return x + weight[:, None] * torch.einsum("bh,bhi->bi", hidden, self.down[chosen])


def main(epochs: int = 10) -> float:
    """Returns the share of held-out digits that are told right."""
    torch.manual_seed(0)
    images, labels = map(torch.tensor, load_digits(return_X_y=True))
    images = images.float() / 16

    model = nn.Sequential(nn.Linear(64, 64), Experts(4, 64, 128), Experts(4, 64, 128), nn.Linear(64, 10))
    # No known layer says what the three axes are, so it is declared: an expert, its rows, its columns.
    stack = {"batch": (0,), "rows": (1,), "columns": (2,)}
    names = [name for name, p in model.named_parameters() if p.ndim == 3]
    optimizer = KLShampoo(model, lr=1e-2, matrices=dict.fromkeys(names, stack))
    print(optimizer.routes())  # an expert that no input chose keeps its weights and its state

    for epoch in range(epochs):
        for batch in torch.randperm(1500).split(100):
            loss = nn.functional.cross_entropy(model(images[batch]), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        print(f"epoch {epoch}  loss {loss.item():.3f}")
    right = (model(images[1500:]).argmax(1) == labels[1500:]).float().mean().item()
    print(f"{right:.1%} of the held-out digits are told right")
    return right


if __name__ == "__main__":
    main()
