"""What makes a site of these pages, which are written to be read in the repository: hooks of mkdocs.

The README is the first page, the examples are one page with their code, and a link to what is no page is its path.
"""

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parent.parent
OUTSIDE = re.compile(r"\[([^\]]*)\]\((?:\.\./|(?!docs/|https?:|#))([\w./-]+)(?:#[\w-]+)?\)")


def on_files(files: Files, config: Any) -> Files:
    """Adds the pages that are no files of docs/."""
    for name, text in (("index.md", _readme()), ("examples.md", _examples())):
        files.append(File.generated(config, name, content=text))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """A page with paths in the place of links that lead out of docs/."""
    return re.sub(r"\[([^\]]*)\]\(\.\./([\w./-]+)(?:#[\w-]+)?\)", _as_path, markdown)


def _readme() -> str:
    text = OUTSIDE.sub(_as_path, (ROOT / "README.md").read_text())
    return text.replace("](docs/", "](")


def _examples() -> str:
    page = (ROOT / "examples" / "README.md").read_text()
    page = re.sub(r"\[([\w.]+)\.py\]\(\1\.py\)", lambda match: f"[{match[1]}.py](#{match[1]}py)", page)
    scripts = sorted((ROOT / "examples").glob("*.py"))
    page = page.replace("](../docs/", "](")
    return page + "".join(f"\n## {path.name}\n\n```python\n{path.read_text()}```\n" for path in scripts)


def _as_path(match: re.Match[str]) -> str:
    words, path = match[1], match[2]
    known = {"../examples/README.md", "examples/README.md"}
    return f"[{words}](examples.md)" if path in known else f"{words} (`{path}`)"
