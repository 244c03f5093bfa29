"""Mistakes in a dataset that its section alone does not reveal, found before training; each is one sentence."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from lhotse.cut import Cut
from nemo.collections.common.prompts import PromptFormatter
from nemo.utils import logging
from omegaconf import DictConfig, OmegaConf

from nemo_emmett.config import nearest
from nemo_emmett.data.config.dataset_config import LIMITS, DatasetConfig, GroupConfig, parse_dataset
from nemo_emmett.data.config.nemo_config import sampler_config
from nemo_emmett.data.config.section import config_of, plain
from nemo_emmett.data.config.sources import Source
from nemo_emmett.data.dataset import describe
from nemo_emmett.data.io.commands import commands_allowed
from nemo_emmett.data.io.files import count_lines_of, is_local
from nemo_emmett.data.io.skipped_records import SkippedRecords
from nemo_emmett.data.readers.examples import ExampleKind, Examples, lengths_in_tokens
from nemo_emmett.data.readers.parallel_text import aligned_shards, directions_of, text_layout
from nemo_emmett.data.readers.registry import (
    ReaderContext,
    defaults_of,
    open_source,
    reader_context,
    register_data_types,
)
from nemo_emmett.data.sampling.tolerance import build_tolerant_sampler
from nemo_emmett.errors import ConfigError, DataError, Help
from nemo_emmett.modules.batch import MODALITIES
from nemo_emmett.prompts.families import forbidden_text
from nemo_emmett.prompts.language_tokens import LanguageTokenPrompt
from nemo_emmett.prompts.languages import check_language
from nemo_emmett.prompts.transcripts import transcript_of
from nemo_emmett.prompts.translation import register_prompt_formats
from nemo_emmett.typed_config import parse_value

TRAIN_SALM_GPT = (
    "train nemo_emmett's SALMGPT instead, which takes text, speech and both, and whose checkpoints NeMo's SALM can "
    "load (examples/speechlm/train.py with ++model._target_=salm_gpt)"
)
"""What to do where NeMo's SALM cannot take the data."""

FILTER_KEYS = (
    *(key for limits in LIMITS for key in limits),
    *("max_cer", "min_context_speaker_similarity", "keep", "bucket_duration_bins"),
)
"""Keys by which NeMo drops examples."""

REMEDIES = {
    "no target language": "give the source a target_lang, or each of its records one",
    "no transcript": "write what is spoken into the field 'source_text' of its records, or remove the key",
    "no source language": "give the source a source_lang, or each of its records one",
    "no duration": "write each record's duration, in seconds, into the manifest",
    "missing audio": "correct the paths in the manifest",
    "text holds a control token": "set prompt_format to one of ours (emmett_...), which takes it for text",
}
"""What to do when all records of a source are bad for one cause."""

MOST_WITHOUT_TRANSCRIPT = 1_000
"""A source has no transcripts if so many of its first examples have none."""

_NEEDED = {
    **dict.fromkeys(("nemo", "nemo_tarred"), ("manifest_filepath",)),
    **dict.fromkeys(("txt", "txt_jsonl"), ("paths", "language")),
    "speech_tsv": ("paths",),
}
"""Keys that a source of a type must have; those of other types are checked where they are read."""


def check_data_config(
    section: Mapping[str, Any] | DictConfig | None,
    tokenizer: Any = None,
    place: str = "data.train_ds",
    examples: ExampleKind = ExampleKind.TRANSLATION,
) -> None:
    """Look for mistakes in ``train_ds``, ``validation_ds``, ... before anything expensive is built.

    Args:
        section: of a dataset, or one with several under ``datasets``; None: nothing to check.
        tokenizer: NeMo tokenizer; without one (there is no model yet), what depends on tokens is not looked at, nor are
            batch sizes, which the OOMptimizer may yet set.
        place: in the recipe, for messages.
        examples: what the dataset takes.

    Raises:
        ConfigError: if a key is misspelt or has a value that cannot work.
        DataError: if a file is missing, parallel files have different lengths, or nothing of a source can be used.

    Example:
        >>> check_data_config({"manifest_filepath": "nowhere.json", "batch_size": 4})
        Traceback (most recent call last):
        nemo_emmett.errors.DataError: data.train_ds.manifest_filepath: there is no file 'nowhere.json'; ...
    """
    if section is None:
        return
    common = plain(section, place)
    if (datasets := common.pop("datasets", None)) is None:
        check_dataset(parse_dataset(config_of(common), place), tokenizer, examples)
        return
    check_dataset_names(datasets, place)
    for name, dataset in datasets.items():
        merged = OmegaConf.merge(config_of(common), config_of(dataset or {}))
        check_dataset(parse_dataset(merged, f"{place}.datasets.{name}"), tokenizer, examples)


def check_dataset_names(datasets: Mapping[str, Any], place: str) -> None:
    """Refuse datasets whose name is that of a modality: Lightning wraps a validation batch in its dataset's name.

    Raises:
        ConfigError: naming the dataset.
    """
    parse_value(dict[str, dict[str, Any] | None], datasets, f"{place}.datasets")
    for name in MODALITIES:
        if name in datasets:
            raise ConfigError(
                f"{place}.datasets.{name}: a dataset cannot be called '{name}', which is the name of a modality in a "
                f"batch; call it, for example, 'dev_{name}'."
            )


def check_dataset(
    dataset: DatasetConfig, tokenizer: Any, kind: ExampleKind, *, reads: bool = True, has_sizes: bool = True
) -> None:
    """The checks of :func:`check_data_config` for one dataset.

    Args:
        dataset: to be checked.
        tokenizer: NeMo tokenizer.
        kind: what the dataset takes.
        reads: also :func:`check_records`.
        has_sizes: batch sizes are there; False: OOMptimizer will set them.
    """
    register_data_types()
    register_prompt_formats()
    if dataset.use_emmett is False:
        raise ConfigError(
            f"{dataset.place}.use_emmett: false has no effect, since this training always reads its data by "
            f"nemo_emmett's dataloader; remove the key, or set ++{dataset.place}.sampling=nemo for NeMo's samplers."
        )
    if kind is ExampleKind.CONVERSATION:
        _check_for_nemo_salm(dataset)
    for group in dataset.groups:
        if kind is not ExampleKind.AS_READ:
            for source in group.sources:
                _check_languages(source)
        check_files([*group.sources, *(group.noise.sources if group.noise else ())])
        rir_path = group.keys.get("rir_path")
        if group.keys.get("rir_enabled") and rir_path and is_local(rir_path) and not Path(rir_path).exists():
            raise DataError(f"{group.place}.rir_path: there is no file '{rir_path}'; correct the path.")
        if has_sizes and (tokenizer is not None or kind is ExampleKind.AS_READ):
            _check_batch_size(group)
        if kind is not ExampleKind.AS_READ:
            _check_prompted(group, tokenizer, kind)
    check_transcripts(dataset, kind)
    if reads:
        check_records(dataset, tokenizer, kind)


def _check_for_nemo_salm(dataset: DatasetConfig) -> None:
    """Refuse data of which NeMo's SALM may get a batch without speech: its preprocessor fails on one."""
    with_text = [part for part in dataset.parts if any(source.is_text for source in part.sources())]
    can_be_zipped = dataset.is_multi_config and len(with_text) < len(dataset.parts)
    if not with_text or (can_be_zipped and dataset.sampler_fusion == "zip"):
        return
    how = f"with sampler_fusion: {dataset.sampler_fusion} " if dataset.is_multi_config else ""
    remedy = (
        f"set ++{dataset.place}.sampler_fusion=zip, so that each batch holds both"
        if can_be_zipped
        else "remove its text sources"
    )
    raise ConfigError(
        f"{with_text[0].place}: holds text, so {how}a batch may hold nothing else, and NeMo's SALM cannot take a batch "
        f"without speech; {TRAIN_SALM_GPT}, or {remedy}."
    )


def _named_languages(source: Source) -> Iterator[tuple[str, list[str]]]:
    """The keys of a source that name languages, and these."""
    for key in ("source_lang", "target_lang"):
        codes = getattr(source, key)
        yield f"{source.place}.{key}", [codes] if isinstance(codes, str) else list(codes or ())
    if source.type in ("parallel_text", "txt_pair") and isinstance(source.paths, Mapping):
        yield f"{source.place}.paths", list(source.paths)


def _check_languages(source: Source) -> None:
    for place, codes in _named_languages(source):
        for code in codes:
            check_language(code, place)
        if len(set(codes)) < len(codes):
            raise ConfigError(f"{place}: names one language twice, as {', '.join(codes)}; name each once.")
    if source.type == "speech_tsv" and isinstance(source.target_lang, list):
        raise ConfigError(
            f"{source.place}.target_lang: a row has one translation, not one to each of {source.target_lang}; list the "
            "file once for each of them, with its target_column."
        )
    if source.type not in ("parallel_text", "txt_pair"):
        return
    layout = text_layout(source)
    if layout == "many":
        directions_of(source)
    elif isinstance(source.target_lang, list):
        raise ConfigError(f"{source.place}.target_lang: a text has one target language, not {source.target_lang}.")
    elif source.target_lang is None and layout != "jsonl" and source.target_lang_column is None:
        raise ConfigError(
            f"{source.place}.target_lang: missing; name the language of the target texts.", page=Help.LANGUAGE
        )


def check_files(sources: Iterable[Source]) -> None:
    """Look for the files that sources name.

    Raises:
        ConfigError: if a source names none.
        DataError: naming the first file that is missing.
    """
    for source in sources:
        for key in _NEEDED.get(source.type, ()):
            if source.keys.get(key) is None:
                raise ConfigError(f"{source.place}.{key}: missing; a source of type '{source.type}' needs it.")
        if source.audio_dir is not None and is_local(source.audio_dir) and not Path(source.audio_dir).is_dir():
            raise DataError(f"{source.place}.audio_dir: there is no folder '{source.audio_dir}'; correct the path.")
        for key, path, written in source.files_as_written():
            if is_local(path) and not os.path.exists(path):
                of_pattern = f" (of '{written}')" if written != path else ""
                raise DataError(
                    f"{source.place}.{key}: there is no file '{path}'{of_pattern}; correct the path, or prepare the "
                    "data first.",
                    page=Help.MISSING_FILE,
                )


def _check_parallel(source: Source) -> None:
    if source.type not in ("parallel_text", "txt_pair") or text_layout(source) not in ("pair", "many"):
        return
    shards = aligned_shards(source)
    counts = count_lines_of([path for shard in shards for path in shard.values() if is_local(path)])
    for shard in shards:
        of_shard = {path: counts[path] for path in shard.values() if path in counts}
        if len(set(of_shard.values())) > 1:
            lengths = ", ".join(f"{path} has {count}" for path, count in of_shard.items())
            raise DataError(f"{source.place}: parallel files must have the same number of lines, but {lengths}.")


def _check_batch_size(group: GroupConfig) -> None:
    size = group.batch_tokens if group.use_multimodal_sampling else group.batch_duration
    has_bins, has_sizes = group.bucket_duration_bins is not None, group.bucket_batch_size is not None
    has_sized_bins = has_bins and has_sizes
    # NeMo divides the durations up to max_duration where it is given no bins, but no numbers of tokens.
    has_durations = not group.use_multimodal_sampling and (group.keys.get("max_duration") or math.inf) < math.inf
    if has_sizes and not has_bins and not has_durations:
        raise ConfigError(
            f"{group.place}.bucket_duration_bins: missing; bucket_batch_size needs a bin for each of its sizes.",
            page=Help.BATCH_SIZE,
        )
    if group.batch_size is None and size is None and not has_sized_bins:
        raise ConfigError(
            f"{group.place}.batch_size: missing; give batch_size, batch_duration (speech), batch_tokens (with "
            "use_multimodal_sampling: true), or bucket_duration_bins with bucket_batch_size.",
            page=Help.BATCH_SIZE,
        )


def _check_prompted(group: GroupConfig, tokenizer: Any, kind: ExampleKind) -> None:
    """What is needed where examples are prompted before they are batched."""
    if not group.use_multimodal_sampling:
        reason = lengths_in_tokens(group.sources, kind)
        for key in ("batch_duration", "use_bucketing", "bucket_batch_size", "bucket_duration_bins"):
            if reason is not None and getattr(group, key):
                raise ConfigError(
                    f"{group.place}.{key}: measures seconds of speech, but {reason}; set use_multimodal_sampling: true "
                    "to measure in tokens."
                )
    known = sorted(PromptFormatter._REGISTERED_FORMATTERS)
    if group.prompt_format is not None and group.prompt_format not in known:
        suggestion = nearest(group.prompt_format, known)
        hint = f"did you mean '{suggestion}'?" if suggestion else f"known are {', '.join(known)}."
        raise ConfigError(f"{group.place}.prompt_format: there is no prompt format '{group.prompt_format}'; {hint}")
    if group.prompt_format is not None and not group.pretokenize:
        raise ConfigError(
            f"{group.place}.pretokenize: must be true, since examples are prompted before they are batched."
        )
    if tokenizer is not None:  # before there is a model, its own keys are not in the section
        if group.prompt_format is None:
            raise ConfigError(
                f"{group.place}.prompt_format: missing; use emmett_t5, or the format of the language model."
            )
        _check_speech(group, tokenizer)
        _check_family(group, tokenizer)
    if group.concatenate_samples:
        raise ConfigError(
            f"{group.place}.concatenate_samples: would join recordings but not their prompts; set it to false."
        )


def _check_family(group: GroupConfig, tokenizer: Any) -> None:
    """Languages that sources name have a token in the family of the language model, if it has tokens of languages."""
    formatter = PromptFormatter.resolve(group.prompt_format)
    if not issubclass(formatter, LanguageTokenPrompt):
        return
    prompt = formatter(tokenizer)
    for source in group.sources:
        for place, codes in _named_languages(source):
            for code in codes:
                try:
                    prompt.language_id(code)
                except ConfigError as error:
                    raise ConfigError(f"{place}: {error}") from error


def _check_speech(group: GroupConfig, tokenizer: Any) -> None:
    for source in group.sources:
        if source.is_text:
            continue
        tag = source.audio_locator_tag
        if tag is None:
            raise ConfigError(
                f"{group.place}.audio_locator_tag: missing; name the token that marks speech, as the model does."
            )
        number = tokenizer.token_to_id(tag)
        if number is None or number == getattr(tokenizer, "unk_id", None):
            raise ConfigError(
                f"{group.place}.audio_locator_tag: the tokenizer has no token '{tag}'; add it "
                f"(tokenizer.add_special_tokens({{'additional_special_tokens': ['{tag}']}})) or name one that it has."
            )
        if group.use_multimodal_sampling and source.token_equivalent_duration is None:
            raise ConfigError(
                f"{group.place}.token_equivalent_duration: missing; give the seconds of speech that one frame of the "
                "encoder covers (0.08 for FastConformer), so that speech can be measured in tokens."
            )


def check_transcripts(dataset: DatasetConfig, kind: ExampleKind) -> None:
    """Look for a transcript among the first records of each source whose transcripts are asked for.

    Sources that cannot be read without their audio are not looked at.

    Raises:
        ConfigError: if the dataset is not ours.
        DataError: naming the first source without a transcript.
    """
    for group in dataset.groups:
        for source in group.sources:
            if source.is_transcription and kind is ExampleKind.AS_READ:
                raise ConfigError(
                    f"{source.place}: its dataset takes examples as NeMo reads them, so that none can be transcribed "
                    "instead of translated; remove the key."
                )
            if source.transcripts and kind is not ExampleKind.TRANSLATION:
                raise ConfigError(
                    f"{group.place}.transcripts: true needs nemo_emmett's SpeechTextDataset, since no other "
                    "dataset has transcripts in its batches; leave the key out."
                )
            needs_some = source.is_transcription or (source.transcripts and not source.is_text)
            if needs_some and (source.is_conversation or _can_be_probed(source, kind)):
                _check_has_transcript(source, group, kind)


def _check_has_transcript(source: Source, group: GroupConfig, kind: ExampleKind) -> None:
    cause = "conversations have no transcripts"
    if not source.is_conversation:
        skipped_records = SkippedRecords()
        with logging.temp_verbosity(logging.ERROR), commands_allowed(group.allow_commands):
            probed = source.with_keys(metadata_only=True, transcripts=True, is_transcription=False)
            cuts, _ = open_source(probed, skipped_records, ExampleKind.TRANSLATION)
            examples = Examples(cuts, ExampleKind.TRANSLATION, defaults_of(probed), skipped_records)
            count = 0
            for example in islice(examples, MOST_WITHOUT_TRANSCRIPT):
                if transcript_of(example):
                    _check_spoken_language(source, example)
                    return
                count += 1
        if count == 0:  # other checks say why
            return
        cause = f"none of the first {count} examples has a transcript"
    asking, remedy = "transcripts: true asks for them", "set transcripts: false for this source"
    if source.is_transcription:
        asking, remedy = "they are to be transcribed", "set transcription: null for this source"
    raise DataError(
        f"{source.place}: {cause} ({source.name}), but {asking}; write what is spoken into the field 'source_text' of "
        f"each record (of a TSV file, into its source_column), or {remedy}."
    )


def _check_spoken_language(source: Source, example: Cut) -> None:
    if source.is_transcription and describe(example)["source_lang"] is None:
        raise DataError(
            f"{source.place}: the spoken language of {source.name} is not known, so nothing can be transcribed; give "
            "the source a source_lang, or each of its records one.",
            page=Help.LANGUAGE,
        )


def check_records(dataset: DatasetConfig, tokenizer: Any, kind: ExampleKind) -> None:
    """Count the lines of parallel text, and send each source's records through NeMo's own filters until one passes.

    Only manifests and text are read.
    """
    for group in dataset.groups:
        for source in group.sources:
            _check_parallel(source)
            if _can_be_probed(source, kind):
                _check_something_is_left(source, group, tokenizer, kind)


def _check_something_is_left(source: Source, group: GroupConfig, tokenizer: Any, kind: ExampleKind) -> None:
    skipped_records = SkippedRecords()
    how = ReaderContext(skipped_records, kind, forbidden=forbidden_text(group.prompt_format, tokenizer))
    allowed = commands_allowed(group.allow_commands)
    with logging.temp_verbosity(logging.ERROR), reader_context(how), allowed:
        probe = _probe(source, group, tokenizer)
        sampler, _ = build_tolerant_sampler(probe, 0, 1, tokenizer, skipped_records)
        if next(iter(sampler.cuts[0]), None) is not None:
            return
    raise nothing_is_left(source, group, skipped_records)


def nothing_is_left(source: Source, group: GroupConfig, skipped_records: SkippedRecords) -> DataError:
    """The error for a source of which no example passes.

    Args:
        source: with its records read once.
        group: with the filters.
        skipped_records: what was read and skipped of the source.
    """
    read, bad = skipped_records.read_count, skipped_records.count()
    causes = skipped_records.causes()
    listed = ", ".join(f"{count} x {cause}" for cause, count in causes.items())
    if read == 0:
        return DataError(f"{source.place}: {source.name} is empty; correct the path, or drop the source.")
    if read <= bad:
        remedy = REMEDIES.get(next(iter(causes)), "mend it, or drop the source") if len(causes) == 1 else "mend it"
        return DataError(
            f"{source.place}: none of the {read} records of {source.name} can be used ({listed}); {remedy}."
        )
    filters = ", ".join(f"{key}: {group.keys[key]}" for key in FILTER_KEYS if group.keys.get(key) is not None)
    but = f" (bad: {listed})" if bad else ""
    return DataError(
        f"{source.place}: nothing of {source.name} is left of {read} records{but} after filtering by "
        f"{filters or 'NeMo defaults'}; relax these keys, or drop the source."
    )


def _can_be_probed(source: Source, kind: ExampleKind) -> bool:
    """Whether its records can be read without their audio, and by our reader."""
    if source.type in ("nemo", "nemo_tarred", "lhotse"):
        return source.shar_path is None
    if source.type == "txt_pair":
        return kind is not ExampleKind.AS_READ and source.questions_path is None
    return source.type in ("parallel_text", "speech_tsv")


def _probe(source: Source, group: GroupConfig, tokenizer: Any) -> DictConfig:
    """The config of a sampler that only filters: one source, once through, in order."""
    overrides = {
        "sources": [source],
        "metadata_only": True,
        "force_finite": True,
        "force_map_dataset": False,
        "force_iterable_dataset": False,
        "shuffle": False,
        "max_open_streams": None,
        "reweight_temperature": None,
        "noise_path": None,
        "rir_enabled": False,
    }
    if tokenizer is None:
        overrides |= {"pretokenize": False, "use_multimodal_sampling": False, "min_tokens": None, "max_tokens": None}
    has_bins = group.bucket_duration_bins is not None and not group.has_auto_bins
    if tokenizer is None or not has_bins or group.bucket_batch_size is None:
        # Without bins, a bucketing sampler would read the data to estimate them.
        overrides |= {"use_bucketing": False, "bucket_duration_bins": None, "bucket_batch_size": None, "batch_size": 1}
        overrides |= {"batch_duration": None, "batch_tokens": None}
    return sampler_config(group, **overrides)
