"""From a model and a recipe's test sets to an evaluation: printed, saved, and reported."""

from __future__ import annotations

import copy
import os
import shlex
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from rich.console import Console

from nemo_emmett.data import MultimodalDataModule, SpeechTextDataset
from nemo_emmett.errors import ConfigError, DataError, OutputError
from nemo_emmett.evaluation.curves import read_curves
from nemo_emmett.evaluation.distributed import ProcessGroup, is_global_zero, process_group
from nemo_emmett.evaluation.metrics import DEFAULT_METRICS, signatures
from nemo_emmett.evaluation.recipe import EvaluationConfig, evaluation_arguments, read_baseline
from nemo_emmett.evaluation.report import write_report
from nemo_emmett.evaluation.results import FILE_NAME, Evaluation, to_json, unused_name, write_hypotheses
from nemo_emmett.evaluation.scoring import score
from nemo_emmett.evaluation.significance import compare, resampling_signature
from nemo_emmett.evaluation.table import print_table, scores_as_metadata, scores_in_markdown
from nemo_emmett.evaluation.translation import Translated, merge_ranks, translate
from nemo_emmett.files import check_writable, hold_folder, new_folder_elsewhere
from nemo_emmett.models import load
from nemo_emmett.models.card import CARD_FILE, check_card, write_scores
from nemo_emmett.models.exported import untrained_warning
from nemo_emmett.run_log import plain_console

REPORT_FILE = "report.html"
"""Name of the page in the output folder."""

NOT_SAVED = "No translations, scores or report were saved; give a folder for them (--output FOLDER, or the key output)."
"""The last line where there is no output folder."""

PACKAGES = ("nemo_emmett", "nemo_toolkit", "torch", "transformers", "lhotse", "sacrebleu")
"""Whose versions an evaluation records."""

StrPath = str | os.PathLike[str]


def evaluate(
    model: Any,
    config: DictConfig | Mapping | StrPath,
    *,
    name: str | None = None,
    output: StrPath | None = None,
    num_beams: int = 1,
    max_new_tokens: int | None = None,
    metrics: Sequence[str] = DEFAULT_METRICS,
    comet: Mapping[str, Any] | None = None,
    baselines: Sequence[StrPath] = (),
    log_dir: StrPath | None = None,
    examples: int = 10,
    trust_remote_code: bool = False,
    update_card: bool = False,
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
        update_card: write the scores into the model card in the model's folder.
        console: where to print; the terminal unless given.

    Returns:
        The evaluation; None in all processes but the first.

    Raises:
        ConfigError: if the config has no test sets, or a metric cannot be computed.
        DataError: if a test set, a baseline or the logs cannot be used.
        ModelError: if a model cannot be loaded.
        OutputError: if the output could not be written; translations and scores are where the message says.

    Example:
        >>> recipe = "examples/speechlm/conf/evaluate_phrasebook.yaml"
        >>> evaluate("exp/model", recipe, output="exp/evaluation")  # doctest: +SKIP
    """
    # All that can be wrong with the arguments, parsed by their names, is found before a model is loaded.
    settings = EvaluationConfig.parse(config, locals())
    saved_or_folders = [read_baseline(baseline) for baseline in settings.baselines]
    writer = _Writer(settings.output)
    if settings.update_card:
        if not isinstance(model, (str, os.PathLike)):
            raise ConfigError(
                "update_card: the card is in the folder of an exported model; give the model by its folder."
            )
        check_card(model)
    curves = None if settings.log_dir is None else read_curves(settings.log_dir)
    with writer.locked(), process_group() as processes:
        loaded = load(model, **settings.loading) if isinstance(model, (str, os.PathLike)) else model
        earlier = _evaluate_baselines(saved_or_folders, settings, writer, processes)
        if loaded is not model:
            loaded = loaded.to(processes.device)
            model_name, short_name = os.fspath(model), _short_name(Path(model))
        else:
            model_name = short_name = type(model).__qualname__
        evaluation = _evaluate(loaded, model_name, settings.name or short_name, settings, processes)
        if evaluation is None:
            return None
        writer.write(evaluation)  # before the comparison, whose failure must not lose the translations
        taken = [evaluation.name]
        for baseline in earlier:  # comparisons and tables refer to them by name
            taken.append(unused_name(baseline.name, taken, "{} ({})"))
        earlier = [replace(baseline, name=unique) for baseline, unique in zip(earlier, taken[1:], strict=True)]
        comparisons = [one for baseline in earlier for one in compare(evaluation, baseline)]
        evaluation = replace(evaluation, comparisons=comparisons)
        console = console or plain_console()
        print_table(evaluation, console, earlier)
        if sentence := untrained_warning(getattr(loaded, "cfg", {}), {one.target_lang for one in evaluation.scores}):
            console.print(f"Warning: {sentence}", highlight=False, style="bold red", soft_wrap=True)
        if settings.update_card:
            write_scores(model_name, scores_in_markdown(evaluation), scores_as_metadata(evaluation))
        with writer.writing() as folder:
            if folder is not None:
                to_json(evaluation, folder / FILE_NAME)
                write_report(
                    evaluation, folder / REPORT_FILE, curves=curves, examples=settings.examples, baselines=earlier
                )
        writer.raise_failure()
        if settings.update_card:
            console.print(f"Scores are in {Path(model_name, CARD_FILE)}.", highlight=False, soft_wrap=True)
        if settings.output is not None:
            console.print(f"Report: {settings.output / REPORT_FILE}", highlight=False, soft_wrap=True)
        elif not settings.update_card:
            console.print(NOT_SAVED, highlight=False, soft_wrap=True)
    return evaluation


def evaluate_recipe(config: DictConfig | StrPath, model: StrPath | None = None, **options: Any) -> Evaluation | None:
    """Evaluate as a recipe says: it has test sets, and may have ``model`` and any argument of :func:`evaluate`.

    Args:
        config: a recipe, or its YAML file; ``baseline`` is one or a list of them.
        model: folder of the model; None takes the recipe's.
        options: arguments of :func:`evaluate`; those that are None or empty are the recipe's.

    Raises:
        ConfigError: if neither names a model, and as :func:`evaluate` does.
    """
    model, recipe, arguments = evaluation_arguments(config, model, options)
    return evaluate(model, recipe, **arguments)


class _Writer:
    """Writes an evaluation into its output folder, if there is one, or into another one where that fails."""

    def __init__(self, output: Path | None) -> None:
        self.output = self.folder = output
        self._failure = ""
        if output is not None:
            check_writable(output, "output", needed=2**20)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other evaluations from the folder."""
        with nullcontext() if self.output is None or not is_global_zero() else hold_folder(self.output):
            yield

    @contextmanager
    def writing(self) -> Iterator[Path | None]:
        """The folder to write to; an error of the file system is kept for :meth:`raise_failure`."""
        try:
            yield self.folder
        except OSError as error:
            self._failure = self._failure or error.strerror or str(error)

    def write(self, evaluation: Evaluation, subfolder: Path = Path()) -> None:
        """Write translations and scores; if that fails, into a new folder elsewhere."""

        def write_to(folder: Path) -> None:
            write_hypotheses(evaluation, folder / subfolder / "hypotheses")
            to_json(evaluation, folder / subfolder / FILE_NAME)

        with self.writing() as folder:
            if folder is not None:
                write_to(folder)
        if self._failure and self.folder == self.output:
            for self.folder in new_folder_elsewhere("evaluation", [Path.cwd()]):
                with suppress(OSError):
                    write_to(self.folder)
                    return
                shutil.rmtree(self.folder, ignore_errors=True)
            self.folder = None

    def raise_failure(self) -> None:
        """Raise OutputError, naming the folder that has the results, if something could not be written."""
        if self._failure:
            kept = "nor any other folder" if self.folder is None else f"translations and scores are in '{self.folder}'"
            raise OutputError(f"output: '{self.output}' could not be written to ({self._failure}); {kept}.")


def _evaluate_baselines(
    baselines: Sequence[Evaluation | Path], settings: EvaluationConfig, writer: _Writer, processes: ProcessGroup
) -> list[Evaluation | None]:
    """Evaluate the baselines that are models, each with its own subfolder; None in all but the first process."""
    file_names: list[str] = []
    evaluations: list[Evaluation | None] = []
    for baseline in baselines:
        if isinstance(baseline, Evaluation):
            evaluations.append(baseline)
            continue
        short_name = _short_name(baseline)
        loaded = load(baseline, **settings.loading).to(processes.device)
        evaluation = _evaluate(loaded, os.fspath(baseline), short_name, settings, processes)
        file_names.append(unused_name(short_name.replace("/", "_"), file_names))
        if evaluation is not None:
            writer.write(evaluation, Path("baselines", file_names[-1]))
        evaluations.append(evaluation)
    return evaluations


def _short_name(model: Path) -> str:
    """The last two parts of a model's folder."""
    parts = model.parts if model.parts and ".." not in model.parts else model.resolve().parts
    return "/".join(parts[-2:])


def _evaluate(
    model: Any, model_name: str, name: str, settings: EvaluationConfig, processes: ProcessGroup
) -> Evaluation | None:
    """Translate in all processes, and score in the first one; None in the others."""
    data_config = copy.deepcopy(settings.data)  # the datamodule adds the model's defaults to it
    datamodule = MultimodalDataModule(
        data_config, tokenizer=model.tokenizer, dataset=SpeechTextDataset(model.tokenizer), defaults=model.data_defaults
    )
    test_sets = datamodule.test_sets(processes.rank, processes.world_size)
    translated = translate(
        model,
        test_sets,
        num_beams=settings.num_beams,
        max_new_tokens=settings.max_new_tokens,
        progress=processes.is_global_zero,
    )
    batch_orders = {name: loader.sampler.order for name, loader in test_sets.items()}
    skipped = {name: loader.skipped_records.records() for name, loader in test_sets.items()}
    outputs = processes.gather(_RankOutput(translated, batch_orders, skipped))
    if outputs is None:
        return None
    whole, skipped_counts = _merge(outputs)
    scores = score(whole.translations, settings.metrics, settings.comet)
    found_signatures = signatures(settings.metrics, {one.target_lang for one in scores})
    if settings.comet is not None:
        found_signatures["COMET"] = settings.comet.signature
    return Evaluation(
        model=model_name,
        name=name,
        date=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        scores=scores,
        translations=whole.translations,
        throughput=whole.throughput,
        signatures=found_signatures | {"intervals and p-values": resampling_signature()},
        skipped=skipped_counts,
        decoding={"num_beams": settings.num_beams, "max_new_tokens": settings.max_new_tokens},
        config=OmegaConf.to_container(data_config.test_ds, resolve=True),
        command=shlex.join(sys.argv),
        versions=_versions(),
    )


@dataclass(frozen=True)
class _RankOutput:
    """The results of one process."""

    translated: Translated
    batch_orders: dict[str, str | None]  # by test set: digest of the order in which this process saw all batches
    skipped: dict[str, frozenset[tuple[str, str]]]  # by test set: records that this process could not read


def _merge(outputs: Sequence[_RankOutput]) -> tuple[Translated, dict[str, int]]:
    """The translations of all processes, and the number of skipped records of each test set that has any."""
    first = outputs[0]
    for test_set, order in first.batch_orders.items():
        if any(output.batch_orders[test_set] != order for output in outputs):  # then some are translated twice or never
            raise DataError(
                f"The processes read test set '{test_set}' in different orders, so that they cannot share it; set "
                "shuffle: false and a number for seed and shard_seed, and see that all read the same files."
            )
    # A record that several processes skipped counts once.
    counts = {name: len(frozenset().union(*(output.skipped[name] for output in outputs))) for name in first.skipped}
    return merge_ranks([output.translated for output in outputs]), {name: n for name, n in counts.items() if n}


def _versions() -> dict[str, str]:
    found = {"python": ".".join(map(str, sys.version_info[:3]))}
    for package in PACKAGES:
        with suppress(PackageNotFoundError):  # run from a source tree that is not installed
            found[package] = version(package)
    return found
