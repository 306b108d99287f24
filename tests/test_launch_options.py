"""The command line: what is given, what is filled in, and one clear sentence for every mistake."""

import pytest

from launch.options import DEFAULT_RATES, Options, Rates, UsageError, parse


def test_defaults_stand_where_nothing_is_given() -> None:
    assert parse([]) == Options()
    assert str(parse([]).folder) == "runs/kl_shampoo"


def test_flags_reach_their_fields() -> None:
    flags = "--optimizer soap --adamw-lr 3e-4 --lr 1 --recipe paper --steps=7 --resume --out here"
    options = parse(flags.split())
    assert options == Options(
        optimizer="soap", adamw_lr=3e-4, lr=1.0, recipe="paper", steps=7, resume="newest", out="here"
    )
    assert options.rates == Rates(1.0, 3e-4)


@pytest.mark.parametrize("optimizer", DEFAULT_RATES)
def test_a_learning_rate_that_is_given_replaces_the_optimizers_own(optimizer: str) -> None:
    assert Options(optimizer=optimizer).rates == DEFAULT_RATES[optimizer]
    assert Options(optimizer=optimizer, lr=0.5).rates.lr == 0.5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--optimizer kl_shampo", "--optimizer kl_shampo is unknown; did you mean kl_shampoo?"),
        ("--optimzer adamw", "--optimzer is no option; did you mean --optimizer?; --help lists them"),
        ("--recipe frsh", "--recipe takes fresh or paper or compact, not frsh"),
        ("--steps many", "--steps takes a whole number, not many"),
        ("--steps 0", "--steps 0 is too small; the least is 1"),
        ("--precondition-frequency 0", "--precondition-frequency 0 is too small; the least is 1"),
        ("--lr -1", "--lr -1.0 is not a finite number of 0 or more"),
        ("--lr 0", "--lr 0 is too small: --adamw-lr is kept in proportion to it"),
        ("--set process_group=1", "--set process_group: the job trains in the group of all its processes"),
        ("--lr .inf", "--lr inf is not a finite number of 0 or more"),
        ("--lr", "argument --lr: expected one argument"),
        ("--width 130", "--width 130 does not divide into --heads 4"),
        ("--tokens-per-step 1000", "--tokens-per-step 1000 is not a whole number of windows of --context 128"),
        ("--steps 5 --warmup 5", "--warmup 5 leaves nothing of --steps 5"),
        ("--schedule cosin", "--schedule takes cosine, linear, wsd, constant, not cosin"),
        ("--optimizer adamw --recipe paper", "--recipe means nothing to --optimizer adamw; leave it out"),
        ("--optimizer adamw --adamw-lr 1e-3", "with --optimizer adamw use --lr"),
    ],
)
def test_a_mistake_is_answered_in_one_sentence(arguments: str, message: str) -> None:
    with pytest.raises(UsageError) as error:
        parse(arguments.split())
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_batch_that_does_not_divide_over_the_processes_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(UsageError, match=r"16 windows a step .* do not divide over 3 processes"):
        parse([])
