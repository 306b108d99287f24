"""Stacked experts and fused weights are read as the matrices they hold, and what is unknown is told of."""

import logging
import re
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from kl_dist import METHODS, KLShampoo, modules, param_groups, plan
from kl_dist.planning.matrices import read_matrices
from tests.stacks import Speaks, trained_stacks

transformers = pytest.importorskip("transformers")

FAMILIES = ["mixtral", "qwen3_moe", "deepseek_v3", "gpt_oss", "llama4_text", "jetmoe", "longcat_flash", "gpt2"]
OTHER_FAMILIES = [
    *(
        "qwen2_moe",
        "deepseek_v2",
        "olmoe",
        "granitemoe",
        "granitemoehybrid",
        "jamba",
        "phimoe",
        "nemotron_h",
        "aria_text",
    ),
    *("ernie4_5_moe", "glm4_moe", "minimax", "minimax_m2", "qwen3_next", "qwen3_5_moe_text", "flex_olmo", "afmoe"),
    *("step3p7", "openai_privacy_filter", "recurrent_gemma", "openai-gpt", "imagegpt"),
]
UNDECLARED = {"zamba": r"A_log", "xlnet": r"mask_emb|seg_embed"}
"""Models with other tensors of three dimensions, which are no matrices, by what these are called."""
SIZES = {
    **{
        "vocab_size": 20,
        "hidden_size": 16,
        "intermediate_size": 12,
        "moe_intermediate_size": 12,
        "num_hidden_layers": 1,
    },
    **{"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8, "num_experts": 3, "num_local_experts": 3},
    **{"num_experts_per_tok": 1, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2},
}


def on_meta(family: str) -> nn.Module:
    """A few layers of a family's default size, so many that one has experts."""
    config = transformers.AutoConfig.for_model(family)
    for name in ("num_hidden_layers", "n_layer"):
        if hasattr(config, name):
            setattr(config, name, 4)
    with torch.device("meta"):
        if type(config) in transformers.AutoModelForCausalLM._model_mapping:
            return transformers.AutoModelForCausalLM.from_config(config)
        return transformers.AutoModel.from_config(config)


@pytest.mark.parametrize(
    "family", [*FAMILIES, *(pytest.param(name, marks=pytest.mark.full) for name in (*OTHER_FAMILIES, *UNDECLARED))]
)
def test_no_stack_of_a_family_of_transformers_is_undeclared(family):
    model = on_meta(family)
    said = modules.look_up(model)
    matrices = said.serve(model.named_parameters()).matrices
    assert matrices, "a model with experts or fused weights was asked for"
    for name, p in model.named_parameters():
        if name in matrices:
            reading = read_matrices(p.shape, {"matrices": matrices[name]})
            assert len(reading.sides) == 2 and (reading.shape[0] > 1 or family == "xlnet"), name
        elif p.ndim > 2 and id(p) not in said.convolutions:
            assert re.search(UNDECLARED.get(family, "^$"), name), name


def test_all_experts_of_transformers_speak_for_themselves_or_are_in_the_table():
    """The sources are read, not imported: a class that the installed version has added is named here."""
    folder = Path(transformers.__file__).parent / "models"
    a_class = re.compile(r"^((?:@.*\n)*)class (\w*Expert\w*)\(nn\.Module\):\n((?:[ \t].*\n|\n)*)", re.M)
    a_stack = re.compile(r"nn\.Parameter\(\s*torch\.\w+\(\(?[^(),]+,[^(),]+,[^(),]+\)")
    found = {}
    for path in folder.glob("*/modeling_*.py"):
        source = path.read_text(encoding="utf-8")
        if "Expert" in source:
            stacked = (match.groups() for match in a_class.finditer(source) if a_stack.search(match[3]))
            found |= {name: "use_experts_implementation" in above for above, name, _ in stacked}
    assert len(found) > 60
    known = {*modules.TABLE, "JetMoeParallelExperts"}  # the table has those by what they are a part of
    assert {name for name, speaks in found.items() if not speaks} <= known


def entries(name: str, tensor: Tensor, family: str) -> list[Tensor]:
    """Views of the matrices in an expert's tensor, gate and up apart; of any other the tensor itself."""
    if name.endswith("experts.down_proj"):
        return list(tensor)
    if not name.endswith("experts.gate_up_proj"):
        return [tensor]
    if family == "gpt_oss":
        return [expert[:, part::2] for expert in tensor for part in range(2)]
    return [half for expert in tensor for half in expert.chunk(2)]


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "gpt_oss"])
def test_experts_get_the_update_of_separate_matrices(family):
    """In float64, with experts that a step leaves out."""
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(family, **SIZES)
    eager = {"experts_implementation": "eager"}  # others lack float64
    model = transformers.AutoModelForCausalLM.from_config(config, **eager).double()
    named = dict(model.named_parameters())
    apart = {name: [nn.Parameter(x.clone()) for x in entries(name, p.detach(), family)] for name, p in named.items()}
    groups = param_groups(model, lr=1e-2)
    twins = [
        {**group, "matrices": None, "params": [q for name, _ in group["params"] for q in apart[name]]}
        for group in groups
    ]
    opt, twin = KLShampoo(groups), KLShampoo(twins)
    idle = 0
    for _ in range(6):
        opt.zero_grad()
        tokens = torch.randint(20, (1, 4))
        model(input_ids=tokens, labels=tokens).loss.backward()
        for name, p in named.items():
            for q, grad in zip(apart[name], entries(name, p.grad, family), strict=True):
                is_idle = len(apart[name]) > 1 and not grad.any()
                q.grad = None if is_idle else grad.clone()
                idle += is_idle
        opt.step()
        twin.step()
    assert idle > 0
    for name, p in named.items():
        for x, q in zip(entries(name, p.detach(), family), apart[name], strict=True):
            torch.testing.assert_close(x, q.detach(), rtol=1e-9, atol=1e-12, msg=name)


@pytest.mark.parametrize("cross", [False, True], ids=["self-attention", "cross-attention"])
def test_fused_qkv_of_gpt2_is_a_matrix_each(cross):
    """`c_attn` of cross-attention has keys and values alone."""
    config = transformers.GPT2Config(
        n_layer=1, n_embd=8, n_head=2, vocab_size=8, n_positions=8, add_cross_attention=cross
    )
    with torch.device("meta"):
        model = transformers.GPT2LMHeadModel(config)
    units = [unit for unit in plan(model, 1, recipe="paper").units if "c_attn" in unit.name and unit.method != "adamw"]
    part = "crossattention" if cross else ".attn."
    assert [unit.block.shape for unit in units if part in unit.name] == [(8, 8)] * (2 if cross else 3)


@pytest.mark.parametrize("method", METHODS)
def test_a_matrix_and_its_transpose_get_the_same_update(method):
    """So that transformers' Conv1D, which is stored as (in, out), needs no declaration."""
    torch.manual_seed(0)
    w = nn.Parameter(torch.randn(7, 5, dtype=torch.float64))
    transposed = nn.Parameter(w.detach().T.clone())
    opts = [KLShampoo([p], lr=0.1, method=method) for p in (w, transposed)]
    for _ in range(6):
        w.grad = torch.randn_like(w)
        transposed.grad = w.grad.T.clone()
        for opt in opts:
            opt.step()
    torch.testing.assert_close(transposed.T, w, rtol=1e-8, atol=1e-10)


@given(st.integers(1, 4), st.integers(1, 5), st.integers(1, 5), st.booleans(), st.booleans())
def test_experts_that_speak_for_themselves_are_read_as_they_say(experts, inner, outer, transposed, concatenated):
    module = Speaks(experts, inner, outer, transposed, concatenated)
    served = modules.look_up(module).serve(module.named_parameters())
    assert served.adamw == ("gate_up_proj_bias",) and served.matrices.keys() == {"gate_up_proj", "down_proj"}
    stored = module.gate_up_proj.detach()
    found = read_matrices(stored.shape, {"matrices": served.matrices["gate_up_proj"]}).view(stored)
    rows = stored.transpose(1, 2) if transposed else stored  # (E, 2 inner, outer)
    apart = rows.chunk(2, dim=1) if concatenated else (rows[:, ::2], rows[:, 1::2])
    for entry, matrix in enumerate(found.transpose(1, 2) if transposed else found):
        assert torch.equal(matrix, apart[entry % 2][entry // 2])


def made(
    name: str, bases: tuple[type, ...] = (nn.Module,), module: str = __name__, **shapes: tuple[int, ...]
) -> nn.Module:
    """A module of a class with this name, and parameters of these shapes."""
    found = type(name, bases, {"__module__": module})()
    for key, shape in shapes.items():
        setattr(found, key, nn.Parameter(torch.zeros(shape)))
    return found


def read(module: nn.Module) -> dict[str, tuple[int, ...]]:
    """How the parameters are read, (B, rows, columns)."""
    matrices = modules.look_up(module).serve(module.named_parameters()).matrices or {}
    shapes = dict(module.named_parameters())
    return {name: read_matrices(shapes[name].shape, {"matrices": x}).shape for name, x in matrices.items()}


def test_experts_of_torchtitan_are_known_under_all_their_names():
    old = made("GroupedExperts", w1=(3, 6, 4), w2=(3, 4, 6), w3=(3, 6, 4))
    assert read(old) == {"w1": (3, 6, 4), "w2": (3, 4, 6), "w3": (3, 6, 4)}
    new = made("GroupedExperts", w1_EFD=(3, 6, 4), w2_EDF=(3, 4, 6), w3_EFD=(3, 6, 4))
    assert read(new) == {"w1_EFD": (3, 6, 4), "w2_EDF": (3, 4, 6), "w3_EFD": (3, 6, 4)}
    fused = made("FusedGroupedExperts", (type(new),), w13=(3, 6, 2, 4), w2_EDF=(3, 4, 6))
    assert read(fused) == {"w13": (6, 6, 4), "w2_EDF": (3, 4, 6)}
    gpt_oss = made("GptOssGroupedExperts", mlp1_weight=(3, 12, 4), mlp2_weight=(3, 4, 6), mlp1_bias=(3, 12))
    assert read(gpt_oss) == {"mlp1_weight": (6, 6, 4), "mlp2_weight": (3, 4, 6)}
    assert read(nn.Sequential(made("FSDPGroupedExperts", (type(old),), w1=(3, 6, 4)))) == {"0.w1": (3, 6, 4)}


def test_experts_of_megablocks_and_dbrx_are_known_stacked_and_flat():
    assert read(made("MLP", module="megablocks.layers.mlp", w1=(3, 4, 6), w2=(3, 6, 4))) == {
        "w1": (3, 4, 6),
        "w2": (3, 6, 4),
    }
    sparse = made("SparseMLP", w1=(18, 4), w2=(18, 4))
    sparse.args = type("Arguments", (), {"ffn_hidden_size": 6})
    assert read(sparse) == {"w1": (3, 6, 4), "w2": (3, 6, 4)}
    glu = made("GroupedGLU", (type(made("SparseGLU", (type(sparse),))),), w1=(18, 4), v1=(18, 4), w2=(18, 4))
    assert read(glu) == {}, "nothing says how many experts there are"
    glu.args = sparse.args
    assert read(glu) == {"w1": (3, 6, 4), "v1": (3, 6, 4), "w2": (3, 6, 4)}
    dbrx = made("DbrxExpertGLU", w1=(18, 4), v1=(18, 4), w2=(18, 4))
    dbrx.ffn_hidden_size = 6
    assert set(read(dbrx).values()) == {(3, 6, 4)}


def test_a_class_of_the_same_name_with_other_tensors_is_not_taken_for_it():
    assert read(made("GroupedExperts", w1=(6, 4), w2=(4, 6))) == {}
    assert read(made("Llama4TextExperts", gate_up_proj=(3, 4, 5))) == {}
    assert read(made("MLP", w1=(3, 4, 6))) == {}


def undeclared() -> nn.Module:
    return made("Own", tensor=(3, 4, 5), frozen=(3, 4, 5), matrix=(4, 5))


def served_by(model: nn.Module, **options) -> dict[str, set[tuple[int, ...]]]:
    """By parameter the shapes of its units under a Kronecker method."""
    opt = KLShampoo(param_groups(model, **options))
    units = [unit for unit in opt.plan.units if unit.method != "adamw"]
    return {
        parameter.name: {unit.block.shape for unit in units if unit.parameter == i}
        for i, parameter in enumerate(opt.plan.parameters)
    }


def test_what_is_undeclared_goes_to_adamw_with_one_warning_that_names_it(caplog):
    model = undeclared()
    model.frozen.requires_grad_(False)
    with caplog.at_level(logging.WARNING):
        assert served_by(model) == {"tensor": set(), "matrix": {(4, 5)}}
    (record,) = caplog.records
    said = record.getMessage()
    assert "AdamW serves tensor:" in said and "frozen" not in said and "matrices={name:" in said


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"matrices": {"tensor": {"batch": (0,)}}}, {(4, 5)}),
        ({"matrices": {"tensor": {"rows": (0,), "columns": (1, 2)}}}, {(3, 20)}),
        ({"adamw_names": ["tensor"]}, set()),
    ],
    ids=str,
)
def test_what_the_user_declares_is_so_without_a_warning(caplog, options, expected):
    model = undeclared()
    del model.frozen
    assert served_by(model, **options) == {"tensor": expected, "matrix": {(4, 5)}}
    assert not caplog.records


def test_a_declaration_for_all_goes_before_the_table():
    model = made("GroupedExperts", w1=(3, 4, 5), tensor=(3, 4, 5))
    assert served_by(model, matrices={"batch": (1,)}) == {"w1": {(3, 5)}, "tensor": {(3, 5)}}
    found = served_by(model, matrices={"w1": {"batch": (2,)}, "tensor": {"batch": (1,)}})
    assert found == {"w1": {(3, 4)}, "tensor": {(3, 5)}}


def test_a_name_that_no_parameter_has_is_an_error():
    with pytest.raises(ValueError, match="matrices has 'tenser', but no parameter"):
        param_groups(undeclared(), matrices={"tenser": {"batch": (0,)}})
    with pytest.raises(ValueError, match="matrices has 'tenser', but no parameter"):
        KLShampoo(undeclared().named_parameters(), matrices={"tenser": {"batch": (0,)}})


def test_names_in_matrices_follow_their_parameters_when_these_are_renamed():
    first, second = nn.ModuleDict({"module": undeclared()}), undeclared()
    matrices = {"module.tensor": {"batch": (0,)}}
    renamed = [(f"module.{name}", p) for name, p in second.named_parameters()]
    opt = KLShampoo([{"params": list(first.named_parameters())}, {"params": renamed}], matrices=matrices)
    shapes = {unit.name: unit.block.shape for unit in opt.plan.units}
    assert shapes["tensor[0]"] == shapes["group1.tensor[2]"] == (4, 5)


def test_without_its_modules_a_tensor_is_read_as_ever():
    units = KLShampoo([("tensor", nn.Parameter(torch.zeros(30, 40, 50)))]).plan.units
    assert [unit.block.shape for unit in units] == [(30, 40, 50)]


def test_convolutions_are_known(caplog):
    model = nn.Sequential(
        *(nn.Conv1d(4, 6, 3), nn.Conv2d(4, 6, 3), nn.Conv3d(4, 6, 3), nn.ConvTranspose2d(4, 6, 3)),
        weight_norm(nn.Conv1d(4, 6, 3)),
    )
    found = served_by(model)
    assert found["0.weight"] == found["4.parametrizations.weight.original1"] == {(6, 12)}
    assert found["1.weight"] == {(6, 36)} and found["3.weight"] == {(4, 54)}
    assert not caplog.records


def test_state_of_what_is_declared_by_name_is_saved_and_loaded(tmp_path):
    def trained(steps: range) -> tuple[nn.Module, KLShampoo]:
        torch.manual_seed(0)
        model = Speaks(2, 3, 4, True, False)
        opt = KLShampoo(param_groups(model, lr=0.1))
        if steps.start:
            saved = torch.load(tmp_path / "saved.pt")
            model.load_state_dict(saved["model"])
            opt.load_state_dict(saved["optimizer"])
        for step in steps:
            generator = torch.Generator().manual_seed(step)
            for p in model.parameters():
                p.grad = torch.randn(p.shape, generator=generator)
            opt.step()
        return model, opt

    model, opt = trained(range(3))
    torch.save({"model": model.state_dict(), "optimizer": opt.state_dict()}, tmp_path / "saved.pt")
    opt.state_dict()["param_groups"][0]["matrices"].clear()
    assert opt.param_groups[0]["matrices"], "what is saved is a copy"
    resumed, whole = trained(range(3, 6))[0], trained(range(6))[0]
    assert all(torch.equal(p, q) for p, q in zip(resumed.parameters(), whole.parameters(), strict=True))


@pytest.mark.parametrize("ranks", [2])
def test_sharded_experts_train_as_in_one_process(worlds, ranks):
    """FSDP2 makes classes of its own of the modules'; one of the shards has every other column of a matrix."""
    alone = trained_stacks()
    for found in worlds[ranks].run(trained_stacks, ranks):
        for name, p in alone.items():
            torch.testing.assert_close(found[name], p, rtol=1e-9, atol=1e-12, msg=name)


def test_norms_of_several_dimensions_and_the_biases_of_attention_are_adamws_and_not_decayed():
    model = nn.Sequential(nn.LayerNorm([4, 8]), nn.MultiheadAttention(8, 2, add_bias_kv=True))
    served = {name: group for group in param_groups(model) for name, _ in group["params"]}
    for name in ("0.weight", "0.bias", "1.bias_k", "1.bias_v"):
        assert served[name]["method"] == "adamw" and served[name]["weight_decay"] == 0.0
    assert "method" not in served["1.in_proj_weight"]
