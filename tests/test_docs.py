"""What the documents say is so: their code runs, and the defaults they name are the options'."""

import ast
import inspect
import json
import os
import re
from importlib import import_module
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import yaml
from torch import nn

import kl_dist
from kl_dist import KLShampoo, options
from kl_dist.options import recipe_defaults
from tests.deepspeed_runs import deepspeed_here, two_groups
from tests.jobs import as_started
from tests.pages import PAGES, ROOT, blocks, commands, pages_with

# -- Python ------------------------------------------------------------------------------------------------------------

NEED_DEEPSPEED, HUGGING_FACE = Path("docs/deepspeed.md"), Path("docs/huggingface.md")
NEED_TORCHTITAN = Path("docs/torchtitan.md")  # tests/test_torchtitan.py runs it, where torchtitan is


def given(folder: Path) -> dict[str, Any]:
    """What a reader has who comes to a block: a model with gradients, its optimizer, a folder, a rank."""
    import lightning

    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(16, 12), nn.Linear(12, 12), nn.Linear(12, 8))
    optimizer = KLShampoo(kl_dist.param_groups(model), lr=1e-2)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    names = {"kl_dist": kl_dist, "torch": torch, "lightning": lightning, "Trainer": lightning.Trainer}
    names |= {"model": model, "optimizer": optimizer, "opt": optimizer}
    names |= {"folder": str(folder / "saved"), "renewed": str(folder / "renewed"), "file": str(folder / "state.pt")}
    return names | {"qkv": nn.Parameter(torch.randn(36, 12)), "experts": nn.Parameter(torch.randn(3, 12, 8))}


def run_blocks(group: dist.ProcessGroup, page: str, folder: str) -> None:
    """All of a page's blocks, one after another, in one namespace."""
    names = given(Path(folder)) | {"rank": group.rank(), "ranks": group.size()}
    with mock.patch.dict(os.environ):  # a Trainer leaves LOCAL_RANK behind
        for number, text in enumerate(blocks(Path(page), "python"), 1):
            exec(compile(text, f"{page}, block {number}", "exec"), names)


OF_THEIR_OWN = {NEED_DEEPSPEED, NEED_TORCHTITAN, HUGGING_FACE}


@pytest.mark.parametrize("page", sorted({*pages_with("python")} - OF_THEIR_OWN), ids=str)
def test_the_code_of_a_page_runs(worlds, page, tmp_path):
    worlds[2].run(run_blocks, 2, str(page), str(tmp_path), timeout=120)


class ForTokens(nn.Module):
    """A model as Hugging Face's Trainer and DeepSpeed take them."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(16, 12), nn.Linear(12, 16)

    def forward(self, tokens: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        output = self.head(self.embedding(tokens).mean(1))
        return {"loss": nn.functional.cross_entropy(output.float(), labels), "logits": output}


def run_deepspeed_blocks(group: dist.ProcessGroup, folder: str) -> int:
    """Those that need its configs, as the page's reader has them, but for where they write; how many there were."""
    dataset = [{"tokens": torch.arange(4) + i % 8, "labels": torch.tensor(i % 16)} for i in range(16)]
    texts = blocks(NEED_DEEPSPEED, "python")
    for text in texts:
        with as_started(group, "docs"), deepspeed_here(group) as deepspeed:
            names = {"deepspeed": deepspeed, "torch": torch, "model": ForTokens(), "dataset": dataset}
            exec(compile(text.replace("runs/hf", folder), str(NEED_DEEPSPEED), "exec"), names)
    return len(texts)


def run_huggingface_blocks(group: dist.ProcessGroup, folder: str) -> int:
    """A block after another, each in processes that have just been started, and with what it is about."""
    dataset = [{"tokens": torch.arange(4) + i % 8, "labels": torch.tensor(i % 16)} for i in range(64)]
    texts = blocks(HUGGING_FACE, "python")
    for text in texts:
        with as_started(group, "docs", ACCELERATE_USE_CPU="true"):
            names = {"torch": torch, "model": ForTokens(), "expert": nn.Linear(3, 3), "dataset": dataset}
            names |= {"batch": torch.utils.data.default_collate(dataset[:4]), "KLShampoo": KLShampoo}
            names |= {"rank": group.rank(), "ranks": group.size()}
            here = text.replace("runs/", f"{folder}/").replace("max_steps", "use_cpu=True, max_steps")
            exec(compile(here, str(HUGGING_FACE), "exec"), names)
    return len(texts)


def test_the_code_of_hugging_faces_page_runs(worlds, tmp_path):
    assert worlds[2].run(run_huggingface_blocks, 2, str(tmp_path), timeout=180) == [4, 4]
    for name in ("hf/checkpoint-4/optimizer.pt", "hf/checkpoint-4/rng_state_1.pth", "state/optimizer.bin"):
        assert (tmp_path / name).exists()


def test_the_code_of_deepspeeds_page_runs(worlds, tmp_path):
    assert worlds[2].run(run_deepspeed_blocks, 2, str(tmp_path), timeout=180) == [2, 2]


# -- what other programs read ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", pages_with("json"), ids=str)
def test_an_entry_of_a_config_has_a_type_and_options_that_exist(page, monkeypatch):
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    deepspeed = pytest.importorskip("deepspeed_integration")
    for text in blocks(page, "json"):
        entry = json.loads(f"{{{text}}}")["optimizer"]
        chosen = {key: x for key, x in entry["params"].items() if x != "auto"}
        assert set(entry["params"]) <= {*options.DEFAULTS, "output_head"}
        getattr(deepspeed, entry["type"])(two_groups(nn.Linear(3, 4)), **chosen)


@pytest.mark.parametrize("page", pages_with("yaml"), ids=str)
def test_the_classes_of_a_yaml_file_take_what_it_gives_them(page):
    def make(node: Any) -> Any:
        """Lightning's command line makes an object wherever there is a class_path."""
        if isinstance(node, list):
            return [make(one) for one in node]
        if not isinstance(node, dict):
            return node
        if "class_path" not in node:
            return {key: make(one) for key, one in node.items()}
        module, _, name = node["class_path"].rpartition(".")
        # YAML 1.1 takes 1e-2 for a word; jsonargparse knows from the option's type that it is a number
        arguments = {key: float(x) if isinstance(x, str) else x for key, x in node.get("init_args", {}).items()}
        return getattr(import_module(module), name)(**make(arguments))

    for text in blocks(page, "yaml"):
        assert "strategy" in make(yaml.safe_load(text))["trainer"]


@pytest.mark.parametrize("page", pages_with("sh"), ids=str)
def test_the_files_targets_and_flags_of_a_command_exist(page):
    """The cheap half of test_docs_commands.py, which runs them: that the page has not fallen behind the jobs."""
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for line in map(str.split, commands(page)):
        if line[0] == "make":
            assert line[1] in targets
        for word in line[1:]:
            if re.match(r"(launch|benchmarks|tests)/", word):
                assert (ROOT / word).exists(), f"{page}: {word}"
        script = next((word for word in line if word.endswith(".py")), None)
        for flag in line[line.index(script) + 1 :] if script else ():
            if flag.startswith("--") and "." not in flag and "lightning" not in script:
                source = (ROOT / script).read_text() + (ROOT / "launch/options.py").read_text()
                assert flag[2:].replace("-", "_") in source.replace("-", "_"), f"{page}: {script} {flag}"


# -- words tied to values ----------------------------------------------------------------------------------------------


def said_of(documented: Any) -> dict[str, str]:
    """By option what the "Args" of a docstring say of it."""
    arguments = (documented.__doc__ or "").partition("Args:\n")[2]
    entry = re.compile(r"^ {8}(\w[\w, ]*): (.*?)(?=^ {4,8}\S|\Z)", re.MULTILINE | re.DOTALL)
    found = entry.findall(arguments)
    return {name.strip(): " ".join(text.split()) for names, text in found for name in names.split(",")}


def test_the_constructor_has_the_defaults_of_the_options():
    taken = {key: one.default for key, one in inspect.signature(KLShampoo).parameters.items()}
    assert {key: taken[key] for key in options.DEFAULTS} == options.DEFAULTS


@pytest.mark.parametrize("option", sorted(recipe_defaults("soap", "fresh")))
def test_the_docstring_names_what_a_recipe_fills_in(option):
    text = said_of(KLShampoo)[option]
    fresh, other, paper = (
        recipe_defaults(*key)[option] for key in (("kl_shampoo", "fresh"), ("soap", "fresh"), ("soap", "paper"))
    )
    if option == "long_side":
        assert text.endswith('None: "cut", but for "muon", which keeps nothing of any side.')
        assert (fresh, paper, recipe_defaults("muon", "fresh")[option]) == ("cut", "cut", "identity")
        return
    if option == "blocking":
        assert text.endswith("None: the recipe's.") and (fresh, paper) == ("square", "none")
        return
    after = text.partition("None: ")[2]
    if option == "betas":
        named = re.findall(r"\([\d., ]+\)", after)
        muons = [recipe_defaults("muon", recipe)[option] for recipe in ("fresh", "paper")]
        assert [ast.literal_eval(pair) for pair in named] == [fresh, other, paper, *muons]
        return
    match = re.fullmatch(r'("?\w+"?) \("paper": (\w+)\)\.', after)
    assert match is not None, text
    assert [ast.literal_eval(match[1]), ast.literal_eval(match[2])] == [fresh, paper]


@pytest.mark.parametrize("documented", ["kl_dist.KLShampoo", "lightning_plugin.options.TakesOptimizerOptions"])
def test_every_option_and_every_method_is_described(documented):
    module, _, name = documented.rpartition(".")
    said = said_of(getattr(import_module(module), name))
    assert set(options.DEFAULTS) <= set(said)
    assert all(f'"{method}"' in said["method"] for method in kl_dist.METHODS)
    assert all(f'"{recipe}"' in said["recipe"] for recipe in options.recipes("adamw"))
    assert all(f'"{choice}"' in said["long_side"] for choice in options.LONG_SIDES)


def table_of(page: str, heading: str) -> dict[str, str]:
    """The first two columns of the table under a heading."""
    text = (ROOT / page).read_text().partition(heading)[2]
    rows = [line.split("|")[1:3] for line in text.splitlines() if line.startswith("|")]
    return {name.strip(): value.strip() for name, value in rows[2:]}


def test_the_table_of_defaults_and_their_evidence_has_the_options_values():
    said = table_of("docs/learning.md", "## The defaults of recipe")
    ours, others = recipe_defaults("kl_shampoo", "fresh"), recipe_defaults("soap", "fresh")
    assert ast.literal_eval(said["betas, KL-Shampoo"]) == ours["betas"]
    assert ast.literal_eval(said["betas, the others"]) == others["betas"]
    for option in ("precondition_frequency", "nesterov", "blocking"):
        assert ast.literal_eval(said[option]) == ours[option] == others[option]


def test_every_word_of_the_glossary_is_where_it_says():
    rows = re.findall(
        r"^\| [\w, ]+ \| .* \| `([\w/]+\.py)`: `(\w+)` \|$", (ROOT / "docs/partition.md").read_text(), re.MULTILINE
    )
    assert len(rows) == 24
    for path, name in rows:
        assert re.search(rf"^(class |def )?{name}\b", (ROOT / "kl_dist" / path).read_text(), re.MULTILINE), (path, name)


def test_the_map_of_a_package_names_all_that_is_in_it():
    """Of those whose maps have a line for each file or folder."""
    for package in ("kl_dist", "kl_dist.cli", "launch", "lightning_plugin"):
        said = import_module(package).__doc__
        for path in sorted((ROOT / package.replace(".", "/")).iterdir()):
            if path.name not in ("__init__.py", "__pycache__", "py.typed"):
                assert path.name in said, f"{package}/{path.name} is not on the map"


def test_no_page_names_a_file_that_is_not_there():
    for page in (*PAGES, Path("CONTRIBUTING.md"), Path("tests/README.md")):
        for name in re.findall(
            r"`((?:kl_dist|launch|lightning_plugin|deepspeed_integration|benchmarks|tests|docs)/[\w./]+)`",
            (ROOT / page).read_text(),
        ):
            assert (ROOT / name).exists(), f"{page}: {name}"
