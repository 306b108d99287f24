"""The pages of docs/ build into a site without a warning, with every page in its navigation."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.jobs import ROOT


def in_navigation(entry: object) -> list[str]:
    if isinstance(entry, str):
        return [entry]
    entries = entry if isinstance(entry, list) else list(entry.values())
    return [page for one in entries for page in in_navigation(one)]


def test_the_site_builds_strictly(tmp_path: Path):
    pytest.importorskip("mkdocs")
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    navigation = yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]
    pages = {page.removesuffix(".md") for page in in_navigation(navigation)}
    assert pages == {"index", "examples", *(path.stem for path in (ROOT / "docs").glob("*.md"))}
    for page in pages - {"index"}:
        assert (tmp_path / "site" / page / "index.html").is_file()
    api = (tmp_path / "site" / "api" / "index.html").read_text()
    for shown in ('class="doc doc-object-name', "param_groups", "precondition_frequency", "load_full_state_dict"):
        assert shown in api
    assert "consolidate_on_save" in (tmp_path / "site" / "examples" / "index.html").read_text()
