"""The list of small faults fits the code, and a fault is called killed or surviving for what the tests say of it."""

import ast
import json
from collections import Counter
from pathlib import Path

import pytest

from benchmarks import mutants

ROOT = Path(__file__).resolve().parent.parent
LEAST = 60
FAULTS = mutants.read(ROOT / "benchmarks" / "faults.yaml")

TINY = {
    "code_of_it.py": "def double(x):\n    return 2 * x\n\n\ndef half(x):\n    return x / 2\n",
    "tests/__init__.py": "",
    "tests/test_code.py": "import code_of_it\n\n\ndef test_double():\n    assert code_of_it.double(3) == 6\n",
    "faults.yaml": """
- file: code_of_it.py
  tests: code
  faults:
    - {what: a sign, before: 2 * x, after: -2 * x}
    - {what: not tested, before: x / 2, after: x / 3}
""",
}


def test_every_fault_fits_its_file_and_leaves_it_python() -> None:
    assert len(FAULTS) >= LEAST
    for fault in FAULTS:
        source = (ROOT / fault.file).read_text()
        assert source.count(fault.before) == 1, f"{fault.what!r} does not fit {fault.file} any more"
        assert ast.dump(ast.parse(source.replace(fault.before, fault.after))) != ast.dump(ast.parse(source))
        assert all((ROOT / name).is_file() for name in fault.tests)


def test_no_package_is_spared() -> None:
    packages = Counter(fault.file.split("/")[0] for fault in FAULTS)
    assert set(packages) == {"kl_dist", "lightning_plugin", "deepspeed_integration", "launch"}
    assert len({(fault.file, fault.what) for fault in FAULTS}) == len(FAULTS)


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    """A checkout with a function that is tested and one that is not."""
    for name, content in TINY.items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(content)
    return tmp_path


def test_what_no_test_notices_survives_and_the_checkout_stays_as_it_is(
    tiny: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path: path.read_text() for path in tiny.rglob("*.*")}
    out = tiny / "verdicts.jsonl"
    given = ["--tree", str(tiny), "--faults", str(tiny / "faults.yaml"), "--out", str(out)]
    assert mutants.main(given) == 1
    said, lines = capsys.readouterr().out, [json.loads(line) for line in out.read_text().splitlines()]
    assert "1 of 2 faults are noticed; 1 survive\n  code_of_it.py: not tested" in said
    assert [(line["fault"], line["killed_by"]) for line in lines] == [
        ("a sign", "tests/test_code.py::test_double"),
        ("not tested", None),
    ]
    out.unlink()
    assert {path: path.read_text() for path in tiny.rglob("*.*") if "__pycache__" not in path.parts} == before
    assert mutants.main([*given, "--only", "a sign"]) == 0


def test_a_fault_that_does_not_fit_is_named(tiny: Path) -> None:
    (tiny / "code_of_it.py").write_text("def double(x):\n    return x + x\n")
    with pytest.raises(ValueError, match="'a sign': what it replaces stands 0 times"):
        mutants.main(["--tree", str(tiny), "--faults", str(tiny / "faults.yaml")])


def test_a_name_that_no_fault_has_is_an_error(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        mutants.main(["--tree", str(tiny), "--faults", str(tiny / "faults.yaml"), "--only", "a sing"])
    assert "has 'a sing' in its file or its name" in capsys.readouterr().err
