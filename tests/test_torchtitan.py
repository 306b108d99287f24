"""kl_dist.torchtitan in the real container of torchtitan, saved and loaded as its Trainer does; skipped without it."""

import zlib
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import lr_scheduler

from kl_dist import KLShampoo, param_groups
from tests.models import deviation
from tests.pages import blocks
from tests.sharded import mesh_of

pytest.importorskip("torchtitan.components.optimizer", reason="torchtitan is not in the test environment")

from torchtitan.components.optimizer import LRSchedulersContainer

from kl_dist.torchtitan import KLShampooContainer

STEPS, SAVED = 6, 3
OPTIONS: dict[str, Any] = {"adamw_lr": 5e-3, "stagger": False}  # which step refreshes what depends on what is in a part


class Decoder(nn.Module):
    """Named as torchtitan's are; half of it is what a stage of a pipeline has."""

    def __init__(self) -> None:
        super().__init__()
        self.tok_embeddings = nn.Embedding(16, 12)
        self.layers = nn.ModuleDict({str(i): nn.Linear(12, 10 + 2 * i) for i in range(4)})
        self.norm = nn.LayerNorm(12)
        self.lm_head = nn.Linear(12, 16, bias=False)


def decoder() -> Decoder:
    torch.manual_seed(1)
    return Decoder().double()


def half(last: bool) -> Decoder:
    model = decoder()
    for name in ("tok_embeddings",) if last else ("norm", "lm_head"):
        delattr(model, name)
    for layer in ("0", "1") if last else ("2", "3"):
        del model.layers[layer]
    return model


def give_gradients(parts: list[nn.Module], step: int) -> None:
    """A function of name and step, so that a stage needs no others."""
    for name, p in (pair for part in parts for pair in part.named_parameters()):
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()) + step)
        grad = torch.randn(p.shape, generator=generator, dtype=p.dtype)
        p.grad = distribute_tensor(grad, p.device_mesh, p.placements) if isinstance(p, DTensor) else grad


def laid_out(group: dist.ProcessGroup, layout: str) -> list[nn.Module]:
    """What a rank has: all of the model, two parts of it, or a stage of a pipeline of two; sharded by FSDP2."""
    ranks = group.size()
    stages = 2 if layout == "pipeline" else 1
    mesh = mesh_of(group, (stages, ranks // stages), ("pp", "fsdp"))
    if layout == "pipeline":
        parts = [half(last=group.rank() >= ranks // 2)]
    else:
        parts = [decoder()] if layout == "whole" else [half(last=False), half(last=True)]
    for part in parts:
        fully_shard(part, mesh=mesh["fsdp"])
    return parts


def trained(
    group: dist.ProcessGroup, layout: str, steps: range, load: str | None, save: str | None
) -> dict[str, Tensor]:
    """The weights that are here, whole, after the steps that were asked for."""
    parts = laid_out(group, layout)
    container = KLShampooContainer.Config(options=OPTIONS).build(model_parts=parts)
    schedule = LRSchedulersContainer.Config(warmup_steps=4).build(optimizers=container, training_steps=STEPS)
    sharing = group.size() // 2 if layout == "pipeline" else group.size()
    assert [optimizer.plan.world_size for optimizer in container] == [sharing] * len(parts)
    weights = {name: p for part in parts for name, p in part.state_dict().items()}
    states = {"optimizer": container, "model": weights, "lr_scheduler": schedule}
    if load:
        dcp.load(states, checkpoint_id=load)
    for step in steps:
        give_gradients(parts, step)
        container.step()
        schedule.step()
    if save:
        dcp.save(states, checkpoint_id=save)
    return {name: p.full_tensor() for name, p in weights.items()}


def on_one_process() -> dict[str, Tensor]:
    model = decoder()
    opt = KLShampoo(param_groups(model, weight_decay=0.1, output_head="lm_head"), lr=1e-2, **OPTIONS)
    schedule = lr_scheduler.LambdaLR(opt, schedule_of_torchtitan)
    for step in range(STEPS):
        give_gradients([model], step)
        opt.step()
        schedule.step()
    return {name: p.detach() for name, p in model.named_parameters()}


def schedule_of_torchtitan(step: int) -> float:
    """Four steps of warm-up; then down, so as to be zero in the step after the last."""
    return (step + 1) / 4 if step < 4 else 1.0 if step == 4 else (STEPS - step) / (STEPS - 4)


@pytest.mark.parametrize(
    ("layout", "ranks", "then", "ranks_then"),
    [("whole", 2, "pipeline", 4), ("pipeline", 4, "parts", 2), ("parts", 2, "whole", 4)],
)
def test_a_run_that_is_resumed_in_another_layout_ends_as_one_process_does(
    worlds, tmp_path, layout, ranks, then, ranks_then
):
    folder = str(tmp_path)
    worlds[ranks].run(trained, ranks, layout, range(SAVED), None, folder, timeout=120)
    found = worlds[ranks_then].run(trained, ranks_then, then, range(SAVED, STEPS), folder, None, timeout=120)
    expected = on_one_process()
    assert {name for weights in found for name in weights} == expected.keys()
    for weights in found:
        assert deviation(weights, {name: expected[name] for name in weights}) <= 1e-9


def test_embeddings_and_the_head_go_to_adamw_and_wrappers_leave_no_trace_in_names():
    model = decoder()
    model.layers["1"] = checkpoint_wrapper(model.layers["1"])
    (opt,) = KLShampooContainer.Config(lr=2e-2, options={"method": "kl_soap"}).build(model_parts=[model])
    by_method = {group["method"]: group["param_names"] for group in opt.param_groups[:2]}
    assert by_method == {
        "kl_soap": [f"layers.{i}.weight" for i in range(4)],
        "adamw": ["tok_embeddings.weight", "lm_head.weight"],
    }
    assert [group["weight_decay"] for group in opt.param_groups] == [0.1, 0.1, 0.0] and opt.param_groups[0][
        "lr"
    ] == 2e-2


def read_before_training(group: dist.ProcessGroup, layout: str) -> bool:
    """Whether weights and state are as they were once torchtitan's container has given its state_dict."""
    parts = laid_out(group, layout)
    container = KLShampooContainer.Config(options=OPTIONS).build(model_parts=parts)

    def all_here() -> list[Tensor]:
        kept = [x for opt in container for entries in opt.state.values() for x in entries.values()]
        return [x.to_local().clone() if isinstance(x, DTensor) else x.clone() for x in [*weights_of(parts), *kept]]

    before = all_here()
    assert container.state_dict()
    return len(before) > 0 and all(map(torch.equal, before, all_here()))


def weights_of(parts: list[nn.Module]) -> list[Tensor]:
    return [p.detach() for part in parts for p in part.parameters()]


@pytest.mark.parametrize(("layout", "ranks"), [("whole", 2), ("pipeline", 4)])
def test_a_state_dict_before_the_first_step_changes_nothing(worlds, layout: str, ranks: int):
    assert all(worlds[ranks].run(read_before_training, ranks, layout))


def test_the_code_of_torchtitans_page_makes_a_config_of_its_trainer():
    pytest.importorskip(
        "torchtitan.models.llama3.config_registry", reason="torchtitan's models need triton", exc_type=ImportError
    )
    names: dict[str, Any] = {}
    (text,) = blocks(Path("docs/torchtitan.md"), "python")
    exec(text, names)
    config = names["llama3_kl_shampoo"]()
    assert type(config.optimizer) is KLShampooContainer.Config and config.optimizer.options == {"adamw_lr": 5e-3}
