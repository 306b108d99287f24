"""A folder of results has one job and one run: the second is told of the first, and a dead one's lock is taken over."""

import json
import os
import shutil
import signal
from pathlib import Path

import pytest

from kl_dist.checkpoint import manifest
from launch import checkpoint, identity
from launch.options import UsageError
from tests.corruptions import estrange
from tests.jobs import begun, on_ranks, started, text_in
from tests.test_launch_checkpoint import ALONE, job, save
from tests.test_launch_job import SIZES
from tests.test_launch_kills import wait_for
from tests.world import World

RUN = f"launch/train.py {SIZES} --optimizer adamw"


def test_of_two_jobs_in_one_folder_the_second_is_refused_and_a_killed_ones_lock_is_taken_over(tmp_path: Path) -> None:
    """Real processes, the first killed with -9."""
    text, out = text_in(tmp_path), tmp_path / "out"
    flags = f"--data {text} --out {out}"
    with begun(f"{RUN} {flags} --steps 100000 --checkpoint-every 50") as first:
        assert wait_for(lambda: (out / "checkpoint" / "step-000050").exists(), first.process)
        before = sorted(path.name for path in out.iterdir())
        second = started(f"{RUN} {flags} --steps 3")
        assert second.status == 2, second.stderr
        assert f"{out} is in use by process {first.process.pid} on " in second.stderr
        assert "wait for its end, or give another --out" in second.stderr and "Traceback" not in second.stderr
        assert sorted(path.name for path in out.iterdir()) == before and first.process.poll() is None
        os.kill(first.process.pid, signal.SIGKILL)
        first.process.wait()
    newest = int(max((out / "checkpoint").glob("step-??????")).name[5:])
    third = started(f"{RUN} {flags} --steps {newest + 2} --resume auto")
    assert third.status == 0, third.stderr


def test_all_ranks_are_told_alike(worlds: dict[int, World], tmp_path: Path) -> None:
    text, out = text_in(tmp_path), tmp_path / "out"
    with identity.alone(out, ALONE):
        done = on_ranks(worlds, "launch.train", 2, f"{RUN.split(' ', 1)[1]} --data {text} --out {out} --steps 2")
    assert done.status == 2 and done.stderr.count(f"in use by process {os.getpid()} on ") == 2
    with identity.alone(out, ALONE), pytest.raises(UsageError, match="in use"), identity.alone(out, ALONE):
        pass
    with identity.alone(out, ALONE):  # after its end it is free
        pass


def test_a_file_in_the_place_of_the_folder_is_said(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("mine")
    with (
        pytest.raises(UsageError, match=r"out cannot be written: File exists"),
        identity.alone(tmp_path / "out", ALONE),
    ):
        pass


def test_a_checkpoint_of_another_run_is_refused_by_name_unless_it_is_asked_for(tmp_path: Path) -> None:
    for name in ("one", "other"):
        identity.settle(tmp_path / name)
        save(tmp_path / name / "checkpoint", 2)
    theirs, mine = (tmp_path / name / "checkpoint" for name in ("one", "other"))
    assert checkpoint.choose(mine, "auto", ALONE) == mine / "step-000002"
    strange = mine / "step-000003"
    save(theirs, 3)
    shutil.copytree(theirs / "step-000003", strange)
    for which in ("auto", "newest"):
        with pytest.raises(
            UsageError, match=f"{strange} was saved by run .*--resume {strange} goes on from it all the same"
        ):
            checkpoint.choose(mine, which, ALONE)
    assert checkpoint.choose(mine, str(strange), ALONE) == strange
    options, model, trainer = job()
    assert checkpoint.load(strange, options, ALONE, model, trainer) == 3


def test_a_folder_that_lost_its_name_is_of_the_run_that_is_gone_on_from(tmp_path: Path) -> None:
    identity.settle(tmp_path / "one")
    run = identity.of(tmp_path / "one")
    path = save(tmp_path / "one" / "checkpoint", 2)
    identity.settle(tmp_path / "moved", checkpoint.run_of(path, "auto"))
    assert identity.of(tmp_path / "moved") == run
    identity.settle(tmp_path / "branch", checkpoint.run_of(path, str(path)))
    assert identity.of(tmp_path / "branch") not in (run, None)


def test_a_folder_with_another_steps_name_is_refused(tmp_path: Path) -> None:
    path = save(tmp_path, 2)
    renamed = path.rename(tmp_path / "step-000009")
    with pytest.raises(UsageError, match="it is of step 2, and was given the name of another"):
        checkpoint.choose(tmp_path, str(renamed), ALONE)
    assert checkpoint.choose(tmp_path, "auto", ALONE) is None
    kept = renamed.rename(tmp_path / "the-best")  # a name of the user's own
    assert checkpoint.choose(tmp_path, str(kept), ALONE) == kept


def test_manifest_and_state_must_be_of_one_save(tmp_path: Path) -> None:
    """Each half whole by itself, its checksums made anew."""
    path = save(tmp_path, 2)
    options, model, trainer = job()
    about = manifest.about(path)
    for key, value in (("step", 3), ("world", 2), ("run", "other")):
        for where in ("manifest", "both"):
            sums = manifest.checksums(path, [one.name for one in path.iterdir() if one.name != manifest.MANIFEST])
            if where == "both":
                run = json.loads((path / "run.json").read_text())
                (path / "run.json").write_text(json.dumps({**run, key: value}))
                sums |= manifest.checksums(path, ["run.json"])
            text = {"about": {**about, key: value}, "files": sums}
            (path / manifest.MANIFEST).write_text(json.dumps(text, indent=1, sort_keys=True))
            assert manifest.fault(path) is None
            with pytest.raises(UsageError, match=rf"manifest\.json is of .*{key} {value}.* of "):
                checkpoint.load(path, options, ALONE, model, trainer)
        (path / "run.json").write_text(json.dumps({**json.loads((path / "run.json").read_text()), **about}))


def test_a_checkpoint_that_an_earlier_version_saved_is_loaded(tmp_path: Path) -> None:
    path = save(tmp_path, 2)
    (path / manifest.MANIFEST).write_text(
        json.dumps(json.loads((path / manifest.MANIFEST).read_text())["files"], indent=1)
    )
    options, model, trainer = job()
    assert checkpoint.choose(tmp_path, "auto", ALONE) == path
    assert checkpoint.load(path, options, ALONE, model, trainer) == 2


def test_nothing_but_the_manifests_files_and_no_link(tmp_path: Path) -> None:
    path = save(tmp_path, 2)
    (path / "more").write_text("")
    assert manifest.fault(path) == "more is not in the manifest: it was put there later, or the manifest is damaged"
    (path / "more").unlink()
    (path / "__0_0.distcp").rename(tmp_path / "elsewhere")
    (path / "__0_0.distcp").symlink_to(tmp_path / "elsewhere")
    fault = manifest.fault(path)
    assert fault is not None and "__0_0.distcp is a link" in fault


def test_a_strangers_checkpoint_whose_manifest_fits_is_refused_and_nothing_of_it_is_run(tmp_path: Path) -> None:
    path = save(tmp_path, 2)
    about, proof = manifest.about(path), tmp_path / "run"
    estrange(path, proof)
    sums = manifest.checksums(path, [one.name for one in path.iterdir() if one.name != manifest.MANIFEST])
    (path / manifest.MANIFEST).write_text(json.dumps({"about": about, "files": sums}, indent=1, sort_keys=True))
    options, model, trainer = job()
    assert checkpoint.choose(tmp_path, "auto", ALONE) == path
    with pytest.raises(UsageError, match=r"names posix\.mkdir, which torch\.distributed\.checkpoint does not write"):
        checkpoint.load(path, options, ALONE, model, trainer)
    assert not proof.exists()
