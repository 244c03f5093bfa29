"""``nemo-emmett train`` and ``nemo-emmett export``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import click

from nemo_emmett.cli.parameters import PATH, RECIPE, loading


@click.command(short_help="Train the model of a recipe, or resume its training.")
@click.argument("recipe", type=RECIPE)
@click.argument("overrides", metavar="[KEY=VALUE]...", nargs=-1)
def train(recipe: str, overrides: Sequence[str]) -> None:
    """Train the model of RECIPE, a YAML file or the name of a recipe of nemo_emmett; KEY=VALUE overrides a key of it.

    Started again, it resumes from its newest complete checkpoint. torchrun and srun may start it on several devices.
    """
    from nemo_emmett.runner import compose_recipe

    cfg = compose_recipe(recipe, overrides)
    from nemo_emmett.early_checks import check_dataset_files, check_sections, refuse_empty_paths

    check_sections(cfg)
    refuse_empty_paths(cfg)
    check_dataset_files(cfg.data, "data")
    from nemo_emmett.run_log import quiet_console

    with quiet_console("Importing NeMo and checking the recipe ..."):
        from nemo_emmett.training import train

        train(cfg)


@click.command(short_help="Write the model of a checkpoint into a folder, for translate and evaluate.")
@click.argument("checkpoint", type=PATH)
@click.argument("folder", type=PATH)
@click.option(
    "--config",
    type=RECIPE,
    help="Recipe of the training, by its path or name.  [default: recipe.yaml next to CHECKPOINT]",
)
def export(checkpoint: Path, folder: Path, config: str | None) -> None:
    """Write the model of CHECKPOINT, a .ckpt file or the folder of a sharded one, into FOLDER, for translate and
    evaluate.

    The pretrained models that the recipe names are read for tokenizer and configs, which a checkpoint does not hold.
    Relative paths in the recipe start from the current folder.
    """
    from nemo_emmett.early_checks import check_checkpoint
    from nemo_emmett.files import check_writable
    from nemo_emmett.runner import compose_recipe

    check_checkpoint(checkpoint, has_recipe=config is not None)
    recipe = None if config is None else compose_recipe(config)
    check_writable(folder, "FOLDER")
    with loading("the checkpoint"):
        from nemo_emmett.exporting import export_checkpoint

        export_checkpoint(checkpoint, folder, recipe)
        click.echo(f"The model of {checkpoint} is in {folder}")
