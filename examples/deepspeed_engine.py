"""DeepSpeed, ZeRO stage 2.        torchrun --nproc-per-node 2 examples/deepspeed_engine.py"""

import deepspeed
import torch
import torch.distributed as dist
from sklearn.datasets import load_digits
from torch import nn

import deepspeed_integration  # noqa: F401 (makes the optimizer's type known)

CONFIG = {
    "train_micro_batch_size_per_gpu": 50,
    "optimizer": {"type": "KLShampoo", "params": {"lr": 1e-2, "adamw_lr": 5e-3, "weight_decay": 0.01}},
    "zero_optimization": {"stage": 2},
    "gradient_clipping": 1.0,
}


def main(steps: int = 150, folder: str = "digits-zero") -> float:
    """Returns the share of held-out digits that are told right."""
    deepspeed.init_distributed("nccl" if torch.cuda.is_available() else "gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)
    images, labels = map(torch.tensor, load_digits(return_X_y=True))
    images = images.float() / 16

    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10))
    engine, *_ = deepspeed.initialize(model=model, config=CONFIG)
    images, labels = images.to(engine.device), labels.to(engine.device)

    for step in range(steps):
        batch = torch.randint(1500, (50 * ranks,)).chunk(ranks)[rank]
        loss = nn.functional.cross_entropy(engine(images[batch]), labels[batch])
        engine.backward(loss)
        engine.step()
        if rank == 0 and step % 50 == 0:
            print(f"step {step:4d}  loss {loss.item():.3f}")

    engine.save_checkpoint(folder)  # and engine.load_checkpoint(folder), on any number of ranks
    right = (engine(images[1500:]).argmax(1) == labels[1500:]).float().mean().item()
    if rank == 0:
        print(f"{right:.1%} of the held-out digits are told right; model and optimizer are in {folder}")
    return right


if __name__ == "__main__":
    main()
