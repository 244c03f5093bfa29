"""The blend of a dataset: the tree of its groups and sources, and the share of the examples that each one has.

Weights count within one ``input_cfg``: tempered by ``reweight_temperature`` and normalised, as NeMo has it, they are
the shares of its members. A source's share of the dataset is the product of the shares on the way to it. Under
``weights: auto`` a member without a ``weight`` weighs what it holds.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from nemo.collections.common.data.lhotse.cutset import count_input_cfg_levels, temperature_reweighting
from nemo.utils import logging, logging_mode

from nemo_emmett.config import item_of
from nemo_emmett.data.blending.counting import Size
from nemo_emmett.data.blending.source_stats import sizes_of
from nemo_emmett.data.config.sources import (
    Source,
    groups_of,
    languages_of,
    rewrite_sources,
    with_inherited,
    with_keys_of_dataset,
)
from nemo_emmett.data.readers.examples import ExampleKind
from nemo_emmett.errors import ConfigError, DataError
from nemo_emmett.prompts.families import forbidden_text
from nemo_emmett.typed_config import is_number

AUTO = "auto"

SHARED_WITH_GROUPS = ("weights", "index_dir")
"""Keys of a ``multi_config`` that hold for the blends of its groups which do not set them."""


@dataclass
class Node:
    """A group or a source in the blend of a dataset."""

    name: str  # of a group: the tags that are its own; of a source: its files
    where: str  # its place in the recipe
    share: float  # of the dataset's examples, from 0 to 1; those of all sources sum to 1
    weight: float  # among the members of its group: given, or what it holds (hours, tokens), or 1
    source: Source | None = None  # None: it is a group
    children: list[Node] = field(default_factory=list)
    size: Size | None = None  # None: not counted, since no weight depends on it, or it cannot be

    def leaves(self) -> Iterator[Node]:
        """Its sources, in the order of the config."""
        if self.source is not None:
            yield self
        for child in self.children:
            yield from child.leaves()


def blends_of(
    settings: Mapping,
    where: str,
    *,
    tokenizer: Any = None,
    index_dir: str | None = None,
    count_all: bool = False,
    kind: ExampleKind | None = None,
) -> dict[str, Node]:
    """The blend of each group of a ``multi_config``, by name; of a dataset without groups under the empty name.

    Arguments and errors are those of :func:`blend_of`.
    """
    options = {"tokenizer": tokenizer, "index_dir": index_dir, "count_all": count_all, "kind": kind}
    if groups_of(settings) is None:
        return {"": blend_of(settings, where, **options)}
    shared = {key: settings[key] for key in SHARED_WITH_GROUPS if settings.get(key) is not None}
    return {
        name: blend_of({**shared, **group}, f"{where}.{name}", **options)
        for name, group in with_inherited(settings).items()
    }


def blend_of(
    settings: Mapping,
    where: str,
    *,
    tokenizer: Any = None,
    index_dir: str | None = None,
    count_all: bool = False,
    kind: ExampleKind | None = None,
) -> Node:
    """The groups and sources of a dataset, and their shares.

    Args:
        settings: plain config of a dataset without ``multi_config``, or of one group of such.
        where: its place in the recipe, for messages.
        tokenizer: NeMo tokenizer, by which text is measured where weights are derived.
        index_dir: folder for counts that cannot be written beside the data; by default the config's own.
        count_all: count all sources, and not only those on whose size a weight depends.
        kind: what the dataset takes; by default what its config suggests.

    Returns:
        The dataset itself, a group whose sources are those of :func:`~nemo_emmett.data.config.sources.list_sources`.

    Raises:
        ConfigError: if weights are missing, no positive numbers, or given and derived in one group; if
            ``reweight_temperature`` does not fit the depth of the groups; or if what a source holds cannot be told.
        DataError: if a source that shall weigh what it holds holds nothing.

    Example:
        >>> root = blend_of({"input_cfg": [{"type": "nemo", "manifest_filepath": "a.json"}]}, "train_ds")
        >>> [(leaf.name, leaf.share) for leaf in root.leaves()]
        [('a.json', 1.0)]
    """
    root = _tree(settings, where)
    leaves = [entry for entry in root.leaves() if count_all or entry.is_measured]
    sources = [with_keys_of_dataset(entry.source, settings) for entry in leaves]
    forbidden = None if tokenizer is None else forbidden_text(settings.get("prompt_format"), tokenizer)
    kind = kind or _suggested_kind(settings, sources)
    sizes = sizes_of(sources, tokenizer, index_dir or settings.get("index_dir"), kind, forbidden)
    for entry, size in zip(leaves, sizes, strict=True):
        if size is None and entry.is_measured:
            raise ConfigError(
                f"{entry.where}.weight: missing; what a source of type '{entry.source.type}' holds cannot be counted, "
                "so give it, and the others of its group, a weight."
            )
        entry.size = size
    return _node(root, 1.0, 1.0, _temperatures(settings, where), frozenset(), tokenizer)


def _suggested_kind(settings: Mapping, sources: Sequence[Source]) -> ExampleKind:
    """What a dataset takes whose config is all that is known of it."""
    prompt_format = settings.get("prompt_format")
    if prompt_format is None:
        translates = any(languages_of(source.config)["target_lang"] or source.is_text for source in sources)
        return ExampleKind.TRANSLATION if translates else ExampleKind.AS_READ
    return ExampleKind.TRANSLATION if prompt_format.startswith("emmett_") else ExampleKind.CONVERSATION


@dataclass
class _Entry:
    """A group or a source before its share is known."""

    where: str
    weight: float | None = None
    source: Source | None = None
    members: list[_Entry] = field(default_factory=list)
    temperatures: list[float] | None = None  # a group's own: of its members, of theirs, ...
    is_auto: bool = False  # its members weigh what they hold
    seconds_per_token: float | None = None  # of speech
    is_measured: bool = False  # a weight depends on its size
    size: Size | None = None

    def leaves(self) -> Iterator[_Entry]:
        if self.source is not None:
            yield self
        for member in self.members:
            yield from member.leaves()


def _tree(settings: Mapping, where: str) -> _Entry:
    """The entries of a dataset's ``input_cfg`` with what groups hand down to their members."""
    entries = rewrite_sources(settings, where, lambda source: {"source": source})
    own = {key: value for key, value in settings.items() if key != "reweight_temperature"}  # the dataset's is for all
    return _group(entries, own, where, f"{where}.input_cfg", is_auto=False, seconds_per_token=None)


def _group(
    entries: Sequence[Mapping], config: Mapping, where: str, place: str, is_auto: bool, seconds_per_token: float | None
) -> _Entry:
    """A group and its members.

    Args:
        entries: of its ``input_cfg``.
        config: its own keys.
        where: its place in the recipe.
        place: that of its ``input_cfg``.
        is_auto: whether the group around it derives weights.
        seconds_per_token: of speech, as the group around it has it.
    """
    group = _Entry(
        where,
        weight=config.get("weight"),
        temperatures=_own_temperatures(config, where),
        is_auto=_is_auto(config, where, is_auto),
    )
    seconds_per_token = config.get("token_equivalent_duration") or seconds_per_token
    for index, entry in enumerate(entries):
        if entry.get("type") == "group":
            here = item_of(place, index)
            member = _group(entry["input_cfg"], entry, here, f"{here}.input_cfg", group.is_auto, seconds_per_token)
        else:
            member = _leaf(entry["source"], seconds_per_token)
        group.members.append(member)
    _check_weights(group)
    if group.is_auto and len(group.members) > 1 and group.members[0].weight is None:
        for leaf in group.leaves():
            leaf.is_measured = True
    return group


def _leaf(source: Source, seconds_per_token: float | None) -> _Entry:
    config = source.config
    own = config.get("token_equivalent_duration") or seconds_per_token
    return _Entry(source.where, weight=config.get("weight"), source=source, seconds_per_token=own)


def _is_auto(config: Mapping, where: str, inherited: bool) -> bool:
    value = config.get("weights", AUTO if inherited else None)
    if value not in (AUTO, None):
        raise ConfigError(
            f"{where}.weights: {value!r} is unknown; it can be auto, and single weights are set by each member's "
            "'weight'."
        )
    return value == AUTO


def _check_weights(group: _Entry) -> None:
    """All members of a group have a weight, or none has."""
    for member in group.members:
        weight = member.weight
        if weight is not None and not (is_number(weight) and 0 < weight < float("inf")):
            raise ConfigError(f"{member.where}.weight: {weight!r} is no weight; give a number above 0.")
    without = [member for member in group.members if member.weight is None]
    if without and len(without) < len(group.members):
        remedy = "or none, so that all weigh what they hold" if group.is_auto else "or set weights: auto and give none"
        raise ConfigError(
            f"{without[0].where}.weight: missing, while others in its group have one; give each a weight, {remedy}."
        )


def _temperatures(settings: Mapping, where: str) -> list[float] | None:
    """``reweight_temperature`` of a dataset: one for each level of ``input_cfg``."""
    value = settings.get("reweight_temperature")
    if value is None or settings.get("input_cfg") is None:
        return None
    levels = count_input_cfg_levels(settings)
    if is_number(value):
        return [float(value)] * levels
    values = _listed_temperatures(value, where)
    if len(values) != levels:
        raise ConfigError(
            f"{where}.reweight_temperature: has {len(values)} values, but the groups are {levels} levels deep; give a "
            "value for each level, or one number for all."
        )
    return values


def _own_temperatures(group: Mapping, where: str) -> list[float] | None:
    """What a group has instead of what it would inherit; levels beyond the list are not tempered, as in NeMo."""
    if "reweight_temperature" not in group:
        return None
    value = group["reweight_temperature"]
    return [] if value is None else _listed_temperatures(value, where)


def _listed_temperatures(value: Any, where: str) -> list[float]:
    if isinstance(value, Sequence) and not isinstance(value, str) and all(map(is_number, value)):
        return [float(temperature) for temperature in value]
    raise ConfigError(
        f"{where}.reweight_temperature: {value!r} is no list of numbers; give one for each level of groups, from the "
        "outermost (0: equal weights, 1: weights as they are)."
    )


def _node(
    entry: _Entry,
    share: float,
    weight: float,
    temperatures: Sequence[float] | None,
    tags_above: frozenset,
    tokenizer: Any,
) -> Node:
    """An entry with its share, and its members with theirs.

    Args:
        entry: a group or a source.
        share: of the dataset's examples.
        weight: among the members of its group.
        temperatures: of the levels below.
        tags_above: those that all sources of the group around it have.
        tokenizer: by which text has been measured.
    """
    if entry.source is not None:
        return Node(entry.source.name, entry.where, share, weight, source=entry.source, size=entry.size)
    temperature, *below = temperatures or [1.0]
    weights = _weights(entry, tokenizer)
    tags = _common_tags(entry)
    node = Node(_name(entry, tags - tags_above), entry.where, share, weight)
    for member, of_member, part in zip(
        entry.members, weights, temperature_reweighting(weights, temperature), strict=True
    ):
        of_members = below if member.temperatures is None else member.temperatures
        node.children.append(_node(member, share * part, of_member, of_members, tags, tokenizer))
    sizes = [child.size for child in node.children]
    node.size = None if None in sizes else sum(sizes, Size())
    return node


def _weights(group: _Entry, tokenizer: Any) -> list[float]:
    """The weights of a group's members before they are tempered."""
    given = [member.weight for member in group.members]
    if None not in given:
        return given
    if not group.is_auto or len(given) == 1:
        return [1.0] * len(given)
    weights = _held(group, tokenizer)
    for member, weight in zip(group.members, weights, strict=True):
        if weight == 0:
            raise DataError(f"{member.where}: holds nothing that could be weighed; correct its paths, or drop it.")
    return weights


def _held(group: _Entry, tokenizer: Any) -> list[float]:
    """What the members hold, in one unit: hours, tokens, or, where there are both, tokens and what they equal."""
    leaves = list(group.leaves())
    has_text = any(leaf.source.is_text for leaf in leaves)
    has_speech = not all(leaf.source.is_text for leaf in leaves)
    if has_text and tokenizer is None:
        logging.warning(
            f"{group.where}: there is no tokenizer, so text weighs its words rather than its tokens.",
            mode=logging_mode.ONCE,
        )
    if not has_text:
        return [sum(leaf.size.hours for leaf in member.leaves()) for member in group.members]
    if has_speech:
        for leaf in leaves:
            if not leaf.source.is_text and not leaf.seconds_per_token:
                raise ConfigError(
                    f"{leaf.where}.token_equivalent_duration: missing; to weigh speech beside text, give (here or for "
                    "all the dataset) the seconds of speech that count as one token, 0.08 for FastConformer."
                )
    return [float(sum(_tokens(leaf) for leaf in member.leaves())) for member in group.members]


def _tokens(leaf: _Entry) -> float:
    return leaf.size.tokens if leaf.source.is_text else leaf.size.seconds / leaf.seconds_per_token


def _common_tags(entry: _Entry) -> frozenset[tuple[str, str]]:
    """The tags that all its sources have."""
    of_sources = [
        frozenset((str(key), str(value)) for key, value in (leaf.source.config.get("tags") or {}).items())
        for leaf in entry.leaves()
    ]
    return frozenset.intersection(*of_sources)


def _name(group: _Entry, own_tags: frozenset[tuple[str, str]]) -> str:
    """What a report calls a group: its tags, or its place in the group around it."""
    if own_tags:
        return ", ".join(f"{key}: {value}" for key, value in sorted(own_tags))
    return group.where.rpartition(".")[2]
