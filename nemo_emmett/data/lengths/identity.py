"""What an index depends on, apart from the content of the files: settings of the reader, of NeMo's maps, of prompts."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from lhotse import MonoCut, Recording, SupervisionSegment
from nemo.collections.common.data.lhotse.dataloader import LhotseDataLoadingConfig, tokenize_with_prompt
from nemo.collections.common.data.lhotse.text_adapters import SourceTargetTextExample, TextExample
from nemo.collections.common.prompts import PromptFormatter
from omegaconf import DictConfig

from nemo_emmett.data.config.dataset_config import GroupConfig
from nemo_emmett.data.config.nemo_config import WITHOUT_BATCHES, sampler_config
from nemo_emmett.data.config.sources import FILE_KEYS, Source
from nemo_emmett.data.io.files import is_local
from nemo_emmett.data.lengths.counting import PROBE, TokenCounter
from nemo_emmett.data.readers.examples import ExampleKind, as_conversation
from nemo_emmett.data.readers.registry import defaults_of

NOT_READ = frozenset(
    (
        *("weight", "shuffle", "shard_seed", "force_finite", "metadata_only", "max_open_streams", "slice_length"),
        *("audio_locator_tag", "token_equivalent_duration", "force_map_dataset", "force_iterable_dataset", *FILE_KEYS),
        "transcripts",
    )
)
"""Keys of a source that do not change what its reader yields in a pass, or whose files are identified by content."""

_UNFILTERED = {
    **{key: getattr(LhotseDataLoadingConfig, key) for key in ("min_duration", "max_duration", "min_tps", "max_tps")},
    **{key: getattr(LhotseDataLoadingConfig, key) for key in ("min_tokens", "max_tokens", "min_tpt", "max_tpt")},
    **WITHOUT_BATCHES,
    "reweight_temperature": None,  # in the shares of the blend
    "force_map_dataset": False,
    "force_iterable_dataset": False,
}
"""Keys with which NeMo's chain has its maps, but neither filters of lengths and rates, nor noise, nor batches."""

_KEYS_OF_MAPS = (
    *("sample_rate", "pretokenize", "perturb_speed", "keep", "max_cer", "min_context_speaker_similarity"),
    *("truncate_duration", "truncate_offset_type", "keep_excessive_supervisions", "pad_min_duration", "pad_direction"),
    *("cut_into_windows_duration", "cut_into_windows_hop", "cut_text_into_windows_tokens"),
)
"""Keys of a dataset that change what NeMo's maps, and the filters that have nothing to do with lengths, make."""

_LANGUAGES = (("en", "de"), ("de", "fr"), ("zh", "en"), (None, "es"))


def maps_config(group: GroupConfig, tokenizer: Any) -> DictConfig:
    """NeMo's config of a group, by which its chain has maps only."""
    of_text = {} if tokenizer is not None else {"use_multimodal_sampling": False, "prompt_format": None}
    return sampler_config(group, **_UNFILTERED, **of_text)


def settings_of(source: Source, kind: ExampleKind) -> dict[str, Any]:
    """The settings of a source's reader, apart from the place of its files."""
    settings: dict[str, Any] = {key: value for key, value in source.keys.items() if key not in NOT_READ}
    if kind is not ExampleKind.AS_READ:  # then languages are read in one form
        languages = {"source_lang": source.source_lang, "target_lang": source.target_lang}
        settings |= languages | ({"tags": {**source.tags, **languages}} if source.tags else {})
    settings["languages"] = list(source.paths) if isinstance(source.paths, Mapping) else None
    settings["tars"] = _base_names(source.tarred_audio_filepaths)
    return settings


def _base_names(paths: Any) -> list[str]:
    """The names of files, or of patterns of files, without their folders."""
    if isinstance(paths, str):
        return [os.path.basename(paths)]
    return [name for path in paths or () for name in _base_names(path)] if isinstance(paths, Sequence) else []


def identity_of(
    source: Source,
    files: list[tuple[str, ...]],
    structured: DictConfig,
    kind: ExampleKind,
    forbidden: str | None,
    counter: TokenCounter,
) -> dict[str, str]:
    """What the index of a source is identified by; it stays the same when the folder of its files is moved.

    Args:
        source: with the keys of its dataset.
        files: of each shard.
        structured: NeMo's config (:func:`maps_config`).
        kind: what the dataset takes.
        forbidden: pattern of what no text may hold.
        counter: has the tokenizer.
    """
    maps = {key: structured[key] for key in _KEYS_OF_MAPS}
    if not structured.use_multimodal_sampling:
        maps["cut_text_into_windows_tokens"] = None
    if counter.tokenizer is not None and structured.pretokenize and structured.prompt_format is not None:
        maps["prompt"] = _fingerprint_of_prompts(structured.prompt_format, counter.tokenizer, source, kind)
    tokens = [source.audio_locator_tag, source.token_equivalent_duration if kind is ExampleKind.CONVERSATION else None]
    folder = os.path.dirname(files[0][0]) if files else ""
    prefix = os.path.join(folder, "")
    names = [[_relative(path, prefix) for path in shard] for shard in files]
    facts = [settings_of(source, kind), names, kind.value, forbidden, counter.fingerprint, maps, tokens]
    return {"identity": hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()}


def _relative(path: str, folder: str) -> str:
    """A path as seen from a folder, whose name ends in a slash."""
    if path.startswith(folder) and "/" not in (name := path[len(folder) :]):  # os.path.relpath is slow
        return name
    return os.path.relpath(path, folder or ".") if is_local(path) else path


def _fingerprint_of_prompts(name: str, tokenizer: Any, source: Source, kind: ExampleKind) -> list:
    """What a prompt format makes of some examples: it changes with the format's content, whatever its name."""
    formatter = PromptFormatter.resolve(name)(tokenizer)
    made = []
    for example in _probes(source, kind):
        try:
            prompted = tokenize_with_prompt(example, tokenizer, formatter)
            ids = [getattr(prompted, key, None) for key in ("input_ids", "context_ids", "answer_ids")]
            made.append([None if one is None else np.asarray(one).tolist() for one in ids])
        except Exception as error:  # a format need not take every example
            made.append(type(error).__name__)
    return made


def _probes(source: Source, kind: ExampleKind) -> Iterator[Any]:
    defaults = replace(defaults_of(source), context=None, system_prompt=None)
    for source_lang, target_lang in _LANGUAGES:
        custom = {"id": "probe", "source_lang": source_lang, "target_lang": target_lang}
        texts = TextExample(PROBE, language=source_lang), TextExample(PROBE[::-1], language=target_lang)
        pair = SourceTargetTextExample(source=texts[0], target=texts[1], custom=custom)
        supervision = SupervisionSegment("probe", "probe", 0.0, 1.0, text=PROBE, language=target_lang)
        recording = Recording("probe", [], 16000, 16000, 1.0, channel_ids=[0])
        tag = {} if source.audio_locator_tag is None else {"audio_locator_tag": source.audio_locator_tag}
        cut = MonoCut("probe", 0.0, 1.0, 0, [supervision], recording=recording, custom={**custom, **tag})
        for example in (pair, cut):
            yield as_conversation(example, defaults) if kind is ExampleKind.CONVERSATION else example
