"""A model, its data, and runs of DeepSpeed's engine on ranks that are there already."""

import contextlib
import logging
import os
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from kl_dist import KLShampoo
from tests.jobs import without_operators
from tests.models import Weights
from tests.noise import NOISE

STEPS, SHARES, SAMPLES = 12, 2, 12
LR, DECAY, CLIP = 2e-2, 0.1, 0.5
OPTIONS = {"lr": LR, "weight_decay": DECAY}
TYPES = {"kl_shampoo": "KLShampoo", "kl_soap": "KLSOAP", "soap": "SOAP", "shampoo": "Shampoo", "muon": "KLMuon"}


class Net(nn.Module):
    """Embedding, matrices of odd sizes, a convolution, a norm, a scalar, and a frozen matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(17, 24)
        self.up = nn.Linear(24, 40)
        self.norm = nn.LayerNorm(40)
        self.mix = nn.Linear(40, 33, bias=False)
        self.convolution = nn.Conv1d(3, 5, 3)
        self.scale = nn.Parameter(torch.ones(1))
        self.frozen = nn.Parameter(torch.randn(6, 6), requires_grad=False)
        self.sometimes = nn.Linear(33, 33, bias=False)
        self.last = nn.Linear(45, 7)

    def forward(self, tokens: Tensor, use: bool = True) -> Tensor:
        hidden = torch.tanh(self.up(self.embedding(tokens).mean(1)))
        hidden = self.mix(self.norm(hidden)) * self.scale
        if use:
            hidden = hidden + torch.tanh(self.sometimes(hidden))
        hidden = self.convolution(hidden.view(-1, 3, 11))
        return self.last(torch.tanh(hidden.flatten(1)))


def net() -> Net:
    torch.manual_seed(0)
    return Net()


def data(step: int, share: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(10 * step + share)
    return torch.randint(17, (SAMPLES, 4), generator=generator), torch.randn(SAMPLES, 7, generator=generator)


def loss_of(model: Any, step: int, share: int, rank: int = 0, ranks: int = 1, use: bool = True) -> Tensor:
    device = getattr(model, "device", "cpu")  # of an engine
    tokens, target = (part.chunk(ranks)[rank].to(device) for part in data(step, share))
    return (model(tokens, use).float() - target).square().mean()


def two_groups(model: nn.Module) -> list[dict[str, Any]]:
    """What is not decayed in a group of its own."""
    flat = [p for p in model.parameters() if len(getattr(p, "ds_shape", p.shape)) < 2]
    few = {id(p) for p in flat}
    return [
        {"params": [p for p in model.parameters() if id(p) not in few]},
        {"params": flat, "weight_decay": 0.0},
    ]


def alone(
    method: str = "kl_shampoo",
    steps: int = STEPS,
    shares: int = SHARES,
    clip: float = CLIP,
    noise: float = 0.0,
    seed: int = 0,
    unused: tuple[int, ...] = (),
    left_out: tuple[int, ...] = (),
    schedule: Callable[[int], float] | None = None,
    **options: Any,
) -> Weights:
    """Plain kl_dist on one process, on the same samples; what is unused has a gradient of zero, as in ZeRO.

    A schedule says the learning rate of every step.
    """
    model = net()
    names = {id(p): name for name, p in model.named_parameters()}
    groups = [{**group, "params": [(names[id(p)], p) for p in group["params"]]} for group in two_groups(model)]
    groups[0]["adamw_names"] = ("embedding.weight",)
    optimizer = KLShampoo(groups, method=method, **{**OPTIONS, **options})
    generator = torch.Generator().manual_seed(seed)
    for step in range(steps):
        if step in left_out:
            continue
        for share in range(shares):
            (loss_of(model, step, share, use=step not in unused) / shares).backward()
        for parameter in model.parameters():
            if parameter.requires_grad and parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            if noise and parameter.grad is not None:
                parameter.grad *= 1 + noise * torch.randn(parameter.shape, generator=generator)
        if clip:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        for group in optimizer.param_groups if schedule else ():
            group["lr"] = schedule(step)
        optimizer.step()
        optimizer.zero_grad()
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def noisy(seed: int, method: str = "kl_shampoo", **options: Any) -> Weights:
    """The same with noise on the gradients, which the seed 0 leaves alone: a yardstick of tests.noise."""
    return alone(method, noise=NOISE if seed else 0.0, seed=seed, **options)


@contextlib.contextmanager
def deepspeed_here(group: dist.ProcessGroup, device: str = "cpu") -> Iterator[Any]:
    """DeepSpeed on the default process group, quiet; fp16 allowed on CPUs, which its accelerator there refuses."""
    assert group.size() == dist.get_world_size(), "DeepSpeed takes the default process group"
    given = {"RANK": str(group.rank()), "LOCAL_RANK": str(group.rank()), "WORLD_SIZE": str(group.size())}
    given |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    if device == "cuda":
        given["LOCAL_RANK"] = "0"  # the ranks share a GPU
    os.environ.update(given | {"DS_ACCELERATOR": device, "DS_IGNORE_CUDA_DETECTION": "1"})
    try:
        import deepspeed

        import deepspeed_integration  # noqa: F401 (registers the optimizers)

        logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
        if device == "cpu":
            without_operators(deepspeed)
        deepspeed.get_accelerator().is_fp16_supported = lambda: True
        deepspeed.init_distributed(dist_backend="gloo")
        yield deepspeed
    finally:
        for key in given:
            os.environ.pop(key, None)


def config(stage: int, method: str = "kl_shampoo", ranks: int = 1, shares: int = SHARES, **more: Any) -> dict[str, Any]:
    """A DeepSpeed config; `zero` are options of its zero_optimization, `options` of the optimizer."""
    zero: dict[str, Any] = {"stage": stage, **more.pop("zero", {})}
    if stage == 3:
        zero.setdefault("stage3_param_persistence_threshold", 0)
    return {
        "train_micro_batch_size_per_gpu": SAMPLES // ranks,
        "gradient_accumulation_steps": shares,
        "gradient_clipping": CLIP,
        "zero_optimization": zero,
        "optimizer": {"type": TYPES[method], "params": {**OPTIONS, **more.pop("options", {})}},
        **more,
    }


def engine_of(deepspeed: Any, given: dict[str, Any], zero_init: bool = False, one_group: bool = False) -> Any:
    """An engine for Net."""
    torch.manual_seed(0)
    if zero_init:
        with deepspeed.zero.Init(config_dict_or_path=given):
            model = Net()
    else:
        model = Net()
    parameters = list(model.parameters()) if one_group else two_groups(model)
    return deepspeed.initialize(model=model, model_parameters=parameters, config=given)[0]


def train(engine: Any, steps: range, shares: int = SHARES, unused: tuple[int, ...] = ()) -> None:
    rank, ranks = dist.get_rank(), dist.get_world_size()
    for step in steps:
        for share in range(shares):
            engine.backward(loss_of(engine, step, share, rank, ranks, step not in unused))
            engine.step()


def weights_of(deepspeed: Any, engine: Any) -> Weights:
    """All of the weights, in float32."""
    found = {}
    for name, p in engine.module.named_parameters():
        gathered = deepspeed.zero.GatheredParameters([p]) if hasattr(p, "ds_id") else contextlib.nullcontext()
        with gathered:
            found[name] = p.detach().float().cpu().clone()
    return found


def fit(group: dist.ProcessGroup, stage: int, method: str = "kl_shampoo", steps: int = STEPS, **more: Any):
    """(weights after a run, what the optimizer says of itself)."""
    made = {key: more.pop(key) for key in ("zero_init", "one_group") if key in more}
    unused = more.pop("unused", ())
    shares = more.get("shares", SHARES)
    with deepspeed_here(group, more.pop("device", "cpu")) as deepspeed:
        engine = engine_of(deepspeed, config(stage, method, group.size(), **more), **made)
        train(engine, range(steps), shares, unused)
        found = weights_of(deepspeed, engine), engine.basic_optimizer.stats()
        engine.destroy()
        return found
