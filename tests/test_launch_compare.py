"""The comparison, at tiny sizes: what is trained, what is not trained again, and what it says of the outcome."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from launch import compare, results, runs, standings
from launch.options import Options, UsageError
from launch.ranks import Ranks
from launch.regression import INPUTS, Regression

SIZES = "--task regression --layers 1 --width 16 --context 16 --tokens-per-step 96 --steps 6 --eval-every 3 --warmup 1"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "deep" / "results.jsonl"


def call(file: Path, *flags: str, sizes: str = SIZES) -> int:
    """The comparison of this command line, in this process."""
    return compare.main([*sizes.split(), "--results", str(file), *flags])


def lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def made_up(label: str, losses: list[float], seed: int = 0, **settings: Any) -> dict[str, Any]:
    """A finished run with an evaluation every 10 steps, which take a second."""
    settings = dict.fromkeys(results.ARENA, 1) | {"task": "text", "steps": 10 * (len(losses) - 1)} | settings
    return {
        "label": label,
        "settings": {"optimizer": label, "seed": seed} | settings,
        "status": "done",
        "evaluations": [[10 * at, float(at), loss] for at, loss in enumerate(losses)],
        "optimizer_seconds": 0.004,
        "optimizer_seconds_mean": 0.005,
        "state_bytes": 1234,
        "machine": {"threads": 1},
        "versions": {"torch": "2"},
    }


def test_every_setting_and_seed_is_a_line_and_a_table_and_a_picture_follow(
    file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    muon = "--optimizer muon --set momentum=0.9 adjust_lr_fn=match_rms_adamw"
    settings = ("--run", "--optimizer adamw", "--run", "--optimizer kl_shampoo", "--run", muon)
    assert call(file, *settings, "--seeds", "0", "1") == 0
    said = capsys.readouterr().out
    records = lines(file)
    assert len(records) == 6
    for record in records:
        assert record["status"] == "done"
        assert [step for step, _, _ in record["evaluations"]] == [0, 3, 6]
        assert record["evaluations"][-1][1] == pytest.approx(record["seconds"])
        assert record["state_bytes"] > 0 and record["optimizer_seconds"] > 0
        assert record["settings"]["data"] and record["machine"]["processor"] and record["versions"]["kl_dist_source"]
    muon_group = next(one for one in records if one["settings"]["optimizer"] == "muon")["settings"]["groups"][0]
    assert (muon_group["momentum"], muon_group["adjust_lr_fn"]) == (0.9, "match_rms_adamw")
    table = file.with_suffix(".md").read_text()
    assert table in said and "[6/6] " in said
    assert "| muon momentum=0.9 adjust_lr_fn=match_rms_adamw | " in table and "| adamw | " in table
    assert file.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def test_adamw_state_is_two_moments_and_a_step() -> None:
    options = Options(optimizer="adamw", layers=1, width=16, context=16, tokens_per_step=96, steps=2)
    job = Regression(options, Ranks(0, 1, torch.device("cpu")))
    measured = runs.measure(job)
    tensors = len(list(job.model.parameters()))
    assert measured["state_bytes"] == 2 * 4 * measured["parameters"] + 4 * tensors


def test_a_run_that_is_there_is_not_repeated(
    file: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert call(file, "--run", "--optimizer adamw") == 0
    before = file.read_text()
    with monkeypatch.context() as patch:
        patch.setattr(compare, "execute", lambda *_: pytest.fail("a run was repeated"))
        # The same number said otherwise, a default said aloud, and twice: one run, and it is there.
        assert (
            call(file, "--run", "--optimizer adamw --lr 0.002", "--run", "--optimizer adamw --weight-decay 1e-2") == 0
        )
    assert file.read_text() == before
    assert "1 runs: 1 are in" in capsys.readouterr().out
    for other in (["--seeds", "1"], ["--weight-decay", "0.1"], ["--grid", "betas=(0.8,0.9)"], ["--width", "8"]):
        count = len(lines(file))
        assert call(file, "--run", "--optimizer adamw", *other) == 0
        assert len(lines(file)) == count + 1


def test_two_at_once_train_as_one_after_another(file: Path, tmp_path: Path) -> None:
    flags = ("--run", "--optimizer kl_shampoo", "--run", "--optimizer adamw")
    assert call(file, *flags) == 0
    assert call(tmp_path / "two.jsonl", *flags, "--jobs", "2") == 0

    def losses(path: Path) -> dict[str, list[float]]:
        return {run["label"]: [loss for _, _, loss in run["evaluations"]] for run in lines(path)}

    alone, together = losses(file), losses(tmp_path / "two.jsonl")
    assert len(alone) == 2 and alone.keys() == together.keys()
    for name, values in alone.items():
        assert together[name] == pytest.approx(values, rel=1e-5)


def test_the_text_is_the_other_task(file: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("".join(f"{number} times {number} is {number * number}.\n" for number in range(500)))
    sizes = SIZES.replace("regression", "text") + f" --heads 2 --data {text}"
    assert call(file, "--run", "--optimizer kl_shampoo", sizes=sizes) == 0
    (run,) = lines(file)
    assert run["evaluations"][-1][2] < run["evaluations"][0][2]


def test_a_run_that_diverges_or_fails_is_reported_and_stops_no_other(
    file: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Failing(Regression):
        def train_step(self, step: int) -> Any:
            if self.options.optimizer == "muon":
                raise RuntimeError("no\nmemory")
            return super().train_step(step)

    flags = ("--run", "--optimizer adamw --lr 1e30", "--run", "--optimizer muon", "--run", "--optimizer adamw")
    with monkeypatch.context() as patch:
        patch.setitem(runs.TASKS, "regression", Failing)
        assert call(file, *flags) == 0
    assert [run["status"] for run in lines(file)] == ["diverged", "failed", "done"]
    said = capsys.readouterr().out
    assert "adamw lr 1e30, seed 0: diverged (at step 2)" in said
    assert "failed (RuntimeError: no memory)" in said
    # What failed may do better next time; what diverged would diverge again.
    assert call(file, *flags) == 0
    assert [run["label"] for run in lines(file)][3:] == ["muon"]
    assert "failed" not in file.with_suffix(".md").read_text()


def test_a_report_alone_trains_nothing_and_shows_what_is_asked_for(
    file: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert call(file, "--run", "--optimizer adamw", "--grid", "lr=1e-3,1e-2") == 0
    before = file.read_text()
    report = ("--report-only", "--results", str(file), "--task", "regression", "--report", str(tmp_path / "again"))
    assert compare.main([*report]) == 0
    table = (tmp_path / "again.md").read_text()
    assert "adamw lr 1e-3" in table and "adamw lr 1e-2" in table
    assert compare.main([*report, *SIZES.split(), "--run", "--optimizer adamw --lr 0.01"]) == 0
    assert (tmp_path / "again.md").read_text().count("| adamw lr 0.01 |") == 1
    assert compare.main([*report, "--steps", "7"]) == 2
    assert "holds none of the runs asked for" in capsys.readouterr().err
    assert file.read_text() == before


def test_steps_and_seconds_are_counted_to_the_best_adamws_final_loss() -> None:
    records = [
        made_up("kl_shampoo", [5.0, 3.0, 1.0], seed=0),
        made_up("kl_shampoo", [5.0, 2.0, 1.4], seed=1),
        made_up("muon", [5.0, 4.5, 4.0]),
        made_up("adamw", [5.0, 2.5, 2.0]),
        made_up("adamw", [5.0, 4.0, 3.0], lr=1),
    ]
    settings = standings.collect(records)
    assert [one.label for one in settings] == ["kl_shampoo", "adamw", "adamw", "muon"]
    kl_shampoo, adamw, worse, muon = (standings.row(one, standings.mark(one, settings)) for one in settings)
    # 2.0 lies between 2.5 after 10 steps and 1.2 after 20.
    assert kl_shampoo == ("kl_shampoo", "1.2", "1, 1.4", "14", "1.38", "4 (5)", "1,234")
    assert adamw[3:5] == ("20", "2")
    assert worse[3:5] == muon[3:5] == (standings.DASH, standings.DASH)


def test_adamw_with_other_steps_is_no_mark() -> None:
    short, long = standings.collect([made_up("adamw", [5.0, 2.0]), made_up("muon", [5.0, 3.0, 1.0])])[::-1]
    assert standings.mark(long, [short, long]) is None
    assert (short.label, long.label) == ("adamw, steps 10", "muon, steps 20")


def test_a_run_from_before_there_was_an_option_is_not_made_again_where_that_is_none(
    file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = ("--run", "--optimizer kl_shampoo")
    assert call(file, *run) == 0
    (record,) = lines(file)
    (options,) = record["settings"]["groups"]
    assert options.pop("matrix_lr") is None
    file.write_text(json.dumps(record) + "\n")
    capsys.readouterr()
    assert call(file, *run) == 0
    assert len(lines(file)) == 1 and "1 are in" in capsys.readouterr().out
    assert call(file, "--run", "--optimizer kl_shampoo --set matrix_lr=1e-3") == 0
    assert len(lines(file)) == 2


def test_a_run_from_before_beta1_grew_is_one_in_which_it_does_not() -> None:
    """0 under KL-Shampoo, None under the other methods."""
    known = [{}, {"final_beta1": 0.0}, {"final_beta1": None}, {"final_beta1": 0.99}]
    before, stays, others, grows = (results.identity({"groups": [{"lr": 0.1, **x}]}) for x in known)
    assert before == stays == others != grows


def test_a_line_that_a_crash_cut_short_costs_no_other(file: Path) -> None:
    results.append(file, made_up("adamw", [5.0, 2.0]))
    with file.open("a") as torn:
        torn.write('{"label": "mu')
    results.append(file, made_up("soap", [5.0, 1.0]))
    assert [run["label"] for run in results.read(file)] == ["adamw", "soap"]


def test_the_regression_is_ill_conditioned_and_the_same_every_time() -> None:
    corpus = Regression.read(Options())
    inputs = corpus.train[:, :INPUTS].double()
    assert 50 < torch.linalg.cond(inputs) < 200
    assert corpus.train[:, INPUTS:].square().mean().item() == pytest.approx(1, rel=0.01)
    assert torch.equal(corpus.train, Regression.read(Options(seed=1)).train)


@pytest.mark.parametrize(
    ("text", "choices"),
    [
        ("lr=1e-2,3e-2", [["--lr", "1e-2"], ["--lr", "3e-2"]]),
        ("--precondition-frequency=1", [["--precondition-frequency", "1"]]),
        ("betas=(0.9,0.95),[0.8,0.9]", [["--set", "betas=(0.9,0.95)"], ["--set", "betas=[0.8,0.9]"]]),
    ],
)
def test_a_grid_is_flags_of_the_job_or_options_of_the_optimizer(text: str, choices: list[list[str]]) -> None:
    assert compare.grid(text) == choices


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "there is nothing to compare; give at least one --run"),
        (["--run", "--optimizr adamw"], "--optimizr is no option; did you mean --optimizer?"),
        (["--run", "--lr '1"], "cannot be read: No closing quotation"),
        (["--run", "--optimizer kl_shampoo --set nestrov=False"], "did you mean 'nesterov'?"),
        (["--run", "--optimizer kl_shampoo --set lr=1"], "--set lr would contradict a flag of the job; use --lr"),
        (["--run", "--optimizer kl_shampoo --set nesterov"], "--set takes key=value, not nesterov"),
        (["--run", "--optimizer muon --set adjust_lr_fn=none_such"], "muon says: Adjust learning rate function"),
        (["--run", "--optimizer adamw --set momentum=1"], "unexpected keyword argument 'momentum'"),
        (["--run", "--optimizer adamw", "--grid", "lr"], "--grid takes NAME=A,B, not lr"),
        (["--run", "--optimizer adamw", "--sedes", "1"], "--sedes is no option"),
        (["--run", "--optimizer adamw", "--jobs", "0"], "--jobs 0 is too small"),
        (["--task", "none"], "argument --task: invalid choice: 'none'"),
    ],
)
def test_a_mistake_is_one_clear_line_before_anything_is_trained(
    flags: list[str], message: str, file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(file, *flags) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error
    assert len(error.splitlines()) == 1
    assert not file.exists()


def test_options_of_the_optimizer_are_read_as_python_or_as_words() -> None:
    options = Options(set=("betas=(0.9,0.95)", "nesterov=false", "blocking=none", "stagger=None"))
    assert options.optimizer_options == {
        "betas": (0.9, 0.95),
        "nesterov": False,
        "blocking": "none",
        "stagger": None,
    }
    with pytest.raises(UsageError, match="would contradict a flag of the job; use --optimizer"):
        Options(set=("method=soap",))
