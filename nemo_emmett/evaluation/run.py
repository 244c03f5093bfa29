"""From a model and a recipe's test sets to an evaluation: printed, saved, and reported."""

from __future__ import annotations

import copy
import os
import shlex
import shutil
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf
from rich.console import Console

from nemo_emmett.config import check_keys
from nemo_emmett.data import MultimodalDataModule, SpeechTextDataset
from nemo_emmett.errors import ConfigError, DataError, OutputError
from nemo_emmett.evaluation.comet import CometConfig
from nemo_emmett.evaluation.curves import read_curves
from nemo_emmett.evaluation.distributed import Processes, is_first_process, joined_processes
from nemo_emmett.evaluation.metrics import DEFAULT_METRICS, check_metrics, signatures
from nemo_emmett.evaluation.recipe import config_of_test_sets, read_yaml
from nemo_emmett.evaluation.report import write_report
from nemo_emmett.evaluation.results import FILE_NAME, Evaluation, from_json, to_json, write_hypotheses
from nemo_emmett.evaluation.scoring import score
from nemo_emmett.evaluation.significance import compare, resampling_signature
from nemo_emmett.evaluation.table import print_table
from nemo_emmett.evaluation.translation import Translated, put_together, translate
from nemo_emmett.files import check_writable, hold_folder, new_folder_elsewhere
from nemo_emmett.models import load

PACKAGES = ("nemo_emmett", "nemo_toolkit", "torch", "transformers", "lhotse", "sacrebleu")
"""Whose versions an evaluation records."""

LEAST_FREE = 2**20
"""Bytes that the disk of an evaluation's output must have free."""

Place = str | os.PathLike[str]


@dataclass(frozen=True)
class Task:
    """What a model has to do: the same for all that are compared."""

    data_config: DictConfig  # holds test_ds
    num_beams: int
    max_new_tokens: int | None
    metrics: tuple[str, ...]
    comet: CometConfig | None
    loading: Mapping[str, bool] = field(default_factory=dict)  # options of loading a model


def evaluate(
    model: Any,
    config: DictConfig | Mapping | Place,
    *,
    name: str | None = None,
    output: Place | None = None,
    num_beams: int = 1,
    max_new_tokens: int | None = None,
    metrics: Sequence[str] = DEFAULT_METRICS,
    comet: Mapping[str, Any] | None = None,
    baselines: Sequence[Place] = (),
    log_dir: Place | None = None,
    examples: int = 10,
    trust_remote_code: bool = False,
    console: Console | None = None,
) -> Evaluation | None:
    """Translate test sets, score the translations, print the table, write JSON, hypotheses and the report.

    Started by ``torchrun`` or ``srun``, the processes share each test set; the first of them scores, prints and writes.

    Args:
        model: a folder that ``save_pretrained`` wrote (loaded onto the GPU if there is one), or a model, used on the
            device where it is.
        config: a recipe, or its YAML file, with ``data.test_ds`` or ``test_ds`` at the top.
        name: what tables call the model; None takes the last two parts of its folder.
        output: folder for ``evaluation.json``, ``hypotheses`` and ``report.html``; None writes nothing.
        num_beams: 1 is greedy search.
        max_new_tokens: longest translation; None leaves it to the model.
        metrics: of BLEU, chrF++, chrF, TER, spBLEU and COMET; BLEU is always among them.
        comet: for COMET ``model``, a checkpoint or a name, and ``batch_size``.
        baselines: what to compare with: each an ``evaluation.json``, its folder, or the folder of another model, which
            is evaluated first and its result kept under ``output/baselines``.
        log_dir: TensorBoard logs of the training, for the report's curves.
        examples: translations shown in the report.
        trust_remote_code: run code that came with a model (:func:`nemo_emmett.models.load`).
        console: where to print; the terminal unless given.

    Returns:
        The evaluation; None in all processes but the first.

    Raises:
        ConfigError: if the config has no test sets, or a metric cannot be computed.
        DataError: if a test set, a baseline or the logs cannot be used.
        ModelError: if a model cannot be loaded.
        OutputError: if the output could not be written; translations and scores are where the message says.

    Example:
        >>> evaluate("exp/model", "conf/evaluate_phrasebook.yaml", output="exp/evaluation")  # doctest: +SKIP
    """
    # What may be wrong with the arguments shows before the translating, not after.
    metrics = check_metrics(metrics)
    _check_counts({"num_beams": (num_beams, 1), "max_new_tokens": (max_new_tokens, 1), "examples": (examples, 0)})
    comet_config = CometConfig.of_recipe(comet) if "COMET" in metrics else None
    loading = {"trust_remote_code": True} if trust_remote_code is True else {}
    task = Task(config_of_test_sets(config), num_beams, max_new_tokens, metrics, comet_config, loading)
    earlier = [_saved_or_folder(baseline) for baseline in baselines]
    place = _Place(None if output is None else Path(output))
    folders = _folders_of_baselines(earlier, output)
    curves = None if log_dir is None else read_curves(log_dir)
    with place.claimed(), joined_processes() as processes:
        loaded = load(model, **loading) if isinstance(model, (str, os.PathLike)) else model
        earlier = [
            _evaluate_baseline(one, task, folder, place, processes) if isinstance(one, Path) else one
            for one, folder in zip(earlier, folders, strict=True)
        ]
        if loaded is not model:
            loaded = loaded.to(processes.device)
            model_name, short_name = os.fspath(model), _short_name(Path(model))
        else:
            model_name = short_name = type(model).__qualname__
        evaluation = _evaluate(loaded, model_name, name or short_name, task, processes)
        if evaluation is None:
            return None
        place.write(evaluation)  # here already: a baseline of other sentences must not cost the translations
        earlier = _told_apart(evaluation, earlier)
        comparisons = [one for baseline in earlier for one in compare(evaluation, baseline)]
        evaluation = replace(evaluation, comparisons=comparisons)
        print_table(evaluation, console, earlier)
        with place.writing() as folder:
            if folder is not None:
                to_json(evaluation, folder / FILE_NAME)
                write_report(evaluation, folder / "report.html", curves=curves, examples=examples, baselines=earlier)
        place.check()
    return evaluation


def evaluate_recipe(config: DictConfig | Place, model: Place | None = None, **options: Any) -> Evaluation | None:
    """Evaluate as a recipe says: beside its test sets it may name ``model`` and any argument of :func:`evaluate`.

    Args:
        config: a recipe, or its YAML file; ``baseline`` is one or a list of them.
        model: folder of the model; None takes the recipe's.
        options: arguments of :func:`evaluate`; those that are None or empty are the recipe's.

    Raises:
        ConfigError: if neither names a model, and as :func:`evaluate` does.
    """
    recipe = config if isinstance(config, DictConfig) else read_yaml(Path(config))
    known = ("name", "output", "num_beams", "max_new_tokens", "metrics", "comet", "log_dir", "examples")
    known += ("trust_remote_code",)
    if "test_ds" in recipe:  # and not a training's, with keys of its own
        check_keys(recipe, (*known, "model", "baseline", "test_ds"), "recipe")
    model = recipe.get("model") if model is None else model
    if not isinstance(model, (str, os.PathLike)):
        raise ConfigError("model: the recipe names no exported model; give the folder that train.py exported to.")
    chosen = {key: _plain(recipe.get(key)) for key in known} | {"baselines": _as_list(recipe.get("baseline"))}
    chosen |= {key: value for key, value in options.items() if value not in (None, ())}
    return evaluate(model, recipe, **{key: value for key, value in chosen.items() if value is not None})


def _check_counts(counts: Mapping[str, tuple[Any, int]]) -> None:
    """Counts that a recipe gives, each with the lowest that works; None is none."""
    for name, (value, lowest) in counts.items():
        if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < lowest):
            raise ConfigError(f"{name}: {value!r} must be a whole number of {lowest} or more.")


class _Place:
    """Where an evaluation is written: its output folder, or another one where that fails.

    Args:
        output: the folder; None writes nothing.
    """

    def __init__(self, output: Path | None) -> None:
        self.output = self.folder = output
        self._failure = ""
        if output is not None:
            check_writable(output, "output", needed=LEAST_FREE)

    @contextmanager
    def claimed(self) -> Iterator[None]:
        """Keep other evaluations from the folder."""
        with nullcontext() if self.output is None or not is_first_process() else hold_folder(self.output):
            yield

    @contextmanager
    def writing(self) -> Iterator[Path | None]:
        """The folder to write to; what goes wrong is kept for :meth:`check`."""
        try:
            yield self.folder
        except OSError as error:
            self._failure = self._failure or error.strerror or str(error)

    def write(self, evaluation: Evaluation, within: Path = Path()) -> None:
        """Write translations and scores; in a folder elsewhere if they do not go where they should."""
        with self.writing() as folder:
            if folder is not None:
                _write(evaluation, folder / within)
        if self._failure and self.folder == self.output:
            for self.folder in new_folder_elsewhere("evaluation", [Path.cwd()]):
                with suppress(OSError):
                    _write(evaluation, self.folder / within)
                    return
                shutil.rmtree(self.folder, ignore_errors=True)
            self.folder = None

    def check(self) -> None:
        """Say what could not be written.

        Raises:
            OutputError: if there was anything.
        """
        if self._failure:
            kept = "nor any other folder" if self.folder is None else f"translations and scores are in '{self.folder}'"
            raise OutputError(f"output: '{self.output}' could not be written to ({self._failure}); {kept}.")


def _plain(value: Any) -> Any:
    return OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value


def _as_list(baseline: Place | ListConfig | None) -> list[Place]:
    if baseline is None:
        return []
    return list(baseline) if isinstance(baseline, (list, ListConfig)) else [baseline]


def _saved_or_folder(baseline: Place) -> Evaluation | Path:
    """A saved evaluation, or the folder of a model that is still to be evaluated."""
    path = Path(baseline)
    if (path / FILE_NAME).is_file():
        return from_json(path / FILE_NAME)
    if not path.is_dir():
        return from_json(path)
    if not (path / "config.json").is_file():
        raise DataError(
            f"The baseline '{path}' holds neither an {FILE_NAME} nor an exported model; give the folder of one of them."
        )
    return path


def _folders_of_baselines(baselines: Sequence[Evaluation | Path], output: Place | None) -> list[Path | None]:
    """Where in the output the evaluation of each baseline is kept: a folder of its own, though models be of one name.

    None for what is saved already, and where nothing is written.
    """
    taken: Counter[str] = Counter()
    folders: list[Path | None] = []
    for baseline in baselines:
        if output is None or not isinstance(baseline, Path):
            folders.append(None)
            continue
        name = _short_name(baseline).replace("/", "_")
        taken[name] += 1
        folders.append(Path("baselines", name if taken[name] == 1 else f"{name}-{taken[name]}"))
    return folders


def _evaluate_baseline(
    model: Path, task: Task, folder: Path | None, place: _Place, processes: Processes
) -> Evaluation | None:
    loaded = load(model, **task.loading).to(processes.device)
    evaluation = _evaluate(loaded, os.fspath(model), _short_name(model), task, processes)
    if evaluation is not None and folder is not None:
        place.write(evaluation, within=folder)
    return evaluation


def _short_name(model: Path) -> str:
    """The last two parts of a model's folder."""
    parts = model.parts if model.parts and ".." not in model.parts else model.resolve().parts
    return "/".join(parts[-2:])


def _evaluate(model: Any, model_name: str, name: str, task: Task, processes: Processes) -> Evaluation | None:
    """Translate together, and score in the first process; None in the others."""
    data_config = copy.deepcopy(task.data_config)  # to which the model adds what it knows
    datamodule = MultimodalDataModule(
        data_config,
        tokenizer=model.tokenizer,
        dataset=SpeechTextDataset(model.tokenizer),
        defaults=model.data_defaults,
    )
    test_sets = datamodule.test_sets(processes.rank, processes.number)
    translated = translate(
        model,
        test_sets,
        num_beams=task.num_beams,
        max_new_tokens=task.max_new_tokens,
        progress=processes.is_first,
    )
    shares = processes.gather(_Share.of(translated, test_sets))
    if shares is None:
        return None
    _check_orders(shares)
    whole = put_together([share.translated for share in shares])
    scores = score(whole.translations, task.metrics, task.comet)
    return Evaluation(
        model=model_name,
        name=name,
        date=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        scores=scores,
        translations=whole.translations,
        throughput=whole.throughput,
        signatures=_signatures(task, {one.target_lang for one in scores}),
        skipped=_skipped(shares),
        decoding={"num_beams": task.num_beams, "max_new_tokens": task.max_new_tokens},
        config=OmegaConf.to_container(data_config.test_ds, resolve=True),
        command=shlex.join(sys.argv),
        versions=_versions(),
    )


@dataclass(frozen=True)
class _Share:
    """What one process has to tell."""

    translated: Translated
    orders: dict[str, str | None]  # by test set: digest of the batches as this process saw them
    skipped: dict[str, frozenset[tuple[str, str]]]  # by test set: records that this process could not read

    @classmethod
    def of(cls, translated: Translated, test_sets: Mapping[str, Any]) -> _Share:
        return cls(
            translated,
            {name: loader.sampler.order for name, loader in test_sets.items()},
            {name: loader.skipped_records.records() for name, loader in test_sets.items()},
        )


def _check_orders(shares: Sequence[_Share]) -> None:
    """Processes that see the data in different orders translate some sentences twice and others never."""
    for test_set, order in shares[0].orders.items():
        if any(share.orders[test_set] != order for share in shares):
            raise DataError(
                f"The processes read test set '{test_set}' in different orders, so that they cannot share it; set "
                "shuffle: false and a number for seed and shard_seed, and see that all read the same files."
            )


def _skipped(shares: Sequence[_Share]) -> dict[str, int]:
    """How many records of each test set could not be read, where there were any; one that several met counts once."""
    counts = {name: len(frozenset().union(*(share.skipped[name] for share in shares))) for name in shares[0].skipped}
    return {name: count for name, count in counts.items() if count}


def _signatures(task: Task, target_langs: set[str]) -> dict[str, str]:
    found = signatures(task.metrics, target_langs)
    if task.comet is not None:
        found["COMET"] = task.comet.signature
    return found | {"intervals and p-values": resampling_signature()}


def _told_apart(evaluation: Evaluation, baselines: Sequence[Evaluation]) -> list[Evaluation]:
    """The baselines, numbered where another has the same name: comparisons and tables know them by it."""
    taken, found = {evaluation.name}, []
    for baseline in baselines:
        name, number = baseline.name, 1
        while name in taken:
            number += 1
            name = f"{baseline.name} ({number})"
        taken.add(name)
        found.append(replace(baseline, name=name))
    return found


def _write(evaluation: Evaluation, folder: Path) -> None:
    write_hypotheses(evaluation, folder / "hypotheses")
    to_json(evaluation, folder / FILE_NAME)


def _versions() -> dict[str, str]:
    found = {"python": ".".join(map(str, sys.version_info[:3]))}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:  # run from a source tree that is not installed
            continue
    return found
