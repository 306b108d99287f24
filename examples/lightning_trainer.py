"""Lightning's Trainer: a module that trains with AdamW, as it is.        python examples/lightning_trainer.py"""

import lightning
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import lightning_plugin  # makes the strategy's name known


class Digits(lightning.LightningModule):
    """Nothing here knows of KL-Shampoo."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10))

    def training_step(self, batch, _):
        images, labels = batch
        return nn.functional.cross_entropy(self.layers(images), labels)

    def validation_step(self, batch, _):
        images, labels = batch
        self.log("right", (self.layers(images).argmax(1) == labels).float().mean(), prog_bar=True, sync_dist=True)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=2e-3)


def main(epochs: int = 10, devices: int = 1, folder: str = "runs") -> float:
    """Returns the share of held-out digits that are told right."""
    lightning.seed_everything(0)
    images, labels = map(torch.tensor, load_digits(return_X_y=True))
    images = images.float() / 16
    train = DataLoader(TensorDataset(images[:1500], labels[:1500]), batch_size=100, shuffle=True)
    test = DataLoader(TensorDataset(images[1500:], labels[1500:]), batch_size=100)

    trainer = lightning.Trainer(
        strategy="kl_shampoo",  # in the place of "ddp"; AdamW is converted, and a table says to what
        devices=devices,
        accelerator="auto" if torch.cuda.is_available() else "cpu",
        max_epochs=epochs,
        gradient_clip_val=1.0,
        log_every_n_steps=5,
        default_root_dir=folder,
        callbacks=[lightning_plugin.KLShampooMonitor()],  # skipped steps, update RMS and the like beside the loss
    )
    trainer.fit(Digits(), train, test)
    return trainer.callback_metrics["right"].item()


if __name__ == "__main__":
    main()
