"""Several processes, parameters sharded over them (FSDP2).        torchrun --nproc-per-node 2 examples/fsdp2.py"""

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from sklearn.datasets import load_digits
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard

from kl_dist import KLShampoo, clip_grad_norm_


def main(epochs: int = 10, folder: str = "digits") -> float:
    """Returns the share of held-out digits that are told right."""
    dist.init_process_group()
    rank, ranks = dist.get_rank(), dist.get_world_size()
    device = (
        torch.device("cuda", rank % torch.cuda.device_count()) if torch.cuda.is_available() else torch.device("cpu")
    )
    torch.manual_seed(0)
    images, labels = (torch.tensor(x).to(device) for x in load_digits(return_X_y=True))
    images = images.float() / 16

    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10)).to(device)
    for layer in (model[0], model[2], model[4], model):
        fully_shard(layer, mesh=dist.init_device_mesh(device.type, (ranks,)))
    optimizer = KLShampoo(model, lr=1e-2)  # after fully_shard, which puts sharded parameters in the place of whole ones

    for step in range(epochs * 1500 // 100):
        batch = torch.randint(1500, (100,)).chunk(ranks)[rank]
        loss = nn.functional.cross_entropy(model(images[batch]), labels[batch])
        optimizer.zero_grad()
        loss.backward()
        clip_grad_norm_(optimizer, 1.0)
        optimizer.step()
        if rank == 0 and step % 50 == 0:
            print(f"step {step:4d}  loss {loss.item():.3f}")

    model_state, optimizer_state = get_state_dict(model, optimizer)  # every rank writes what it holds
    dcp.save({"model": model_state, "optimizer": optimizer_state}, checkpoint_id=folder)
    dcp.load(
        {"model": model_state, "optimizer": optimizer_state}, checkpoint_id=folder
    )  # also on other numbers of ranks
    set_state_dict(model, optimizer, model_state_dict=model_state, optim_state_dict=optimizer_state)
    right = (model(images[1500:]).argmax(1) == labels[1500:]).float().mean().item()
    if rank == 0:
        print(f"{right:.1%} of the held-out digits are told right; model and optimizer are in {folder}")
    dist.destroy_process_group()
    return right


if __name__ == "__main__":
    main()
