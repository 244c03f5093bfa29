"""From a model and a recipe's test sets to an evaluation: printed, saved, and reported."""

from __future__ import annotations

import copy
import os
import shlex
import sys
from collections.abc import Iterable, Mapping
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities import CombinedLoader
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from rich.console import Console
from yaml import YAMLError

from nemo_emmett.data import MultimodalDataModule, SpeechTextDataset
from nemo_emmett.errors import ConfigError
from nemo_emmett.evaluation.curves import read_curves
from nemo_emmett.evaluation.report import write_report
from nemo_emmett.evaluation.results import Evaluation, from_json, to_json
from nemo_emmett.evaluation.scoring import score, signatures
from nemo_emmett.evaluation.table import print_table
from nemo_emmett.evaluation.translation import translate
from nemo_emmett.models import load

PACKAGES = ("nemo_emmett", "nemo_toolkit", "torch", "transformers", "lhotse", "sacrebleu")
"""Whose versions an evaluation records."""


def evaluate(
    model: Any,
    config: DictConfig | Mapping | str | os.PathLike[str],
    *,
    output: str | os.PathLike[str] | None = None,
    num_beams: int = 1,
    max_new_tokens: int | None = None,
    log_dir: str | os.PathLike[str] | None = None,
    baseline: str | os.PathLike[str] | None = None,
    examples: int = 10,
    console: Console | None = None,
) -> Evaluation:
    """Translate test sets, score the translations, print the table, write ``evaluation.json`` and ``report.html``.

    Args:
        model: a folder that ``save_pretrained`` wrote (loaded onto the GPU if there is one), or a model, used on the
            device where it is.
        config: a recipe, or its YAML file, with ``data.test_ds`` or ``test_ds`` at the top.
        output: folder for the two files; None writes none.
        num_beams: 1 is greedy search.
        max_new_tokens: longest translation; None leaves it to the model.
        log_dir: TensorBoard logs of the training, for the report's curves.
        baseline: the ``evaluation.json`` of an earlier model, whose BLEU is shown beside this one's.
        examples: translations shown in the report.
        console: where to print; the terminal unless given.

    Raises:
        ConfigError: if the config has no test sets.
        DataError: if a test set, the baseline or the logs cannot be used.
        ModelError: if the model cannot be loaded.

    Example:
        >>> evaluate("exp/model", "conf/evaluate_phrasebook.yaml", output="exp/evaluation")  # doctest: +SKIP
    """
    # What may be wrong with the arguments shows before the translating, not after.
    data_config = _data_config(config)
    earlier = None if baseline is None else from_json(baseline)
    curves = None if log_dir is None else read_curves(log_dir)
    if isinstance(model, (str, os.PathLike)):
        model_name, model = os.fspath(model), _load(model)
    else:
        model_name = type(model).__qualname__
    test_sets = _test_sets(data_config, model)
    translations, throughput = translate(model, test_sets, num_beams=num_beams, max_new_tokens=max_new_tokens)
    evaluation = Evaluation(
        model=model_name,
        date=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        scores=score(translations),
        translations=translations,
        throughput=throughput,
        signatures=signatures(),
        skipped=_skipped(test_sets),
        decoding={"num_beams": num_beams, "max_new_tokens": max_new_tokens},
        config=OmegaConf.to_container(data_config.test_ds, resolve=True),
        command=shlex.join(sys.argv),
        versions=_versions(),
    )
    if output is not None:
        to_json(evaluation, Path(output) / "evaluation.json")
    print_table(evaluation, console, baseline=earlier)
    if output is not None:
        write_report(evaluation, Path(output) / "report.html", curves=curves, examples=examples, baseline=earlier)
    return evaluation


def evaluate_recipe(
    config: DictConfig | str | os.PathLike[str], model: str | os.PathLike[str] | None = None, **options: Any
) -> Evaluation:
    """Evaluate as a recipe says: beside its test sets it may name ``model`` and any argument of :func:`evaluate`.

    Args:
        config: a recipe, or its YAML file.
        model: folder of the model; None takes the recipe's.
        options: arguments of :func:`evaluate`; those that are None are the recipe's.

    Raises:
        ConfigError: if neither names a model, and as :func:`evaluate` does.
    """
    recipe = config if isinstance(config, DictConfig) else _read_yaml(Path(config))
    model = recipe.get("model") if model is None else model
    if not isinstance(model, (str, os.PathLike)):
        raise ConfigError("model: the recipe names no exported model; give the folder that train.py exported to.")
    known = ("output", "num_beams", "max_new_tokens", "log_dir", "baseline", "examples")
    chosen = {name: recipe.get(name) for name in known} | {k: v for k, v in options.items() if v is not None}
    return evaluate(model, recipe, **{name: value for name, value in chosen.items() if value is not None})


def _data_config(config: DictConfig | Mapping | str | os.PathLike[str]) -> DictConfig:
    """A copy of the section that holds ``test_ds``, interpolations into the rest of the recipe intact."""
    where = "the config"
    if isinstance(config, (str, os.PathLike)):
        where = f"'{os.fspath(config)}'"
        config = _read_yaml(Path(config))
    recipe = copy.deepcopy(config) if isinstance(config, DictConfig) else OmegaConf.create(dict(config))
    data = recipe.data if "data" in recipe and "test_ds" in recipe.data else recipe
    if "test_ds" not in data or not data.test_ds.get("datasets"):
        raise ConfigError(
            f"data.test_ds.datasets is missing in {where}: name the test sets there, each with its input_cfg."
        )
    return data


def _read_yaml(path: Path) -> DictConfig:
    try:
        config = OmegaConf.load(path)
    except OSError as error:
        raise ConfigError(f"The config '{path}' cannot be read: {error.strerror}.") from error
    except (YAMLError, OmegaConfBaseException) as error:
        raise ConfigError(f"The config '{path}' is not YAML: {' '.join(str(error).split())}.") from error
    if not isinstance(config, DictConfig):
        raise ConfigError(f"The config '{path}' holds a list; it must hold keys, among them data.test_ds.")
    return config


def _load(folder: str | os.PathLike[str]) -> torch.nn.Module:
    return load(folder).to("cuda" if torch.cuda.is_available() else "cpu")


def _test_sets(data_config: DictConfig, model: Any) -> Mapping[str, Iterable]:
    """Loaders of the test sets by name."""
    datamodule = MultimodalDataModule(
        data_config,
        tokenizer=model.tokenizer,
        dataset=SpeechTextDataset(model.tokenizer),
        defaults=model.data_defaults,
    )
    loader = datamodule.test_dataloader()
    # One set after another: Lightning's combination would give the sets' batches side by side, padded with None.
    assert isinstance(loader, CombinedLoader)
    return loader.iterables


def _skipped(test_sets: Mapping[str, Iterable]) -> dict[str, int]:
    """How many records of each test set could not be read, where there were any."""
    # NeMo's wrapper around each loader keeps ours as its source.
    counts = {name: loader._source.bad_records.count() for name, loader in test_sets.items()}
    return {name: count for name, count in counts.items() if count}


def _versions() -> dict[str, str]:
    found = {"python": ".".join(map(str, sys.version_info[:3]))}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:  # run from a source tree that is not installed
            continue
    return found
