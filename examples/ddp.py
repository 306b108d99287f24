"""Several processes, the model whole on each of them.        torchrun --nproc-per-node 2 examples/ddp.py"""

import torch
import torch.distributed as dist
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from kl_dist import KLShampoo, clip_grad_norm_


def main(epochs: int = 10, file: str = "digits.pt") -> float:
    """Returns the share of held-out digits that are told right."""
    dist.init_process_group()  # nccl for what lies on GPUs, gloo for what lies on the host
    rank, ranks = dist.get_rank(), dist.get_world_size()
    device = (
        torch.device("cuda", rank % torch.cuda.device_count()) if torch.cuda.is_available() else torch.device("cpu")
    )
    torch.manual_seed(0)
    images, labels = (torch.tensor(x).to(device) for x in load_digits(return_X_y=True))
    images = images.float() / 16

    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10)).to(device)
    model = DistributedDataParallel(model)
    optimizer = KLShampoo(model, lr=1e-2)
    optimizer.reduce_to_owners(model)  # each gradient goes to the rank that needs it: a third less to send
    if rank == 0:
        print(optimizer.plan)  # who owns what

    for step in range(epochs * 1500 // 100):
        batch = torch.randint(1500, (100,)).chunk(ranks)[rank]  # the same draw on all ranks, and each takes its share
        loss = nn.functional.cross_entropy(model(images[batch]), labels[batch])
        optimizer.zero_grad()
        loss.backward()
        clip_grad_norm_(optimizer, 1.0)
        optimizer.step()
        if rank == 0 and step % 50 == 0:
            print(f"step {step:4d}  loss {loss.item():.3f}")

    optimizer.consolidate_state_dict()  # on all ranks, before rank 0 saves
    if rank == 0:
        torch.save({"model": model.module.state_dict(), "optimizer": optimizer.state_dict()}, file)
    right = (model(images[1500:]).argmax(1) == labels[1500:]).float().mean().item()
    if rank == 0:
        print(f"{right:.1%} of the held-out digits are told right; model and optimizer are in {file}")
    dist.destroy_process_group()
    return right


if __name__ == "__main__":
    main()
