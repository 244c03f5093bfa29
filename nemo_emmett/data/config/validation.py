"""What can be known to be wrong about a data config before training starts; each mistake is one sentence."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nemo.collections.common.data.lhotse.dataloader import (
    LhotseDataLoadingConfig,
    make_structured_with_schema_warnings,
)
from nemo.collections.common.prompts import PromptFormatter
from nemo.utils import logging, logging_mode
from omegaconf import DictConfig, OmegaConf

from nemo_emmett.config import check_keys, item_of, nearest
from nemo_emmett.data.config.schema import (
    ANY_SOURCE_KEYS,
    AUTO_BINS,
    KEYS_OF_TYPE,
    LEGACY_KEYS,
    OUR_KEYS,
    MultimodalDataConfig,
)
from nemo_emmett.data.config.sources import (
    CLASSIC_KEYS,
    INHERITED_BY_GROUPS,
    SHARED_BY_GROUPS,
    Source,
    config_of,
    groups_of,
    languages_of,
    list_all_sources,
    list_sources,
    merge_groups,
    nemo_keys,
    plain,
    with_inherited,
    wrap_sources,
)
from nemo_emmett.data.io.commands import commands_allowed
from nemo_emmett.data.io.files import count_lines_of, is_local
from nemo_emmett.data.io.skipped_records import SkippedRecords
from nemo_emmett.data.readers.examples import ExampleKind
from nemo_emmett.data.readers.parallel_text import aligned_shards, directions_of, text_layout
from nemo_emmett.data.readers.registry import ReaderContext, known_types, reader_context
from nemo_emmett.data.sampling.fusion import check_for_nemo_salm, check_fusion
from nemo_emmett.data.sampling.tolerance import build_tolerant_sampler
from nemo_emmett.errors import ConfigError, DataError
from nemo_emmett.modules.batch import MODALITIES
from nemo_emmett.prompts.families import forbidden_text
from nemo_emmett.prompts.languages import check_language
from nemo_emmett.prompts.translation import register_prompt_formats

EFFECTIVE_ABOVE_GROUPS = {*SHARED_BY_GROUPS, *INHERITED_BY_GROUPS, *OUR_KEYS, "cuda_expandable_segments"}
"""Keys that mean something beside ``multi_config``; all others belong into the groups."""

FILTER_KEYS = (
    "min_duration",
    "max_duration",
    "min_tokens",
    "max_tokens",
    "min_tps",
    "max_tps",
    "min_tpt",
    "max_tpt",
    "max_cer",
    "min_context_speaker_similarity",
    "keep",
    "bucket_duration_bins",
)
"""Keys by which NeMo drops examples."""

REMEDIES = {
    "no target language": "give the source a target_lang, or each of its records one",
    "no duration": "write each record's duration, in seconds, into the manifest",
    "missing audio": "correct the paths in the manifest",
    "text holds a control token": "set prompt_format to one of ours (emmett_...), which takes it for text",
}
"""What to do when all records of a source are bad for one cause."""


def check_data_config(
    config: Mapping | DictConfig | None,
    tokenizer: Any = None,
    where: str = "data.train_ds",
    examples: ExampleKind = ExampleKind.TRANSLATION,
) -> None:
    """Look for mistakes in ``train_ds``, ``validation_ds``, ... before anything expensive is built.

    Args:
        config: a dataset's config, or one with several under ``datasets``; None: nothing to check.
        tokenizer: NeMo tokenizer; without one (there is no model yet), what depends on tokens is not looked at, nor are
            batch sizes, which the OOMptimizer may yet set.
        where: its place in the recipe, for messages.
        examples: what the dataset takes.

    Raises:
        ConfigError: if a key is misspelt or has a value that cannot work.
        DataError: if a file is missing, parallel files have different lengths, or nothing of a source can be used.

    Example:
        >>> check_data_config({"manifest_filepath": "nowhere.json", "batch_size": 4})
        Traceback (most recent call last):
        nemo_emmett.errors.DataError: data.train_ds.manifest_filepath: there is no file 'nowhere.json'; ...
    """
    if config is None:
        return
    settings = plain(config)
    datasets = settings.pop("datasets", None)
    if datasets is None:
        check_dataset(settings, tokenizer, where, examples)
        return
    check_dataset_names(datasets, where)
    for name, dataset in datasets.items():
        merged = plain(OmegaConf.merge(settings, dataset or {}))
        check_dataset(merged, tokenizer, f"{where}.datasets.{name}", examples)


def check_dataset_names(datasets: Mapping, where: str) -> None:
    """Refuse datasets whose name is that of a modality: Lightning wraps a validation batch in its dataset's name.

    Raises:
        ConfigError: naming the dataset.
    """
    for name in MODALITIES:
        if name in datasets:
            raise ConfigError(
                f"{where}.datasets.{name}: a dataset cannot be called '{name}', which is the name of a modality in a "
                f"batch; call it, for example, 'dev_{name}'."
            )


def check_keys_of_dataset(settings: Mapping, where: str) -> list[str]:
    """Refuse misspelt keys of a dataset, its groups and its sources, and types of sources that do not exist.

    Args:
        settings: plain config of the dataset.
        where: its place in the recipe.

    Returns:
        The dataset's own keys that resemble nothing.

    Raises:
        ConfigError: naming the key, and the nearest known one.
    """
    groups = groups_of(settings)
    own = {key: value for key, value in settings.items() if groups is None or key not in groups}
    unknown_keys = check_keys(own, nemo_keys() | OUR_KEYS, where, LEGACY_KEYS)
    _check_keys_of_groups(settings.get("input_cfg"), f"{where}.input_cfg")
    for name, group in (groups or {}).items():
        check_keys(group, nemo_keys() | OUR_KEYS, f"{where}.{name}", LEGACY_KEYS)
        _check_keys_of_groups(group.get("input_cfg"), f"{where}.{name}.input_cfg")
    for source in list_all_sources(settings, where):
        _check_type_and_keys(source)
    return unknown_keys


def check_files_of_dataset(settings: Mapping, where: str) -> None:
    """Look for the files that a dataset's sources name.

    Args:
        settings: plain config of the dataset.
        where: its place in the recipe.

    Raises:
        ConfigError: if a source names none.
        DataError: naming the first file that is missing.
    """
    for source in list_all_sources(settings, where):
        _check_files(source)


def check_dataset(settings: Mapping, tokenizer: Any, where: str, kind: ExampleKind) -> None:
    """The checks of :func:`check_data_config` for one dataset, given as plain dicts."""
    register_prompt_formats()
    MultimodalDataConfig.take_from(dict(settings))
    groups = groups_of(settings)
    if settings.get("use_emmett") is False:
        raise ConfigError(
            f"{where}.use_emmett: false has no effect, since this training always reads its data by nemo_emmett's "
            f"dataloader; remove the key, or set ++{where}.sampling=nemo for NeMo's samplers."
        )
    given = settings
    if groups and settings.get("sampler_fusion") == "mux":
        check_fusion("mux", settings.get("sampler_weights"), list(groups), where)
        settings, groups = merge_groups(settings, where), None
    unknown_keys = check_keys_of_dataset(settings, where)
    if kind is ExampleKind.CONVERSATION:
        _check_for_nemo_salm(given, where)
    if groups is None:  # NeMo warns of strangers itself
        _check_group(settings, tokenizer, where, kind)
        return
    unknown_keys += [key for key in settings if key in LEGACY_KEYS - {"use_lhotse"} and key not in groups]
    if unknown_keys:
        logging.warning(f"{where}: these keys are ignored: {', '.join(unknown_keys)}")
    if not groups:
        raise ConfigError(f"{where}: multi_config is set, but there are no groups; give each kind of data a section.")
    check_fusion(settings.get("sampler_fusion", "round_robin"), settings.get("sampler_weights"), list(groups), where)
    _warn_of_keys_without_effect(settings, groups, where)
    for name, group in with_inherited(settings).items():
        for key in ("max_bad_records", "sampling", "use_emmett"):
            if key in group:
                raise ConfigError(f"{where}.{name}.{key}: holds for all groups together; set {where}.{key}.")
        _check_group(group, tokenizer, f"{where}.{name}", kind)


def _check_for_nemo_salm(settings: Mapping, where: str) -> None:
    has_groups = groups_of(settings) is not None
    has_text = {
        name: any(source.is_text for source in list_sources(group, f"{where}.{name}".rstrip(".")))
        for name, group in (with_inherited(settings) if has_groups else {"": settings}).items()
    }
    check_for_nemo_salm(has_text, settings.get("sampler_fusion", "round_robin") if has_groups else None, where)


def _warn_of_keys_without_effect(settings: Mapping, groups: Mapping[str, Mapping], where: str) -> None:
    for key, value in settings.items():
        if key in nemo_keys() - EFFECTIVE_ABOVE_GROUPS and value is not None:
            _warn_once(f"{where}.{key}: has no effect beside multi_config; set it in the groups ({', '.join(groups)}).")
    defaults = OmegaConf.structured(LhotseDataLoadingConfig)
    for name, group in groups.items():
        for key in SHARED_BY_GROUPS:
            shared = settings.get(key, defaults[key])
            if key in group and group[key] != shared:
                _warn_once(
                    f"{where}.{name}.{key}: has no effect, since all groups share {where}.{key}, which is {shared}; "
                    "set it there."
                )


def _warn_once(message: str) -> None:
    """A dataset is checked before the model is built and again with its loader."""
    logging.warning(message, mode=logging_mode.ONCE)


def _check_group(settings: Mapping, tokenizer: Any, where: str, kind: ExampleKind) -> None:
    """The checks of what one sampler draws from."""
    sources = list_sources(settings, where)
    for source in sources:
        if kind is not ExampleKind.AS_READ:
            _check_languages(source)
        _check_files(source)
        _check_parallel(source)
    if tokenizer is not None or kind is ExampleKind.AS_READ:
        _check_batch_size(settings, where)
    if kind is not ExampleKind.AS_READ:
        _check_sampling(settings, sources, where, kind)
        _check_prompt_format(settings, tokenizer, where)
        if tokenizer is not None:
            _check_speech_settings(settings, sources, tokenizer, where)
        if settings.get("concatenate_samples"):
            raise ConfigError(
                f"{where}.concatenate_samples: would join recordings but not their prompts; set it to false."
            )
    for source in sources:
        _check_something_is_left(source, settings, tokenizer, kind)


def _check_keys_of_groups(entries: Any, where: str) -> None:
    if not isinstance(entries, Sequence) or isinstance(entries, str):
        return
    for index, entry in enumerate(entries):
        if isinstance(entry, Mapping) and entry.get("type") == "group":
            place = item_of(where, index)
            check_keys(entry, ANY_SOURCE_KEYS | nemo_keys(), place, LEGACY_KEYS)
            _check_keys_of_groups(entry.get("input_cfg"), f"{place}.input_cfg")


def _check_type_and_keys(source: Source) -> None:
    types = known_types()
    if source.type not in types:
        suggestion = nearest(source.type, types)
        hint = f"did you mean '{suggestion}'?" if suggestion else f"known are {', '.join(types)}."
        raise ConfigError(f"{source.where}.type: there is no data type '{source.type}'; {hint}")
    if source.type not in KEYS_OF_TYPE:
        return
    known = ANY_SOURCE_KEYS | KEYS_OF_TYPE[source.type] | nemo_keys()
    if unknown_keys := check_keys(source.config, known, source.where, LEGACY_KEYS):
        logging.warning(f"{source.where}: these keys have no meaning for '{source.type}': {', '.join(unknown_keys)}")
    tags = source.config.get("tags")
    if tags is not None and not isinstance(tags, Mapping):
        raise ConfigError(f"{source.where}.tags: {tags!r} is not a mapping; write each tag as 'name: value'.")


def _check_languages(source: Source) -> None:
    languages = languages_of(source.config)
    targets = languages["target_lang"]
    for key, codes in languages.items():
        for code in [codes] if isinstance(codes, str) else codes or ():
            check_language(code, f"{source.where}.{key}")
    if source.type not in ("parallel_text", "txt_pair"):
        return
    layout = _text_layout(source)
    if layout == "many":
        for code in source.config["paths"]:
            check_language(code, f"{source.where}.paths")
    elif targets is not None and not isinstance(targets, str):
        raise ConfigError(f"{source.where}.target_lang: a text has one target language, not {list(targets)}.")
    elif targets is None and layout != "jsonl":
        raise ConfigError(f"{source.where}.target_lang: missing; name the language of the target texts.")


def _text_layout(source: Source) -> str:
    try:
        layout = text_layout(source.config)
        if layout == "many":
            directions_of(source.config)
        return layout
    except ConfigError as error:
        raise ConfigError(f"{source.where}.{error}") from None


def _check_files(source: Source) -> None:
    needs = {"nemo": "manifest_filepath", "nemo_tarred": "manifest_filepath"}.get(source.type)
    if needs is not None and source.config.get(needs) is None:
        raise ConfigError(f"{source.where}.{needs}: missing; a source of type '{source.type}' needs it.")
    for key, path, written in source.files_as_written():
        if is_local(path) and not Path(path).exists():
            of_pattern = f" (of '{written}')" if written != path else ""
            raise DataError(
                f"{source.where}.{key}: there is no file '{path}'{of_pattern}; correct the path, or prepare the data "
                "first."
            )


def _check_parallel(source: Source) -> None:
    if source.type not in ("parallel_text", "txt_pair") or _text_layout(source) not in ("pair", "many"):
        return
    shards = aligned_shards(source.config)
    counts = count_lines_of([path for shard in shards for path in shard.values() if is_local(path)])
    for shard in shards:
        of_shard = {path: counts[path] for path in shard.values() if path in counts}
        if len(set(of_shard.values())) > 1:
            lengths = ", ".join(f"{path} has {count}" for path, count in of_shard.items())
            raise DataError(f"{source.where}: parallel files must have the same number of lines, but {lengths}.")


def _check_batch_size(settings: Mapping, where: str) -> None:
    has_bins = settings.get("bucket_duration_bins") is not None
    sized = [
        settings.get("batch_size"),
        settings.get("batch_tokens") if settings.get("use_multimodal_sampling") else settings.get("batch_duration"),
        settings.get("bucket_batch_size") if has_bins else None,
    ]
    if all(size is None for size in sized):
        raise ConfigError(
            f"{where}.batch_size: missing; give batch_size, batch_duration (speech), batch_tokens (with "
            "use_multimodal_sampling: true), or bucket_duration_bins with bucket_batch_size."
        )


def _check_sampling(settings: Mapping, sources: Sequence[Source], where: str, kind: ExampleKind) -> None:
    """Speech is measured in seconds unless ``use_multimodal_sampling`` counts everything in tokens."""
    if settings.get("use_multimodal_sampling"):
        return
    without_seconds = [source for source in sources if source.is_text or kind is ExampleKind.CONVERSATION]
    for key in ("batch_duration", "use_bucketing", "bucket_batch_size", "bucket_duration_bins"):
        if without_seconds and settings.get(key):
            raise ConfigError(
                f"{where}.{key}: measures seconds of speech, which {without_seconds[0].name} does not have; set "
                "use_multimodal_sampling: true to measure in tokens."
            )


def _check_prompt_format(settings: Mapping, tokenizer: Any, where: str) -> None:
    name = settings.get("prompt_format")
    if name is None:
        if tokenizer is not None:  # before there is a model, its own prompt format is not known yet
            raise ConfigError(f"{where}.prompt_format: missing; use emmett_t5, or the format of the language model.")
        return
    known = sorted(PromptFormatter._REGISTERED_FORMATTERS)
    if name not in known:
        suggestion = nearest(name, known)
        hint = f"did you mean '{suggestion}'?" if suggestion else f"known are {', '.join(known)}."
        raise ConfigError(f"{where}.prompt_format: there is no prompt format '{name}'; {hint}")
    if settings.get("pretokenize") is False:
        raise ConfigError(f"{where}.pretokenize: must be true, since examples are prompted before they are batched.")


def _check_speech_settings(settings: Mapping, sources: Sequence[Source], tokenizer: Any, where: str) -> None:
    for source in sources:
        if source.is_text:
            continue
        tag = source.config.get("audio_locator_tag") or settings.get("audio_locator_tag")
        if tag is None:
            raise ConfigError(
                f"{where}.audio_locator_tag: missing; name the token that marks where speech stands, as the model does."
            )
        if not _has_token(tokenizer, tag):
            raise ConfigError(
                f"{where}.audio_locator_tag: the tokenizer has no token '{tag}'; add it "
                f"(tokenizer.add_special_tokens({{'additional_special_tokens': ['{tag}']}})) or name one that it has."
            )
        seconds = source.config.get("token_equivalent_duration") or settings.get("token_equivalent_duration")
        if settings.get("use_multimodal_sampling") and not seconds:
            raise ConfigError(
                f"{where}.token_equivalent_duration: missing; give the seconds of speech that one frame of the encoder "
                "covers (0.08 for FastConformer), so that speech can be measured in tokens."
            )


def _has_token(tokenizer: Any, token: str) -> bool:
    number = tokenizer.token_to_id(token)
    return number is not None and number != getattr(tokenizer, "unk_id", None)


def _check_something_is_left(source: Source, settings: Mapping, tokenizer: Any, kind: ExampleKind) -> None:
    """Send a source's records through NeMo's own filters until one passes. Nothing but manifests and text is read."""
    if not _can_be_probed(source, kind):
        return
    skipped_records = SkippedRecords()
    allowed = commands_allowed(settings.get("allow_commands") is True)
    how = ReaderContext(skipped_records, kind, forbidden=forbidden_text(settings.get("prompt_format"), tokenizer))
    with logging.temp_verbosity(logging.ERROR), reader_context(how), allowed:
        sampler, _ = build_tolerant_sampler(
            _probe_config(source, settings, tokenizer), 0, 1, tokenizer, skipped_records
        )
        if next(iter(sampler.cuts[0]), None) is not None:
            return
    read, bad = skipped_records.read_count, skipped_records.count()
    causes = skipped_records.causes()
    listed = ", ".join(f"{count} x {cause}" for cause, count in causes.items())
    if read == 0:
        raise DataError(f"{source.where}: {source.name} is empty; correct the path, or drop the source.")
    if read <= bad:
        remedy = REMEDIES.get(next(iter(causes)), "mend it, or drop the source") if len(causes) == 1 else "mend it"
        raise DataError(
            f"{source.where}: none of the {read} records of {source.name} can be used ({listed}); {remedy}."
        )
    filters = ", ".join(f"{key}: {settings[key]}" for key in FILTER_KEYS if settings.get(key) is not None)
    but = f" (bad: {listed})" if bad else ""
    raise DataError(
        f"{source.where}: nothing of {source.name} is left of {read} records{but} after filtering by "
        f"{filters or 'NeMo defaults'}; relax these keys, or drop the source."
    )


def _can_be_probed(source: Source, kind: ExampleKind) -> bool:
    """Whether its records can be read without their audio, and by our reader."""
    if source.type in ("nemo", "nemo_tarred", "lhotse"):
        return source.config.get("shar_path") is None
    if source.type == "txt_pair":
        return kind is not ExampleKind.AS_READ and source.config.get("questions_path") is None
    return source.type == "parallel_text"


def _probe_config(source: Source, settings: Mapping, tokenizer: Any) -> DictConfig:
    """The config of a sampler that only filters: one source, once through, in order."""
    probe = {key: value for key, value in settings.items() if key in nemo_keys() - CLASSIC_KEYS}
    probe |= {
        "input_cfg": wrap_sources(
            {"input_cfg": [source.config], "allow_commands": settings.get("allow_commands")}, source.where
        ),
        "metadata_only": True,
        "force_finite": True,
        "force_map_dataset": False,
        "force_iterable_dataset": False,
        "shuffle": False,
        "max_open_streams": None,
        "reweight_temperature": None,
        "noise_path": None,
        "rir_enabled": False,
        "channel_selector": None,  # our readers select channels
    }
    if tokenizer is None:
        probe |= {"pretokenize": False, "use_multimodal_sampling": False, "min_tokens": None, "max_tokens": None}
    bins = probe.get("bucket_duration_bins")
    if tokenizer is None or bins in (None, AUTO_BINS) or probe.get("bucket_batch_size") is None:
        # Without bins, a bucketing sampler would read the data to estimate them.
        probe |= {"use_bucketing": False, "bucket_duration_bins": None, "bucket_batch_size": None, "batch_size": 1}
        probe |= {"batch_duration": None, "batch_tokens": None}
    return make_structured_with_schema_warnings(config_of(probe))
