"""The sources of a dataset and the groups around them: nodes of the tree that a section of a recipe is parsed to.

Each source has what it inherits from the groups around it, its languages and its place in the recipe.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from nemo.collections.common.data.lhotse.cutset import get_known_config_data_types
from nemo.utils import logging, logging_mode

from nemo_emmett.config import check_keys, item_of, nearest
from nemo_emmett.data.config.entries import load_entries
from nemo_emmett.data.config.schema import (
    ANY_SOURCE_KEYS,
    AUTO,
    KEYS_OF_TYPE,
    LEGACY_KEYS,
    LOADER_KEYS,
    TYPES,
    Paths,
    PathsByName,
    Seed,
    WeightedPaths,
)
from nemo_emmett.data.io.commands import is_pipe, refuse_pipes
from nemo_emmett.data.io.files import expand_paths
from nemo_emmett.errors import ConfigError
from nemo_emmett.prompts.language_codes import normalized
from nemo_emmett.typed_config import (
    Count,
    NonEmpty,
    NonNegative,
    Positive,
    Switch,
    Text,
    Whole,
    parse_section,
    parse_value,
)

SOURCE_TYPE, FEED_TYPE = "emmett_source", "emmett_feed"
"""NeMo data types that we make, users need not write them: a source of our loaders, and examples put in by hand."""

SPEECH_TSV = "speech_tsv"
"""Source type of tab-separated files of speech."""

TEXT_TYPES = frozenset({"txt", "txt_jsonl", "txt_pair", "nemo_sft_jsonl", "parallel_text"})
"""Source types without speech."""

CONVERSATION_TYPES = ("conversation", "share_gpt")
"""Parts of the names of types whose examples are conversations, which may hold a recording and no text."""

_CLASSIC = {"lhotse": ("cuts_path", "shar_path"), "nemo": ("manifest_filepath", "tarred_audio_filepaths")}
CLASSIC_KEYS = frozenset().union(*_CLASSIC.values())
"""Keys by which a dataset names its one source without ``input_cfg``."""

FILE_KEYS = (
    *("manifest_filepath", "tarred_audio_filepaths", "cuts_path", "shar_path"),
    *("source_paths", "target_paths", "paths", "questions_path", "data_dir"),
)
"""Keys by which a source names its files."""

PATTERN_KEYS = ("manifest_filepath", "tarred_audio_filepaths", "source_paths", "target_paths", "paths")
"""Those that may name many files by a pattern. So may the fields of a ``shar_path``; all others name one."""

LANGUAGE_KEYS = {"source_lang": "source_language", "target_lang": "target_language"}
"""Our keys for the languages of a source, with NeMo's for those of a text."""

INHERITED = (*LANGUAGE_KEYS, "channel_selector", "transcription", "transcripts")
"""Keys that a source inherits from the groups around it and from its dataset, beyond NeMo's."""

INHERITED_IN_NEMO = (
    *("shuffle", "shard_seed", "text_field", "lang_field", "metadata_only", "force_finite", "max_open_streams"),
    *("audio_locator_tag", "token_equivalent_duration", "skip_missing_manifest_entries"),
    *("force_map_dataset", "force_iterable_dataset", "slice_length"),
)
"""Keys that a source inherits in NeMo, too."""

Column = Count | Text | None


@dataclass(frozen=True, kw_only=True)
class Source:
    """One entry of ``input_cfg`` that names files. A key that the entry does not have, and does not inherit, is None.

    Args:
        keys: all of its keys, as NeMo's own reader of its type takes them.
        place: in the recipe, for messages (``data.train_ds.input_cfg.0``).
        type: of the source, such as ``nemo_tarred`` or ``parallel_text``; ``group`` for a list of sources.
        weight: sampling weight among the members of its group.
        tags: added to each example, such as ``context`` (the prompt), ``source_lang``, ``target_lang``.
        source_lang: language of the input, in the one form of its code (:func:`language_code`), as all languages here;
            by its tags, else by our key, else by NeMo's.
        target_lang: language, or languages, to translate to; in the same way.
        transcripts: batches have the transcripts of its speech.
        is_transcription: it is read for transcription only: the answers are what is spoken (``transcription``).
        members: the sources that a conversation type of NeMo's reads, if they are listed.
        extra_fields: fields that NeMo adds to each example of a manifest.
        paths: text files, or TSV and JSONL files with both sides in a line.
        source_paths: text files of the input, a line for each example.
        target_paths: text files of the output, aligned with them.
        questions_path: text files of instructions, one of which is put before each example.
        data_dir: folder of the data, for types that only NeMo reads.
        directions: directions that are trained on, such as ``en-de``; by default the source's to the target language.
        source_column: column of the input in a TSV file, by its number from 0 or its name in the first line.
        target_column: column of the output.
        source_field: field of the input in a JSONL file.
        target_field: field of the output.
    """

    keys: Mapping[str, Any]
    place: str
    type: Text
    weight: Positive | None = None
    tags: Mapping[str, Any] | None = None
    source_lang: Text | None = None
    target_lang: Text | list[Text] | None = None
    transcripts: Switch | None = None
    is_transcription: Switch = False
    members: tuple[Source, ...] = ()
    manifest_filepath: WeightedPaths | None = None
    tarred_audio_filepaths: WeightedPaths | None = None
    cuts_path: Text | None = None
    shar_path: WeightedPaths | PathsByName | None = None
    extra_fields: list[dict[str, Any]] | None = None
    channel_selector: Whole | Text | None = None
    paths: Paths | PathsByName | None = None
    source_paths: Paths | None = None
    target_paths: Paths | None = None
    questions_path: Paths | None = None
    data_dir: Text | None = None
    directions: list[Text] | None = None
    audio_dir: NonEmpty | None = None
    id_column: Column = None
    audio_column: Column = None
    source_column: Column = None
    target_column: Column = None
    duration_column: Column = None
    offset_column: Column = None
    source_lang_column: Column = None
    target_lang_column: Column = None
    source_field: Text | None = None
    target_field: Text | None = None
    shuffle: Switch | None = None
    shard_seed: Seed | None = None
    text_field: Text | None = None
    lang_field: Text | None = None
    metadata_only: Switch | None = None
    force_finite: Switch | None = None
    max_open_streams: Count | None = None
    audio_locator_tag: Text | None = None
    token_equivalent_duration: Positive | None = None
    skip_missing_manifest_entries: Switch | None = None
    slice_length: Count | None = None

    @property
    def is_text(self) -> bool:
        """Whether it surely holds no speech."""
        return self.type in TEXT_TYPES

    @property
    def is_conversation(self) -> bool:
        """Whether its examples are conversations, whatever the dataset takes."""
        return any(part in self.type for part in CONVERSATION_TYPES)

    @property
    def is_tarred(self) -> bool:
        """Whether NeMo reads it in the workers (tar files, and all that is not a plain manifest)."""
        if self.type in ("nemo", "nemo_tarred"):
            return self.tarred_audio_filepaths is not None
        if self.type in ("lhotse", "lhotse_shar"):
            return self.shar_path is not None
        if self.type.endswith("_as_conversation"):
            return self.tarred_audio_filepaths is not None or self.shar_path is not None
        return self.type not in ("parquet", SPEECH_TSV)

    @property
    def name(self) -> str:
        """What a report calls it: its file(s)."""
        for key in ("manifest_filepath", "shar_path", "cuts_path", "paths", "target_paths", "data_dir"):
            if (value := getattr(self, key)) is not None:
                return f"{value} (transcription)" if self.is_transcription else str(value)
        return self.place

    def files(self) -> Iterator[tuple[str, str]]:
        """Each file that it names, with the key that names it."""
        for key, path, _ in self.files_as_written():
            yield key, path

    def files_as_written(self) -> Iterator[tuple[str, str, str]]:
        """Each file that it names, with the key that names it and what the user wrote: the file or a pattern."""
        for key in FILE_KEYS:
            for path, written in _paths_in(getattr(self, key), key in PATTERN_KEYS):
                yield key, path, written

    def sources(self) -> Iterator[Source]:
        """Itself: the sources below a node of the tree."""
        yield self

    def with_keys(self, **keys: Any) -> Source:
        """The same with other values of NeMo's keys."""
        of_fields = {field.name: keys[field.name] for field in fields(self) if field.name in keys}
        return replace(self, keys={**self.keys, **keys}, **of_fields)


@dataclass(frozen=True, kw_only=True)
class SourceGroup:
    """An entry of ``input_cfg`` of the type ``group``, or the whole of a dataset's.

    Args:
        place: in the recipe.
        members: its groups and sources.
        weight: among the members of the group around it; None where none is given.
        is_auto: whether its members weigh what they hold (``weights: auto``).
        is_pair: its members are one source, read for translation and for transcription; it is no level of the recipe.
        temperatures: its own ``reweight_temperature``, of its members, of theirs, ...; None: those of the dataset.
        keys: that NeMo reads of a group.
    """

    place: str
    members: tuple[SourceGroup | Source, ...]
    weight: float | None = None
    is_auto: bool = False
    is_pair: bool = False
    temperatures: tuple[float, ...] | None = None
    keys: Mapping[str, Any]

    def sources(self) -> Iterator[Source]:
        """All its sources in the order of the recipe."""
        for member in self.members:
            yield from member.sources()

    @property
    def depth(self) -> int:
        """How many levels of ``input_cfg`` there are below it."""
        below = max(
            member.depth if isinstance(member, SourceGroup) else int(bool(member.members)) for member in self.members
        )
        return below + (not self.is_pair)

    @property
    def has_pairs(self) -> bool:
        """Whether there are pairs of sources in it."""
        return any(member.is_pair or member.has_pairs for member in self.members if isinstance(member, SourceGroup))


def _paths_in(value: Any, is_pattern: bool) -> Iterator[tuple[str, str]]:
    """All files in a value that may be a path, a list (perhaps with weights), or a mapping of them; as expanded and
    as written."""
    if isinstance(value, (str, Path)):
        yield from ((path, str(value)) for path in (expand_paths(value) if is_pattern else [str(value)]))
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _paths_in(item, is_pattern=True)
    elif isinstance(value, Sequence):
        for item in value:
            yield from _paths_in(item, is_pattern)


def source_of_files(sources: Sequence[Source]) -> dict[str, str]:
    """For each file, and for each source's own name, the source that it belongs to, as a report calls it."""
    owners: dict[str, str] = {}
    for source in sources:
        title = source.place if source.name == source.place else f"{source.place} ({source.name})"
        for name in (source.name, *(path for _, path in source.files())):
            owners.setdefault(name, title)
    return owners


def parse_source(entry: Mapping[str, Any], place: str, *, allow_commands: bool = False) -> Source:
    """An entry of ``input_cfg``, with all that it inherits, as a source.

    Raises:
        ConfigError: naming the first key whose value is not of its type, or is a command, unless that is allowed.
    """
    if not allow_commands:
        refuse_pipes(entry, place)
    tags, languages, members = entry.get("tags") or {}, {}, []
    for key, in_nemo in LANGUAGE_KEYS.items():
        given = (tags.get(key), entry.get(key), entry.get(in_nemo))
        languages[key] = next((value for value in given if value not in (None, "", [])), None)
    if str(entry.get("type")).endswith("_as_conversation") and entry.get("input_cfg") is not None:
        inherited = {key: entry[key] for key in INHERITED if entry.get(key) is not None}
        how = {"allow_commands": allow_commands}
        inside = parse_entries(entry["input_cfg"], f"{place}.input_cfg", inherited, **how)
        members = [source for member in inside for source in member.sources()]
    given = {"keys": dict(entry), "place": place, "members": tuple(members)}
    source = parse_section(Source, {**entry, **languages}, place, **given)
    source = replace(source, source_lang=normalized(source.source_lang), target_lang=_normalized(source.target_lang))
    if isinstance(source.paths, Mapping):
        source = replace(source, paths=_by_language(source.paths, place))
    typed = {field.name: getattr(source, field.name) for field in fields(source) if field.name not in LANGUAGE_KEYS}
    return source.with_keys(**{k: typed[k] for k in entry.keys() & typed.keys() if typed[k] != entry[k]})  # 5 for '5'


def _normalized(languages: str | list[str] | None) -> str | list[str] | None:
    return [normalized(code) for code in languages] if isinstance(languages, list) else normalized(languages)


def _by_language(paths: Mapping[str, Any], place: str) -> dict[str, Any]:
    """The files of each language, by its one code."""
    found: dict[str, str] = {}
    for code in map(str, paths):
        if (other := found.setdefault(normalized(code), code)) != code:
            raise ConfigError(f"{place}.paths: '{other}' and '{code}' are one language; list all its files under one.")
    return {normalized(str(code)): of_language for code, of_language in paths.items()}


def parse_classic(
    section: Mapping[str, Any], place: str, inherited: Mapping[str, Any], *, allow_commands: bool
) -> SourceGroup | Source:
    """The one source of a dataset that names it by NeMo's classic keys (``manifest_filepath``, ...).

    Raises:
        ConfigError: if there is none of them, or a file is the output of a command, unless that is allowed.
    """
    kind = next((kind for kind, keys in _CLASSIC.items() if any(section.get(k) is not None for k in keys)), None)
    if kind is None or all(section.get(key) is None for key in (*_CLASSIC["lhotse"], "manifest_filepath")):
        raise ConfigError(f"{place}: names no data; give input_cfg, manifest_filepath, cuts_path or shar_path.")
    files = {key: section[key] for key in _CLASSIC[kind] if section.get(key) is not None}
    entry = {**inherited, "type": kind, **files}
    return _with_transcription(entry, place, allow_commands=allow_commands)


def parse_entries(
    entries: Any,
    place: str,
    inherited: Mapping[str, Any],
    *,
    allow_commands: bool,
    tags: Mapping[str, Any] | None = None,
    is_auto: bool = False,
) -> tuple[SourceGroup | Source, ...]:
    """The members of an ``input_cfg``, which may be in a file.

    Args:
        entries: the list, or the path of a YAML file with it.
        place: in the recipe.
        inherited: keys of the groups around it and the dataset, for the members which do not set them.
        allow_commands: files may be the output of commands.
        tags: of the groups around it.
        is_auto: members weigh what they hold, unless a group among them says otherwise.

    Raises:
        ConfigError: for a mistake in an entry, naming its key.
        DataError: if the file cannot be read.
    """
    if isinstance(entries, (str, Path)):
        if is_pipe(str(entries)):
            raise ConfigError(f"{place}: '{entries}' is a command; write its output to a file, and name that.")
        entries = load_entries(entries, place)
    if not isinstance(entries, Sequence) or not entries:
        raise ConfigError(f"{place}: is empty or not a list; it must list the sources of the data.")
    how = {"allow_commands": allow_commands, "is_auto": is_auto}
    members = tuple(
        _parse_entry(entry, item_of(place, index), inherited, tags or {}, **how) for index, entry in enumerate(entries)
    )
    check_weights(members, is_auto)
    return members


def _parse_entry(
    entry: Any, place: str, inherited: Mapping, tags: Mapping, *, allow_commands: bool, is_auto: bool
) -> SourceGroup | Source:
    if not isinstance(entry, Mapping) or "type" not in entry:
        raise ConfigError(f"{place}.type: missing; name the kind of source (nemo, lhotse, parallel_text, ...).")
    _check_type_and_keys(entry, place)
    own_tags = {} if entry.get("tags") is None else entry["tags"]
    if not isinstance(own_tags, Mapping):
        raise ConfigError(f"{place}.tags: {own_tags!r} is not a mapping; write each tag as 'name: value'.")
    tags = {**own_tags, **tags}  # NeMo attaches a group's tags after those of its members: the outer ones win
    own = {key: entry[key] for key in INHERITED if entry.get(key) is not None}
    inherited = {**inherited, **own, **{key: entry[key] for key in INHERITED_IN_NEMO if key in entry}}
    if entry["type"] == "group":
        return parse_group(entry, place, inherited, allow_commands=allow_commands, tags=tags, is_auto=is_auto)
    if entry["type"] in TEXT_TYPES and entry.get("transcription") is not None:
        raise ConfigError(
            f"{place}.transcription: a source of the type '{entry['type']}' holds no speech; remove the key."
        )
    entry = {**inherited, **entry, **({"tags": tags} if tags else {})}
    return _with_transcription(entry, place, allow_commands=allow_commands)


def _with_transcription(entry: Mapping[str, Any], place: str, *, allow_commands: bool) -> SourceGroup | Source:
    """A source; with ``transcription`` two of its files, one of which is read for transcription, and their shares.

    Raises:
        ConfigError: if the share cannot be used, or the source is of conversations.
    """
    share = parse_value(TYPES["transcription"], entry.get("transcription"), f"{place}.transcription")
    source = parse_source(
        {key: value for key, value in entry.items() if key != "transcription"}, place, allow_commands=allow_commands
    )
    if share is None or source.is_text:
        return source
    if source.is_conversation:
        raise ConfigError(
            f"{place}.transcription: a source of the type '{source.type}' has the answers of its conversations; "
            "set transcription: null for it."
        )
    translated = source.with_keys(weight=1.0 - share)
    transcribed = replace(source.with_keys(weight=share, is_transcription=True), place=f"{place}.transcription")
    # Shares are exact: no temperature applies to them.
    keys = {"reweight_temperature": [], **({} if source.weight is None else {"weight": source.weight})}
    members = (translated, transcribed)
    return SourceGroup(place=place, members=members, weight=source.weight, is_pair=True, temperatures=(), keys=keys)


def refuse_without_speech(sources: Iterable[Source], share: float | None, place: str) -> None:
    """Refuse ``transcription`` for a dataset or group without speech.

    Raises:
        ConfigError: naming the key.
    """
    if share is not None and not any(source.is_transcription for source in sources):
        raise ConfigError(f"{place}.transcription: there is no speech to transcribe; remove the key.")


def parse_group(
    entry: Mapping[str, Any],
    place: str,
    inherited: Mapping[str, Any],
    *,
    allow_commands: bool,
    tags: Mapping[str, Any] | None = None,
    is_auto: bool = False,
) -> SourceGroup:
    """A group of sources with its members; the arguments are those of :func:`parse_entries`."""
    is_auto = parse_value(TYPES["weights"], entry.get("weights", AUTO if is_auto else None), f"{place}.weights") == AUTO
    how = {"allow_commands": allow_commands, "tags": tags, "is_auto": is_auto}
    temperatures = None
    if "reweight_temperature" in entry:  # levels beyond the list are not tempered, as in NeMo
        temperatures = parse_value(
            list[NonNegative] | None, entry["reweight_temperature"], f"{place}.reweight_temperature"
        )
    members = parse_entries(entry.get("input_cfg"), f"{place}.input_cfg", inherited, **how)
    sources = [source for member in members for source in member.sources()]
    refuse_without_speech(sources, entry.get("transcription"), place)
    return SourceGroup(
        place=place,
        members=members,
        weight=parse_value(Positive | None, entry.get("weight"), f"{place}.weight"),
        is_auto=is_auto,
        temperatures=None if "reweight_temperature" not in entry else tuple(temperatures or ()),
        keys={key: value for key, value in entry.items() if key not in ("tags", "input_cfg", *INHERITED)},
    )


def check_weights(members: Sequence[SourceGroup | Source], is_auto: bool) -> None:
    """All members of a group have a weight, or none has.

    Raises:
        ConfigError: naming the first member without one.
    """
    without = [member for member in members if member.weight is None]
    if without and len(without) < len(members):
        remedy = "or none, so that all weigh what they hold" if is_auto else "or set weights: auto and give none"
        raise ConfigError(
            f"{without[0].place}.weight: missing, while others in its group have one; give each a weight, {remedy}."
        )


def known_types() -> list[str]:
    """The source types that a recipe may name."""
    return sorted({*get_known_config_data_types(), "parallel_text", SPEECH_TSV} - {SOURCE_TYPE, FEED_TYPE})


_KEYS_OF_SOME_TYPE = frozenset().union(*KEYS_OF_TYPE.values()) - (LOADER_KEYS - CLASSIC_KEYS)


def _check_type_and_keys(entry: Mapping[str, Any], place: str) -> None:
    kind, types = entry["type"], known_types()
    if kind not in types:
        suggestion = nearest(str(kind), types)
        hint = f"did you mean '{suggestion}'?" if suggestion else f"known are {', '.join(types)}."
        raise ConfigError(f"{place}.type: there is no data type '{kind}'; {hint}")
    if kind not in KEYS_OF_TYPE:
        return
    own = ANY_SOURCE_KEYS | KEYS_OF_TYPE[kind]
    for key in entry:
        if key in _KEYS_OF_SOME_TYPE - own and entry[key] is not None:
            of = ", ".join(name for name, keys in KEYS_OF_TYPE.items() if key in keys)
            raise ConfigError(
                f"{place}.{key}: is no key of the type '{kind}', but of {of}; remove it, or correct the type."
            )
    if unknown_keys := check_keys(entry, own | LOADER_KEYS | _KEYS_OF_SOME_TYPE, place, LEGACY_KEYS):
        message = f"{place}: these keys have no meaning for '{kind}': {', '.join(unknown_keys)}"
        logging.warning(message, mode=logging_mode.ONCE)
