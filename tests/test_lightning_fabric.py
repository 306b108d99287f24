"""`Fabric(strategy="kl_shampoo")` trains as plain kl_dist does on one process."""

from importlib import import_module
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.optim import AdamW

from kl_dist import KLShampoo, clip_grad_norm_
from tests.lightning_runs import DECAY, LR, STEPS, alone, launched
from tests.lightning_runs import train as train_alone
from tests.models import deviation, same_bits
from tests.products import product
from tests.sharded import layers, loss_of, tokens_of, weights_of
from tests.test_lightning_features import SCHEDULES

DOUBLE = 1e-9
STRATEGIES = ("kl_shampoo", "kl_shampoo_fsdp2")


def fabric(namespace: str, strategy: Any) -> Any:
    made = import_module(namespace).Fabric(accelerator="cpu", devices=dist.get_world_size(), strategy=strategy)
    made.launch()
    return made


def set_up(made: Any, model: Any, **options: Any) -> tuple[Any, Any]:
    model = made.setup_module(model)
    optimizer = AdamW(model.parameters(), lr=LR, weight_decay=DECAY, **options)
    return model, made.setup_optimizers(optimizer)


def train(made: Any, model: Any, optimizer: Any, steps: range, clip: dict | None = None, scheduler: Any = None) -> None:
    for step in steps:
        optimizer.zero_grad()
        made.backward(loss_of(model, tokens_of(step).chunk(made.world_size)[made.global_rank]))
        if clip is not None:
            made.clip_gradients(model, optimizer, **clip)
        optimizer.step()
        if scheduler is not None:
            scheduler.step()


def fit(group, strategy: Any, namespace: str = "lightning.fabric", clip: dict | None = None):
    with launched(group):
        made = fabric(namespace, strategy)
        model = layers(torch.float64)
        wrapped, optimizer = set_up(made, model)
        train(made, wrapped, optimizer, range(STEPS), clip)
        return weights_of(model)


@pytest.fixture(scope="module", params=STRATEGIES)
def trained(request, worlds):
    """A strategy, and what an undisturbed run on two ranks made of the weights."""
    return request.param, worlds[2].run(fit, 2, request.param)


def test_weights_equal_those_of_one_process(trained):
    _, found = trained
    assert same_bits(*found) and deviation(found[0], alone()) <= DOUBLE


def clip_norm(optimizer: KLShampoo, step: int) -> None:
    clip_grad_norm_(optimizer, 0.1)


def clip_value(optimizer: KLShampoo, step: int) -> None:
    torch.nn.utils.clip_grad_value_([p for group in optimizer.param_groups for p in group["params"]], 0.01)


CLIPPED: dict[str, Any] = {"norm": (clip_norm, {"max_norm": 0.1}), "value": (clip_value, {"clip_val": 0.01})}


@product(how=CLIPPED, strategy=STRATEGIES, namespace=["lightning.fabric", "lightning_fabric"])
def test_clipping_is_that_of_the_whole_gradient(worlds, how, strategy, namespace):
    change, clip = CLIPPED[how]
    expected = alone(change=change)
    assert deviation(expected, alone()) > 1e-3, "the clipping must clip for this test to mean anything"
    assert deviation(worlds[2].run(fit, 2, strategy, namespace, clip)[0], expected) <= DOUBLE


def test_the_other_methods_have_strategies_too(worlds):
    found = worlds[2].run(fit, 2, "kl_soap")[0]
    assert deviation(found, alone(method="kl_soap", betas=(0.95, 0.95))) <= DOUBLE


def jointly(group, name: str):
    """Model, optimizer and scheduler set up together."""
    with launched(group):
        made = fabric("lightning.fabric", "kl_shampoo")
        model = layers(torch.float64)
        optimizer = AdamW(model.parameters(), lr=LR, weight_decay=DECAY)
        wrapped, converted, scheduler = made.setup(model, optimizer, scheduler=SCHEDULES[name](optimizer))
        train(made, wrapped, converted, range(STEPS), scheduler=scheduler)
        return weights_of(model)


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_scheduler_set_up_with_its_optimizer_follows(worlds, name):
    found = worlds[2].run(jointly, 2, name)[0]
    assert deviation(found, alone(schedule=SCHEDULES[name])) <= DOUBLE


def resumed(group, strategy: str, path: str):
    """Half of the steps, saved; the others with new objects, loaded."""
    with launched(group):
        for steps in (range(STEPS // 2), range(STEPS // 2, STEPS)):
            made = fabric("lightning.fabric", strategy)
            model = layers(torch.float64)
            wrapped, optimizer = set_up(made, model)
            state = {"model": wrapped, "optimizer": optimizer}
            if steps.start:
                made.load(path, state)
            train(made, wrapped, optimizer, steps)
            if not steps.start:
                made.save(path, state)
        return weights_of(model)


def test_a_saved_run_goes_on_to_the_bit(worlds, trained, tmp_path):
    strategy, whole = trained
    found = worlds[2].run(resumed, 2, strategy, str(tmp_path / "half.ckpt"))[0]
    assert same_bits(found, whole[0])


def scheduler_too_early(group):
    with launched(group):
        made = fabric("lightning.fabric", "kl_shampoo")
        model = made.setup_module(layers(torch.float64))
        optimizer = AdamW(model.parameters())
        SCHEDULES["warmup"](optimizer)
        made.setup_optimizers(optimizer)


def model_too_late(group):
    with launched(group):
        made = fabric("lightning.fabric", "kl_shampoo")
        made.setup_optimizers(AdamW(layers(torch.float64).parameters()))


@pytest.mark.parametrize(
    ("run", "said"), [(scheduler_too_early, "make the scheduler after"), (model_too_late, "call setup_module first")]
)
def test_what_could_not_follow_is_refused(worlds, run, said):
    assert all(said in str(error) for error in worlds[2].run_expecting_errors(run, 2))


def returned(group):
    with launched(group):
        made = fabric("lightning.fabric", "kl_shampoo")
        model = made.setup_module(layers(torch.float64))
        ours = KLShampoo(model.named_parameters(), lr=LR)
        return made.setup_optimizers(ours).optimizer is ours


def test_klshampoo_is_set_up_as_it_is(worlds):
    assert worlds[2].run(returned, 2) == [True, True]


FEW = 3  # steps of AdamW, and after them of KLShampoo on the same samples


def with_adamw(group, path: str):
    with launched(group):
        made = fabric("lightning.fabric", "ddp")
        model = made.setup_module(layers(torch.float64))
        optimizer = made.setup_optimizers(AdamW(model.parameters(), lr=LR))
        train(made, model, optimizer, range(FEW))
        made.save(path, {"model": model, "optimizer": optimizer})


def loading(group, path: str, how: str):
    with launched(group):
        kind = import_module("lightning_plugin").KLShampooFabricStrategy
        made = fabric("lightning.fabric", kind(optimizer_checkpoint=how))
        model = layers(torch.float64)
        wrapped, optimizer = set_up(made, model)
        made.load(path, {"model": wrapped, "optimizer": optimizer})
        train(made, wrapped, optimizer, range(FEW))
        return weights_of(model)


def after_adamw(model: Any, optimizer: KLShampoo) -> None:
    train_alone(model, AdamW(model.parameters(), lr=LR), FEW)


def test_adamws_checkpoint_is_refused_with_the_way_out_which_works(worlds, tmp_path):
    path = str(tmp_path / "adamw.ckpt")
    worlds[2].run(with_adamw, 2, path)
    errors = worlds[2].run_expecting_errors(loading, 2, path, "strict")
    assert all("optimizer_checkpoint='ignore'" in str(error) for error in errors)
    found = worlds[2].run(loading, 2, path, "ignore")[0]
    assert deviation(found, alone(steps=FEW, start=after_adamw)) <= DOUBLE
