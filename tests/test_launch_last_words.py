"""Where a user looks first, at the end of what torchrun or launch/agent.py says, are the first failure's own words."""

from pathlib import Path
from typing import Any

import pytest
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

from launch.agent import last_words
from launch.endings import FAILED, USAGE, record, status_of
from launch.options import UsageError
from tests.jobs import TORCHRUN, Ended, free_port, started, text_in
from tests.test_launch_job import SIZES

full = pytest.mark.full

FAILURES = {
    # name: the script and its arguments, the words, how an exit status tells them
    "typing mistake": ("launch/train.py --stepz 3", "error: --stepz is no option; did you mean --steps?", USAGE),
    "missing file": ("launch/train.py {sizes} --data nowhere.txt", "nowhere.txt", USAGE),
    "on one rank": ("tests/failing_job.py raise 1 {job}", "ArithmeticError: the layers do not add up", FAILED),
    "on all ranks": ("tests/failing_job.py all 0 {job}", "ArithmeticError: the layers do not add up", FAILED),
    "nan": ("tests/failing_job.py nan 1 {job} --set on_nonfinite=raise", "finite", FAILED),
}


def one_of_all(name: str) -> list[Any]:
    return [pytest.param(one, marks=() if one == name else full) for one in FAILURES]


def command(name: str, folder: Path) -> str:
    job = f"{SIZES} --steps 5 --data {text_in(folder)} --out {folder / 'out'}"
    return FAILURES[name][0].format(job=job, sizes=SIZES)


def assert_last_and_once(done: Ended, words: str, below: int) -> None:
    lines = done.stderr.strip().splitlines()
    assert words in "\n".join(lines[-below:]), done.stderr
    assert done.stderr.count(words) == 1, done.stderr


@pytest.mark.parametrize(
    "name", ["on one rank", *(pytest.param(one, marks=full) for one in FAILURES if one != "on one rank")]
)
def test_torchruns_last_entry_is_the_first_failure_in_its_own_words(name: str, tmp_path: Path) -> None:
    """Above the line that ends its box."""
    done = started(f"{TORCHRUN} 2 {command(name, tmp_path)}")
    assert done.status == 1
    assert_last_and_once(done, FAILURES[name][1], below=2)


@pytest.mark.parametrize("name", one_of_all("nan"))
def test_the_script_for_hosts_ends_with_the_words_and_the_status(name: str, tmp_path: Path) -> None:
    _, words, status = FAILURES[name]
    options = f"--nnodes 1 --nproc-per-node 2 --rdzv-backend c10d --rdzv-endpoint 127.0.0.1:{free_port()}"
    options += " --rdzv-id tests --rdzv-conf is_host=1,join_timeout=60 --monitor-interval 1 --local-addr 127.0.0.1"
    done = started(f"launch/agent.py {options} {command(name, tmp_path)}")
    assert done.status == status, done.stderr
    assert_last_and_once(done, words, below=1)


def failure(code: int, file: Path | None, rank: int = 0) -> ProcessFailure:
    return ProcessFailure(rank, 1, code, str(file or "nowhere"))


def test_what_is_recorded_is_what_torchrun_reads(tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    record("the words")
    words, status = last_words("job", {3: failure(4, tmp_path / "error.json")})
    assert words.endswith(": the words") and words.startswith("rank 3 on ") and status == 4
    record("E: the words", "Traceback:\n  here\nE: the words")
    words, _ = last_words("job", {3: failure(1, tmp_path / "error.json")})
    assert words.splitlines()[-1] == "E: the words" and words.count("the words") == 1
    assert capsys.readouterr().err == "", "torchrun says it"
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "1")
    record("the words")
    assert capsys.readouterr().err == "the words\n", "torchrun starts again and says nothing"


def test_a_process_that_was_killed_has_the_signals_name_and_the_shells_status() -> None:
    words, status = last_words("job", {1: failure(-9, None)})
    assert "killed by SIGKILL" in words and status == 137


def test_without_torchrun_the_words_are_on_the_console(capsys: Any) -> None:
    def mistaken() -> None:
        raise UsageError("no such thing")

    assert status_of(mistaken) == USAGE and capsys.readouterr().err == "error: no such thing\n"
