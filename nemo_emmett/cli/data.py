"""``nemo-emmett index``, ``blend`` and ``bins``: reports on the data of a recipe."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from nemo_emmett.cli.parameters import (
    COUNT,
    FILE,
    bucket_options,
    index_dir_option,
    limit_option,
    loading,
    recipe_arguments,
    section_option,
    tokenizer_option,
)
from nemo_emmett.corpora.commands import NumberRange

if TYPE_CHECKING:
    from omegaconf import DictConfig, ListConfig

    from nemo_emmett.planning.blend_report import Recipe


def _composed(
    config: str, overrides: Sequence[str], section: str | None, tokenizer: str | None
) -> DictConfig | ListConfig:
    """The config, its dataset checked as far as that is possible without importing NeMo."""
    from omegaconf import ListConfig, OmegaConf

    from nemo_emmett.data.config.section import escaped, plain
    from nemo_emmett.early_checks import check_dataset_files, refuse_empty_paths
    from nemo_emmett.planning.needed import find_dataset, no_tokenizer
    from nemo_emmett.runner import compose_data

    content = compose_data(config, overrides)
    if isinstance(content, ListConfig):
        place, keys = f"{Path(config).stem}.input_cfg", plain(content, config, throw_on_missing=True)
    else:
        found, keys = find_dataset(content, section, config)
        place = found or Path(config).stem
    if tokenizer is not None and not Path(tokenizer).exists():
        raise no_tokenizer(tokenizer)
    dataset = OmegaConf.create(escaped(keys))
    refuse_empty_paths(dataset, place)
    check_dataset_files(dataset, place, in_dataset=True)
    return content


def _read_data(
    content: DictConfig | ListConfig, config: str, section: str | None, given: Mapping[str, Any] | None = None
) -> tuple[Recipe, Any]:
    """The dataset of a command, with its model's defaults, and the model's tokenizer."""
    from nemo_emmett.data.checks import check_files
    from nemo_emmett.planning.blend_report import read_recipe
    from nemo_emmett.planning.known_by_model import known_by_model
    from nemo_emmett.plugin import find_model

    recipe = read_recipe(content, config, section)
    if "model" not in content:
        return read_recipe(content, config, section, given), None
    check_files(recipe.dataset.sources)  # before the model is built, which takes seconds
    known = known_by_model(content, find_model)
    return read_recipe(content, config, section, {**known.defaults, **(given or {})}), known.tokenizer


@click.command(short_help="Build the length indexes of the training data, and show what was skipped.")
@recipe_arguments
@section_option
@tokenizer_option
@index_dir_option
def index(
    config: str, overrides: Sequence[str], section: str | None, tokenizer: str | None, index_dir: str | None
) -> None:
    """Build the length indexes of the data of CONFIG ahead of its training, and show their sizes and what was skipped.

    CONFIG is a recipe (a YAML file, or the name of one of nemo_emmett), the config of a dataset, or a list of sources
    (input_cfg); KEY=VALUE overrides a key of it, as for train. No audio is read. Ended and started again, it goes on
    where it was.
    """
    content = _composed(config, overrides, section, tokenizer)
    with loading("the data's readers"):
        recipe, of_model = _read_data(content, config, section)
        from nemo_emmett.planning.bins_report import tokenizer_of
        from nemo_emmett.planning.index_report import print_index

        print_index(recipe.dataset, tokenizer=tokenizer_of(recipe, tokenizer, of_model), index_dir=index_dir)


@click.command(short_help="Show each part of the data: its size, its share, and how often it is repeated.")
@recipe_arguments
@section_option
@click.option("--steps", type=COUNT, help="How far to look ahead.  [default: trainer.max_steps, or 1000]")
@tokenizer_option
@index_dir_option
def blend(config: str, overrides: Sequence[str], section: str | None, tokenizer: str | None, **options: Any) -> None:
    """Show the sizes of the data of CONFIG, the share of each part in the examples, and how often it is repeated.

    CONFIG is a recipe (a YAML file, or the name of one of nemo_emmett), the config of a dataset, or a list of sources
    (input_cfg); KEY=VALUE overrides a key of it, as for train. No audio is read.
    """
    content = _composed(config, overrides, section, tokenizer)
    with loading("the data's readers"):
        recipe, of_model = _read_data(content, config, section)
        from nemo_emmett.planning.bins_report import tokenizer_of
        from nemo_emmett.planning.blend_report import print_blend

        print_blend(recipe, tokenizer=tokenizer_of(recipe, tokenizer, of_model), **options)


@click.command(short_help="Find the bins of least padding for the data, and show what they save.")
@recipe_arguments
@section_option
@bucket_options
@limit_option
@click.option(
    "--outliers",
    type=NumberRange(min=0, min_open=True),
    help="Leave out outputs so many standard deviations too long for their inputs.  [default: none]",
)
@tokenizer_option
@click.option(
    "--token-equivalent-duration",
    type=NumberRange(min=0, min_open=True),
    help="Seconds of speech that count as one token.  [default: the config's, or the model's]",
)
@click.option("--output", type=FILE, help="PNG to draw the lengths and bins in.  [default: none]")
def bins(config: str, overrides: Sequence[str], section: str | None, tokenizer: str | None, **options: Any) -> None:
    """Find the bins of least padding for each group of the data of CONFIG, and show what they save.

    CONFIG is a recipe (a YAML file, or the name of one of nemo_emmett), the config of a dataset, or a list of sources
    (input_cfg); KEY=VALUE overrides a key of it, as for train. No audio is read.
    """
    output, seconds = options.pop("output"), options.pop("token_equivalent_duration")
    given = {"token_equivalent_duration": seconds} if seconds else {}
    content = _composed(config, overrides, section, tokenizer)
    with loading("the data's readers"):
        recipe, of_model = _read_data(content, config, section, given)
        from nemo_emmett.planning.bins_report import bins_of_dataset, draw_bins, print_bins, tokenizer_of

        groups = bins_of_dataset(recipe.dataset, tokenizer_of(recipe, tokenizer, of_model), **options)
        print_bins(groups)
        if output is not None:
            draw_bins(groups, output)
