"""``nemo-emmett <command>``. A command imports what it needs when it runs, so that ``--help`` is fast.

- ``group``: what all commands have in common. ``parameters``: arguments and options that several have.
- ``corpora``: ``prepare``. ``data``: ``index``, ``blend``, ``bins``. ``batch_sizes``: ``plan``, ``oomptimize``.
- ``training``: ``train``, ``export``. ``translation``: ``translate``. ``serving``: ``serve``.
- ``evaluation``: ``evaluate``. ``installation``: ``doctor``. ``init`` has a room of its own.
"""

from __future__ import annotations

import click

from nemo_emmett import __version__
from nemo_emmett.cli.batch_sizes import oomptimize, plan
from nemo_emmett.cli.corpora import prepare
from nemo_emmett.cli.data import bins, blend, index
from nemo_emmett.cli.evaluation import evaluate
from nemo_emmett.cli.group import CommandGroup
from nemo_emmett.cli.installation import doctor
from nemo_emmett.cli.serving import serve
from nemo_emmett.cli.training import export, train
from nemo_emmett.cli.translation import translate
from nemo_emmett.init.command import init


@click.group(cls=CommandGroup, context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.version_option(__version__, prog_name="nemo-emmett")
def main() -> None:
    """Train one model on text and speech translation, with NeMo."""


for command in (doctor, init, prepare, index, blend, bins, plan, oomptimize, train, export, translate, serve, evaluate):
    main.add_command(command)
