"""The pages of the documentation, and the blocks of code in them."""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGES = [Path("README.md"), *sorted(path.relative_to(ROOT) for path in (ROOT / "docs").glob("*.md"))]
LANGUAGES = {"python", "sh", "json", "yaml"}


def blocks(page: Path, language: str) -> list[str]:
    found = re.findall(r"^```(\w*)\n(.*?)^```", (ROOT / page).read_text(), re.MULTILINE | re.DOTALL)
    assert all(kind in LANGUAGES for kind, _ in found), f"{page} has a block that nothing here runs"
    return [text for kind, text in found if kind == language]


def pages_with(language: str) -> list[Path]:
    return [page for page in PAGES if blocks(page, language)]


def commands(page: Path) -> list[str]:
    """The lines of its shell blocks, without their comments."""
    lines = [line.partition("#")[0].strip() for text in blocks(page, "sh") for line in text.splitlines()]
    return [line for line in lines if line]
