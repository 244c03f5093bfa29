"""A dataset's section of a recipe, parsed: the dataset, its groups, and in each of them a tree of sources.

:func:`parse_dataset` finds all mistakes that the section alone can reveal; what depends on files, the tokenizer or the
model is looked at by :mod:`~nemo_emmett.data.checks`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from nemo.collections.common.data.lhotse.dataloader import LhotseDataLoadingConfig
from nemo.utils import logging, logging_mode
from omegaconf import DictConfig

from nemo_emmett.config import check_keys, nearest
from nemo_emmett.data.config.packing_keys import check_packed_alike, check_packing, refuse_above_groups
from nemo_emmett.data.config.schema import AUTO, FUSIONS, LEGACY_KEYS, LOADER_KEYS, OUR_TYPES, parse_keys
from nemo_emmett.data.config.section import plain
from nemo_emmett.data.config.sources import (
    INHERITED,
    LANGUAGE_KEYS,
    Source,
    SourceGroup,
    check_weights,
    parse_classic,
    parse_entries,
    parse_group,
    refuse_without_speech,
)
from nemo_emmett.data.io.commands import refuse_pipes
from nemo_emmett.errors import ConfigError, Help
from nemo_emmett.typed_config import Switch, is_number, parse_value

SHARED_BY_GROUPS = ("seed", "shard_seed", "num_workers", "pin_memory", "shuffle", "metadata_only", "force_finite")
"""Keys of a ``multi_config`` that overrule those of its groups, as in NeMo."""

_OF_ALL_GROUPS = (*SHARED_BY_GROUPS, "sampler_fusion", "sampler_weights", "multi_config")

INHERITED_BY_GROUPS = (
    *("prompt_format", "audio_locator_tag", "token_equivalent_duration", "sample_rate", "source_lang", "target_lang"),
    *("weights", "index_dir", "num_sub_buckets", "allow_commands", "force_map_dataset", "force_iterable_dataset"),
    "transcripts",
    "transcription",
)
"""Keys of a ``multi_config`` that hold for the groups which do not set them."""

_EFFECTIVE_ABOVE_GROUPS = {*_OF_ALL_GROUPS, *INHERITED_BY_GROUPS, *OUR_TYPES, "cuda_expandable_segments"}
"""Keys that mean something next to ``multi_config``; all others belong into the groups."""

_INHERITED_BY_SOURCES = (
    *(*INHERITED, "text_field", "lang_field", "audio_locator_tag", "token_equivalent_duration"),
    "skip_missing_manifest_entries",
)
"""Keys of a dataset that its sources inherit here; what depends on the samplers (``shuffle``, ...) follows later."""

_KEYS_UNDER_ZIP = ("every_n_steps", "batch_ratio")
"""Keys of a group that say how much of it a step of ``zip`` holds."""

_KEYS_OF_A_BATCH = (
    *("batch_size", "batch_duration", "batch_tokens", "quadratic_duration", "quadratic_factor", "use_bucketing"),
    *("bucket_batch_size", "bucket_duration_bins", "num_buckets", "use_multimodal_sampling"),
)
"""Keys of how a batch is put together, which under ``mux`` there is but one of."""

_OF_MERGED_GROUPS = (*LANGUAGE_KEYS, "transcripts", "transcription")
"""Keys that a group may have under ``mux``, for its sources."""

LIMITS = tuple((f"min_{name}", f"max_{name}") for name in ("duration", "tokens", "tps", "tpt"))
"""Keys of the least and the most that NeMo's filters let pass."""


@dataclass(frozen=True, kw_only=True)
class Noise:
    """``noise_path``: recordings to be mixed into the examples.

    Args:
        members: its groups and sources.
        keys: that NeMo reads of it, apart from the sources.
    """

    members: tuple[SourceGroup | Source, ...]
    keys: Mapping[str, Any]

    @property
    def sources(self) -> list[Source]:
        """All its sources."""
        return [source for member in self.members for source in member.sources()]

    @property
    def is_tarred(self) -> bool:
        """Whether some of it is in tar files."""
        return any(s.tarred_audio_filepaths is not None or s.shar_path is not None for s in self.sources)


@dataclass(frozen=True, kw_only=True)
class GroupConfig:
    """Sources that share their batches: a dataset, or a group of a ``multi_config`` with what it inherits.

    Args:
        name: of the group; empty for a dataset without groups, or whose groups are mixed into one (``mux``).
        place: in the recipe, for messages.
        root: its groups and sources.
        keys: all its keys for NeMo's dataloader, apart from its sources.
        temperatures: ``reweight_temperature`` of each level of ``input_cfg``; None: weights are taken as they are.
        noise: None where none is mixed in.
        every_n_steps: under ``zip``, the steps that hold a batch of it: the first, and every n-th from there.
        batch_ratio: under ``zip``, its examples in a step per example of :func:`leading_group`; None: as its sizes say.
        packing: several examples share a row of the language model's input; ``batch_size`` counts rows.
        row_tokens: most positions of a row; a pair: of the encoder's and of the decoder's.
    """

    name: str
    place: str
    root: SourceGroup
    keys: Mapping[str, Any]
    temperatures: tuple[float, ...] | None = None
    noise: Noise | None = None
    index_dir: str | None = None
    allow_commands: bool = False
    prompt_format: str | None = None
    pretokenize: bool = True
    audio_locator_tag: str | None = None
    token_equivalent_duration: float | None = None
    use_multimodal_sampling: bool = False
    batch_size: int | None = None
    batch_duration: float | None = None
    batch_tokens: int | None = None
    use_bucketing: bool = False
    bucket_batch_size: list[int] | None = None
    bucket_duration_bins: list | str | None = None
    num_buckets: int = LhotseDataLoadingConfig.num_buckets
    num_sub_buckets: int | None = None
    num_cuts_for_bins_estimate: int = LhotseDataLoadingConfig.num_cuts_for_bins_estimate
    force_map_dataset: bool = False
    force_iterable_dataset: bool = False
    concatenate_samples: bool = False
    every_n_steps: int = 1
    batch_ratio: float | None = None
    packing: bool = False
    row_tokens: int | list[int] | None = None

    @property
    def sources(self) -> list[Source]:
        """All its sources in the order of the recipe."""
        return list(self.root.sources())

    @property
    def has_auto_bins(self) -> bool:
        """Whether its bins are yet to be found."""
        return self.bucket_duration_bins == AUTO


@dataclass(frozen=True, kw_only=True)
class DatasetConfig:
    """A dataset's section of a recipe.

    Args:
        place: in the recipe, for messages.
        groups: that have a sampler each; one with the empty name unless it is a ``multi_config``.
        is_multi_config: whether its section has groups.
        unknown_keys: its own keys that nothing reads.
        max_bad_records: stop past so many (>= 1), or this share (< 1) of a source's.
    """

    place: str
    groups: tuple[GroupConfig, ...]
    is_multi_config: bool
    unknown_keys: tuple[str, ...] = ()
    use_emmett: bool | None = None
    max_bad_records: int | float | None = 0.25
    sampling: str = "auto"
    weights: str | None = None
    index_dir: str | None = None
    allow_commands: bool = False
    sampler_fusion: str = "round_robin"
    sampler_weights: Mapping[str, float] | None = None
    seed: int | str = LhotseDataLoadingConfig.seed
    shard_seed: int | str = LhotseDataLoadingConfig.shard_seed
    num_workers: int = LhotseDataLoadingConfig.num_workers
    pin_memory: bool = LhotseDataLoadingConfig.pin_memory
    shuffle: bool = LhotseDataLoadingConfig.shuffle
    force_finite: bool = LhotseDataLoadingConfig.force_finite
    cuda_expandable_segments: bool = True

    @property
    def is_mux(self) -> bool:
        """Whether its groups are mixed into one, with one kind of batch."""
        return self.is_multi_config and self.sampler_fusion == "mux"

    @property
    def sources(self) -> list[Source]:
        """All sources of all groups in the order of the recipe."""
        return [source for group in self.groups for source in group.sources]

    @property
    def parts(self) -> Sequence[SourceGroup | Source]:
        """Its groups as the recipe has them, or all of it where it has none."""
        return self.groups[0].root.members if self.is_mux else [group.root for group in self.groups]


def parse_dataset(section: Mapping[str, Any] | DictConfig, place: str) -> DatasetConfig:
    """A dataset's section of a recipe as a tree.

    Args:
        section: any NeMo dataloader config (``LhotseDataLoadingConfig``), with our keys
            (:data:`~nemo_emmett.data.config.schema.OUR_TYPES`).
        place: in the recipe, for messages.

    Raises:
        ConfigError: if a key is misspelt, has a value that cannot be used, or does not fit another one.
        DataError: if an ``input_cfg`` file cannot be read.

    Example:
        >>> parse_dataset({"manifest_filepath": "a.json", "batch_size": 0}, "data.train_ds")
        Traceback (most recent call last):
        nemo_emmett.errors.ConfigError: data.train_ds.batch_size: 0 cannot be used; give a whole number from 1, or null.
    """
    section = plain(section, place)
    is_multi_config = parse_value(Switch, section.get("multi_config", False), f"{place}.multi_config")
    sections = {}
    if is_multi_config:
        sections = {str(k): v for k, v in section.items() if isinstance(v, dict) and k != "sampler_weights"}
    own = {key: value for key, value in section.items() if str(key) not in sections}
    unknown_keys = check_keys(own, LOADER_KEYS | OUR_TYPES.keys(), place, LEGACY_KEYS)
    own = parse_keys(own, place)
    _check_fusion(own, list(sections) if is_multi_config else None, place)
    if is_multi_config:
        unknown_keys += [key for key in own if key in LEGACY_KEYS - {"use_lhotse"} and key not in unknown_keys]
    if is_multi_config and own.get("sampler_fusion") != "mux":
        refuse_above_groups(own, place)
    if is_multi_config and own.get("sampler_fusion") == "mux":
        groups = (_merged_group(own, sections, place),)
    elif is_multi_config:
        groups = tuple(_groups(own, sections, place))
        _warn_of_keys_without_effect(own, sections, unknown_keys, place)
    else:
        groups = (_group_config(own, place, ""),)
    sources = [source for group in groups for source in group.sources]
    refuse_without_speech(sources, own.get("transcription"), place)
    _check_keys_under_zip(own, groups, is_multi_config and own.get("sampler_fusion") == "zip", place)
    values = {f.name: own[f.name] for f in fields(DatasetConfig) if f.name in own}
    return DatasetConfig(
        **values, place=place, groups=groups, is_multi_config=is_multi_config, unknown_keys=tuple(unknown_keys)
    )


def _groups(own: Mapping[str, Any], sections: Mapping[str, dict], place: str) -> Iterator[GroupConfig]:
    inherited = {key: own[key] for key in INHERITED_BY_GROUPS if own.get(key) is not None}
    shared = {key: own.get(key, getattr(LhotseDataLoadingConfig, key)) for key in SHARED_BY_GROUPS}
    for name, section in sections.items():
        for key in ("max_bad_records", "sampling", "use_emmett"):
            if key in section:
                raise ConfigError(f"{place}.{name}.{key}: holds for all groups together; set {place}.{key}.")
        check_keys(section, LOADER_KEYS | OUR_TYPES.keys(), f"{place}.{name}", LEGACY_KEYS)
        keys = {**inherited, **parse_keys(section, f"{place}.{name}"), **shared}
        yield _group_config(keys, f"{place}.{name}", name)


def _group_config(keys: Mapping[str, Any], place: str, name: str, root: SourceGroup | None = None) -> GroupConfig:
    """A group from its checked keys.

    Args:
        keys: its own and those that it inherits.
        place: in the recipe.
        name: of the group.
        root: its sources; by default those that its keys name.
    """
    for key in ("noise_path", "rir_path") if not keys.get("allow_commands") else ():
        refuse_pipes(keys.get(key), f"{place}.{key}")
    root = root or _root(keys, place)
    values = {f.name: keys[f.name] for f in fields(GroupConfig) if f.name in keys and f.name != "name"}
    own = {key: value for key, value in keys.items() if key not in OUR_TYPES and key not in _OF_ALL_GROUPS[-3:]}
    group = GroupConfig(
        **values,
        name=name,
        place=place,
        root=root,
        keys=own,
        temperatures=_temperatures(keys.get("reweight_temperature"), root, place) if keys.get("input_cfg") else None,
        noise=_noise(keys, place),
    )
    check_packing(keys, group.sources, place)
    _check_sizes(group)
    return group


def _root(keys: Mapping[str, Any], place: str) -> SourceGroup:
    inherited = {key: keys[key] for key in _INHERITED_BY_SOURCES if keys.get(key) is not None}
    how = {"allow_commands": keys.get("allow_commands", False)}
    if keys.get("input_cfg") is not None:
        for key in ("manifest_filepath", "tarred_audio_filepaths", "cuts_path", "shar_path"):
            if keys.get(key) is not None:
                message = f"{place}.{key}: has no effect next to input_cfg, which NeMo prefers; remove one of them."
                logging.warning(message, mode=logging_mode.ONCE)
        own = {key: keys[key] for key in ("input_cfg", "weights") if key in keys}
        return parse_group(own, place, inherited, **how)
    source = parse_classic(keys, place, inherited, **how)
    return SourceGroup(place=place, members=(source,), is_auto=keys.get("weights") == AUTO, keys={})


def _merged_group(own: Mapping[str, Any], sections: Mapping[str, dict], place: str) -> GroupConfig:
    """``sampler_fusion: mux``: the groups of a ``multi_config`` as the members of one, with one kind of batch.

    The weights of the groups (``sampler_weights``) become their shares of the examples.

    Raises:
        ConfigError: if a group says how its batches are put together.
    """
    weights = own.get("sampler_weights")
    if weights is None and own.get("weights") is None:
        weights = dict.fromkeys(sections, 1.0)
    inherited = {key: own[key] for key in _INHERITED_BY_SOURCES if own.get(key) is not None}
    how = {"allow_commands": own.get("allow_commands", False), "is_auto": own.get("weights") == AUTO}
    members = []
    for name, section in sections.items():
        for key in section:
            if key in _KEYS_OF_A_BATCH:
                raise ConfigError(
                    f"{place}.{name}.{key}: under sampler_fusion: mux all groups share their batches; "
                    f"set {place}.{key}."
                )
            if key not in ("input_cfg", *_OF_MERGED_GROUPS):
                raise ConfigError(
                    f"{place}.{name}.{key}: under sampler_fusion: mux a group has an input_cfg, languages, "
                    f"transcripts and transcription, no more; set {place}.{key} for all groups, or another fusion."
                )
        if section.get("input_cfg") is None:
            raise ConfigError(
                f"{place}.{name}.input_cfg: missing; under sampler_fusion: mux a group lists its sources."
            )
        section = {**section, "type": "group", **({} if weights is None else {"weight": weights[name]})}
        of_group = {**inherited, **{key: section[key] for key in _OF_MERGED_GROUPS if section.get(key) is not None}}
        members.append(parse_group(section, f"{place}.{name}", of_group, **how))
    check_weights(members, how["is_auto"])
    root = SourceGroup(place=place, members=tuple(members), is_auto=how["is_auto"], keys={})
    return _group_config({**own, "input_cfg": True}, place, "", root)


def _noise(keys: Mapping[str, Any], place: str) -> Noise | None:
    noise, place = keys.get("noise_path"), f"{place}.noise_path"
    if noise is None:
        return None
    if isinstance(noise, str):
        is_cuts = noise.endswith((".jsonl", ".jsonl.gz"))
        noise = {"input_cfg" if noise.endswith(".yaml") else "cuts_path" if is_cuts else "manifest_filepath": noise}
    how = {"allow_commands": keys.get("allow_commands", False)}
    if noise.get("input_cfg") is not None:
        members = parse_entries(noise["input_cfg"], f"{place}.input_cfg", {}, **how)
    else:
        members = (parse_classic(noise, place, {}, **how),)
    names = ("input_cfg", "manifest_filepath", "tarred_audio_filepaths", "cuts_path", "shar_path")
    return Noise(members=members, keys={key: value for key, value in noise.items() if key not in names})


def _temperatures(value: Any, root: SourceGroup, place: str) -> tuple[float, ...] | None:
    """``reweight_temperature`` of a dataset: one for each level of ``input_cfg``."""
    if value is None:
        return None
    if is_number(value):
        return (float(value),) * root.depth
    if len(value) != root.depth:
        raise ConfigError(
            f"{place}.reweight_temperature: has {len(value)} values, but the groups are {root.depth} levels deep; give "
            "a value for each level, or one number for all."
        )
    return tuple(map(float, value))


def _check_fusion(keys: Mapping[str, Any], groups: Sequence[str] | None, place: str) -> None:
    fusion, weights = keys.get("sampler_fusion", "round_robin"), keys.get("sampler_weights")
    if groups is not None and not groups:
        raise ConfigError(f"{place}: multi_config is set, but there are no groups; give each kind of data a section.")
    if fusion not in FUSIONS:
        suggestion = nearest(str(fusion), FUSIONS)
        hint = f"did you mean '{suggestion}'?" if suggestion else f"it can be {', '.join(FUSIONS)}."
        raise ConfigError(f"{place}.sampler_fusion: '{fusion}' is unknown; {hint}")
    if groups is None or weights is None:
        return
    for name in groups:
        if name not in weights:
            raise ConfigError(f"{place}.sampler_weights: the group '{name}' has none; give each group a weight.")
    for name in weights:
        if name not in groups:
            raise ConfigError(
                f"{place}.sampler_weights: there is no group '{name}'; the groups are {', '.join(groups)}."
            )


def _check_keys_under_zip(own: Mapping[str, Any], groups: Sequence[GroupConfig], is_zip: bool, place: str) -> None:
    """What relates the groups of a step to one another: ``every_n_steps``, ``batch_ratio`` and ``packing``."""
    if is_zip:
        check_packed_alike([(group.place, group.packing, group.sources) for group in groups])
    for key in _KEYS_UNDER_ZIP:
        holders = [place] if key in own else [g.place for g in groups if getattr(g, key) != getattr(GroupConfig, key)]
        if holders and (key in own or not is_zip):
            if key not in own and own.get("multi_config"):
                raise ConfigError(
                    f"{holders[0]}.{key}: has a meaning under sampler_fusion: zip alone, where a step holds a batch of "
                    f"every group, and here it is {own.get('sampler_fusion', 'round_robin')}; leave the key out, or "
                    f"set {place}.sampler_fusion: zip."
                )
            raise ConfigError(
                f"{holders[0]}.{key}: is a key of a group of a multi_config with sampler_fusion: zip, where each step "
                "holds a batch of every group; set it there."
            )
    if is_zip and all(group.every_n_steps > 1 for group in groups):
        raise ConfigError(
            f"{groups[0].place}.every_n_steps: no group gives a batch to every step, so some steps would hold nothing; "
            "leave the key out of one group."
        )
    followers = [group for group in groups if group.batch_ratio is not None]
    if not followers:
        return
    if (leader := leading_group(groups)) is None:
        raise ConfigError(
            f"{groups[0].place}.batch_ratio: all groups have one, but the ratio is to a group without; leave the key "
            "out of the group that the others follow."
        )
    if leader.every_n_steps > 1:
        raise ConfigError(
            f"{leader.place}.every_n_steps: {leader.every_n_steps} cannot be combined with "
            f"{followers[0].place}.batch_ratio, which is a ratio to this group's batch in each step; leave one out."
        )
    for group in followers:
        if (group.batch_duration or group.batch_tokens) and not group.bucket_batch_size:
            key = "batch_tokens" if group.batch_tokens else "batch_duration"
            raise ConfigError(
                f"{group.place}.{key}: cannot be combined with batch_ratio, which counts examples; give the most "
                "examples by batch_size, or by bucket_batch_size."
            )


def leading_group(groups: Sequence[GroupConfig]) -> GroupConfig | None:
    """The group to whose batches every ``batch_ratio`` relates: the first without one."""
    return next((group for group in groups if group.batch_ratio is None), None)


def _check_sizes(group: GroupConfig) -> None:
    """Bins, and what must fit them."""
    bins, place = group.bucket_duration_bins, group.place
    if isinstance(bins, list):
        if not bins or bins != sorted(bins):
            raise ConfigError(
                f"{place}.bucket_duration_bins: {bins} is not in ascending order; sort the bins.", page=Help.BATCH_SIZE
            )
        sizes = group.bucket_batch_size
        if sizes is not None and len(sizes) != len(bins):
            raise ConfigError(
                f"{place}.bucket_batch_size: has {len(sizes)} sizes for {len(bins)} bins; give one for each.",
                page=Help.BATCH_SIZE,
            )
        for key in ("max_tps", "max_tpt"):
            if isinstance(ratios := group.keys.get(key), list) and sizes is not None and len(ratios) != len(bins):
                raise ConfigError(f"{place}.{key}: has {len(ratios)} values for {len(bins)} bins; give one for each.")
    for low, high in LIMITS:
        least, most = (group.keys.get(key, getattr(LhotseDataLoadingConfig, key)) for key in (low, high))
        if is_number(least) and is_number(most) and least > most:
            raise ConfigError(f"{place}.{low}: {least} is above {high}, which is {most}, so nothing is left.")
    if group.force_map_dataset and group.force_iterable_dataset:
        raise ConfigError(f"{place}.force_map_dataset: excludes force_iterable_dataset; set one of them.")


def _warn_of_keys_without_effect(
    own: Mapping[str, Any], sections: Mapping[str, Mapping], unknown_keys: Sequence[str], place: str
) -> None:
    """Said once, since a dataset is parsed before the model is built and again with its loader."""
    messages = [f"{place}: these keys are ignored: {', '.join(unknown_keys)}"] if unknown_keys else []
    for key, value in own.items():
        if key in LOADER_KEYS - _EFFECTIVE_ABOVE_GROUPS and value is not None:
            names = ", ".join(sections)
            messages.append(f"{place}.{key}: has no effect next to multi_config; set it in the groups ({names}).")
    for name, section in sections.items():
        for key in _OF_ALL_GROUPS:
            shared = own.get(key, getattr(LhotseDataLoadingConfig, key))
            if key in section and section[key] != shared:
                messages.append(
                    f"{place}.{name}.{key}: has no effect, since all groups share {place}.{key}, which is {shared}; "
                    "set it there."
                )
    for message in messages:
        logging.warning(message, mode=logging_mode.ONCE)
