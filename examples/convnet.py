"""A convolutional net on scikit-learn's digits: kernels are read as matrices.        python examples/convnet.py"""

import torch
from sklearn.datasets import load_digits
from torch import nn

from kl_dist import KLShampoo


def main(epochs: int = 6) -> float:
    """Returns the share of held-out digits that are told right."""
    torch.manual_seed(0)
    images, labels = map(torch.tensor, load_digits(return_X_y=True))
    images = images.float().view(-1, 1, 8, 8) / 16
    train, test = slice(0, 1500), slice(1500, None)

    model = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(128, 10),
    )  # fmt: skip
    # 32 x 16 x 3 x 3 is served as 32 x 144; with merge_dims=False as a tensor of four sides, each with its own factor.
    # The last layer is left to AdamW, as the output head of a language model would be.
    optimizer = KLShampoo(model, lr=1e-2, adamw_lr=3e-3, adamw_names=["9.weight"])
    print(optimizer.routes())

    for epoch in range(epochs):
        model.train()
        for batch in torch.randperm(1500).split(100):
            loss = nn.functional.cross_entropy(model(images[train][batch]), labels[train][batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        model.eval()
        right = (model(images[test]).argmax(1) == labels[test]).float().mean().item()
        print(f"epoch {epoch}  loss {loss.item():.3f}  {right:.1%} of the held-out digits are told right")
    return right


if __name__ == "__main__":
    main()
