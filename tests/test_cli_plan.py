"""`kl-shampoo plan`: every built-in model, a factory, a config.json; errors in words; a table and a picture."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from kl_dist.cli import main as cli
from kl_dist.cli.models import BUILT_IN, Model, NoSuchModel, model_of, options_of
from kl_dist.cli.plan import Layout, Question

BILLIONS = {"gpt2": 0.12, "gpt2-xl": 1.56, "llama-8b": 8.03, "llama-70b": 70.55, "qwen3-moe-30b": 30.53}
BILLIONS["mixtral-8x7b"] = 46.70


def small() -> nn.Module:
    return nn.Sequential(nn.Embedding(50, 16), nn.Linear(16, 32), nn.Linear(32, 50))


def reads_its_weights() -> nn.Module:
    model = small()
    float(model[1].weight.sum())
    return model


def frozen() -> nn.Module:
    return small().requires_grad_(False)


def no_module() -> int:
    return 3


def of_this_file(name: str) -> str:
    return f"{__name__}:{name}"


def asked(model: Model, ranks: int, layout: str = "ddp", **given) -> Question:
    return Question(model, ranks, Layout.of(layout), torch.bfloat16, 8, given)


def test_the_page_shows_what_the_command_prints(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    cli.main(["plan", "gpt2", "--world", "32"])
    printed = [line.strip() for line in capsys.readouterr().out.splitlines()]
    page = [line.strip() for line in (Path(__file__).parents[1] / "docs/plan.md").read_text().splitlines()]
    first = page.index(printed[0])
    assert page[first : first + len(printed)] == printed


@pytest.mark.parametrize("name", BUILT_IN)
def test_a_built_in_model_has_the_size_of_its_name_and_a_matrix_for_each_expert(name):
    model = model_of(name)
    assert round(model.numel / 1e9, 2) == BILLIONS[name]
    few = {key: shape for key, shape in BUILT_IN[name].items() if not key.startswith(("h.", "layers."))}
    few |= {key: shape for key, shape in BUILT_IN[name].items() if key.startswith(("h.0.", "layers.0."))}
    plan = asked(Model(name, few, options_of(few)), 2).plan()
    served = {plan.parameters[unit.parameter].name for unit in plan.units if unit.elementwise}
    assert served == {key for key, shape in few.items() if len(shape) < 2} | set(options_of(few)["adamw_names"])
    assert all(len(unit.block.shape) == 2 for unit in plan.units if not unit.elementwise)


def test_built_in_shapes_are_those_of_transformers_models():
    transformers = pytest.importorskip("transformers")
    shape = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": 128, "head_dim": 16}
    config = transformers.Qwen3MoeConfig(
        **shape, num_attention_heads=8, num_key_value_heads=2, num_experts=4, moe_intermediate_size=48
    )
    from kl_dist.cli.models import mixture

    ours = mixture(64, 128, 32, 4, 48, 2, 128, head=16)
    with torch.device("meta"):
        theirs = transformers.AutoModelForCausalLM.from_config(config)
    assert sorted(ours.values()) == sorted(tuple(p.shape) for p in theirs.parameters())
    pair = (Model("ours", ours, options_of(ours)), Model("theirs", theirs))
    kinds = [
        sorted((unit.method, unit.block.shape) for unit in asked(model, 1).plan().units if not unit.elementwise)
        for model in pair
    ]
    assert kinds[0] == kinds[1]


def test_a_factory_is_made_on_the_meta_device_and_read_by_its_modules():
    model = model_of(of_this_file("small"))
    assert isinstance(model.given, nn.Module) and all(p.is_meta for p in model.given.parameters())
    plan = asked(model, 2).plan()
    served = {plan.parameters[unit.parameter].name: unit.method for unit in plan.units}
    assert served["0.weight"] == "adamw" and served["1.weight"] == "kl_shampoo"


def test_a_config_of_hugging_face_is_read(tmp_path):
    pytest.importorskip("transformers")
    config = {"model_type": "gpt2", "n_layer": 2, "n_embd": 64, "n_head": 2, "vocab_size": 100, "n_positions": 32}
    (tmp_path / "config.json").write_text(json.dumps(config))
    for path in (tmp_path, tmp_path / "config.json"):
        plan = asked(model_of(str(path)), 2).plan()
        matrices = [unit for unit in plan.units if not unit.elementwise]
        assert {unit.block.shape for unit in matrices} == {(64, 64)} and len(matrices) == 2 * (3 + 1 + 4 + 4)


@pytest.mark.parametrize(
    ("model", "said"),
    [
        ("gpt3", "no model 'gpt3'; did you mean 'gpt2'?"),
        ("qqq", "no model 'qqq'; there are gpt2, gpt2-xl,"),
        ("no_such_module:f", "cannot import 'no_such_module:f': No module named"),
        (of_this_file("nothing"), "cannot import"),
        (of_this_file("reads_its_weights"), "failed on the meta device"),
        (of_this_file("no_module"), "returned int, not a torch.nn.Module"),
        ("missing/config.json", "no file missing/config.json"),
    ],
)
def test_what_is_no_model_is_said(model, said):
    with pytest.raises(NoSuchModel) as refused:
        model_of(model)
    assert said in str(refused.value)


def test_a_config_of_no_language_model_is_said(tmp_path):
    pytest.importorskip("transformers")
    (tmp_path / "config.json").write_text('{"model_type": "no such"}')
    with pytest.raises(NoSuchModel, match="no causal language model"):
        model_of(str(tmp_path))


def test_a_layout_is_a_number_of_ranks_to_a_replica():
    assert [Layout.of(layout).shard_size(8) for layout in ("ddp", "fsdp2", "hsdp:4x2")] == [1, 8, 2]
    grown = asked(model_of("gpt2"), 8, "hsdp:4x2").layout.at(32)
    assert grown.shard_size(32) == 2 and grown.replicas == 16


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("gpt2 --layout hsdp:3x2", "hsdp:3x2 is for 6 ranks, not 8"),
        ("gpt2 --layout fsdp", "layout is ddp, fsdp2 or hsdp:RxS"),
        ("gpt2 --world 0", "world_size must be at least 1, not 0"),
        ("gpt2 --set precondition_frequencies=3", "did you mean 'precondition_frequency'"),
        ("gpt2 --set precondition_frequency=0", "precondition_frequency must be at least 1"),
        ("gpt2 --set precondition_frequency", "--set takes OPTION=VALUE"),
        ("gpt2 --world 12 --set partition_size=5", "partition_size is one of 1, 2, 3, 4, 6, 12"),
        ("gpt2 --world 16 --set max_state_bytes=1000", "max_state_bytes is 1000"),
        ("gpt2 --bandwidth -1", "between must be more than 0, not -1"),
        ("gpt4", "no model 'gpt4'"),
        ("--wrld 8", "--wrld is no option of plan; did you mean --world?"),
        ("gpt2 --bandwith=1e9", "did you mean --bandwidth?"),
        ("gpt2 --wor 8", "did you mean --world?"),
        ("tests.test_cli_plan:frozen", "tests.test_cli_plan:frozen has no parameter that is trained"),
        ("gpt2 --qqqqq", "--qqqqq is no option of plan; there are --bandwidth, --bandwidth-within, --dtype,"),
    ],
)
def test_a_mistake_is_one_line(command, said, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(["plan", *command.split()])
    told = capsys.readouterr().err
    assert ended.value.code == 2 and said in told and len(told.strip().splitlines()) == 1


def test_the_command_prints_its_tables_and_draws_a_picture(tmp_path, capsys):
    png = tmp_path / "plan.png"
    cli.main(["plan", of_this_file("small"), "--world", "8", "--largest", "16", "--png", str(png), "--latency", "0"])
    said = capsys.readouterr().out
    for line in ("optimizer state", "temporary memory", "sent between nodes", "bound by", "balance", "padding"):
        assert line in said
    assert "refreshes: T = 2" in said and "over more and fewer ranks" in said and "latency 0" in said
    assert png.read_bytes().startswith(b"\x89PNG") and png.stat().st_size > 20_000


def test_options_and_rates_of_the_machine_are_taken(capsys):
    words = ["plan", of_this_file("small"), "--set", "precondition_frequency=3", "--set", "recipe=compact"]
    cli.main([*words, "--flops", "1e9", "--largest", "1"])
    said = capsys.readouterr().out
    assert "one step of 3" in said and "flops 1e+09" in said


def test_a_world_that_the_layout_does_not_have_is_left_out_of_the_growth():
    from kl_dist.cli.machine import PRESETS

    found = asked(model_of("gpt2"), 16, "hsdp:4x4").growth(64, PRESETS["h100"])
    assert [one.world_size for one in found] == [4, 16, 64]
    assert found[0].state_bytes > found[1].state_bytes


@pytest.mark.parametrize("missing", ["rich", "matplotlib", "jsonargparse"])
def test_without_its_extra_it_says_which(missing):
    block = f"import sys; sys.modules[{missing!r}] = None; from kl_dist.cli.main import main; main(['plan', 'gpt2'])"
    root = Path(__file__).resolve().parent.parent
    done = subprocess.run([sys.executable, "-c", block], capture_output=True, text=True, cwd=root)
    assert done.returncode == 1 and "pip install 'kl-shampoo[plan]'" in done.stderr and "Traceback" not in done.stderr


def test_importing_kl_dist_imports_none_of_it():
    heavy = ("rich", "matplotlib", "jsonargparse", "kl_dist.cli")
    code = f"import sys, kl_dist; print([name for name in {heavy} if name in sys.modules])"
    root = Path(__file__).resolve().parent.parent
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=root)
    assert done.stdout.strip() == "[]"
