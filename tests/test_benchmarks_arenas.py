"""The tables over batch and length are those that the lines of the runs give."""

import pytest

from benchmarks import arenas
from tests.pages import ROOT

TABLES = [["1024x400", "8192x400", "32768x400"], ["1024x2000", "1024x10000"]]


@pytest.mark.parametrize("columns", TABLES, ids=" ".join)
def test_the_page_has_the_tables_that_the_lines_give(columns):
    page = (ROOT / "docs" / "learning.md").read_text()
    rows = arenas.table(arenas.read(arenas.RESULTS), columns)
    assert len(rows) > 10 and "\n".join(rows[1:]) in page, (
        f"put there what `python -m benchmarks.arenas {columns}` prints"
    )


def test_the_best_of_a_cell_is_the_best_mean_of_rates_with_seeds_enough():
    found = {1e-2: {0: 2.0, 1: 2.2, 2: 2.1}, 2.2e-2: {0: 1.9}, 3.3e-2: {0: 2.0, 1: 2.1, 2: 2.1, 3: 2.1}}
    assert (
        arenas.cell(found) == "2.000, 2.200, 2.100 at 1e-2; 1.900 at 2.2e-2; **2.000, 2.100, 2.100, 2.100** at 3.3e-2"
    )
    assert arenas.cell({1e-2: {1: 2.0}}) == "**2.000** at 1e-2" and arenas.cell({}) == ""
