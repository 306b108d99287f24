"""The collectives: what every rank gets, and errors that reach all of them."""

from unittest import mock

import pytest
import torch
import torch.distributed as dist

from kl_dist.ranks import Ranks


def gather_chunks(group) -> tuple[torch.Tensor, torch.Tensor]:
    """Two gathers under way at once."""
    ranks = Ranks(group)
    launched = []
    for k in (1, 2):
        chunk = torch.full((3,), 10.0 * k + ranks.rank)
        launched.append(ranks.gather(chunk, torch.empty(64, dtype=torch.uint8)))
    return tuple(exchange.wait() for exchange in launched)


def swap_and_gather(group, grid: tuple[tuple[int, ...], ...]) -> tuple[torch.Tensor, ...]:
    """In each row, place r sends r + s + 1 numbers to place s, each 10 r + s, twice at once; then all gather."""
    ranks = Ranks(group)
    row = next(row for row in grid if ranks.rank in row)
    team, place = ranks.team(row), row.index(ranks.rank)
    lengths = [place + other + 1 for other in range(len(row))]
    out = torch.cat([torch.full((n,), 10.0 * place + other) for other, n in enumerate(lengths)])
    launched = [team.swap(out * k, lengths, torch.empty(sum(lengths)), lengths) for k in (1, 2)]
    launched.append(team.gather(torch.full((3,), float(place)), torch.empty(64, dtype=torch.uint8)))
    return tuple(exchange.wait() for exchange in launched)


def make_groups_that_some_have(group) -> tuple[list[float], list[int]]:
    """What comes to each rank within its pair, and how many groups each of two calls makes."""
    ranks, pairs = Ranks(group), [(0, 1), (2, 3)]
    of_two = dist.new_group([0, 1])
    if ranks.rank in pairs[0]:
        ranks.get_to_know(of_two)
    made = []
    for lines in (pairs, [*pairs, (0, 2), (1, 3)]):
        with mock.patch.object(dist, "new_group", wraps=dist.new_group) as new_group:
            ranks.make_groups(lines)
        made.append(new_group.call_count)
    team = ranks.team(next(pair for pair in pairs if ranks.rank in pair))
    came = team.gather(torch.tensor([float(ranks.rank)]), torch.empty(64, dtype=torch.uint8)).wait()
    return came.flatten().tolist(), made


def test_groups_are_made_once_and_by_all_whoever_has_one_already(world):
    found = world.run(make_groups_that_some_have, 4, timeout=20)
    assert found == [([0.0, 1.0], [2, 2])] * 2 + [([2.0, 3.0], [2, 2])] * 2


@pytest.mark.parametrize("grid", [((0, 1, 2, 3),), ((0, 1), (2, 3)), ((0, 2), (1, 3))])
def test_every_row_of_a_grid_swaps_segments_of_any_length(world, grid):
    found = world.run(swap_and_gather, 4, grid)
    for row in grid:
        for place, rank in enumerate(row):
            first, second, gathered = found[rank]
            expected = [torch.full((place + other + 1,), 10.0 * other + place) for other in range(len(row))]
            assert torch.equal(first, torch.cat(expected))
            assert torch.equal(second, 2 * torch.cat(expected))
            assert torch.equal(gathered, torch.arange(len(row)).float()[:, None].expand(-1, 3))


def broadcast_two(group, grid: tuple[tuple[int, ...], ...]) -> list[torch.Tensor]:
    """In each row the last and the first place send what they are, at once."""
    ranks = Ranks(group)
    row = next(row for row in grid if ranks.rank in row)
    sent = [(place, torch.full((2,), float(ranks.rank))) for place in (len(row) - 1, 0)]
    ranks.team(row).broadcast(sent).wait()
    return [tensor for _, tensor in sent]


@pytest.mark.parametrize("grid", [((0, 1, 2, 3),), ((0, 1), (2, 3)), ((0, 2), (1, 3))])
def test_every_row_of_a_grid_hears_what_its_members_send(world, grid):
    found = world.run(broadcast_two, 4, grid)
    for row in grid:
        for rank in row:
            assert [tensor.tolist() for tensor in found[rank]] == [[row[-1]] * 2, [row[0]] * 2]


def test_one_process_exchanges_with_itself():
    ranks = Ranks()
    assert (ranks.rank, ranks.size) == (0, 1)
    assert torch.equal(ranks.gather(torch.ones(2), torch.empty(0, dtype=torch.uint8)).wait(), torch.ones(1, 2))
    assert ranks.largest(torch.tensor([1.0, 2.0])) == [1.0, 2.0]
    assert ranks.gather_objects("all") == ["all"]
    ranks.raise_together(None)
    ranks.check_same("a", lambda: ("line",), "it")


def largest_of(group, values: list[list[float]]) -> list[float]:
    return Ranks(group).largest(torch.tensor(values[group.rank()]))


def test_largest_is_elementwise_and_the_same_on_all_ranks(world):
    values = [[0.0, 4.0, -1.0], [3.0, 0.0, -2.0], [1.0, 1.0, -3.0]]
    assert world.run(largest_of, 3, values) == [[3.0, 4.0, -1.0]] * 3


class OddError(ArithmeticError):
    pass


def raise_on(group, problems: dict[int, Exception]) -> None:
    Ranks(group).raise_together(problems.get(group.rank()))


@pytest.mark.parametrize(
    ("problem", "elsewhere"),
    [
        (ValueError("bad value"), ValueError),
        (TypeError("bad type"), TypeError),
        (torch.linalg.LinAlgError("bad matrix"), RuntimeError),
        (OddError("odd"), RuntimeError),
    ],
)
def test_a_problem_on_one_rank_is_raised_on_all(world, problem, elsewhere):
    errors = world.run_expecting_errors(raise_on, 3, {1: problem})
    assert [type(error) for error in errors] == [elsewhere, type(problem), elsewhere]
    assert [str(error) for error in errors] == [f"rank 1: {problem}", str(problem), f"rank 1: {problem}"]


def test_of_several_problems_a_rank_raises_its_own_or_else_the_first(world):
    errors = world.run_expecting_errors(raise_on, 3, {1: ValueError("one"), 2: TypeError("two")})
    assert [str(error) for error in errors] == ["rank 1: one", "one", "two"]
    assert [type(error) for error in errors] == [ValueError, ValueError, TypeError]


def test_without_a_problem_nothing_is_raised(world):
    assert world.run_expecting_errors(raise_on, 3, {}) == [None] * 3


def compare(group, lines: list[tuple[str, ...]]) -> None:
    mine = lines[group.rank()]
    Ranks(group).check_same("\n".join(mine), lambda: mine, "the list")


@pytest.mark.parametrize(
    ("lines", "complaint"),
    [
        ([("a", "b"), ("a", "b"), ("a", "x")], "the list differs between ranks: rank 0 has «b», rank 2 has «x»"),
        ([("a", "b"), ("y", "z"), ("y", "z")], "the list differs between ranks: rank 0 has «a», rank 1 has «y»"),
        ([("a", "b"), ("a",), ("a", "b")], "the list differs between ranks: only rank 0 has «b»"),
        ([("a",), ("a",), ("a", "b")], "the list differs between ranks: only rank 2 has «b»"),
    ],
)
def test_ranks_that_differ_all_hear_of_the_first_difference(world, lines, complaint):
    errors = world.run_expecting_errors(compare, 3, lines)
    assert [(type(error), str(error)) for error in errors] == [(ValueError, complaint)] * 3


def test_ranks_that_agree_hear_nothing(world):
    assert world.run_expecting_errors(compare, 3, [("a", "b")] * 3) == [None] * 3
