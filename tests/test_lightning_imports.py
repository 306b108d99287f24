"""`import lightning_plugin` leaves a Lightning alone that the script does not import, in whichever order it does."""

import subprocess
import sys

import pytest

from tests.jobs import QUIET, ROOT, SECONDS
from tests.world import patience

SETS_LEVEL = "import logging; logging.getLogger('lightning.pytorch').setLevel('ERROR')"
SAYS = """
import sys
from importlib import import_module
print([name for name in ("lightning", "pytorch_lightning") if name in sys.modules])
"""
NAMED = """
from {trainer} import Trainer
strategy = Trainer(strategy="kl_soap_fsdp2", accelerator="cpu", logger=False).strategy
print(isinstance(strategy, lightning_plugin.KLShampooFSDP2Strategy), type(strategy).__module__.rpartition(".")[2])
"""
LEVEL = "import logging; print(logging.getLogger('lightning.pytorch').level == logging.ERROR)"


def said_by(*lines: str) -> list[str]:
    """What a new process prints."""
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(lines)],
        cwd=ROOT,
        env=QUIET | {"PYTHONPATH": str(ROOT), "PATH": ""},
        capture_output=True,
        text=True,
        timeout=SECONDS * patience(),
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.mark.parametrize("first", ["ours", "theirs"])
@pytest.mark.parametrize(
    ("trainer", "module"),
    [("lightning.pytorch", "of_lightning"), ("pytorch_lightning", "of_pytorch_lightning")],
)
def test_the_lightning_of_the_script_alone_is_imported_and_knows_the_names(first: str, trainer: str, module: str):
    imports = ["import lightning_plugin", f"import {trainer}"]
    ours = imports if first == "ours" else imports[::-1]
    imported = trainer.partition(".")[0]
    assert said_by(*ours, NAMED.format(trainer=trainer), SAYS) == [f"True {module}", f"['{imported}']"]


def test_without_any_it_imports_none_until_a_class_is_asked_for():
    found = said_by("import lightning_plugin", SAYS, "lightning_plugin.KLShampooStrategy", SAYS)
    assert found == ["[]", "['lightning']"]


def test_what_the_script_has_set_of_lightnings_loggers_stays():
    assert said_by("import lightning.pytorch", SETS_LEVEL, "import lightning_plugin", LEVEL) == ["True"]


def test_a_fabric_that_is_imported_alone_knows_the_names():
    fabric = "strategy = lightning_fabric.Fabric(strategy='soap', accelerator='cpu', devices=1).strategy"
    kind = "print(isinstance(strategy, lightning_plugin.KLShampooFabricStrategy))"
    assert said_by("import lightning_plugin, lightning_fabric", fabric, kind, SAYS) == ["True", "['pytorch_lightning']"]
