"""The sources that a data config names, however deeply they are grouped: found, and given their tags and languages."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import yaml
from nemo.collections.common.data.lhotse.dataloader import (
    LhotseDataLoadingConfig,
    make_structured_with_schema_warnings,
)
from omegaconf import DictConfig, OmegaConf

from nemo_emmett.config import escape_interpolations, item_of
from nemo_emmett.data.config.schema import OUR_KEYS
from nemo_emmett.data.io.commands import is_pipe, refuse_pipes
from nemo_emmett.data.io.files import expand_paths, open_bytes
from nemo_emmett.errors import ConfigError, DataError

SOURCE_TYPE = "emmett_source"
"""NeMo data type under which the sources of our loaders are read; it is made by us, users need not write it."""

LANGUAGE_KEYS = {"source_lang": "source_language", "target_lang": "target_language"}
"""Our keys for the languages of a source, with NeMo's for those of a text."""

TEXT_TYPES = frozenset({"txt", "txt_jsonl", "txt_pair", "nemo_sft_jsonl", "parallel_text"})
"""Source types without speech."""

CLASSIC_KEYS = frozenset({"manifest_filepath", "tarred_audio_filepaths", "cuts_path", "shar_path"})
"""Keys by which a dataset names its one source without ``input_cfg``."""

FILE_KEYS = (
    "manifest_filepath",
    "tarred_audio_filepaths",
    "cuts_path",
    "shar_path",
    "source_paths",
    "target_paths",
    "paths",
    "questions_path",
    "data_dir",
)
"""Keys by which a source names its files."""

PATTERN_KEYS = ("manifest_filepath", "tarred_audio_filepaths", "source_paths", "target_paths", "paths")
"""Those that may name many files by a pattern. So may the fields of a ``shar_path``; all others name one."""

_PASSED_DOWN_BY_NEMO = (
    "shuffle",
    "shard_seed",
    "text_field",
    "lang_field",
    "metadata_only",
    "force_finite",
    "max_open_streams",
    "audio_locator_tag",
    "token_equivalent_duration",
    "skip_missing_manifest_entries",
    "force_map_dataset",
    "force_iterable_dataset",
    "slice_length",
)
"""Keys that NeMo hands from a dataset or group to the sources in it that do not set them."""

_PASSED_DOWN_BY_US = (*LANGUAGE_KEYS, "channel_selector")
"""Keys that we hand from a dataset or group to the sources in it that do not set them."""

SHARED_BY_GROUPS = (
    "seed",
    "shard_seed",
    "num_workers",
    "pin_memory",
    "shuffle",
    "sampler_fusion",
    "sampler_weights",
    "multi_config",
    "metadata_only",
    "force_finite",
)
"""Keys of a ``multi_config`` that overrule those of its groups, as in NeMo."""

INHERITED_BY_GROUPS = (
    "prompt_format",
    "audio_locator_tag",
    "token_equivalent_duration",
    "sample_rate",
    "source_lang",
    "target_lang",
    "weights",
    "index_dir",
    "num_sub_buckets",
    "allow_commands",
    "force_map_dataset",
    "force_iterable_dataset",
)
"""Keys of a ``multi_config`` that hold for the groups which do not set them."""


_KEYS_OF_A_BATCH = (
    "batch_size",
    "batch_duration",
    "batch_tokens",
    "quadratic_duration",
    "quadratic_factor",
    "use_bucketing",
    "bucket_batch_size",
    "bucket_duration_bins",
    "num_buckets",
    "use_multimodal_sampling",
)
"""Keys of how a batch is put together, which under ``mux`` there is but one of."""


@dataclass(frozen=True)
class Source:
    """One entry of ``input_cfg`` that names files.

    Args:
        config: its keys, with the ``tags`` of the groups around it and the keys that it inherits.
        where: its place in the recipe, for messages (``data.train_ds.input_cfg.0``).
    """

    config: dict[str, Any]
    where: str

    @property
    def type(self) -> str:
        """NeMo's or our name of what kind of data it is."""
        return self.config["type"]

    @property
    def is_text(self) -> bool:
        """Whether it surely holds no speech."""
        return self.type in TEXT_TYPES

    @property
    def is_tarred(self) -> bool:
        """Whether NeMo reads it in the workers (tar files, and all that is not a plain manifest)."""
        if self.type in ("nemo", "nemo_tarred"):
            return self.config.get("tarred_audio_filepaths") is not None
        if self.type in ("lhotse", "lhotse_shar"):
            return self.config.get("shar_path") is not None
        if self.type.endswith("_as_conversation"):
            return any(self.config.get(key) is not None for key in ("tarred_audio_filepaths", "shar_path"))
        return self.type != "parquet"

    def files(self) -> Iterator[tuple[str, str]]:
        """Each file that it names, with the key that names it."""
        for key, path, _ in self.files_as_written():
            yield key, path

    def files_as_written(self) -> Iterator[tuple[str, str, str]]:
        """Each file that it names, with the key that names it and what the user wrote: the file or a pattern."""
        for key in FILE_KEYS:
            is_pattern = key in PATTERN_KEYS
            for path, written in _paths_in(self.config.get(key), is_pattern):
                yield key, path, written

    @property
    def name(self) -> str:
        """What a report calls it: its file(s)."""
        for key in ("manifest_filepath", "shar_path", "cuts_path", "paths", "target_paths", "data_dir"):
            if (value := self.config.get(key)) is not None:
                return str(value)
        return self.where


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


def languages_of(config: Mapping) -> dict[str, Any]:
    """The ``source_lang`` and ``target_lang`` of a source: by its tags, else by our keys, else by NeMo's."""
    tags = config.get("tags") or {}
    return {key: tags.get(key) or config.get(key) or config.get(nemos) for key, nemos in LANGUAGE_KEYS.items()}


def place_of(config: Mapping | DictConfig, section: str) -> str:
    """A config's place in its recipe, for messages; ``data.train_ds`` for one that is part of none.

    Args:
        config: of a dataset.
        section: of the recipe that holds the datasets: NeMo's models keep a copy of ``model``, detached from the rest.

    Example:
        >>> place_of(OmegaConf.create({"model": {"validation_ds": {"batch_size": 4}}}).model.validation_ds, "model")
        'model.validation_ds'
    """
    place = config._get_full_key(None) if isinstance(config, DictConfig) else ""
    return place if "." in place else f"{section}.{place}" if place else "data.train_ds"


def plain(config: Mapping | DictConfig) -> dict[str, Any]:
    """A config as plain dicts and lists, with its interpolations resolved and its paths as text, as YAML has them."""
    if not isinstance(config, DictConfig):
        config = OmegaConf.create(config)
    return _paths_as_text(OmegaConf.to_container(config, resolve=True))


def _paths_as_text(value: Any) -> Any:
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, dict):
        return {key: _paths_as_text(item) for key, item in value.items()}
    return [_paths_as_text(item) for item in value] if isinstance(value, list) else value


def config_of(settings: Mapping) -> DictConfig:
    """The inverse of :func:`plain`: ``${`` in a text, such as a path, is no interpolation any more."""
    return OmegaConf.create(_escaped(settings))


def _escaped(value: Any) -> Any:
    if isinstance(value, str):
        return escape_interpolations(value)
    if isinstance(value, Mapping):
        return {key: _escaped(item) for key, item in value.items()}
    return [_escaped(item) for item in value] if isinstance(value, (list, tuple)) else value


def groups_of(settings: Mapping) -> dict[str, dict] | None:
    """The groups of a ``multi_config`` by name, None if the dataset is none."""
    if not settings.get("multi_config"):
        return None
    return {str(k): v for k, v in settings.items() if isinstance(v, dict) and k != "sampler_weights"}


def with_inherited(settings: Mapping) -> dict[str, dict]:
    """The groups of a ``multi_config`` with what they inherit from it."""
    inherited = {key: settings[key] for key in INHERITED_BY_GROUPS if settings.get(key) is not None}
    return {name: {**inherited, **group} for name, group in (groups_of(settings) or {}).items()}


def merge_groups(settings: Mapping, where: str) -> dict[str, Any]:
    """``sampler_fusion: mux``: the groups of a ``multi_config`` as the members of one stream with one kind of batch.

    The weights of the groups (``sampler_weights``) become their shares of the examples.

    Raises:
        ConfigError: if a group says how its batches are put together.
    """
    groups = groups_of(settings) or {}
    for name, group in groups.items():
        for key in group:
            if key in _KEYS_OF_A_BATCH:
                raise ConfigError(
                    f"{where}.{name}.{key}: under sampler_fusion: mux all groups share their batches; "
                    f"set {where}.{key}."
                )
            if key not in ("input_cfg", *LANGUAGE_KEYS):
                raise ConfigError(
                    f"{where}.{name}.{key}: under sampler_fusion: mux a group has an input_cfg and languages, no more; "
                    f"set {where}.{key} for all groups, or another fusion."
                )
    weights = settings.get("sampler_weights")
    if weights is None and settings.get("weights") is None:
        weights = dict.fromkeys(groups, 1.0)
    members = []
    for name, group in groups.items():
        if group.get("input_cfg") is None:
            raise ConfigError(
                f"{where}.{name}.input_cfg: missing; under sampler_fusion: mux a group lists its sources."
            )
        members.append({"type": "group", **group, **({} if weights is None else {"weight": weights[name]})})
    dropped = {*groups, "multi_config", "sampler_fusion", "sampler_weights"}
    return {**{key: value for key, value in settings.items() if key not in dropped}, "input_cfg": members}


def list_sources(settings: Mapping, where: str) -> list[Source]:
    """All sources of a dataset (without ``multi_config``) in the order of the config.

    Args:
        settings: a plain config: ``input_cfg``, or NeMo's classic keys (``manifest_filepath``, ...).
        where: its place in the recipe.

    Raises:
        ConfigError: if it names no data.
        DataError: if an ``input_cfg`` file cannot be read.
    """
    found = []
    rewrite_sources(settings, where, lambda source: found.append(source) or source.config)
    return found


def list_all_sources(settings: Mapping, where: str) -> list[Source]:
    """All sources of a dataset, be it one of groups or not; arguments and errors are those of :func:`list_sources`."""
    if groups_of(settings) is None:
        return list_sources(settings, where)
    return [
        source for name, group in with_inherited(settings).items() for source in list_sources(group, f"{where}.{name}")
    ]


def source_of_files(sources: Sequence[Source]) -> dict[str, str]:
    """For each file, and for each source's own name, the source that it belongs to, as a report calls it."""
    owners: dict[str, str] = {}
    for source in sources:
        title = source.where if source.name == source.where else f"{source.where} ({source.name})"
        for name in (source.name, *(path for _, path in source.files())):
            owners.setdefault(name, title)
    return owners


def rewrite_sources(settings: Mapping, where: str, rewrite: Callable[[Source], dict]) -> list[dict]:
    """The ``input_cfg`` of a dataset with each source replaced by ``rewrite(source)``; groups and weights stay.

    Raises:
        ConfigError: for a source whose files are the output of commands, unless the dataset allows that.
    """
    if settings.get("allow_commands") is not True:
        for key in ("noise_path", "rir_path"):
            refuse_pipes(settings.get(key), f"{where}.{key}")
        rewrite = partial(_without_pipes, rewrite)
    inherited = {key: settings[key] for key in _PASSED_DOWN_BY_US if settings.get(key) is not None}
    if settings.get("input_cfg") is not None:
        entries, where = settings["input_cfg"], f"{where}.input_cfg"
        return _rewrite(entries, where, {}, inherited, rewrite)
    return [rewrite(Source({**inherited, **_classic_source(settings, where)}, where))]


def _without_pipes(rewrite: Callable[[Source], dict], source: Source) -> dict:
    refuse_pipes(source.config, source.where)
    return rewrite(source)


def _classic_source(settings: Mapping, where: str) -> dict[str, Any]:
    if settings.get("cuts_path") is not None or settings.get("shar_path") is not None:
        kind = "lhotse"
    elif settings.get("manifest_filepath") is not None:
        kind = "nemo"
    else:
        raise ConfigError(f"{where}: names no data; give input_cfg, manifest_filepath, cuts_path or shar_path.")
    return {"type": kind, **{key: settings[key] for key in CLASSIC_KEYS if settings.get(key) is not None}}


def _rewrite(
    entries: str | Path | Sequence, where: str, tags: Mapping, inherited: Mapping, rewrite: Callable[[Source], dict]
) -> list[dict]:
    if isinstance(entries, (str, Path)):
        if is_pipe(str(entries)):
            raise ConfigError(f"{where}: '{entries}' is a command; write its output to a file, and name that.")
        entries = _load_entries(entries, where)
    if not isinstance(entries, Sequence) or not entries:
        raise ConfigError(f"{where}: is empty or not a list; it must list the sources of the data.")
    rewritten = []
    for index, entry in enumerate(entries):
        place = item_of(where, index)
        if not isinstance(entry, Mapping) or "type" not in entry:
            raise ConfigError(f"{place}.type: missing; name the kind of source (nemo, lhotse, parallel_text, ...).")
        # NeMo attaches a group's tags after those of its members: the outer ones win.
        entry_tags = {**(entry.get("tags") or {}), **tags}
        passed_down = {**inherited, **{k: entry[k] for k in _PASSED_DOWN_BY_US if entry.get(k) is not None}}
        if entry["type"] == "group":
            members = _rewrite(entry.get("input_cfg"), f"{place}.input_cfg", entry_tags, passed_down, rewrite)
            group = {key: value for key, value in entry.items() if key not in ("tags", *_PASSED_DOWN_BY_US)}
            rewritten.append({**group, "input_cfg": members})
        else:
            source = {**passed_down, **entry}
            if entry_tags:
                source["tags"] = entry_tags
            rewritten.append(rewrite(Source(source, place)))
    return rewritten


def _load_entries(path: str | Path, where: str) -> Any:
    try:
        with open_bytes(str(path)) as file:
            entries = yaml.load(file, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    except OSError as error:
        raise DataError(f"{where}: the file '{path}' cannot be read ({error.strerror or error}).") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise DataError(f"{where}: the file '{path}' is not YAML: {' '.join(str(error).split())}.") from error
    return OmegaConf.to_container(OmegaConf.create(entries), resolve=True) if isinstance(entries, list) else entries


def wrap_sources(settings: Mapping, where: str) -> list[dict]:
    """The ``input_cfg`` of a dataset with every source of the type ``emmett_source``, which wraps the original."""

    return rewrite_sources(settings, where, _wrapped)


def _wrapped(source: Source, **settings: Any) -> dict[str, Any]:
    outer = {key: source.config[key] for key in ("weight", *_PASSED_DOWN_BY_NEMO) if key in source.config}
    return {"type": SOURCE_TYPE, "source": source.config, "where": source.where, **outer, **settings}


def structured_config(settings: Mapping, where: str) -> DictConfig:
    """NeMo's config of a sampler (without our keys), with all its sources read by us."""
    elsewhere = OUR_KEYS | CLASSIC_KEYS | {"channel_selector"}  # our readers select channels
    routed = {key: value for key, value in settings.items() if key not in elsewhere}
    if routed.get("noise_path") is not None:
        routed["noise_path"] = _noise_read_by_us(routed["noise_path"], f"{where}.noise_path")
    return make_structured_with_schema_warnings(config_of({**routed, "input_cfg": wrap_sources(settings, where)}))


def _noise_read_by_us(noise: str | Path | Mapping, where: str) -> dict[str, Any]:
    """``noise_path`` as NeMo takes it, with its sources read by us.

    NeMo writes it as ``key=value`` and reads that as YAML, in which many a path means something else; JSON is safe.
    """
    settings = noise
    if not isinstance(noise, Mapping):
        path = str(noise)
        is_cuts = path.endswith((".jsonl", ".jsonl.gz"))
        settings = {"input_cfg" if path.endswith(".yaml") else "cuts_path" if is_cuts else "manifest_filepath": path}
    sources = rewrite_sources(settings, where, lambda source: _wrapped(source, examples="as_read"))
    others = {key: value for key, value in settings.items() if key not in {"input_cfg", *CLASSIC_KEYS}}
    text = json.dumps(_escaped(sources), ensure_ascii=False)
    return {**others, "input_cfg": text.replace("$", "\\u0024")}


def unwrap(config: Mapping) -> Source:
    """The source inside an ``emmett_source``, with what NeMo has passed down to it."""
    passed_down = {key: config[key] for key in _PASSED_DOWN_BY_NEMO if key in config}
    return Source({**passed_down, **config["source"]}, config["where"])


def with_keys_of_dataset(source: Source, structured: Mapping | DictConfig) -> Source:
    """A source with the keys of its dataset that hold for the sources which do not set them."""
    passed_down = {key: structured[key] for key in _PASSED_DOWN_BY_NEMO if key in structured}
    return Source({**passed_down, **source.config}, source.where)


def nemo_keys() -> frozenset[str]:
    """The keys that NeMo's dataloader knows."""
    return frozenset(LhotseDataLoadingConfig.__dataclass_fields__)
