"""What is shipped: the wheel holds the packages that a user imports, and nothing of how they are made."""

import os
import re
import shutil
import subprocess
import sys
import zipfile
from functools import partial
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("kl_dist", "lightning_plugin", "deepspeed_integration")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the tree, so that nothing is left in it."""
    source = tmp_path_factory.mktemp("source")
    unwanted = shutil.ignore_patterns(".*", "runs", "build", "dist", "*.egg-info", "__pycache__")
    shutil.copytree(ROOT, source, ignore=unwanted, dirs_exist_ok=True)
    return source


def wheel_of(source: Path, folder: Path) -> Path:
    """Built without reaching for a network."""
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", folder, source]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = folder.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def wheel(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return wheel_of(source, tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def sdist(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sdist")
    code = f"from setuptools import build_meta; build_meta.build_sdist({str(folder)!r})"
    done = subprocess.run([sys.executable, "-c", code], cwd=source, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = folder.glob("*.tar.gz")
    return path


def test_twine_has_nothing_to_say_of_what_is_shipped(wheel: Path, sdist: Path) -> None:
    command = [sys.executable, "-m", "twine", "--no-color", "check", "--strict", wheel, sdist]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "COLUMNS": "999"})
    assert done.returncode == 0, done.stdout + done.stderr
    assert [line.rsplit(": ", 1)[1] for line in done.stdout.splitlines()] == ["PASSED", "PASSED"]


def test_the_sdist_makes_the_same_wheel(wheel: Path, sdist: Path, tmp_path: Path) -> None:
    first, second = (zipfile.ZipFile(path) for path in (wheel, wheel_of(sdist, tmp_path)))
    assert sorted(first.namelist()) == sorted(second.namelist())
    for name in first.namelist():
        assert name.endswith("/RECORD") or first.read(name) == second.read(name), name


def test_the_wheel_holds_the_importable_packages_and_nothing_else(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names if ".dist-info/" not in name}
    assert tops == {package for package in PACKAGES if (ROOT / package).is_dir()}
    expected = {path.relative_to(ROOT).as_posix() for package in PACKAGES for path in ROOT.glob(f"{package}/**/*.py")}
    assert expected <= set(names)
    assert {"kl_dist/py.typed", "lightning_plugin/py.typed"} <= set(names)


def test_the_wheel_is_named_after_the_version_in_the_code(wheel: Path) -> None:
    from kl_dist import __version__

    assert wheel.name == f"kl_shampoo-{__version__}-py3-none-any.whl"
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in zipfile.ZipFile(wheel).namelist())


def test_the_command_runs_from_the_installed_wheel(wheel: Path, tmp_path: Path) -> None:
    """Installed beside the environment's libraries, from a folder that knows nothing of the checkout."""
    installed = tmp_path / "installed"
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", installed]
    subprocess.run([*install, wheel], check=True, capture_output=True, timeout=120)
    elsewhere = {**os.environ, "PYTHONPATH": str(installed)}
    run = partial(subprocess.run, capture_output=True, text=True, cwd=tmp_path, env=elsewhere, timeout=120)
    where = run([sys.executable, "-c", "import kl_dist; print(kl_dist.__file__)"])
    assert Path(where.stdout.strip()).is_relative_to(installed)
    command = installed / "bin" / "kl-shampoo"
    done = run([command, "plan", "gpt2", "--world", "4", "--largest", "1", "--png", tmp_path / "plan.png"])
    assert done.returncode == 0, done.stderr
    assert "144 matrices, ddp, 4 ranks" in done.stdout and (tmp_path / "plan.png").exists()
    refused = run([command, "plan", "gpt5"])
    assert refused.returncode == 2 and refused.stderr.startswith("error: no model 'gpt5'")


def test_every_direct_dependency_of_the_two_commands_is_pinned() -> None:
    """What pip may choose freely changes under a project's feet."""
    if sys.version_info < (3, 11):
        pytest.skip("needs tomllib")
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    named = [*project["dependencies"], *(name for one in extras.values() for name in one)]
    wanted = {re.split(r"[\[>=]", name)[0] for name in named}
    assert "torch" in wanted and "jsonargparse" in wanted
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    assert wanted <= {line.split("==")[0] for line in lines}


def test_the_package_imports_torch_and_no_other_library() -> None:
    """Nor what torch leaves until it is needed: with these `import kl_dist` would take seconds more."""
    late = ("torch.distributed.checkpoint", "torch.distributed.fsdp", "torch._dynamo")
    others = (
        "lightning",
        "pytorch_lightning",
        "deepspeed",
        "transformers",
        "accelerate",
        "jsonargparse",
        "rich",
        "matplotlib",
    )
    code = "import torch, sys; before = set(sys.modules); import kl_dist; print(*sorted(set(sys.modules) - before))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    imported = done.stdout.split()
    assert "kl_dist.optimizer" in imported
    assert not {name for name in imported if name.split(".")[0] in others or name.startswith(late)}
