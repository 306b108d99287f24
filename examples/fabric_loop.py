"""Lightning Fabric: a loop of one's own.        python examples/fabric_loop.py"""

import torch
from lightning.fabric import Fabric
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import lightning_plugin  # noqa: F401 (makes the strategy's name known)
from kl_dist import KLShampoo


def main(epochs: int = 10, devices: int = 1, file: str = "digits.ckpt") -> float:
    """Returns the share of held-out digits that are told right."""
    accelerator = "auto" if torch.cuda.is_available() else "cpu"
    fabric = Fabric(strategy="kl_shampoo", devices=devices, accelerator=accelerator)
    fabric.launch()
    fabric.seed_everything(0)
    images, labels = map(torch.tensor, load_digits(return_X_y=True))
    images = images.float() / 16
    train = fabric.setup_dataloaders(
        DataLoader(TensorDataset(images[:1500], labels[:1500]), batch_size=100, shuffle=True)
    )

    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10))
    model, optimizer = fabric.setup(model, KLShampoo(model, lr=1e-2))

    for epoch in range(epochs):
        for batch, target in train:
            loss = nn.functional.cross_entropy(model(batch), target)
            optimizer.zero_grad()
            fabric.backward(loss)
            fabric.clip_gradients(model, optimizer, max_norm=1.0)
            optimizer.step()
        fabric.print(f"epoch {epoch}  loss {loss.item():.3f}")

    fabric.save(file, {"model": model, "optimizer": optimizer})
    images, labels = images[1500:].to(fabric.device), labels[1500:].to(fabric.device)
    right = (model(images).argmax(1) == labels).float().mean().item()
    fabric.print(f"{right:.1%} of the held-out digits are told right; model and optimizer are in {file}")
    return right


if __name__ == "__main__":
    main()
