"""Which method serves which parameter: by dimension, by module where modules are known, by what the user says."""

import pytest
import torch
from torch import nn

from kl_dist import KLShampoo, modules, param_groups, plan


class Model(nn.Module):
    """An embedding, a convolution, a norm, a matrix, a head: tied, named, found by a method, or none of these."""

    def __init__(self, tied: bool = False, has_method: bool = False) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 8)
        self.bag = nn.EmbeddingBag(5, 8)
        self.convolution = nn.Conv2d(1, 8, 3)
        self.norm = nn.LayerNorm(8)
        self.table = nn.Parameter(torch.zeros(4, 8))
        self.scale = nn.Parameter(torch.zeros(()))
        self.linear = nn.Linear(8, 8)
        self.head = nn.Linear(8, 11)
        if tied:
            self.head.weight = self.embedding.weight
        if has_method:
            self.get_output_embeddings = lambda: self.head


MATRICES = {"table", "convolution.weight", "linear.weight"}
ELEMENTWISE = {"embedding.weight", "bag.weight"}
UNDECAYED = {"scale", "convolution.bias", "norm.weight", "norm.bias", "linear.bias", "head.bias"}


def methods(opt: KLShampoo) -> dict[str, str]:
    """The method of every parameter that a unit of the plan serves."""
    return {opt.plan.parameters[unit.parameter].name: unit.method for unit in opt.plan.units}


def routed_to_adamw(model: nn.Module, **options) -> set[str]:
    return {name for name, method in methods(KLShampoo(param_groups(model, **options))).items() if method == "adamw"}


@pytest.mark.parametrize(
    ("model", "options", "head"),
    [
        (dict(), dict(), {"head.weight"}),
        (dict(), dict(output_head=""), set()),
        (dict(), dict(output_head="head"), {"head.weight"}),
        (dict(), dict(output_head="linear"), {"linear.weight"}),
        (dict(has_method=True), dict(), {"head.weight"}),
        (dict(tied=True), dict(), set()),
        (dict(tied=True, has_method=True), dict(output_head="head"), set()),
    ],
    ids=[
        "found by the vocabulary",
        "not looked for",
        "named",
        "named otherwise",
        "found by its method",
        "tied",
        "all at once",
    ],
)
def test_embeddings_and_the_output_head_go_to_adamw(model, options, head):
    """A tied head is the embedding's parameter, and so has its name."""
    assert routed_to_adamw(Model(**model), **options) == ELEMENTWISE | UNDECAYED | head
    served = methods(KLShampoo(param_groups(Model(**model), **options)))
    tied = {"head.weight"} if model.get("tied") else set()
    assert served.keys() == {*MATRICES, *ELEMENTWISE, *UNDECAYED, "head.weight"} - tied


class Block(nn.Module):
    """With a Linear of as many outputs as there are rows in the embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.narrow = nn.Linear(8, 11), nn.Linear(11, 8)


def decoder(blocks: int = 1, heads: int = 1, outputs: int = 11, embeddings: int = 1) -> nn.Module:
    """The heads first, as in litgpt."""
    made = nn.Module()
    made.heads = nn.Module()
    for number in range(heads):
        setattr(made.heads, f"of{number}", nn.Linear(8, outputs))
    made.parts = nn.ModuleDict({f"e{number}": nn.Embedding(11 - number, 8) for number in range(embeddings)})
    made.parts["blocks"] = nn.ModuleList([Block() for _ in range(blocks)])
    return made


@pytest.mark.parametrize(
    ("given", "found"),
    [
        ({}, "heads.of0"),
        ({"blocks": 3, "embeddings": 2}, "heads.of0"),
        ({"outputs": 10, "embeddings": 2}, "heads.of0"),
        ({"outputs": 12}, None),
        ({"heads": 2}, None),
        ({"embeddings": 0}, None),
    ],
    ids=str,
)
def test_the_only_linear_outside_of_blocks_with_a_vocabularys_outputs_is_the_head(given, found, caplog):
    with caplog.at_level("INFO", "kl_dist"):
        said = modules.look_up(decoder(**given))
    assert said.head == found
    assert caplog.messages == ([] if found is None else [said.about_head])
    if found:
        assert f"'{found}' is taken" in said.about_head and 'output_head=""' in said.about_head


def test_the_head_is_found_within_wrappers_and_sequences():
    for model in (nn.Sequential(nn.Embedding(11, 8), Block(), nn.Linear(8, 11)), torch.compile(decoder())):
        assert modules.look_up(model).head in ("2", "_orig_mod.heads.of0")
    assert modules.look_up(nn.Sequential(nn.Conv2d(1, 11, 3), nn.Linear(8, 11))).head is None


def test_a_model_without_an_output_head_has_none():
    class NoHead(Model):
        def get_output_embeddings(self):
            return None

    assert routed_to_adamw(NoHead()) == ELEMENTWISE | UNDECAYED


def test_norms_and_biases_are_not_decayed():
    groups = param_groups(Model(), weight_decay=0.3, lr=0.1)
    decay = {name: group["weight_decay"] for group in groups for name, _ in group["params"]}
    assert {name for name, value in decay.items() if value == 0} == UNDECAYED
    assert {value for name, value in decay.items() if name not in UNDECAYED} == {0.3}
    model = Model()
    opt = KLShampoo(param_groups(model, weight_decay=0.5, lr=0.1))
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(1.0)
            p.grad = torch.zeros_like(p)
    opt.step()
    assert {name for name, p in model.named_parameters() if (p == 1).all()} == UNDECAYED


def test_groups_hold_every_parameter_once_with_all_options():
    model = Model()
    model.linear.weight.requires_grad_(False)
    groups = param_groups(model, lr=0.3, precondition_frequency=7, adamw_lr=0.1)
    names = [name for group in groups for name, _ in group["params"]]
    assert sorted(names) == sorted(name for name, _ in model.named_parameters())
    opt = KLShampoo(groups, lr=0.7)
    assert all((g["lr"], g["precondition_frequency"], g["adamw_lr"]) == (0.3, 7, 0.1) for g in opt.param_groups)
    assert "linear.weight" not in methods(opt)
    assert {group["lr"] for group in KLShampoo(param_groups(model), lr=0.7).param_groups} == {0.7}


def test_no_group_is_empty():
    assert len(param_groups(nn.Linear(3, 2, bias=False))) == 1
    assert len(param_groups(nn.LayerNorm(3))) == 1
    assert param_groups(nn.Tanh()) == []


def test_named_parameters_are_routed_by_dimension_alone():
    model = Model()
    served = methods(KLShampoo(model.named_parameters(), method="soap"))
    assert served == {name: "soap" if p.ndim >= 2 else "adamw" for name, p in model.named_parameters()}


@pytest.mark.parametrize("shape", [(1, 7), (7, 1), (2, 1, 3), (1, 1, 1, 1, 2)], ids=str)
def test_a_matrix_never_falls_back_to_adamw(shape):
    """However thin it is."""
    assert methods(KLShampoo([("w", nn.Parameter(torch.zeros(shape)))])) == {"w": "kl_shampoo"}


def test_a_group_sets_the_route_of_its_parameters():
    model = Model()
    matrices, *others = [{"params": [pair]} for pair in model.named_parameters() if pair[1].ndim >= 2]
    matrices["method"] = "adamw"
    served = methods(KLShampoo([matrices, *others], method="shampoo"))
    assert list(served.values()).count("adamw") == 1 and list(served.values()).count("shampoo") == len(others)


def test_nameless_parameters_get_names_by_their_place():
    opt = KLShampoo([{"params": [nn.Parameter(torch.zeros(3, 2))]}, {"params": [nn.Parameter(torch.zeros(3))]}])
    assert methods(opt) == {"group0.param0": "kl_shampoo", "group1.param0": "adamw"}


@pytest.mark.parametrize("world_size", [1, 3, 20])
def test_routes_are_a_table_with_a_line_per_parameter(world_size):
    model = Model()
    model.nothing = nn.Parameter(torch.zeros(0, 3))
    opt = KLShampoo(param_groups(model, max_preconditioner_dim=8))
    heading, *lines = opt.routes().splitlines()
    assert heading.split()[:3] == ["parameter", "shape", "method"]
    rows = {line.split()[0]: line for line in lines}
    shapes = {name: p.shape for name, p in model.named_parameters()}
    assert rows.keys() == shapes.keys() and len(lines) == len(rows)
    served = methods(opt)
    for name, row in rows.items():
        assert str(tuple(shapes[name])) in row
        assert served.get(name, "none") in row
    assert "8x8" in rows["linear.weight"]


def test_a_plan_of_a_model_routes_as_its_groups_do():
    model = Model()
    opt = KLShampoo(param_groups(model, output_head="head", method="soap"))
    found = plan(model, 1, output_head="head", method="soap")
    assert found.owner == opt.plan.owner
    assert {u.name: u.method for u in found.units} == {u.name: u.method for u in opt.plan.units}


def test_names_are_those_of_the_model_within_its_wrappers():
    """As torch.distributed.checkpoint has them, so that what DDP saved loads without it."""
    for wrapped in ("module._orig_mod.{}", "_orig_mod.module.{}", "module.{}", "_checkpoint_wrapped_module.{}"):
        named = [(wrapped.format(name), parameter) for name, parameter in nn.Linear(3, 4).named_parameters()]
        assert set(KLShampoo(named).plan.owner) == {"weight", "bias"}
    named = [(name, nn.Parameter(torch.zeros(2))) for name in ("module.weight", "weight", "a._orig_mod.b")]
    assert set(KLShampoo(named).plan.owner) == {"module.weight", "weight", "a.b"}


def test_names_given_go_to_adamw_and_shape_the_plan():
    model = Model()
    opt = KLShampoo(model.named_parameters(), adamw_names=["table", "scale"])
    assert {name for name in MATRICES | ELEMENTWISE if methods(opt)[name] == "adamw"} == {"table"}
    with pytest.raises(ValueError, match="'tabel', but no parameter"):
        KLShampoo(model.named_parameters(), adamw_names=("tabel",))
    with pytest.raises(TypeError, match="adamw_names is a tuple"):
        KLShampoo(model.named_parameters(), adamw_names="table")
    opt.param_groups[0]["adamw_names"] = None
    with pytest.raises(ValueError, match=r"adamw_names.*cannot be changed"):
        opt.step()


def test_names_given_to_adamw_follow_their_parameters_when_these_are_renamed():
    """By what wraps a model, and where two models have the same names."""
    first, second = nn.ModuleDict({"module": Model()}), Model()
    groups = [
        {"params": first.named_parameters(), "adamw_names": ["module.table"]},
        {"params": [(f"module.{name}", p) for name, p in second.named_parameters()], "adamw_names": ["module.table"]},
    ]
    opt = KLShampoo(groups)
    assert methods(opt)["table"] == methods(opt)["group1.table"] == "adamw"
    assert methods(opt)["linear.weight"] == methods(opt)["group1.linear.weight"] == "kl_shampoo"


def test_the_head_of_a_part_of_the_model_goes_to_adamw():
    whole = nn.ModuleDict({"part": Model(has_method=True)})
    assert "part.head.weight" in routed_to_adamw(whole)


@pytest.mark.parametrize("wrapped", [lambda model: model, torch.compile], ids=["plain", "compiled"])
def test_a_model_in_the_place_of_parameters_is_divided_as_param_groups_does(wrapped):
    model = Model(has_method=True)
    said = {"matrices": {"linear.weight": {"parts": {0: 2}}}, "adamw_names": ["table"]}
    opt = KLShampoo(wrapped(model), lr=1e-2, weight_decay=0.2, **said)
    other = KLShampoo(param_groups(model, weight_decay=0.2, **said), lr=1e-2, **said)
    assert methods(opt)["table"] == "adamw" and "linear.weight" in opt.routes()
    assert sum(opt.plan.parameters[unit.parameter].name == "linear.weight" for unit in opt.plan.units) == 2
    assert opt.plan == other.plan
    for group, expected in zip(opt.param_groups, other.param_groups, strict=True):
        assert all(p is q for p, q in zip(group.pop("params"), expected.pop("params"), strict=True))
        assert group == expected


def warned(caplog: pytest.LogCaptureFixture, params, **options) -> str:
    caplog.clear()
    KLShampoo(params, **options)
    return caplog.text


def test_what_seems_no_matrix_and_is_served_as_one_is_named(caplog):
    shapes = {"table": (5000, 16), "wide": (16, 5000), "mlp": (64, 16), "x.lm_head.weight": (11, 8)}
    shapes |= {"experts": (32, 24, 20), "kernel": (24, 24, 3, 3), "long": (4000, 4), "large": (4096, 1024)}

    def named(names: str) -> list[tuple[str, nn.Parameter]]:
        return [(name, nn.Parameter(torch.zeros(shapes[name]))) for name in names.split()]

    said = warned(caplog, named("table mlp wide x.lm_head.weight"))
    assert "'table', 'wide', 'x.lm_head.weight' are by name or shape an embedding or output head" in said
    assert "'group0.param0' is by name or shape an embedding" in warned(caplog, [named("table")[0][1]])
    assert "'experts' is served as one tensor of three sides" in warned(caplog, named("experts kernel"))
    for served in ({"adamw_names": ["table", "experts"]}, {"method": "adamw"}):
        assert not warned(caplog, named("table mlp experts"), **served)
    assert not warned(caplog, [{"params": named("experts"), "matrices": {"batch": (0,)}}])
    assert not warned(caplog, named("long large kernel mlp"))
    assert not warned(caplog, named("kernel"), recipe="paper")
    assert not warned(caplog, nn.Sequential(nn.Embedding(5000, 16), nn.Linear(16, 64)))
