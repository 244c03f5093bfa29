"""The buckets of a recipe's training data, and the worst batch that each of them may give.

A ``train_ds`` has one group of data, or several (NeMo's ``multi_config``). A group's ``bucket_duration_bins`` are in
seconds or in tokens, in one or two dimensions; here they become the :class:`Shape` of the longest example of a bucket.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

from omegaconf import DictConfig, OmegaConf

from nemo_emmett.errors import ConfigError
from nemo_emmett.oomptimizer.profile import LIMIT_KEYS, ONLY_GROUP, ROW_TOKENS, Bin, RowTokens, as_bins, shown
from nemo_emmett.typed_config import Positive, Switch, is_number, parse_section, parse_value

TEXT_TYPES = frozenset({"txt", "txt_jsonl", "txt_pair", "parallel_text", "nemo_sft_jsonl"})
"""Types of sources (NeMo's ``input_cfg``) that hold no speech."""

CONVERSATION_TYPES = ("conversation", "share_gpt")
"""Parts of the names of types whose examples are conversations, which may hold a recording and no text."""

_TASK_KEYS = ("source_lang", "target_lang", "context", "system_prompt")

AUTO_BINS = "auto"
"""Bins that are solved for when the data is opened."""

MUX = "mux"
"""``sampler_fusion: mux``: groups are mixed into one stream of examples, whose bins are keys of ``train_ds``."""

TOKENS_PER_SECOND = 12.0
"""Output tokens per second of speech where the bins do not bound them (the default of NeMo's OOMptimizer)."""


@dataclass(frozen=True)
class Task:
    """What a source asks the model for, as far as its config gives it; None: each of its records may give its own.

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
    """What a bucket's bin bounds, and what the recipe gives of its examples.

    Args:
        seconds_per_token: of speech, where bins are in tokens; 0 where they are in seconds.
        two_dimensional: the bin bounds input and output separately.
        tasks: of the group's sources of speech, or of text if there are no others.
        conversations: some examples may be conversations with their own prompt.
        text: examples without speech may be in the same bins as speech.
        packed: examples share rows; the bin is what a row holds, and the batch size the number of rows.
        batch_seconds: of the recordings of a packed batch, padded; 0: as many as its rows have, and a quarter more.
    """

    seconds_per_token: float = 0.0
    two_dimensional: bool = False
    tasks: tuple[Task, ...] = (Task(),)
    conversations: bool = False
    text: bool = False
    packed: bool = False
    batch_seconds: float = 0.0


@dataclass(frozen=True)
class Shape:
    """The longest example of a bucket.

    Args:
        modality: ``audio`` or ``text``.
        seconds: of speech; 0 for text.
        input_tokens: of the context; for speech, of the context without the recording (0: the prompt alone).
        output_tokens: of the answer.
        total: the bin bounds input and output together: a decoder-only model's sequence has ``input_tokens``
            positions, outputs included.
        contents: what else is known of the bucket's examples; not compared.
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
        group: name of the group of data; ``ONLY_GROUP`` if there is one.
        index: number of the group's bin, from 0.
        bin: the bin, as the recipe has it.
        shape: of its longest example.
    """

    group: str
    index: int
    bin: Bin
    shape: Shape

    def __str__(self) -> str:
        group = f"{self.group}: " if self.group else ""
        return f"{group}bucket {self.index + 1} {shown(self.bin)}"


@dataclass(frozen=True)
class Group:
    """A group of data with buckets of its own.

    Args:
        name: its key in ``train_ds``; ``ONLY_GROUP`` if there is one.
        config: its section of the recipe; batch sizes are written into it.
        buckets: in ascending order; a single one, of a group with one batch size.
        limit_key: of a group with one batch size (``batch_size``, no buckets), the key that bounds its examples:
            ``max_duration`` or ``max_tokens``; ``row_tokens`` of one whose examples are packed; else None.
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
    place: str = "train_ds",
    *,
    token_equivalent_duration: float | None = None,
    tokens_per_second: float = TOKENS_PER_SECOND,
) -> dict[str, Group]:
    """The groups of a ``train_ds`` by name, each with its buckets.

    Args:
        train_ds: of a recipe.
        place: of this section in the recipe, for messages.
        token_equivalent_duration: seconds of speech in a token, if the recipe leaves that to the model.
        tokens_per_second: of output, for one-dimensional bins in seconds.

    Raises:
        ConfigError: if a group has neither bins nor one ``batch_size`` for examples of a bounded length, bins that do
            not rise or mix one and two dimensions, or bins in tokens for speech without a
            ``token_equivalent_duration``; or if a key that decides how lengths are measured has a wrong value.
    """
    groups = {}
    for name, config in configs_of_groups(train_ds, place).items():
        given = {key.name: config.get(key.name) for key in fields(_LengthKeys)}
        given["token_equivalent_duration"] = config.get(
            "token_equivalent_duration", train_ds.get("token_equivalent_duration")
        )  # the only one that groups inherit
        keys = parse_section(_LengthKeys, given, join_place(place, name))
        frame = keys.token_equivalent_duration or token_equivalent_duration
        groups[name] = _read_group(name, config, keys, join_place(place, name), frame, tokens_per_second)
    return groups


def configs_of_groups(train_ds: DictConfig, place: str = "train_ds") -> dict[str, DictConfig]:
    """The sections of a ``train_ds``'s groups by name; itself under ``ONLY_GROUP`` if it has none."""
    if not _has_groups(train_ds, place) or train_ds.get("sampler_fusion") == MUX:
        return {ONLY_GROUP: train_ds}
    return _groups_in(train_ds)


def is_zip(train_ds: DictConfig, place: str = "train_ds") -> bool:
    """Whether each step holds a batch of every group."""
    return _has_groups(train_ds, place) and train_ds.get("sampler_fusion", "round_robin") == "zip"


def bins_of(config: DictConfig, place: str) -> tuple[Bin, ...] | None:
    """The checked bins of a group; None if it has none."""
    bins = config.get("bucket_duration_bins")
    if bins is None:
        return None
    if bins == AUTO_BINS:
        raise ConfigError(
            f"{place}.bucket_duration_bins: 'auto' is not solved for by this datamodule; write the bins "
            "(`nemo-emmett bins` finds them), or use nemo_emmett.data.MultimodalDataModule."
        )
    return as_bins(OmegaConf.to_container(bins, resolve=True) if OmegaConf.is_config(bins) else bins, place)


def join_place(place: str, group: str) -> str:
    """The place of a group in the recipe; that of ``train_ds`` itself for ``ONLY_GROUP``."""
    return f"{place}.{group}" if group else place


def _has_groups(train_ds: DictConfig, place: str) -> bool:
    return bool(parse_value(Switch | None, train_ds.get("multi_config"), f"{place}.multi_config"))


def _groups_in(train_ds: DictConfig) -> dict[str, DictConfig]:
    return {
        str(name): group
        for name, group in train_ds.items()
        if isinstance(group, DictConfig) and name != "sampler_weights"
    }


@dataclass(frozen=True)
class _LengthKeys:
    """The keys of a group that decide what its bins bound."""

    use_bucketing: Switch | None = None
    use_multimodal_sampling: Switch | None = None
    measure_total_length: Switch | None = None
    token_equivalent_duration: Positive | None = None
    packing: Switch | None = None


def _read_group(
    name: str, config: DictConfig, keys: _LengthKeys, place: str, frame: float | None, tokens_per_second: float
) -> Group:
    bins, limit_key = bins_of(config, place), None
    if keys.packing:
        return _packed_group(name, config, place, frame)
    if bins is None and (keys.use_bucketing or config.get("batch_size") is None):
        raise ConfigError(
            f"{place}.bucket_duration_bins: is missing; OOMptimizer finds a batch size for each bucket, so write the "
            "bins (`nemo-emmett bins` finds them), or leave use_bucketing out and give batch_size, which it replaces, "
            f"with {LIMIT_KEYS[bool(keys.use_multimodal_sampling)]}, the longest example."
        )
    sources = _sources(config, place)
    modality = "text" if sources and all(kind in TEXT_TYPES for kind, _ in sources) else "audio"
    in_tokens = bool(keys.use_multimodal_sampling)
    types = [kind for kind, _ in sources if modality == "text" or _is_conversation(kind)]
    if types and not in_tokens:
        what = "text alone" if modality == "text" else f"conversations (type: {types[0]}), whose length is in tokens"
        raise ConfigError(
            f"{place}.use_multimodal_sampling: is false, so lengths are in seconds, but the group holds {what}; "
            "set it to true."
        )
    if modality == "audio" and in_tokens and not frame:
        raise ConfigError(
            f"{place}.token_equivalent_duration: is missing; lengths are in tokens, so the seconds of speech in a "
            "token must be known."
        )
    if bins is None:
        limit_key = LIMIT_KEYS[in_tokens]
        limit = config.get(limit_key)
        if not is_number(limit) or not 0 < limit < math.inf:
            fault = "is missing" if limit is None else f"{limit!r} is no bound"
            raise ConfigError(
                f"{place}.{limit_key}: {fault}; OOMptimizer finds this group's one batch_size for its longest example, "
                f"so give the most {'tokens' if in_tokens else 'seconds'} that an example may have."
            )
        bins = (float(limit),)
    contents = replace(_contents(config, sources, place), seconds_per_token=float(frame or 0) if in_tokens else 0.0)
    is_total = in_tokens and keys.measure_total_length is not False

    def shape(item: Bin) -> Shape:
        longest, total = item, False
        if isinstance(item, tuple):
            longest, outputs = item[0], math.floor(item[1])
        elif in_tokens:
            # One number bounds the input, or both together: neither can be longer, so both are taken to be as long.
            outputs, total = math.floor(item), is_total
        else:
            outputs = math.ceil(item * tokens_per_second)
        of_bin = replace(contents, two_dimensional=isinstance(item, tuple))
        if modality == "text":
            return Shape("text", 0.0, math.floor(longest), outputs, total, of_bin)
        # As if all of it were speech; the model's adapter takes off the prompt.
        seconds = longest * float(frame) if in_tokens else longest
        return Shape("audio", seconds, math.floor(longest) if total else 0, outputs, total, of_bin)

    return Group(name, config, tuple(Bucket(name, n, item, shape(item)) for n, item in enumerate(bins)), limit_key)


def _packed_group(name: str, config: DictConfig, place: str, frame: float | None) -> Group:
    """A group whose examples are packed: one bucket, whose batch size counts rows."""
    row_tokens = parse_value(RowTokens, config.get(ROW_TOKENS), f"{place}.{ROW_TOKENS}")
    sources = _sources(config, place)
    modality = "text" if sources and all(kind in TEXT_TYPES for kind, _ in sources) else "audio"
    seconds = config.get("batch_duration") or 0.0
    if modality == "audio" and not (frame or seconds):
        raise ConfigError(
            f"{place}.token_equivalent_duration: is missing; rows are in tokens, so the seconds of speech in a token "
            "must be known."
        )
    size, outputs = row_tokens if isinstance(row_tokens, list) else (row_tokens, row_tokens)
    contents = _contents(config, sources, place)
    contents = replace(contents, seconds_per_token=float(frame or 0), packed=True, batch_seconds=float(seconds))
    of_row = size * float(frame or 0) if modality == "audio" else 0.0
    shape = Shape(modality, of_row, size, outputs, contents=contents)
    bin_ = (float(size), float(outputs)) if isinstance(row_tokens, list) else float(size)
    return Group(name, config, (Bucket(name, 0, bin_, shape),), ROW_TOKENS)


def _contents(config: DictConfig, sources: Sequence[tuple[str, Mapping[str, Any]]], place: str) -> Contents:
    sources = sources or [("", _task_keys(config, {}, place))]
    of_speech = [keys for kind, keys in sources if kind not in TEXT_TYPES]
    tasks = dict.fromkeys(task for keys in of_speech or [keys for _, keys in sources] for task in _tasks(keys))
    return Contents(
        tasks=tuple(tasks),
        conversations=any(_is_conversation(kind) for kind, _ in sources),
        text=any(kind in TEXT_TYPES for kind, _ in sources),
    )


def _is_conversation(kind: str) -> bool:
    return any(part in kind for part in CONVERSATION_TYPES)


def _sources(config: DictConfig, place: str) -> list[tuple[str, Mapping[str, Any]]]:
    """The type of each source of a group, with the task keys that it has or inherits."""
    members = _groups_in(config).values() if config.get("sampler_fusion") == MUX else [config]
    inherited = _task_keys(config, {}, place)
    return [
        source
        for member in members
        for source in _walk(member.get("input_cfg"), place, _task_keys(member, inherited, place))
    ]


def _walk(input_cfg: Any, place: str, inherited: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    if isinstance(input_cfg, str):
        try:
            input_cfg = OmegaConf.load(input_cfg)
        except OSError as error:
            raise ConfigError(f"{place}.input_cfg: {input_cfg} cannot be read: {error.strerror}.") from error
    entries = [] if input_cfg is None else input_cfg
    if not isinstance(entries, Sequence) or not all(isinstance(entry, Mapping) for entry in entries):
        raise ConfigError(f"{place}.input_cfg: {input_cfg} cannot be used; give a list of sources, each a mapping.")
    for entry in entries:
        keys = _task_keys(entry, inherited, place)
        if entry.get("type") == "group":
            yield from _walk(entry.get("input_cfg"), place, keys)
        else:
            yield str(entry.get("type")), keys


def _task_keys(entry: Mapping[str, Any], inherited: Mapping[str, Any], place: str) -> dict[str, Any]:
    """Tags of an outer group take precedence, as NeMo attaches them last; of keys, those of the innermost do."""
    own = entry.get("tags") or {}
    if not isinstance(own, Mapping):
        raise ConfigError(f"{place}: tags of a source: {own} cannot be used; give a mapping.")
    tags = {**own, **inherited.get("tags", {})}
    keys = {name: entry[name] for name in _TASK_KEYS if entry.get(name) is not None}
    return {**inherited, **keys, **{name: tags[name] for name in _TASK_KEYS if tags.get(name)}, "tags": tags}


def _tasks(keys: Mapping[str, Any]) -> Iterator[Task]:
    targets = keys.get("target_lang")
    for target in targets if isinstance(targets, Sequence) and not isinstance(targets, str) else [targets]:
        task = {name: keys.get(name) for name in _TASK_KEYS} | {"target_lang": target}
        yield Task(**{name: None if value is None else str(value) for name, value in task.items()})
