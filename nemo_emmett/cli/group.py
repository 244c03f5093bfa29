"""The group of all commands: mistakes in one sentence, and a list of commands that is not cut."""

from __future__ import annotations

from typing import Any

import click

from nemo_emmett.runner import mistakes_as_sentences

_WHOLE = 1000
"""Characters of a command's line in a list: more than any has, so that click wraps it and does not cut it."""


class CommandGroup(click.Group):
    """Commands in the order in which they were added; a user's mistake ends one with a sentence and exit code 2."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command."""
        with mistakes_as_sentences():
            return super().invoke(ctx)

    def list_commands(self, ctx: click.Context) -> list[str]:
        """All names, in the order of the work with them."""
        return list(self.commands)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the first sentence on each command."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, one.get_short_help_str(_WHOLE)) for name, one in self.commands.items()])
