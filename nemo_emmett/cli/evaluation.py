"""``nemo-emmett evaluate``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from nemo_emmett.cli.parameters import COUNT, FOLDER, MODEL, PATH, loading, trust_argument, trust_option
from nemo_emmett.corpora.commands import Names


@click.command(short_help="Translate test sets with an exported model, and score the translations.")
@click.argument("model", type=MODEL)
@click.argument("config", type=PATH)
@click.option("--output", type=FOLDER, help="Folder for evaluation.json and report.html.  [default: the recipe's]")
@click.option("--num-beams", type=COUNT, help="1 is greedy search.  [default: the recipe's, or 1]")
@click.option("--max-new-tokens", type=COUNT, help="Longest translation, in tokens.  [default: the model's]")
@click.option("--log-dir", type=PATH, help="TensorBoard logs of the training, for its curves.  [default: the recipe's]")
@click.option("--name", help="Name of the model in tables.  [default: the end of its folder's path]")
@click.option(
    "--metrics",
    type=Names(),
    help="Of BLEU, chrF++, chrF, TER, spBLEU and COMET; BLEU is always one.  [default: the recipe's, or BLEU,chrF++]",
)
@click.option(
    "--baseline",
    "baselines",
    multiple=True,
    type=PATH,
    help="An earlier evaluation.json, its folder, or the folder of a model to compare with; may be repeated.",
)
@click.option("--examples", type=click.IntRange(min=0), help="Translations shown.  [default: the recipe's, or 10]")
@click.option("--update-card", is_flag=True, default=None, help="Write the scores into the model's card, README.md.")
@trust_option
def evaluate(model: Path, config: Path, trust_remote_code: bool, **options: Any) -> None:
    """Translate the test sets of the recipe CONFIG with the model in the folder MODEL, and score the translations.

    Options that are not given are the recipe's. Started by torchrun or srun, the processes share each test set.
    """
    from nemo_emmett.evaluation.recipe import check_evaluation

    check_evaluation(config, model, options)
    with loading("the model"):
        from nemo_emmett.evaluation import evaluate_recipe

        evaluate_recipe(config, model, **options, **trust_argument(trust_remote_code))
