"""Another checkout of this project in the same process: what a change gains, measured in one run."""

from __future__ import annotations

import contextlib
import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

PACKAGE = "kl_dist"


def package_of(folder: Path) -> ModuleType:
    """`kl_dist` as it is in another folder (a git worktree, say); this process's own stays what everyone else imports.

    Raises:
        ModuleNotFoundError: the folder has no kl_dist.
    """
    if not (folder / PACKAGE / "__init__.py").exists():
        raise ModuleNotFoundError(f"there is no {PACKAGE} in {folder}: give the root of a checkout")
    with _hidden(), _first_on_path(folder):
        return importlib.import_module(PACKAGE)


@contextlib.contextmanager
def _hidden() -> Iterator[None]:
    """This process's modules of the package out of the way; what is imported meanwhile goes when they come back."""
    own = {name: module for name, module in sys.modules.items() if _is_ours(name)}
    try:
        for name in own:
            del sys.modules[name]
        yield
    finally:
        for name in [name for name in sys.modules if _is_ours(name)]:
            del sys.modules[name]
        sys.modules.update(own)


@contextlib.contextmanager
def _first_on_path(folder: Path) -> Iterator[None]:
    sys.path.insert(0, str(folder.resolve()))
    try:
        importlib.invalidate_caches()
        yield
    finally:
        sys.path.remove(str(folder.resolve()))


def _is_ours(name: str) -> bool:
    return name == PACKAGE or name.startswith(PACKAGE + ".")
