"""The summaries of a training: a table before the first step, and one at its end, however it ends."""

from __future__ import annotations

import logging
import os
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping, Timer
from lightning.pytorch.loggers import TensorBoardLogger, WandbLogger
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.utilities import CombinedLoader
from omegaconf import DictConfig
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from nemo_emmett.callbacks.run_progress import RunProgress
from nemo_emmett.data.config.dataset_config import DatasetConfig, GroupConfig, leading_group, parse_dataset
from nemo_emmett.data.config.sources import Source
from nemo_emmett.data.dataloader import MultimodalDataLoader
from nemo_emmett.data.lengths.counting import Size
from nemo_emmett.data.lengths.index import LengthIndex
from nemo_emmett.data.readers.parallel_text import directions_of
from nemo_emmett.data.scheduled_batches import ScheduledBatches
from nemo_emmett.data.worker_batches import ResumableWorkerBatches
from nemo_emmett.exporting import BestCheckpoint
from nemo_emmett.models.causal import unwrap_peft
from nemo_emmett.modules.batch import MODALITIES
from nemo_emmett.modules.data_ranks import number_of_data_ranks, reads_first
from nemo_emmett.modules.loss import sum_over_ranks

DATA_ROWS = 6
"""Rows of the data table; the other sources are added up in one more."""

CAUSES = 3
"""Causes of skipped records that are named; the log file has all."""

Rows = Iterator[tuple[str, str]]


class RunSummary(Callback):
    """Prints the table before the first step, and keeps what the table at the end shows. Only rank zero prints.

    Args:
        cfg: the recipe.
        progress: another callback of the trainer, which has the time.
        log_file: of the run; None if there is none.
    """

    def __init__(self, cfg: DictConfig, progress: RunProgress, log_file: Path | None = None) -> None:
        self.cfg = cfg
        self.progress = progress
        self.log_file = log_file
        self.exported: str | None = None  # what was exported, once it is
        self._loader: MultimodalDataLoader | None = None
        self._totals: Tensor | None = None  # (M, 2) target tokens and examples, of all ranks
        self._has_started = False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print the first table."""
        self._has_started = True
        loaders = [getattr(loader, "_source", loader) for loader in CombinedLoader(trainer.train_dataloader).flattened]
        self._loader = next((loader for loader in loaders if isinstance(loader, MultimodalDataLoader)), None)
        if not trainer.is_global_zero:
            return
        rows = [*_model_rows(pl_module), *_device_rows(trainer)]
        last = [*self._step_rows(trainer), *self._place_rows(trainer)]
        data = []
        if self._loader is not None and trainer.datamodule is not None:
            dataset = parse_dataset(trainer.datamodule.cfg.train_ds, "data.train_ds")
            groups = _groups_of(dataset, self._loader, number_of_data_ranks(pl_module, trainer.world_size))
            data = [_data_table(groups)]
            last = [*_batch_rows(dataset, groups), *last]
        self._print("Training", _table(rows), *data, _table(last))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Add up the tokens of all ranks."""
        if (totals := _totals_here(pl_module)) is not None:
            counted = totals if reads_first(pl_module) else torch.zeros_like(totals)
            self._totals = sum_over_ranks(counted.to(pl_module.device))

    @contextmanager
    def around(self, trainer: Trainer, model: LightningModule, best: BestCheckpoint) -> Iterator[None]:
        """Print the last table when the block ends, if training has started in it.

        Args:
            trainer: which the block has fit the model, and export it.
            model: that is trained.
            best: a callback of the trainer.
        """
        try:
            yield
        except BaseException as error:
            title = "Interrupted" if isinstance(error, (SystemExit, KeyboardInterrupt)) else "Failed"
            try:
                self._print_end(title, trainer, model, best)
            except Exception:  # the training's own error matters more
                logging.getLogger(__name__).exception("The summary of the run could not be printed.")
            raise
        self._print_end("Trained", trainer, model, best)

    def _print_end(self, title: str, trainer: Trainer, model: LightningModule, best: BestCheckpoint) -> None:
        if not (self._has_started and trainer.is_global_zero):
            return
        self.progress.stop()
        rows = list(self._end_rows(trainer, model))
        if found := best.find():
            rows.append(("best", f"{found['monitor']} {found['score']:.4f}: {_shown(found['path'])}"))
        if title != "Trained" or _out_of_time(trainer):
            rows += self._resume_rows(trainer)
        if self.log_file is not None:
            rows.append(("log", _shown(self.log_file)))
        folder = self.cfg.get("export_dir") if self.exported else None
        if folder:
            rows.append(("exported", f"{_shown(folder)} ({self.exported})"))
        self._print(title, _table(rows))
        if folder:  # lines to copy, which are not folded
            commands = _next_commands(folder, self._targets(trainer), self._has_text(trainer))
            print("Next:", *commands, sep="\n  ", flush=True)  # noqa: T201

    def _end_rows(self, trainer: Trainer, model: LightningModule) -> Rows:
        steps, planned = trainer.global_step - self.progress.first_step, self.progress.planned_steps(trainer)
        of = "" if planned is None else f" of {planned:,}"
        before = f", {steps:,} of them in this run" if self.progress.first_step else ""
        yield "steps", f"{trainer.global_step:,}{of}{before}{self._reason_of_end(trainer)}"
        yield "epochs", f"{trainer.current_epoch:,}"
        seconds, validation = self.progress.training_seconds, self.progress.validation_seconds
        pace = f" ({steps / seconds:.3g} steps/s)" if seconds and steps else ""
        yield "time", f"{_duration(seconds)} of training{pace}, {_duration(validation)} of validation"
        where, totals = "", self._totals
        if totals is None and (totals := _totals_here(model)) is not None and trainer.world_size > 1:
            where = f" (rank 0 of {trainer.world_size})"
        for name, (tokens, examples) in zip(MODALITIES, () if totals is None else totals.tolist(), strict=False):
            if examples and seconds:
                rates = f"{tokens / seconds:,.0f} target tokens/s, {examples / seconds:,.1f} examples/s"
                yield name, f"{examples:,.0f} examples, {rates}{where}"
        if self._loader is not None:
            yield "skipped", "\n".join(self._skipped())

    def _reason_of_end(self, trainer: Trainer) -> str:
        if trainer.global_step == self.progress.planned_steps(trainer):
            return ""
        if _out_of_time(trainer):
            return ", out of time (max_time)"
        stops_early = any(isinstance(callback, EarlyStopping) for callback in trainer.callbacks)
        return ", stopped early: the score no longer improved" if stops_early and trainer.should_stop else ""

    def _resume_rows(self, trainer: Trainer) -> Rows:
        last = getattr(trainer.checkpoint_callback, "last_model_path", None)
        if not (last and os.path.exists(last)):
            yield "saved", "no checkpoint in this run"
            return
        yield "saved", _shown(last)
        manager = self.cfg.get("exp_manager")
        if manager is not None and manager.get("resume_if_exists"):
            yield "resume", "run the same command"
        elif manager is not None:
            override = shlex.quote(f'++exp_manager.resume_from_checkpoint="{_shown(last)}"')
            yield "resume", f"add {override} to the command"

    def _skipped(self) -> Iterator[str]:
        counts = self._loader.skipped_records.counts.most_common()
        if not counts:
            yield "no record"
        for (source, cause), count in counts[:CAUSES]:
            yield f"{count:,} x {cause}: {_shown(source)}"
        if rest := counts[CAUSES:]:
            yield f"{sum(count for _, count in rest):,} for other causes"

    def _targets(self, trainer: Trainer) -> list[str]:
        """Languages that the data translates to, as far as its sources name them."""
        if trainer.datamodule is None or not getattr(trainer.datamodule, "cfg", {}).get("train_ds"):
            return []
        sources = parse_dataset(trainer.datamodule.cfg.train_ds, "data.train_ds").sources
        return list(dict.fromkeys(target for source in sources for _, target in _directions(source) if target))

    def _has_text(self, trainer: Trainer) -> bool:
        totals = self._totals if self._totals is not None else _totals_here(trainer.lightning_module)
        return totals is None or bool(totals[MODALITIES.index("text"), 1] > 0)

    def _step_rows(self, trainer: Trainer) -> Rows:
        planned, start = self.progress.planned_steps(trainer), ""
        if trainer.global_step:
            start = f", from step {trainer.global_step:,} ({_shown(trainer.ckpt_path)})" if trainer.ckpt_path else ""
        timers = [callback.time_remaining() for callback in trainer.callbacks if isinstance(callback, Timer)]
        limits = [] if planned is None else [f"{planned:,}"]
        limits += [f"at most {_duration(left)}" for left in timers if left is not None]
        yield "steps", f"{', '.join(limits) or 'without end'}{start}"

    def _place_rows(self, trainer: Trainer) -> Rows:
        folder = getattr(trainer.checkpoint_callback, "dirpath", None)
        if folder:
            yield "checkpoints", _shown(folder)
        if self.cfg.get("export_dir"):
            yield "export to", _shown(self.cfg.export_dir)
        if self.log_file is not None:
            yield "log", _shown(self.log_file)
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                yield "watch", f"tensorboard --logdir {shlex.quote(_shown(logger.log_dir).rstrip('/'))}"
            elif isinstance(logger, WandbLogger):
                run = logger.experiment
                yield "watch", f"wandb sync {shlex.quote(_shown(Path(run.dir).parent))}" if run.offline else run.url

    def _print(self, title: str, *parts: Any) -> None:
        console = Console(file=sys.stdout)  # 80 columns where there is no terminal
        with console.capture() as printed:
            console.print(Group(f"[bold]{title}[/bold]", *parts), highlight=False)
        print("\n".join(line.rstrip() for line in printed.get().splitlines()), flush=True)  # noqa: T201


@dataclass
class GroupFacts:
    """A group of the training data, and what its loader knows of it.

    Args:
        config: of the group.
        indexes: of its sources; empty if they are streamed.
        shares: of the examples, one for each source; empty if NeMo samples.
        bins: edges between its buckets.
        batch_sizes: of each bucket, on a rank.
    """

    config: GroupConfig
    indexes: Sequence[LengthIndex] = ()
    shares: Sequence[float] = ()
    bins: Sequence[Any] = ()
    batch_sizes: Sequence[int] = field(default_factory=tuple)


def _groups_of(dataset: DatasetConfig, loader: MultimodalDataLoader, data_ranks: int) -> list[GroupFacts]:
    groups = [GroupFacts(group) for group in dataset.groups]
    for group in groups:
        if isinstance(group.config.bucket_duration_bins, list):
            group.bins = group.config.bucket_duration_bins
        group.batch_sizes = group.config.bucket_batch_size or ()
    batches = loader.dataset
    if isinstance(batches, ScheduledBatches):
        rest = iter(batches.indexes)
        orders = loader.sampler.order.groups
        for group, reader, order in zip(groups, batches.readers, orders, strict=True):
            group.indexes = list(islice(rest, len(group.config.sources)))
            group.bins, group.shares = reader.pipeline.duration_bins or (), order.shares
            group.batch_sizes = [size // data_ranks for size in order.global_batch_sizes or ()]
    elif isinstance(batches, ResumableWorkerBatches):
        for group, plan in zip(groups, batches.plan.groups, strict=True):
            group.bins, group.shares = plan.pipeline.duration_bins or (), plan.shares
    return groups


def _data_table(groups: Sequence[GroupFacts]) -> Table:
    """What the sources hold, added up by group and languages."""
    added: dict[tuple[str, str], list] = {}  # sources, size (None: not known), share
    for group in groups:
        for number, source in enumerate(group.config.sources):
            key = (group.config.name or ("text" if source.is_text else "speech"), _languages(source))
            size = group.indexes[number].size if group.indexes else None
            records = group.indexes[number].num_records if group.indexes else None
            share = group.shares[number] if group.shares else None
            old = added.setdefault(key, [0, 0, Size(), 0.0])
            new = (1, records, size, share)
            added[key] = [None if None in (a, b) else a + b for a, b in zip(old, new, strict=True)]
    shown = list(added.items())
    if len(shown) > DATA_ROWS:
        rest = [values for _, values in shown[DATA_ROWS - 1 :]]
        total = [None if None in values else sum(values[1:], values[0]) for values in zip(*rest, strict=True)]
        shown[DATA_ROWS - 1 :] = [(("others", f"{len(rest)} more pairs"), [*total[:3], None])]
    rows = []
    for (name, languages), (sources, records, size, share) in shown:
        sizes = ["", "", ""]
        if size is not None:
            speech = _duration(size.seconds) if size.seconds else ""
            sizes = [f"{size.examples:,}", speech, _count(size.tokens) if size.tokens else ""]
        of_records = "" if records is None else f"{records:,}"
        rows.append((name, languages, f"{sources:,}", of_records, *sizes, "" if share is None else f"{share:.1%}"))
    titles = ("data", "languages", "sources", "records", "examples", "speech", "tokens", "share")
    known = [number for number in range(len(titles)) if any(row[number] for row in rows)]
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for number in known:
        table.add_column(titles[number], justify="left" if number < 2 else "right", overflow="fold")
    for row in rows:
        table.add_row(*(Text(row[number]) for number in known))
    return table


def _directions(source: Source) -> list[tuple[str, str]]:
    """The language pairs that a source names; a language that only its records name is empty."""
    if source.is_transcription:
        return [(source.source_lang or "", source.source_lang or "")]
    if isinstance(source.paths, Mapping):
        return directions_of(source)
    targets = source.target_lang if isinstance(source.target_lang, list) else [source.target_lang or ""]
    return [(source.source_lang or "", target) for target in targets]


def _languages(source: Source) -> str:
    directions = _directions(source)
    if directions == [("", "")]:
        return "of each record"
    if len(directions) > 2:
        sources, targets = (list(dict.fromkeys(side)) for side in zip(*directions, strict=True))
        if set(sources) == set(targets) and len(directions) == len(sources) * (len(sources) - 1):
            return f"all of {','.join(sources)}"
        return f"{','.join(filter(None, sources)) or '?'} to {','.join(targets)}"
    return ", ".join(f"{one or '?'}-{other or '?'}" for one, other in directions)


def _batch_rows(dataset: DatasetConfig, groups: Sequence[GroupFacts]) -> Rows:
    if len(groups) > 1:
        weights = dataset.sampler_weights
        listed = "" if not weights else ": " + ", ".join(f"{name} {weight:g}" for name, weight in weights.items())
        each = "a batch of each in every step" if dataset.sampler_fusion == "zip" else "a batch of one in every step"
        rare = [group.config for group in groups if group.config.every_n_steps > 1]
        each += "".join(f", of {group.name} once in {group.every_n_steps} steps" for group in rare)
        yield "blend", f"{dataset.sampler_fusion} ({each}){listed}"
    for group in groups:
        config = group.config
        unit = "tokens" if config.use_multimodal_sampling else "s"
        if len(group.bins) and isinstance(group.bins[0], Sequence):
            unit = f"(input x output {unit})" if config.use_multimodal_sampling else f"({unit} x output tokens)"
        limits = [f"{config.batch_tokens:,} tokens"] if config.batch_tokens else []
        limits += [f"{config.batch_duration:g} s"] if config.batch_duration else []
        limits += [_size_of(config)] if config.batch_size and not config.bucket_batch_size else []
        if group.batch_sizes:
            limits = [f"{_several(list(dict.fromkeys(group.batch_sizes)))} examples"]
        if config.batch_ratio is not None:
            limits.append(f"{config.batch_ratio:g} for each of {leading_group(dataset.groups).name}")
        buckets = len(group.bins) + (not config.bucket_batch_size)
        edges = f", {buckets} bucket{'s' * (buckets != 1)} at {_several(group.bins)} {unit}" if len(group.bins) else ""
        yield f"{config.name} batch".lstrip(), f"{' or '.join(limits) or 'of a size that NeMo sets'}{edges}"


def _size_of(config: GroupConfig) -> str:
    if not config.packing:
        return f"{config.batch_size:,} examples"
    sizes = config.row_tokens if isinstance(config.row_tokens, list) else [config.row_tokens]
    return f"{config.batch_size:,} packed rows of {' and '.join(f'{size:,}' for size in sizes)} positions"


def _several(values: Sequence[Any]) -> str:
    """Values in a list; of many, the first and the last."""
    shown = [
        f"{value:.4g}" if isinstance(value, (int, float)) else " x ".join(f"{one:.4g}" for one in value)
        for value in values
    ]
    return ", ".join(shown) if len(shown) <= 6 else f"{', '.join(shown[:2])}, ..., {', '.join(shown[-2:])}"


def _model_rows(model: LightningModule) -> Rows:
    # FSDP2 gives a model a class of its own.
    yield "model", next(kind for kind in type(model).__mro__ if not issubclass(kind, FSDPModule)).__name__
    cfg = getattr(model, "cfg", None) or {}
    if (llm := getattr(model, "llm", None)) is not None:
        name = cfg.get("pretrained_llm")
        yield "language model", f"{type(unwrap_peft(llm)).__name__}{f', {_shown(name)}' if name else ''}"
    if (encoder := getattr(getattr(model, "perception", None), "encoder", None)) is not None:
        name = cfg.get("pretrained_asr")
        yield "speech encoder", f"{type(encoder).__name__}{f', {_shown(name)}' if name else ''}"
    teachers = {id(p) for p in getattr(model, "teachers", torch.nn.Module()).parameters()}
    parameters = [p for p in model.parameters() if id(p) not in teachers]
    total, trained = (sum(p.numel() for p in parameters if p.requires_grad or not only) for only in (False, True))
    yield "parameters", f"{_count(total)}, of which {_count(trained)} are trained ({trained / max(total, 1):.1%})"
    if objectives := getattr(model, "objectives", ()):
        yield "objectives", ", ".join(f"{objective.name} (weight {objective.weight:g})" for objective in objectives)


def _device_rows(trainer: Trainer) -> Rows:
    device = trainer.strategy.root_device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type.upper()
    nodes = f" on {trainer.num_nodes} nodes" if trainer.num_nodes > 1 else ""
    strategy = type(trainer.strategy).__name__.removesuffix("Strategy")
    if isinstance(trainer.strategy, ModelParallelStrategy):
        mesh = trainer.strategy.device_mesh
        sizes = (f"{name} {size}" for name, size in zip(mesh.mesh_dim_names, mesh.shape, strict=True) if size > 1)
        strategy += f" ({', '.join(sizes).replace('_', ' ')})"
    accumulates = trainer.accumulate_grad_batches
    batches = f", {accumulates} batches a step" if accumulates > 1 else ""
    yield "devices", f"{trainer.world_size} x {name}{nodes}, {strategy}, precision {trainer.precision}{batches}"


def _out_of_time(trainer: Trainer) -> bool:
    left = [callback.time_remaining() for callback in trainer.callbacks if isinstance(callback, Timer)]
    return any(seconds is not None and seconds <= 0 for seconds in left)


def _next_commands(folder: str, targets: Sequence[str], has_text: bool) -> Iterator[str]:
    model, what = shlex.quote(_shown(folder)), '"..."' if has_text else "RECORDING.wav"
    yield f"nemo-emmett translate --model {model} --to {targets[0] if targets else 'LANGUAGE'} {what}"
    yield f"nemo-emmett evaluate {model} TEST_SETS.yaml"


def _totals_here(model: LightningModule) -> Tensor | None:
    return model.trained_totals() if hasattr(model, "trained_totals") else None


def _table(rows: Sequence[tuple[str, str]]) -> Table:
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in rows:
        table.add_row(name, Text(value))  # not markup, which brackets in a path would be
    return table


def _shown(path: Any) -> str:
    """A path in the working folder relative to it; anything else as it is."""
    text, here = str(path), os.getcwd() + os.sep
    return text.removeprefix(here)


def _count(number: float) -> str:
    for limit, suffix in ((1e9, " G"), (1e6, " M"), (1e5, " k")):
        if number >= limit:
            return f"{number / (1e3 if suffix == ' k' else limit):.3g}{suffix}"
    return f"{number:,.0f}"


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 3600 else f"{seconds / 3600:,.1f} h"
