"""The blend of a dataset: the tree of its groups and sources, and the share of the examples that each one has.

Weights count within one ``input_cfg``: tempered by ``reweight_temperature`` and normalised, as NeMo has it, they are
the shares of its members. A source's share of the dataset is the product of the shares on the way to it. Under
``weights: auto`` a member without a ``weight`` weighs what it holds.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from nemo.collections.common.data.lhotse.cutset import temperature_reweighting
from nemo.utils import logging, logging_mode

from nemo_emmett.data.blending.source_stats import is_countable, sizes_of
from nemo_emmett.data.config.dataset_config import GroupConfig
from nemo_emmett.data.config.sources import Source, SourceGroup
from nemo_emmett.data.lengths.building import open_length_indexes
from nemo_emmett.data.lengths.counting import Size
from nemo_emmett.data.readers.examples import ExampleKind
from nemo_emmett.errors import ConfigError, DataError
from nemo_emmett.prompts.families import forbidden_text


@dataclass
class Node:
    """A group or a source in the blend of a dataset."""

    name: str  # of a group: the tags that are its own; of a source: its files
    place: str  # in the recipe
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


def blend_of(
    group: GroupConfig,
    *,
    tokenizer: Any = None,
    index_dir: str | None = None,
    count_all: bool = False,
    kind: ExampleKind | None = None,
) -> Node:
    """The sources of a group, with the groups in it, and their shares.

    Args:
        group: a dataset without ``multi_config``, or one group of such.
        tokenizer: NeMo tokenizer, by which text is measured where weights are derived.
        index_dir: folder for counts that cannot be written next to the data; by default the group's own.
        count_all: count all sources, and not only those on whose size a weight depends.
        kind: what the dataset takes; by default what the section suggests.

    Returns:
        The group itself, as a node whose leaves are its sources.

    Raises:
        ConfigError: if what a source holds cannot be counted, but its weight depends on it.
        DataError: if a source that shall weigh what it holds holds nothing.

    Example:
        >>> section = {"input_cfg": [{"type": "nemo", "manifest_filepath": "a.json"}]}
        >>> root = blend_of(parse_dataset(section, "train_ds").groups[0])
        >>> [(leaf.name, leaf.share) for leaf in root.leaves()]
        [('a.json', 1.0)]
    """
    measured = {source.place: source for source in _measured(group.root)}
    sources = group.sources if count_all else list(measured.values())
    sizes = _sizes_of(group, sources, tokenizer, index_dir or group.index_dir, kind or suggested_kind(group))
    for source in sources:
        if sizes[source.place] is None and source.place in measured:
            raise ConfigError(
                f"{source.place}.weight: missing; what a source of type '{source.type}' holds cannot be counted, "
                "so give it, and the others of its group, a weight."
            )
    return _node(group.root, 1.0, 1.0, group.temperatures, frozenset(), _Sizes(sizes, tokenizer))


def _sizes_of(
    group: GroupConfig, sources: Sequence[Source], tokenizer: Any, index_dir: str | None, kind: ExampleKind
) -> dict[str, Size | None]:
    """What sources hold, by their places: by their length indexes or, if they have none, counted as streams."""
    places = {source.place for source in sources if is_countable(source)}
    indexes = open_length_indexes([group], tokenizer, kind, index_dir, places=places) if places else {}
    sizes = {place: index.size for place, index in indexes.items() if index is not None}
    streams = [source for source in sources if source.place not in sizes]
    forbidden = None if tokenizer is None else forbidden_text(group.prompt_format, tokenizer)
    counted = sizes_of(streams, tokenizer, index_dir, kind, forbidden)
    return sizes | {source.place: size for source, size in zip(streams, counted, strict=True)}


def suggested_kind(group: GroupConfig) -> ExampleKind:
    """What a dataset takes of which its section is all that is known."""
    if group.prompt_format is None:
        translates = any(source.target_lang or source.is_text for source in group.sources)
        return ExampleKind.TRANSLATION if translates else ExampleKind.AS_READ
    return ExampleKind.TRANSLATION if group.prompt_format.startswith("emmett_") else ExampleKind.CONVERSATION


@dataclass(frozen=True)
class _Sizes:
    """What the sources hold, by their places; measured in tokens of the tokenizer."""

    of: Mapping[str, Size | None]
    tokenizer: Any


def _measured(group: SourceGroup) -> Iterator[Source]:
    """The sources on whose size a weight depends."""
    if group.is_auto and len(group.members) > 1 and group.members[0].weight is None:
        yield from (source for source in group.sources() if not source.is_transcription)
        return
    for member in group.members:
        if isinstance(member, SourceGroup):
            yield from _measured(member)


def _node(
    entry: SourceGroup | Source,
    share: float,
    weight: float,
    temperatures: Sequence[float] | None,
    tags_above: frozenset,
    sizes: _Sizes,
) -> Node:
    """A group or source with its share, and its members with theirs.

    Args:
        entry: a group or a source.
        share: of the dataset's examples.
        weight: among the members of its group.
        temperatures: of the levels below.
        tags_above: those that all sources of the group around it have.
        sizes: of the sources.
    """
    if isinstance(entry, Source):
        return Node(entry.name, entry.place, share, weight, source=entry, size=sizes.of.get(entry.place))
    temperature, *below = temperatures or [1.0]
    weights = _weights(entry, sizes)
    # The tags that all its sources have.
    tags = frozenset.intersection(
        *(frozenset((str(key), str(value)) for key, value in (leaf.tags or {}).items()) for leaf in entry.sources())
    )
    name = ", ".join(f"{key}: {value}" for key, value in sorted(tags - tags_above))
    name = entry.members[0].name if entry.is_pair else name
    node = Node(name or entry.place.rpartition(".")[2], entry.place, share, weight)
    for member, of_member, part in zip(
        entry.members, weights, temperature_reweighting(weights, temperature), strict=True
    ):
        own = member.temperatures if isinstance(member, SourceGroup) else None
        of_members = below if own is None else own
        node.children.append(_node(member, share * part, of_member, of_members, tags, sizes))
    of_children = [child.size for child in node.children[: 1 if entry.is_pair else None]]
    node.size = None if None in of_children else sum(of_children, Size())
    return node


def _weights(group: SourceGroup, sizes: _Sizes) -> list[float]:
    """The weights of a group's members before they are tempered."""
    given = [member.weight for member in group.members]
    if None not in given:
        return given
    if not group.is_auto or len(given) == 1:
        return [1.0] * len(given)
    weights = _held(group, sizes)
    for member, weight in zip(group.members, weights, strict=True):
        if weight == 0:
            raise DataError(f"{member.place}: holds nothing that could be weighed; correct its paths, or drop it.")
    return weights


def _held(group: SourceGroup, sizes: _Sizes) -> list[float]:
    """What the members hold, in one unit: hours, tokens, or, where there are both, tokens and what they equal. What is
    transcribed as well counts once."""
    members = [[source for source in member.sources() if not source.is_transcription] for member in group.members]
    sources = [source for of_member in members for source in of_member]
    if not any(source.is_text for source in sources):
        return [sum(sizes.of[source.place].hours for source in of_member) for of_member in members]
    if sizes.tokenizer is None:
        logging.warning(
            f"{group.place}: there is no tokenizer, so text weighs its words rather than its tokens.",
            mode=logging_mode.ONCE,
        )
    for source in sources:
        if not source.is_text and not source.token_equivalent_duration:
            raise ConfigError(
                f"{source.place}.token_equivalent_duration: missing; to weigh speech and text together, give (here or "
                "for all the dataset) the seconds of speech that count as one token, 0.08 for FastConformer."
            )

    def tokens(source: Source) -> float:
        size = sizes.of[source.place]
        return size.tokens if source.is_text else size.seconds / source.token_equivalent_duration

    return [float(sum(map(tokens, of_member))) for of_member in members]
