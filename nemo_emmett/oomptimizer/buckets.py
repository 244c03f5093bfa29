"""The buckets of a recipe's training data, and the worst batch that each of them may give.

A ``train_ds`` has one group of data, or several (NeMo's ``multi_config``). A group's ``bucket_duration_bins`` are in
seconds or in tokens, in one or two dimensions; what they bound is told here once, as the :class:`Shape` of the longest
example of a bucket.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from omegaconf import DictConfig, OmegaConf

from nemo_emmett.errors import ConfigError
from nemo_emmett.oomptimizer.profile import ONLY_GROUP, Bin, as_bins, shown

TEXT_TYPES = frozenset({"txt", "txt_jsonl", "txt_pair", "parallel_text", "nemo_sft_jsonl"})
"""Types of sources (NeMo's ``input_cfg``) that hold no speech."""

CONVERSATION_TYPES = ("conversation", "share_gpt")
"""Parts of the names of types whose examples are conversations, which may hold a recording and no other words."""

_TASK_KEYS = ("source_lang", "target_lang", "context", "system_prompt")

AUTO_BINS = "auto"
"""Bins that are solved for when the data is opened."""

MUX = "mux"
"""``sampler_fusion: mux``: groups are but shares of one stream, whose bins stand above them."""

TOKENS_PER_SECOND = 12.0
"""Output tokens beside a second of speech where the bins do not bound them (the default of NeMo's OOMptimizer)."""


@dataclass(frozen=True)
class Task:
    """What a source asks for, as far as its config says it; where that is None, its records may say anything.

    Args:
        source_lang: language of the speech or the text.
        target_lang: language of the answer.
        context: the instruction, in place of one that names the languages.
        system_prompt: of chat formats.
    """

    source_lang: str | None = None
    target_lang: str | None = None
    context: str | None = None
    system_prompt: str | None = None


@dataclass(frozen=True)
class Contents:
    """What a bucket's bin bounds, and what the recipe says of its examples.

    Args:
        seconds_per_token: of speech, where bins are in tokens; 0 where they are in seconds.
        two_dimensional: the bin bounds input and output each by itself.
        tasks: of the group's sources of speech, or of text where there is nothing else.
        conversations: some examples may be conversations that bring their own prompt.
        text: examples without speech may be in the same bins as speech.
    """

    seconds_per_token: float = 0.0
    two_dimensional: bool = False
    tasks: tuple[Task, ...] = (Task(),)
    conversations: bool = False
    text: bool = False


@dataclass(frozen=True)
class Shape:
    """The longest example of a bucket.

    Args:
        modality: ``audio`` or ``text``.
        seconds: of speech; 0 for text.
        input_tokens: of the context; for speech, of what stands beside it in the prompt (0: the prompt alone).
        output_tokens: of the answer.
        total: the bin bounds input and output together: a decoder-only model's sequence has ``input_tokens``
            positions, outputs included.
        contents: what else is known of the bucket's examples; shapes are equal without regard to it.
    """

    modality: str
    seconds: float
    input_tokens: int
    output_tokens: int
    total: bool = False
    contents: Contents = field(default=Contents(), compare=False, repr=False)


@dataclass(frozen=True)
class Bucket:
    """One bucket of a group.

    Args:
        group: name of the group of data; ``ONLY_GROUP`` where there is but one.
        index: its place among the group's bins, from 0.
        bin: the bin, as the recipe has it.
        shape: of its longest example.
    """

    group: str
    index: int
    bin: Bin
    shape: Shape

    def __str__(self) -> str:
        where = f"{self.group}: " if self.group else ""
        return f"{where}bucket {self.index + 1} {shown(self.bin)}"


@dataclass(frozen=True)
class Group:
    """A group of data that is bucketed by itself.

    Args:
        name: its key in ``train_ds``; ``ONLY_GROUP`` where there is but one.
        config: its part of the recipe; batch sizes are written into it.
        buckets: in rising order; one, of a group with one batch size.
        limit_key: of a group with one batch size (``batch_size``, no buckets), the key that bounds its examples:
            ``max_duration`` or ``max_tokens``; else None.
    """

    name: str
    config: DictConfig
    buckets: tuple[Bucket, ...]
    limit_key: str | None = None

    @property
    def bins(self) -> tuple[Bin, ...]:
        """The bins, as the recipe has them."""
        return tuple(bucket.bin for bucket in self.buckets)

    @property
    def modality(self) -> str:
        """``audio`` or ``text``."""
        return self.buckets[0].shape.modality


def read_groups(
    train_ds: DictConfig,
    where: str = "train_ds",
    *,
    token_equivalent_duration: float | None = None,
    tokens_per_second: float = TOKENS_PER_SECOND,
) -> dict[str, Group]:
    """The groups of a ``train_ds`` by name, each with its buckets.

    Args:
        train_ds: of a recipe.
        where: its place in the recipe, for messages.
        token_equivalent_duration: seconds of speech in a token, where the recipe leaves that to the model.
        tokens_per_second: of output, for one-dimensional bins in seconds.

    Raises:
        ConfigError: if a group has neither bins nor one ``batch_size`` for examples of a bounded length, bins that do
            not rise or mix one and two dimensions, or bins in tokens for speech without a
            ``token_equivalent_duration``.
    """
    return {
        name: _read_group(name, config, train_ds, _place(where, name), token_equivalent_duration, tokens_per_second)
        for name, config in configs_of_groups(train_ds).items()
    }


def configs_of_groups(train_ds: DictConfig) -> dict[str, DictConfig]:
    """The configs of a ``train_ds``'s groups by name; itself under ``ONLY_GROUP`` where it has none."""
    if not train_ds.get("multi_config", False) or train_ds.get("sampler_fusion") == MUX:
        return {ONLY_GROUP: train_ds}
    return _groups_in(train_ds)


def _groups_in(train_ds: DictConfig) -> dict[str, DictConfig]:
    return {
        str(name): group
        for name, group in train_ds.items()
        if isinstance(group, DictConfig) and name != "sampler_weights"
    }


def is_zip(train_ds: DictConfig) -> bool:
    """Whether each step holds a batch of every group."""
    return bool(train_ds.get("multi_config", False)) and train_ds.get("sampler_fusion", "round_robin") == "zip"


def bins_of(config: DictConfig, where: str) -> tuple[Bin, ...] | None:
    """The checked bins of a group; None where it has none."""
    bins = config.get("bucket_duration_bins")
    if bins is None:
        return None
    if bins == AUTO_BINS:
        raise ConfigError(
            f"{where}.bucket_duration_bins: 'auto' is not solved for by this datamodule; write the bins "
            "(`nemo-emmett bins` finds them), or use nemo_emmett.data.MultimodalDataModule."
        )
    return as_bins(OmegaConf.to_container(bins, resolve=True) if OmegaConf.is_config(bins) else bins, where)


def _read_group(
    name: str,
    config: DictConfig,
    train_ds: DictConfig,
    where: str,
    token_equivalent_duration: float | None,
    tokens_per_second: float,
) -> Group:
    bins, limit_key = bins_of(config, where), None
    if bins is None and (config.get("use_bucketing", False) or config.get("batch_size") is None):
        raise ConfigError(
            f"{where}.bucket_duration_bins: is missing; OOMptimizer finds a batch size for each bucket, so write the "
            "bins (`nemo-emmett bins` finds them)."
        )
    modality = "text" if _is_text(config, where) else "audio"
    in_tokens = bool(config.get("use_multimodal_sampling", False))  # which groups do not inherit
    if modality == "text" and not in_tokens:
        raise ConfigError(
            f"{where}.use_multimodal_sampling: is false, so lengths are in seconds, but the group holds text alone; "
            "set it to true."
        )
    frame = config.get("token_equivalent_duration", train_ds.get("token_equivalent_duration"))
    frame = frame or token_equivalent_duration
    if modality == "audio" and in_tokens and not frame:
        raise ConfigError(
            f"{where}.token_equivalent_duration: is missing; lengths are in tokens, so the seconds of speech in a "
            "token must be known."
        )
    if bins is None:
        limit_key = "max_tokens" if in_tokens else "max_duration"
        bins = (_longest_of_one_size(config, limit_key, where),)
    total = in_tokens and bool(config.get("measure_total_length", True))
    measure = _Measure(modality, float(frame or 0), in_tokens, total, tokens_per_second, _contents(config, where))
    buckets = tuple(Bucket(name, index, item, measure.shape(item)) for index, item in enumerate(bins))
    return Group(name, config, buckets, limit_key)


def _longest_of_one_size(config: DictConfig, limit_key: str, where: str) -> float:
    """The longest example of a group whose batches are all of one size, by the config's own limit."""
    longest = config.get(limit_key)
    if not isinstance(longest, (int, float)) or isinstance(longest, bool) or not 0 < longest < math.inf:
        wrong = "is missing" if longest is None else f"{longest!r} is no bound"
        unit = "tokens" if limit_key == "max_tokens" else "seconds"
        raise ConfigError(
            f"{where}.{limit_key}: {wrong}; OOMptimizer finds this group's one batch_size for its longest example, so "
            f"give the most {unit} that an example may have."
        )
    return float(longest)


@dataclass(frozen=True)
class _Measure:
    """How a group measures its examples."""

    modality: str
    seconds_per_token: float
    in_tokens: bool
    total: bool
    tokens_per_second: float
    contents: Contents

    def shape(self, item: Bin) -> Shape:
        if isinstance(item, tuple):
            longest, outputs, total = item[0], math.floor(item[1]), False
        elif self.in_tokens:
            # One number bounds the input, or both together: neither can be longer, so both are taken to be as long.
            longest, outputs, total = item, math.floor(item), self.total
        else:
            longest, outputs, total = item, math.ceil(item * self.tokens_per_second), False
        contents = replace(
            self.contents,
            seconds_per_token=self.seconds_per_token if self.in_tokens else 0.0,
            two_dimensional=isinstance(item, tuple),
        )
        if self.modality == "text":
            return Shape("text", 0.0, math.floor(longest), outputs, total, contents)
        # As if all of it were speech; how much the prompt leaves of it, a model's adapter knows.
        seconds = longest * self.seconds_per_token if self.in_tokens else longest
        return Shape("audio", seconds, math.floor(longest) if total else 0, outputs, total, contents)


def _is_text(config: DictConfig, where: str) -> bool:
    """Whether all sources of a group surely hold text alone."""
    types = [str(entry.get("type")) for each in _members(config) for entry in _sources(each.get("input_cfg"), where)]
    return bool(types) and all(kind in TEXT_TYPES for kind in types)


def _members(config: DictConfig) -> list[DictConfig]:
    """The configs that hold a group's sources."""
    return list(_groups_in(config).values()) if config.get("sampler_fusion") == MUX else [config]


def _contents(config: DictConfig, where: str) -> Contents:
    """What a group's sources hold, as far as the recipe says it."""
    inherited = _said(config, {})
    found = [
        said for each in _members(config) for said in _described(each.get("input_cfg"), where, _said(each, inherited))
    ] or [(None, inherited)]
    of_speech = [said for kind, said in found if kind not in TEXT_TYPES]
    tasks = dict.fromkeys(task for said in of_speech or [said for _, said in found] for task in _tasks(said))
    kinds = [str(kind) for kind, _ in found]
    return Contents(
        tasks=tuple(tasks),
        conversations=any(any(part in kind for part in CONVERSATION_TYPES) for kind in kinds),
        text=any(kind in TEXT_TYPES for kind in kinds),
    )


def _described(input_cfg: Any, where: str, said: Mapping) -> Iterator[tuple[Any, Mapping]]:
    """The type of each source, and what it and the groups around it say of its examples."""
    for entry in _entries(input_cfg, where):
        own = _said(entry, said)
        if entry.get("type") == "group":
            yield from _described(entry.get("input_cfg"), where, own)
        else:
            yield entry.get("type"), own


def _said(config: Mapping, inherited: Mapping) -> dict[str, Any]:
    """Tags of an outer group win, as NeMo attaches them last; keys are those of the innermost."""
    tags = {**(config.get("tags") or {}), **inherited.get("tags", {})}
    keys = {name: config[name] for name in _TASK_KEYS if config.get(name) is not None}
    return {**inherited, **keys, **{name: tags[name] for name in _TASK_KEYS if tags.get(name)}, "tags": tags}


def _tasks(said: Mapping) -> Iterator[Task]:
    targets = said.get("target_lang")
    for target in [targets] if targets is None or isinstance(targets, str) else targets:
        task = {name: said.get(name) for name in _TASK_KEYS} | {"target_lang": target}
        yield Task(**{name: None if value is None else str(value) for name, value in task.items()})


def _entries(input_cfg: Any, where: str) -> Sequence[Mapping]:
    if isinstance(input_cfg, str):
        try:
            input_cfg = OmegaConf.load(input_cfg)
        except OSError as error:
            raise ConfigError(f"{where}.input_cfg: {input_cfg} cannot be read: {error.strerror}.") from error
    return input_cfg or ()


def _sources(input_cfg: Any, where: str) -> Iterator[Mapping]:
    for entry in _entries(input_cfg, where):
        if entry.get("type") == "group":
            yield from _sources(entry.get("input_cfg"), where)
        else:
            yield entry


def _place(where: str, name: str) -> str:
    return f"{where}.{name}" if name else where
