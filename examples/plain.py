"""One process: classify scikit-learn's handwritten digits.        python examples/plain.py"""

import torch
from sklearn.datasets import load_digits
from torch import nn

from kl_dist import KLShampoo


def main(epochs: int = 10) -> float:
    """Returns the share of held-out digits that are told right."""
    torch.manual_seed(0)
    images, labels = map(torch.tensor, load_digits(return_X_y=True))
    images = images.float() / 16
    train, test = slice(0, 1500), slice(1500, None)

    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10))
    optimizer = KLShampoo(model, lr=1e-2)
    print(optimizer.routes())  # which method serves which parameter
    steps = epochs * 1500 // 100
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1e-2, total_steps=steps, cycle_momentum=False)

    for step in range(steps):
        batch = torch.randint(1500, (100,))
        loss = nn.functional.cross_entropy(model(images[train][batch]), labels[train][batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 50 == 0:
            print(f"step {step:4d}  loss {loss.item():.3f}  update RMS {optimizer.stats()['update_rms']:.2f}")

    right = (model(images[test]).argmax(1) == labels[test]).float().mean().item()
    print(f"{right:.1%} of the held-out digits are told right")
    return right


if __name__ == "__main__":
    main()
