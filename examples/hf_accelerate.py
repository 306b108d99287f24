"""Hugging Face's Accelerate.        accelerate launch --multi_gpu --num_processes 2 examples/hf_accelerate.py"""

import torch
from accelerate import Accelerator
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from kl_dist import KLShampoo
from kl_dist.huggingface import consolidate_on_save


def main(epochs: int = 10, folder: str = "runs/accelerate") -> float:
    """Returns the share of held-out digits that are told right."""
    accelerator = Accelerator(cpu=not torch.cuda.is_available())
    torch.manual_seed(0)
    images, labels = map(torch.tensor, load_digits(return_X_y=True))
    images = images.float() / 16

    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10))
    optimizer = KLShampoo(model, lr=1e-2)
    train = DataLoader(TensorDataset(images[:1500], labels[:1500]), batch_size=50, shuffle=True)
    model, optimizer, train = accelerator.prepare(model, optimizer, train)
    consolidate_on_save(accelerator)

    for epoch in range(epochs):
        for batch, target in train:
            loss = nn.functional.cross_entropy(model(batch), target)
            optimizer.zero_grad()
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
        accelerator.print(f"epoch {epoch}  loss {loss.item():.3f}")

    accelerator.save_state(folder)
    images, labels = images[1500:].to(accelerator.device), labels[1500:].to(accelerator.device)
    right = (model(images).argmax(1) == labels).float().mean().item()
    accelerator.print(f"{right:.1%} of the held-out digits are told right; model and optimizer are in {folder}")
    return right


if __name__ == "__main__":
    main()
