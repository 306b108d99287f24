"""What cannot be had with DeepSpeed is refused at initialisation, with the reason and the way out; what can, works."""

from functools import cache

import pytest
import torch
from torch import nn

from kl_dist import KLShampoo, param_groups
from tests.deepspeed_runs import OPTIONS, alone, config, deepspeed_here, engine_of, net, train, weights_of
from tests.models import Weights, deviation, same_bits
from tests.products import product
from tests.world import World

CPU = {"device": "cpu"}
REFUSED = {
    "fp16 at stage 0": (0, {"fp16": {"enabled": True}}, "never applied"),
    "nvme": (3, {"zero": {"offload_optimizer": {"device": "nvme", "nvme_path": "/tmp"}}}, "NVMe"),
    "parameters on nvme": (3, {"zero": {"offload_param": {"device": "nvme", "nvme_path": "/tmp"}}}, "NVMe"),
    "ratio": (3, {"zero": {"offload_optimizer": {**CPU, "ratio": 0.5}}}, "ratio below 1"),
    "super offload": (3, {"zero": {"offload_optimizer": {**CPU, "super_offload": True}}}, "SuperOffload"),
    "zenflow": (2, {"zero": {"offload_optimizer": CPU, "zenflow": {"topk_ratio": 0.1}}}, "ZenFlow"),
    "elastic": (1, {"zero": {"elastic_checkpoint": True}}, "Universal Checkpoint"),
    "autocast": (2, {"torch_autocast": {"enabled": True, "dtype": "float16"}}, "use bfloat16"),
    "bf16 masters": (2, {"bf16": {"enabled": True, "bf16_master_weights_and_grads": True}}, "weights in float32"),
    "a typing mistake": (1, {"options": {"betass": (0.9, 0.9)}}, "did you mean 'betas'"),
    "amsgrad": (1, {"options": {"amsgrad": True}}, "no method here has it"),
    "a bad value": (2, {"options": {"precondition_frequency": 0}}, "at least 1"),
    "no such head": (2, {"options": {"output_head": "hed"}}, "no module named 'hed'"),
    "raise": (2, {"options": {"on_nonfinite": "raise"}}, "DeepSpeed leaves a step out"),
    "no number": (1, {"options": {"betas": 0.9}}, "betas"),
    "no such name": (2, {"options": {"adamw_names": ["up.wieght"]}}, "adamw_names has 'up.wieght'"),
}


def initialised(group, stage: int, more: dict):
    with deepspeed_here(group) as deepspeed:
        engine_of(deepspeed, config(stage, ranks=group.size(), **more))


@pytest.mark.parametrize("name", REFUSED)
def test_refused_at_initialisation(worlds, name):
    stage, more, said = REFUSED[name]
    errors = worlds[2].run_expecting_errors(initialised, 2, stage, more)
    assert all(said in str(error) for error in errors), errors


def every_way_in(group, stage: int):
    """The weights after two steps, by the way the optimizer came to the engine."""
    with deepspeed_here(group) as deepspeed:
        import deepspeed_integration as ours

        entry = config(stage, ranks=group.size())
        plain = {key: x for key, x in entry.items() if key != "optimizer"}
        ways = {
            "entry": (entry, None),
            "lower case": ({**entry, "optimizer": {**entry["optimizer"], "type": "kl_shampoo"}}, None),
            "instance": (plain, lambda model: ours.KLShampoo(list(model.parameters()), **OPTIONS)),
            "named": (plain, lambda model: ours.KLShampoo(model.named_parameters(), **OPTIONS)),
            "callable": (plain, lambda model: lambda parameters: ours.KLShampoo(parameters, **OPTIONS)),
        }
        found = {}
        for name, (given, make) in ways.items():
            model = net()
            optimizer = None if make is None else make(model)
            engine = deepspeed.initialize(
                model=model, optimizer=optimizer, model_parameters=list(model.parameters()), config=given
            )[0]
            train(engine, range(2))
            found[name] = weights_of(deepspeed, engine)
            engine.destroy()
        return found


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_every_way_of_giving_the_optimizer_is_the_same(worlds, stage):
    found = worlds[2].run(every_way_in, 2, stage, timeout=120)[0]
    assert len(found) == 5 and all(same_bits(weights, found["entry"]) for weights in found.values())


def names_of_types(group):
    """What the look-up of a config's "type" finds: (ours, torch's own Muon)."""
    with deepspeed_here(group):
        import deepspeed_integration as ours

        found = [getattr(torch.optim, name, None) for name in ("KLMuon", "kl_muon", "klmuon")]
        theirs = [getattr(torch.optim, name, None) for name in ("Muon", "muon")]
        return all(kind is ours.KLMuon for kind in found), not any(kind is ours.KLMuon for kind in theirs)


def test_muon_has_a_name_of_its_own_beside_deepspeeds_and_torchs(worlds):
    assert worlds[2].run(names_of_types, 2) == [(True, True)] * 2


def made_by_hand(group, make, **zero):
    """The weights after three steps of an optimizer that is handed over; without `make`, of the config's entry."""
    with deepspeed_here(group) as deepspeed:
        model, given = net(), config(2, ranks=group.size(), zero=zero)
        optimizer = None if make is None else make(model)
        if make is not None:
            del given["optimizer"]
        engine = deepspeed.initialize(
            model=model, optimizer=optimizer, model_parameters=list(model.parameters()), config=given
        )[0]
        train(engine, range(3))
        found = weights_of(deepspeed, engine)
        engine.destroy()
        return found


def one_group(model):
    from deepspeed_integration import KLShampoo as Ours

    return Ours(list(model.parameters()), **OPTIONS)


def named_groups(model):
    from deepspeed_integration import KLShampoo as Ours

    return Ours(param_groups(model, **OPTIONS))


def unnamed_groups(model):
    from deepspeed_integration import KLShampoo as Ours

    groups = param_groups(model, **OPTIONS)
    return Ours([{**one, "params": [p for _, p in one["params"]]} for one in groups])


def test_one_made_by_hand_can_be_offloaded(worlds):
    """For offload DeepSpeed wants its own Adam to be handed over."""
    found, expected = (
        worlds[2].run(made_by_hand, 2, make, offload_optimizer=CPU, timeout=120) for make in (one_group, None)
    )
    assert same_bits(found[0], expected[0])


def test_groups_may_have_names(worlds):
    found, expected = (worlds[2].run(made_by_hand, 2, make, timeout=120) for make in (named_groups, unnamed_groups))
    assert same_bits(found[0], expected[0])


def other_clients(group, how: str, stage: int, more: dict):
    with deepspeed_here(group) as deepspeed:
        import deepspeed_integration as ours

        model = net()
        make = {
            "kl_dist's": lambda parameters: KLShampoo(parameters, lr=1e-2),
            "kl_dist's class": lambda parameters: KLShampoo,
            "ours": lambda parameters: ours.KLShampoo(parameters, lr=1e-2),
        }[how.removeprefix("callable, ")]
        optimizer = make if how.startswith("callable") else make(list(model.parameters()))
        given = {key: x for key, x in config(stage, ranks=group.size(), **more).items() if key != "optimizer"}
        deepspeed.initialize(model=model, optimizer=optimizer, model_parameters=list(model.parameters()), config=given)


ELASTIC = {"zero": {"elastic_checkpoint": True}}
UNTESTED = {"zero_allow_untested_optimizer": True}


@pytest.mark.parametrize(
    ("how", "stage", "more", "said"),
    [
        ("kl_dist's", 2, UNTESTED, "hand over deepspeed_integration.KLShampoo"),
        ("kl_dist's class", 2, {}, "hand over deepspeed_integration.KLShampoo"),
        ("callable, kl_dist's", 2, UNTESTED, "hand over deepspeed_integration.KLShampoo"),
        ("callable, kl_dist's", 0, {}, "hand over deepspeed_integration.KLShampoo"),
        ("ours", 1, ELASTIC, "Universal Checkpoint"),
        ("callable, ours", 1, ELASTIC, "Universal Checkpoint"),
    ],
)
def test_clients_are_looked_at_as_the_entry_is(worlds, how, stage, more, said):
    errors = worlds[2].run_expecting_errors(other_clients, 2, how, stage, more)
    assert all(said in str(error) for error in errors), errors


def poisoned(group, stage: int, value: float | None, more: dict):
    """A run with a step whose gradient is not finite on one rank, or that leaves the step out."""
    with deepspeed_here(group) as deepspeed:
        engine = engine_of(deepspeed, config(stage, ranks=group.size(), shares=1, gradient_clipping=0.0, **more))
        for step in range(5):
            if step == 3 and value is None:
                continue
            hook = None
            if step == 3 and group.rank() == 1:
                hook = engine.module.mix.register_forward_hook(lambda _, __, output: output * value)
            train(engine, range(step, step + 1), shares=1)
            if hook is not None:
                hook.remove()
        left_out = engine.basic_optimizer.stats()["skipped_steps"]
        found = weights_of(deepspeed, engine), engine.global_steps, left_out
        engine.destroy()
        return found


@cache
def calm(world: World, stage: int) -> Weights:
    return world.run(poisoned, 2, stage, None, {"bf16": {"enabled": True}}, timeout=120)[0][0]


@product(stage=[0, 1, 2, 3], value=[float("nan"), float("inf")], checked=[True, False])
def test_a_gradient_that_is_not_finite_changes_nothing_on_any_rank(worlds, stage, value, checked):
    more = {"bf16": {"enabled": True, "check_grad_overflow": checked}}
    for weights, steps, left_out in worlds[2].run(poisoned, 2, stage, value, more, timeout=120):
        assert same_bits(weights, calm(worlds[2], stage)) and steps == 5 and left_out == 1
        assert all(torch.isfinite(x).all() for x in weights.values())


def test_the_weights_are_unlike_without_the_optimizer(worlds):
    """What is compared above moves."""
    assert deviation(alone(steps=3), {name: p.detach() for name, p in net().named_parameters()}) > 1e-2


def with_experts(deepspeed):
    from deepspeed.moe.layer import MoE

    deepspeed.utils.groups._create_expert_and_data_parallel(1)
    return nn.Sequential(nn.Linear(4, 4), MoE(4, nn.Linear(4, 4), num_experts=2))


def as_pipeline(deepspeed):
    return deepspeed.pipe.PipelineModule([nn.Linear(4, 4), nn.Linear(4, 4)], num_stages=1, loss_fn=nn.MSELoss())


def of_another_kind(group, make, stage: int, more: dict):
    with deepspeed_here(group) as deepspeed:
        model = make(deepspeed) if make else net()
        given = config(stage, ranks=group.size(), **more)
        deepspeed.initialize(model=model, model_parameters=list(model.parameters()), config=given)


@pytest.mark.parametrize(
    ("make", "more", "said"),
    [
        (as_pipeline, {}, "pipeline parallelism"),
        (with_experts, {}, "expert parallelism"),
        (None, {"tensor_parallel": {"autotp_size": 2}}, "tensor parallelism"),
    ],
)
def test_other_kinds_of_parallelism_are_refused(worlds, make, more, said):
    errors = worlds[2].run_expecting_errors(of_another_kind, 2, make, 1, more, timeout=120)
    assert all(said in str(error) and "use data parallelism alone" in str(error) for error in errors), errors
