"""What a user's data holds, its weights, bins and batch sizes, by its length indexes."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from nemo.utils import logging
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from transformers import AutoConfig, PreTrainedConfig

from nemo_emmett import plugin
from nemo_emmett.data.bucketing.length_stats import as_nemo_writes, measure, solve
from nemo_emmett.data.checks import check_data_config
from nemo_emmett.data.config.dataset_config import GroupConfig, parse_dataset
from nemo_emmett.data.config.section import config_of, plain
from nemo_emmett.data.lengths.building import open_length_indexes
from nemo_emmett.data.lengths.index import LengthIndex
from nemo_emmett.data.readers.examples import ExampleKind
from nemo_emmett.data.sampling.tolerance import KEYS_OF_FUNCTION
from nemo_emmett.errors import ConfigError, ModelError
from nemo_emmett.init.choices import Choices
from nemo_emmett.init.data_files import DataFile
from nemo_emmett.init.writing import NUM_SUB_BUCKETS, RecipeContent, RecipeGroup, RecipeSource, recipe_text
from nemo_emmett.models.perception import read_asr_config
from nemo_emmett.models.targets import first_line
from nemo_emmett.oomptimizer.memory import parse_memory
from nemo_emmett.planning.architecture import architecture_only
from nemo_emmett.planning.bins_and_sizes import examples_per_bucket
from nemo_emmett.planning.commands import SAFETY_MARGIN
from nemo_emmett.planning.fake_training import fake_training
from nemo_emmett.planning.index_report import skipped_of
from nemo_emmett.planning.planner import Planner
from nemo_emmett.planning.recipe import without_training
from nemo_emmett.runner import compose_recipe
from nemo_emmett.training import build_training

EXAMPLES_PER_BUCKET, MOST_BUCKETS = 500, 15
"""A group gets a range of input lengths for each so many examples, at most so many."""

SECONDS_PER_BATCH, TOKENS_PER_BATCH, MOST_EXAMPLES = 120, 4096, 256
"""The longest batch of speech and of text (source and translation), padding included, where no memory is named; and the
largest number of its examples."""

MEMORY_FRACTION = 0.9
"""Of the device, that a step may take: the default of ``nemo-emmett plan``."""

STEPS_OF_AN_INTERVAL = (50, 2000)
"""Fewest and most steps from one checkpoint and validation to the next."""

OF_GROUP = {True: "audio", False: "text"}
"""Names of the groups of speech and text."""


@dataclass(frozen=True)
class MeasuredSource:
    """What is said of a source in the summary.

    Args:
        name: of its files.
        languages: source and target.
        records: read, good or bad.
        examples: that it makes.
        hours: of speech.
        tokens: of text.
        skipped: records by cause, with where the first of them are.
    """

    name: str
    languages: tuple[str, str]
    records: int
    examples: int
    hours: float
    tokens: int
    skipped: Mapping[str, int]

    @property
    def holds(self) -> str:
        """Its size in words."""
        size = f"{self.hours:.3g} hours" if self.hours else f"{self.tokens:,} tokens"
        return f"{size}, {self.examples:,} examples"


@dataclass(frozen=True)
class Measured:
    """A recipe's content, filled in, and what its data holds."""

    content: RecipeContent
    train: tuple[MeasuredSource, ...]
    dev: tuple[MeasuredSource, ...]


def measure_choices(choices: Choices, console: Console) -> Measured:
    """Measure the data, and find weights, bins and batch sizes.

    Args:
        choices: the user's.
        console: shows the search for batch sizes.

    Raises:
        EmmettError: if a pretrained part cannot be read, or nothing of a file can be used.
    """
    plugin.register()
    content = _draft(choices)
    cfg = _composed(content)
    tokenizer, defaults = _of_model(cfg)
    content = replace(content, prompt_format=defaults["prompt_format"])
    data = {name: {**defaults, **plain(cfg.data[name])} for name in ("train_ds", "validation_ds") if name in cfg.data}
    for name, section in data.items():
        check_data_config(section, place=f"data.{name}")
    dataset = parse_dataset(config_of(data["train_ds"]), "data.train_ds")
    indexes = open_length_indexes(dataset.groups, tokenizer, ExampleKind.TRANSLATION)
    groups, sources = [], []
    for drafted, group in zip(content.groups, dataset.groups, strict=True):
        files = [file for file in choices.train if file.is_speech == drafted.is_speech]
        of_group = [_measured(file, choices, indexes[s.place]) for file, s in zip(files, group.sources, strict=True)]
        groups.append(_with_bins(drafted, group, of_group, tokenizer, indexes))
        sources += of_group
    dev, of_dev = _dev_sets(content, choices, data.get("validation_ds"), tokenizer)
    content = replace(content, groups=tuple(groups), dev=dev)
    if choices.gpu_memory is not None:
        content = _planned(content, choices.gpu_memory, console)
    return Measured(_with_steps(content), tuple(sources), of_dev)


# The model


def _draft(choices: Choices) -> RecipeContent:
    """The recipe's content before the data is measured."""
    llm = _llm_config(choices.backbone)
    target = choices.model or ("salm_t5" if llm.is_encoder_decoder else "salm_gpt")
    if (target == "salm_t5") != llm.is_encoder_decoder:
        wanted, given = ("a decoder-only model", "an encoder-decoder")[:: 1 if llm.is_encoder_decoder else -1]
        raise ConfigError(
            f"--model: '{target}' is built on {wanted}, and '{choices.backbone}' is {given} ({llm.model_type}); leave "
            "it out, or choose another backbone."
        )
    width = None
    if choices.encoder is not None:
        with logging.temp_verbosity(logging.ERROR):
            width = read_asr_config(choices.encoder)["encoder"]["d_model"]
    return RecipeContent(
        target,
        choices.backbone,
        choices.encoder,
        width,
        getattr(llm, "num_attention_heads", None),
        tuple(_drafted(name, files, choices) for name, files in _by_modality(choices.train, "{}")),
        tuple(_drafted(name, files, choices) for name, files in _by_modality(choices.dev, "dev_{}")),
    )


def _llm_config(backbone: str) -> PreTrainedConfig:
    try:
        return AutoConfig.from_pretrained(backbone)
    except Exception as error:  # of transformers, the network, or a file
        raise ModelError(
            f"--backbone: the config of '{backbone}' cannot be read ({first_line(error)}); give the folder of a "
            "Hugging Face model, or a name that can be fetched from here."
        ) from error


def _by_modality(files: Sequence[DataFile], name: str) -> list[tuple[str, list[DataFile]]]:
    found = [(is_speech, [file for file in files if file.is_speech == is_speech]) for is_speech in (True, False)]
    return [(name.format("speech" if "dev" in name and s else OF_GROUP[s]), of_kind) for s, of_kind in found if of_kind]


def _drafted(name: str, files: Sequence[DataFile], choices: Choices) -> RecipeGroup:
    sources = tuple(RecipeSource(choices.entry(file)) for file in files)
    return RecipeGroup(name, files[0].is_speech, sources)


def _composed(content: RecipeContent) -> DictConfig:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "draft.yaml")
        path.write_text(recipe_text(content, path), encoding="utf-8")
        return compose_recipe(str(path))


def _of_model(cfg: DictConfig) -> tuple[Any, dict[str, Any]]:
    """The model's tokenizer, and the keys that it sets in its data."""
    section = OmegaConf.to_container(cfg.model, resolve=True)
    model_class = plugin.find_model(section.pop("_target_"))
    with logging.temp_verbosity(logging.ERROR), fake_training():
        model = model_class(architecture_only(section))
    return model.tokenizer, dict(model.data_defaults)


# The data


def _measured(file: DataFile, choices: Choices, index: LengthIndex) -> MeasuredSource:
    languages = choices.languages_of(file)
    return MeasuredSource(
        file.name,
        tuple(language or "by record" for language in languages),
        index.num_records,
        index.size.examples,
        index.size.hours,
        index.size.tokens,
        dict(skipped_of(index)),
    )


def _with_bins(
    drafted: RecipeGroup,
    group: GroupConfig,
    measured: Sequence[MeasuredSource],
    tokenizer: Any,
    indexes: Mapping[str, LengthIndex | None],
) -> RecipeGroup:
    """The group with the weights of its sources, the bins of least padding, and batch sizes by the rule."""
    lengths = measure(group, tokenizer, ExampleKind.TRANSLATION, two_dimensional=True, indexes=indexes)
    num_buckets = min(max(len(lengths.inputs) // EXAMPLES_PER_BUCKET, 1), MOST_BUCKETS)
    bins = solve(lengths, num_buckets, NUM_SUB_BUCKETS if len(lengths.inputs) >= EXAMPLES_PER_BUCKET else 1)
    counts = examples_per_bucket(bins, lengths).astype(int)
    if drafted.is_speech:
        limit, of_example = SECONDS_PER_BATCH, [seconds for seconds, _ in bins]
        what = f"{limit} seconds of speech"
    else:
        limit, of_example = TOKENS_PER_BATCH, [sum(pair) for pair in bins]
        what = f"{limit:,} tokens of source and translation"
    sizes = [max(1, min(int(limit // length), MOST_EXAMPLES)) for length in of_example]
    rule = (
        f"By a rule, not by the memory: a batch has at most {what}, padding included,",
        "and no more examples than its bucket. `nemo-emmett plan` and `oomptimize` find the largest that fit.",
    )
    entries = [source.entry for source in drafted.sources]
    if len(entries) > 1:
        weights = [source.hours if drafted.is_speech else source.tokens for source in measured]
        entries = [{**e, "weight": float(f"{w:.4g}")} for e, w in zip(entries, weights, strict=True)]
    return replace(
        drafted,
        sources=tuple(RecipeSource(e, s.holds) for e, s in zip(entries, measured, strict=True)),
        bins=as_nemo_writes(bins),
        sizes=_capped(sizes, counts),
        rule=rule,
        examples=len(lengths.inputs),
        counts=tuple(counts.tolist()),
        left_out={KEYS_OF_FUNCTION.get(name, name): count for name, count in lengths.dropped.items() if count},
    )


def _capped(sizes: Sequence[int], counts: Sequence[int]) -> list[int]:
    """Batch sizes that are no larger than their buckets: a larger batch would hold an example twice."""
    return [max(1, min(int(size), int(count))) for size, count in zip(sizes, counts, strict=True)]


def _dev_sets(
    content: RecipeContent, choices: Choices, section: dict[str, Any] | None, tokenizer: Any
) -> tuple[tuple[RecipeGroup, ...], tuple[MeasuredSource, ...]]:
    """The validation sets with what they hold."""
    sets, sources = [], []
    for drafted in content.dev:
        common = {key: value for key, value in section.items() if key != "datasets"}
        place = f"data.validation_ds.datasets.{drafted.name}"
        dataset = parse_dataset(config_of({**common, **section["datasets"][drafted.name]}), place)
        indexes = open_length_indexes(dataset.groups, tokenizer, ExampleKind.TRANSLATION)
        files = [file for file in choices.dev if file.is_speech == drafted.is_speech]
        places = [source.place for group in dataset.groups for source in group.sources]
        measured = [_measured(file, choices, indexes[place]) for file, place in zip(files, places, strict=True)]
        entries = [source.entry for source in drafted.sources]
        holds = tuple(RecipeSource(e, s.holds) for e, s in zip(entries, measured, strict=True))
        sets.append(replace(drafted, sources=holds))
        sources += measured
    return tuple(sets), tuple(sources)


# Batch sizes and steps


def _planned(content: RecipeContent, memory: str, console: Console) -> RecipeContent:
    """The content with the batch sizes that fit into the memory of a device."""
    cfg = _composed(replace(content, groups=tuple(replace(group, sizes=None) for group in content.groups)))
    budget = int(parse_memory(memory, "--gpu-memory") * MEMORY_FRACTION)
    title = f"Batch sizes planned for {memory}"
    profile = Planner(without_training(cfg), build_training, budget, SAFETY_MARGIN, 0.5, title, console).search()
    rule = (
        f"By a plan for {memory}, of which a step takes at most {MEMORY_FRACTION:.0%} (`nemo-emmett plan`);",
        "no batch has more examples than its bucket.",
    )
    groups = [
        replace(group, sizes=_capped(profile.groups[group.name].bucket_batch_size, group.counts), rule=rule)
        for group in content.groups
    ]
    return replace(content, groups=tuple(groups))


def _with_steps(content: RecipeContent) -> RecipeContent:
    """The content with the steps of a pass over each group; an interval is a pass over that which takes most."""
    steps = {group.name: float(np.divide(group.counts, group.sizes).sum()) for group in content.groups}
    fewest, most = STEPS_OF_AN_INTERVAL
    return replace(content, pass_steps=steps, interval=min(max(math.ceil(max(steps.values())), fewest), most))
