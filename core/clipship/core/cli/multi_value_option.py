"""Options that take every value up to the next option: ``--seeds 1 2 3`` is three of --seeds."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

import click


class MultiValueCommand(click.Command):
    """A command whose options with ``multiple=True`` may be given once, followed by several values."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Repeat the option before each of its values."""
        several = {
            name
            for option in self.params
            if isinstance(option, click.Option) and option.multiple
            for name in option.opts
        }
        return super().parse_args(ctx, list(repeated(args, several)))


def repeated(args: Sequence[str], several: Collection[str]) -> Iterator[str]:
    """``args`` with each value after the first of an option in ``several`` preceded by that option."""
    option, values = "", 0
    for position, argument in enumerate(args):
        if argument == "--":
            yield from args[position:]
            return
        if argument.startswith("-"):
            option, values = (argument if argument in several else ""), 0
        elif option:
            values += 1
            if values > 1:
                yield option
        yield argument
