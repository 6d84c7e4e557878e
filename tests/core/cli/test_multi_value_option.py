"""Options that take several values, as people write them."""

from __future__ import annotations

import click
import pytest
from click.testing import CliRunner

from clipship.core.cli.multi_value_option import MultiValueCommand, repeated


@click.command(cls=MultiValueCommand)
@click.argument("names", nargs=-1)
@click.option("--sizes", "-s", multiple=True, type=int)
@click.option("--out")
@click.option("--quiet", is_flag=True)
def command(names: tuple[str, ...], sizes: tuple[int, ...], out: str | None, quiet: bool) -> None:
    click.echo(f"{names} {sizes} {out} {quiet}")


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("--sizes 1 2 3", "() (1, 2, 3) None False"),
        ("--sizes 1 --sizes 2", "() (1, 2) None False"),
        ("-s 1 2 --quiet", "() (1, 2) None True"),
        ("a b --sizes 1 2 --out x", "('a', 'b') (1, 2) x False"),
        ("--sizes 1 2 -- a", "('a',) (1, 2) None False"),
        ("--out x a", "('a',) () x False"),
        ("--sizes=1 a", "('a',) (1,) None False"),
    ],
)
def test_an_option_takes_values_up_to_the_next_one(line: str, expected: str) -> None:
    result = CliRunner().invoke(command, line.split())
    assert result.output.strip() == expected


def test_a_bad_value_among_several_is_told() -> None:
    result = CliRunner().invoke(command, ["--sizes", "1", "two"])
    assert result.exit_code == 2
    assert "'two' is not a valid integer" in result.output


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("a b --data x y --seeds 1 2 --out o", "a b --data x --data y --seeds 1 --seeds 2 --out o"),
        ("a --data=x --out o", "a --data=x --out o"),
        ("--data x y -- a b", "--data x --data y -- a b"),
        ("a --out o b --json c", "a --out o b --json c"),
    ],
)
def test_the_option_is_repeated_before_each_value(given: str, expected: str) -> None:
    assert list(repeated(given.split(), ("--data", "--seeds"))) == expected.split()
