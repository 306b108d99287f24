"""A plugin of pytest for Lightning's own tests: "ddp" is KLShampooStrategy, which trains what names no strategy, too.

`benchmarks.lightning_tests` loads it, and says by the environment variable STRATEGY ("ddp" or "kl_shampoo") which it
is, and by OUTCOMES which file gets a line of JSON for each test. Where STRATEGY is "ddp" it is Lightning's own. By
IN_PLACE_OF_ONE what names no strategy trains with another of that name, "ddp_find_unused_parameters_true" for example.

Its tests train with SGD for the most part, which KLShampooStrategy refuses without an lr: here it is given SGD's.
"""

from __future__ import annotations

import json
import os
from typing import Any

import pytest
from lightning.fabric.strategies.launchers.subprocess_script import _ChildProcessObserver
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy, StrategyRegistry
from lightning.pytorch.trainer.connectors.accelerator_connector import _AcceleratorConnector
from torch.optim import SGD

from lightning_plugin.namespaces.of_lightning import KLShampooStrategy


class InPlaceOfDDP(KLShampooStrategy):
    """KLShampooStrategy that takes SGD's learning rate for its own, and its weight decay."""

    def _converted(self, optimizer: Any, schedulers: list[Any]) -> Any:
        inner = getattr(optimizer, "optimizer", optimizer)
        if type(inner) is not SGD:
            return super()._converted(optimizer, schedulers)
        told = self.optimizer_options
        self.optimizer_options = {"lr": inner.defaults["lr"], "weight_decay": inner.defaults["weight_decay"], **told}
        try:
            return super()._converted(optimizer, schedulers)
        finally:
            self.optimizer_options = told


def _names_of_ddp() -> dict[str, dict[str, Any]]:
    return {name: one["init_params"] for name, one in StrategyRegistry.items() if one["strategy"] is DDPStrategy}


def pytest_configure() -> None:
    """Both runs train under DDP where a test names no strategy, so that they differ in the strategy alone."""
    choose = _AcceleratorConnector._choose_strategy

    def chosen(self: Any) -> Any:
        found = choose(self)
        is_alone = isinstance(found, SingleDeviceStrategy) and found.root_device.type == "cpu"
        return os.environ.get("IN_PLACE_OF_ONE", "ddp") if is_alone else found

    _AcceleratorConnector._choose_strategy = chosen  # type: ignore[method-assign]
    _ChildProcessObserver.__init__.__defaults__ = (0.1,)  # seconds from look to look, for which every test waits
    if os.environ["STRATEGY"] == "kl_shampoo":
        for name, options in _names_of_ddp().items():
            StrategyRegistry.register(name, InPlaceOfDDP, override=True, **options)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """A line for each test: its name, whether it passed (None: skipped), and the last line of what it says if not."""
    if (report.when != "call" and report.passed) or hasattr(report, "wasxfail"):
        return
    if report.outcome == "rerun":  # by pytest-rerunfailures, of a test that is known to fail at times: another follows
        return
    said = "" if report.passed else report.longreprtext.strip().splitlines()[-1]
    if report.skipped and isinstance(report.longrepr, tuple):
        said = report.longrepr[2]
    crash = getattr(report.longrepr, "reprcrash", None)
    passed = None if report.skipped else report.passed
    line = {"test": report.nodeid, "passed": passed, "said": crash.message[:300] if crash else said[:300]}
    with open(os.environ["OUTCOMES"], "a") as file:
        file.write(json.dumps(line) + "\n")
