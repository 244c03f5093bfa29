"""The keys of a dataset's section: the types and ranges of NeMo's and ours, and which of them a source type has."""

from __future__ import annotations

from functools import reduce
from operator import or_
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

import annotated_types
from nemo.collections.common.data.lhotse.dataloader import LhotseDataLoadingConfig

from nemo_emmett.typed_config import (
    Count,
    Limit,
    NonEmpty,
    NonNegative,
    Number,
    Positive,
    PositiveWhole,
    Share,
    Switch,
    Text,
    Whole,
    parse_value,
)

AUTO = "auto"
"""``bucket_duration_bins: auto`` finds bins of least padding, ``weights: auto`` weighs sources by what they hold."""

SAMPLINGS = ("auto", "emmett", "nemo")
"""Who may sample."""

FUSIONS = ("zip", "round_robin", "randomized_round_robin", "mux")
"""How the groups of a ``multi_config`` may be combined."""

# More than any machine can do: a slip of the keyboard would only run out of memory, or never fill a batch.
MAX_BATCH_SIZE, MAX_BUCKETS, MAX_WORKERS = 10**6, 10**5, 10**4

Seed = Count | Literal["trng", "randomized"]
"""A random seed, or one of lhotse's ways to choose one."""

TranscriptionShare = Annotated[Number, annotated_types.Gt(0), annotated_types.Lt(1)]
"""The share of a source's examples that are read for transcription."""

_NonEmptyList = Annotated[list[NonEmpty], annotated_types.MinLen(1)]

OUR_TYPES = {
    "use_emmett": Switch,  # a stock NeMo recipe takes our dataloader (ours is always taken by MultimodalDataModule)
    "max_bad_records": Count | Annotated[Number, annotated_types.Gt(0), annotated_types.Lt(1)] | None,
    "source_lang": NonEmpty | None,  # language of the source side, for all sources that do not say it themselves
    "target_lang": NonEmpty | _NonEmptyList | None,  # language(s) to translate to, for all sources that do not say it
    "sampling": Literal[SAMPLINGS],  # "emmett" (resumable, stationary), "nemo" (NeMo's samplers), or "auto"
    "weights": Literal[AUTO] | None,  # sources and groups weigh what they hold (hours, tokens)
    "index_dir": NonEmpty | None,  # folder for indexes and counts where they cannot be written next to the data
    "allow_commands": Switch,  # sources and recordings may be the output of commands, which a shell runs
    "num_sub_buckets": PositiveWhole | None,  # output-length buckets in each input-length bucket, for `auto` bins
    "transcription": TranscriptionShare | None,  # share of the speech examples that are transcribed, not translated
    "every_n_steps": PositiveWhole,  # of a group under zip: it gives a batch to every n-th step only, from the first on
    "batch_ratio": Positive | None,  # of a group under zip: its examples in a step per example of the first group
    "packing": Switch,  # several examples in a row of the language model's input; batch_size counts rows
    "row_tokens": PositiveWhole | Annotated[list[PositiveWhole], annotated_types.Len(2, 2)] | None,  # most of a row
    "transcripts": Switch | None,  # batches of speech have the transcripts, and the prompts of these as text
}
"""Keys of ``train_ds``, ``validation_ds``, ... beyond those of NeMo's ``LhotseDataLoadingConfig``."""

_Pair = Annotated[list[Number], annotated_types.Len(2, 2)]
_PositivePair = Annotated[list[Positive], annotated_types.Len(2, 2)]

Paths = NonEmpty | _NonEmptyList
"""One file or several, each of which may be a pattern."""

_WeightedPath = NonEmpty | Annotated[list[NonEmpty | Number], annotated_types.MinLen(1)]
WeightedPaths = NonEmpty | Annotated[list[_WeightedPath], annotated_types.MinLen(1)]
"""One file or several; in a list, a file may be in a list of its own, with a weight."""

PathsByName = dict[Text, Paths]
"""Files by their language, or by their field of lhotse Shar."""

_RANGES = {
    "manifest_filepath": WeightedPaths | None,
    "tarred_audio_filepaths": WeightedPaths | None,
    "cuts_path": NonEmpty | None,
    "shar_path": WeightedPaths | PathsByName | None,
    "batch_size": PositiveWhole | None,
    "batch_duration": Positive | None,
    "batch_tokens": PositiveWhole | None,
    "quadratic_duration": Positive | None,
    "quadratic_factor": Positive | None,
    "bucket_batch_size": list[Annotated[PositiveWhole, annotated_types.Le(MAX_BATCH_SIZE)]] | None,
    "bucket_duration_bins": list[Positive] | list[_PositivePair] | Literal[AUTO] | None,
    "num_buckets": Annotated[PositiveWhole, annotated_types.Le(MAX_BUCKETS)],
    "num_cuts_for_bins_estimate": PositiveWhole,
    "bucket_buffer_size": PositiveWhole,
    "shuffle_buffer_size": Count | None,
    "seed": Seed,
    "shard_seed": Seed,
    "max_open_streams": PositiveWhole | None,
    "reweight_temperature": NonNegative | list[NonNegative] | None,
    "token_equivalent_duration": Positive | None,
    "cut_text_into_windows_tokens": PositiveWhole | None,
    "max_tps": Limit | list[Limit],
    "max_tpt": Limit | list[Limit],
    "sample_rate": PositiveWhole,
    "num_workers": Annotated[Count, annotated_types.Le(MAX_WORKERS)],
    "noise_path": Text | dict[str, Any] | None,
    "noise_snr": _Pair,
    "noise_mix_prob": Share,
    "truncate_duration": Positive | None,
    "truncate_offset_type": Literal["random", "start", "end"],
    "cut_into_windows_duration": Positive | None,
    "cut_into_windows_hop": Positive | None,
    "rir_prob": Share,
    "pad_min_duration": Positive | None,
    "pad_direction": Literal["left", "right", "both", "random"],
    "lowpass_frequencies_interval": _Pair,
    "lowpass_prob": Share,
    "compression_prob": Share,
    "compression_level_interval": _Pair,
    "clipping_gain_db": _Pair,
    "clipping_oversampling": PositiveWhole | None,
    "clipping_prob": Share,
    "clipping_prob_hard": Share,
    "sampler_weights": dict[str, Positive] | None,
    "slice_length": PositiveWhole | None,
    "concatenate_gap_seconds": NonNegative,
    "concatenate_duration_factor": Positive,
    "keep": NonEmpty,
}
"""Keys of NeMo's whose values have a range that its own annotations do not say."""


def _strict(hint: Any) -> Any:
    """A type of NeMo's as :mod:`~nemo_emmett.typed_config` checks it: a text is no boolean, a boolean no number."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (list, tuple):
        return list[_strict(arguments[0])]
    if origin is dict:
        return dict[str, _strict(arguments[1])]
    if arguments:
        return reduce(or_, map(_strict, arguments))
    return {bool: Switch, int: Whole, float: Limit, str: Text}.get(hint, hint)


LOADER_KEYS = frozenset(LhotseDataLoadingConfig.__dataclass_fields__)
"""The keys of NeMo's dataloader."""

TYPES = {key: _strict(hint) for key, hint in get_type_hints(LhotseDataLoadingConfig).items()} | _RANGES | OUR_TYPES
"""The type of each key of a dataset."""


def parse_keys(section: dict[str, Any], place: str) -> dict[str, Any]:
    """The keys of a dataset or group with their values checked; those without a type stay as they are.

    Raises:
        ConfigError: naming the first key whose value is not of its type.
    """
    keys = dict(section)
    for key in section:
        if key not in TYPES:
            continue
        value = parse_value(TYPES[key], section[key], f"{place}.{key}")
        keys[key] = section[key] if value == section[key] else value  # 20 stays 20 where it may be 20.0
    return keys


LEGACY_KEYS = frozenset(
    """
    ais_config augmentor batch_sampler blank_index bos_id bucketing_batch_size bucketing_strategy bucketing_weights
    concat_sampling_probabilities concat_sampling_scale concat_sampling_seed concat_sampling_technique
    concat_sampling_temperature concat_shuffle defer_setup ds_item eos_id ignore_eos int_values is_concat is_tarred
    labels manifest_parse_func max_utts name normalize normalize_transcripts pad_id parser persistent_workers
    prefetch_factor return_language_id return_sample_id shard_manifests shard_strategy shuffle_n
    tarred_shard_strategy trim trim_silence unk_index use_lhotse use_start_end_token
    """.split()  # noqa: SIM905 - one key a line would be a page
)
"""Keys that NeMo's recipes carry from older dataloaders; NeMo warns of them, and so do we."""

ANY_SOURCE_KEYS = frozenset(
    {"type", "weight", "weights", "tags", "input_cfg"}
    | {"source_lang", "target_lang", "source_language", "target_language", "transcripts"}
    | {"transcription"}
)

_MANIFEST = frozenset({"manifest_filepath", "tarred_audio_filepaths", "extra_fields"})
_CUTS = frozenset({"cuts_path", "shar_path"})

KEYS_OF_TYPE = {
    "group": frozenset(),
    "nemo": _MANIFEST,
    "nemo_tarred": _MANIFEST,
    "lhotse": _CUTS,
    "lhotse_shar": _CUTS,
    "lhotse_as_conversation": _MANIFEST | _CUTS,
    "sqa_as_conversation": _MANIFEST | _CUTS,
    "s2s_as_conversation": _MANIFEST | _CUTS | {"input_roles", "output_roles", "strip_timestamp_tokens"},
    "multimodal_conversation": _MANIFEST,
    "txt": frozenset({"paths", "language"}),
    "txt_jsonl": frozenset({"paths", "language", "text_field"}),
    "nemo_sft_jsonl": frozenset({"paths", "language"}),
    "txt_pair": frozenset({"source_paths", "target_paths", "questions_path", "questions_language"}),
    "parallel_text": frozenset(
        {"source_paths", "target_paths", "paths", "directions", "source_column", "target_column"}
        | {"source_lang_column", "target_lang_column", "source_field", "target_field"}
    ),
    "speech_tsv": frozenset(
        {"paths", "audio_dir", "id_column", "audio_column", "source_column", "target_column", "duration_column"}
        | {"offset_column", "source_lang_column", "target_lang_column"}
    ),
}
"""Keys of each source type, beyond those that every source has; types not listed here are not checked."""
