"""The page of a run has what the run recorded, needs nothing from elsewhere, and is readable on a narrow screen."""

import json
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

from kl_dist.cli import report
from kl_dist.cli.main import main
from tests.jobs import ROOT, on_ranks, text_in
from tests.models import raising
from tests.world import World

SIZES = "--layers 1 --width 32 --heads 2 --context 32 --tokens-per-step 512 --steps 12 --eval-every 3"
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.fixture(scope="module")
def run(worlds: dict[int, World], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of launch/train.py on two ranks."""
    folder = tmp_path_factory.mktemp("report")
    done = on_ranks(worlds, "launch.train", 2, f"{SIZES} --data {text_in(folder)} --out {folder / 'run'}")
    assert done.status == 0, done.stderr
    return folder / "run"


class Page(HTMLParser):
    """What is on a page: its tags, where it would load from, its words."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.loads: list[str] = []
        self.words = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.loads += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href")]

    def handle_data(self, data: str) -> None:
        self.words += data


def test_the_page_has_what_the_run_recorded_and_loads_nothing(run):
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    page = Page(report.write(run).read_text())
    titles = ("Loss over steps", "Loss over seconds", "Learning rate", "Update RMS", "Spectra", "Memory, MiB")
    for title in (*titles, "Communication hidden", "Balance of work"):
        assert title in page.words
    assert "Left out so far" not in page.words  # nothing was
    assert page.tags.count("svg") == page.tags.count("figure") >= 10
    assert f"{records[-1]['val_loss']:.4f}" in page.words and "blocks.0.attention.qkv.weight" in page.words
    assert all(one.startswith(("#", "data:")) for one in page.loads)


def test_the_jobs_record_each_matrix_where_they_look_at_the_validation_loss(run):
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records if "optimizer" in record] == [3, 6, 9, 12]
    said = records[-1]["optimizer"]
    assert 0 <= said["communication_hidden"] <= 1 <= said["work_as_run"]
    assert 0.05 < said["update_rms"] < 1 and said["restarts"] == 0 and records[-1]["memory"] > 2**20
    assert all({"effective_rank.0", "condition.1", "eigenvalues.0"} <= one.keys() for one in said["matrices"].values())


def test_a_record_of_losses_alone_is_a_page_too_and_a_line_cut_short_is_left_out(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.5}\n{"step": 2, "loss": 2.25}\n{"step": 3, "lo')
    page = Page(report.write(tmp_path, tmp_path / "page.html").read_text())
    assert page.tags.count("svg") == 1 and "2.2500" in page.words


def test_what_is_left_out_is_drawn(run, tmp_path):
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    records[-1]["optimizer"]["skipped_steps"] = 2
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    assert "Left out so far" in Page(report.write(tmp_path).read_text()).words


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        (None, "metrics.jsonl cannot be read .*give the folder of a run"),
        ("", "has no step in it yet"),
        ('{"step": 1, "loss": 2}\nnot json\n{"step": 3, "loss": 1}\n', "line 2 of .* is no step's record"),
        ('{"loss": 2}\n{"step": 3, "loss": 1}\n', "line 1 of .* is no step's record .*step"),
    ],
)
def test_what_is_no_run_is_refused(tmp_path, text, complaint):
    if text is not None:
        (tmp_path / "metrics.jsonl").write_text(text)
    with raising(ValueError, complaint):
        report.write(tmp_path)
    assert not (tmp_path / "report.html").exists()


def test_the_command_says_where_the_page_is_and_ends_with_two_where_there_is_no_run(run, tmp_path, capsys):
    main(["report", str(run), "--out", str(tmp_path / "page.html")])
    assert capsys.readouterr().out.strip() == str(tmp_path / "page.html")
    with pytest.raises(SystemExit) as left:
        main(["report", str(tmp_path)])
    assert left.value.code == 2 and "give the folder of a run" in capsys.readouterr().err


def test_it_does_without_what_plan_alone_needs(run, tmp_path):
    """The extra of the jobs has no rich, which makes plan's tables."""
    words = ["report", str(run), "--out", str(tmp_path / "page.html")]
    code = f"import sys; sys.modules['rich'] = None; from kl_dist.cli.main import main; main({words})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "page.html").is_file()


@pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium here to look at the page with")
@pytest.mark.parametrize("width", [390, 1300])
def test_a_browser_shows_the_page_without_a_complaint(run, tmp_path, width):
    page = report.write(run, tmp_path / "page.html")
    measuring = "<script>addEventListener('load', () => {document.title = JSON.stringify([innerWidth,"
    measuring += " document.documentElement.scrollWidth, ...[...document.querySelectorAll('figure svg')].map("
    measuring += "x => Math.round(x.getBoundingClientRect().width))])})</script>"
    page.write_text(page.read_text().replace("</body>", f"{measuring}</body>"))
    command = [
        str(CHROMIUM),
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--no-first-run",
        "--enable-logging=stderr",
    ]
    command += [
        "--disable-background-networking",
        f"--user-data-dir={tmp_path / 'profile'}",
        f"--window-size={width},900",
    ]
    done = subprocess.run([*command, "--dump-dom", page.as_uri()], capture_output=True, text=True, timeout=120)
    assert "CONSOLE" not in done.stderr, done.stderr
    title = re.search(r"<title>(\[.*?\])</title>", done.stdout)
    assert title, done.stdout[:500]
    inner, scrolled, *plots = json.loads(title[1])
    assert scrolled <= inner  # nothing to scroll sideways for, but the table in its own box
    assert len(plots) >= 10 and all(0.25 * inner < plot <= inner for plot in plots)
