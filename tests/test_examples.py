"""Every example trains, by itself or on two processes, and is short enough to be read at once."""

from importlib import import_module
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch.distributed as dist

from tests.jobs import ROOT, TORCHRUN, as_started, started
from tests.world import World

EXAMPLES = sorted(path.stem for path in (ROOT / "examples").glob("*.py"))
NEEDS = {"deepspeed_engine": "deepspeed", "lora": "peft", "hf_trainer": "transformers", "hf_accelerate": "accelerate"}
NEEDS |= {"lightning_trainer": "lightning", "fabric_loop": "lightning"}

ALONE: dict[str, dict[str, Any]] = {"plain": {}, "convnet": {}, "experts": {}, "lora": {}}
"""Those of one process, and what they are told."""

TOGETHER = {
    "ddp": {"file": "digits.pt"},
    "fsdp2": {"folder": "digits"},
    "deepspeed_engine": {"folder": "digits"},
    "hf_accelerate": {"folder": "digits"},
    "hf_trainer": {"folder": "text", "steps": 30},
}
"""Those of several processes, and where they write."""

LAUNCHED = ("lightning_trainer", "fabric_loop")
"""Those that are started as a user does: a Trainer or Fabric in a test's own process would leave it another."""

LEAST = {"lora": 0.15, "hf_trainer": 0.3}
"""Of what main returns: as a rule the share of held-out digits that are told right."""


def test_every_example_is_run_and_shorter_than_sixty_lines():
    assert sorted([*ALONE, *TOGETHER, *LAUNCHED]) == EXAMPLES
    page = (ROOT / "examples" / "README.md").read_text()
    for name in EXAMPLES:
        assert len((ROOT / "examples" / f"{name}.py").read_text().splitlines()) < 60, name
        assert f"({name}.py)" in page, f"examples/README.md does not name {name}.py"


@pytest.mark.parametrize("name", ALONE)
def test_on_one_process(name: str, capsys):
    pytest.importorskip(NEEDS.get(name, "sklearn"))
    with as_started(None, name):
        assert import_module(f"examples.{name}").main(**ALONE[name]) > LEAST.get(name, 0.88)
    assert capsys.readouterr().out


def on_a_rank(group: dist.ProcessGroup, name: str, options: dict[str, Any]) -> float:
    """main() on ranks that have their process group already."""
    module = import_module(f"examples.{name}")  # and DeepSpeed, which looks for operators to compile when it starts
    with (
        as_started(group, name),
        mock.patch.object(dist, "init_process_group", lambda *_, **__: None),
        mock.patch.object(dist, "destroy_process_group", lambda *_: None),
    ):
        return module.main(**options)


@pytest.mark.parametrize("name", TOGETHER)
def test_on_two_ranks(name: str, worlds: dict[int, World], tmp_path: Path):
    pytest.importorskip(NEEDS.get(name, "sklearn"))
    options = {key: str(tmp_path / x) if isinstance(x, str) else x for key, x in TOGETHER[name].items()}
    first, second = worlds[2].run(on_a_rank, 2, name, options, timeout=120)
    assert first == second > LEAST.get(name, 0.88)
    assert list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "name", [*LAUNCHED, *(pytest.param(name, marks=pytest.mark.full) for name in (*ALONE, *TOGETHER))]
)
def test_as_it_is_started(name: str, tmp_path: Path):
    pytest.importorskip(NEEDS.get(name, "sklearn"))
    script = ROOT / "examples" / f"{name}.py"
    command = f"{TORCHRUN} 2 {script}" if name in TOGETHER else str(script)
    done = started(command, tmp_path, PYTHONPATH=str(ROOT))
    assert done.status == 0, done.stderr
