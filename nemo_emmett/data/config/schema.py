"""The keys that nemo_emmett adds to NeMo's dataloader configs, and the keys that each kind of source knows."""

from __future__ import annotations

from collections.abc import MutableMapping
from dataclasses import dataclass, fields

from nemo_emmett.errors import ConfigError

AUTO_BINS = "auto"
"""``bucket_duration_bins: auto``: the bins of least padding are found when the loader is built."""

SAMPLINGS = ("auto", "emmett", "nemo")
"""Who may sample."""


@dataclass
class MultimodalDataConfig:
    """Keys of ``train_ds``, ``validation_ds``, ... beyond those of NeMo's ``LhotseDataLoadingConfig``."""

    use_emmett: bool = False  # a stock NeMo recipe takes our dataloader (ours is always taken by MultimodalDataModule)
    max_bad_records: int | float | None = 0.25  # stop past so many (>= 1), or this share (< 1) of a source's
    source_lang: str | None = None  # language of the source side, for all sources that do not say it themselves
    target_lang: str | list[str] | None = None  # language(s) to translate to, for all sources that do not say it
    sampling: str = "auto"  # who samples: "emmett" (resumable, stationary), "nemo" (NeMo's samplers), or "auto"
    weights: str | None = None  # "auto": sources and groups weigh what they hold (hours, tokens)
    index_dir: str | None = None  # folder for indexes and counts where they cannot be written beside the data
    allow_commands: bool = False  # sources and recordings may be the output of commands, which a shell runs
    num_sub_buckets: int | None = None  # output-length buckets in each input-length bucket, for `auto` bins

    @classmethod
    def take_from(cls, settings: MutableMapping) -> MultimodalDataConfig:
        """Remove our keys from ``settings`` and return them.

        Raises:
            ConfigError: if ``max_bad_records`` is neither a number of records nor a share of them, or ``sampling`` or
                ``weights`` is unknown.
        """
        taken = cls(**{f.name: settings.pop(f.name) for f in fields(cls) if f.name in settings})
        if taken.sampling not in SAMPLINGS:
            raise ConfigError(f"sampling: {taken.sampling!r} is unknown; it can be {', '.join(SAMPLINGS)}.")
        if taken.weights not in (None, "auto"):
            raise ConfigError(
                f"weights: {taken.weights!r} is unknown; it can be auto, and single weights are set by `weight` in "
                "input_cfg (for groups of a multi_config, by sampler_weights)."
            )
        if not isinstance(taken.allow_commands, bool):
            raise ConfigError(f"allow_commands: {taken.allow_commands!r} is neither true nor false.")
        limit = taken.max_bad_records
        number = isinstance(limit, int) and not isinstance(limit, bool) and limit >= 0
        share = isinstance(limit, float) and (0 < limit < 1 or (limit.is_integer() and limit >= 0))
        if limit is not None and not (number or share):
            raise ConfigError(
                f"max_bad_records: {limit!r} is neither a number of records (0, 1, 2, ...) nor a share of them "
                "(between 0 and 1); use null for no limit."
            )
        return taken


OUR_KEYS = frozenset(f.name for f in fields(MultimodalDataConfig))

LEGACY_KEYS = frozenset(
    {
        "ais_config",
        "augmentor",
        "batch_sampler",
        "blank_index",
        "bos_id",
        "bucketing_batch_size",
        "bucketing_strategy",
        "bucketing_weights",
        "concat_sampling_probabilities",
        "concat_sampling_scale",
        "concat_sampling_seed",
        "concat_sampling_technique",
        "concat_sampling_temperature",
        "concat_shuffle",
        "defer_setup",
        "ds_item",
        "eos_id",
        "ignore_eos",
        "int_values",
        "is_concat",
        "is_tarred",
        "labels",
        "manifest_parse_func",
        "max_utts",
        "name",
        "normalize",
        "normalize_transcripts",
        "pad_id",
        "parser",
        "persistent_workers",
        "prefetch_factor",
        "return_language_id",
        "return_sample_id",
        "shard_manifests",
        "shard_strategy",
        "shuffle_n",
        "tarred_shard_strategy",
        "trim",
        "trim_silence",
        "unk_index",
        "use_lhotse",
        "use_start_end_token",
    }
)
"""Keys that NeMo's recipes carry from older dataloaders; NeMo warns of them, and so do we."""

ANY_SOURCE_KEYS = frozenset({"type", "weight", "weights", "tags", "input_cfg", "source_lang", "target_lang"})

_MANIFEST = frozenset({"manifest_filepath", "tarred_audio_filepaths", "extra_fields"})
_CUTS = frozenset({"cuts_path", "shar_path"})
_TEXT_LANGUAGES = frozenset({"source_language", "target_language"})

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
    "txt_pair": frozenset({"source_paths", "target_paths", "questions_path", "questions_language"}) | _TEXT_LANGUAGES,
    "parallel_text": frozenset(
        {"source_paths", "target_paths", "paths", "directions", "source_column", "target_column"}
        | {"source_field", "target_field"}
        | _TEXT_LANGUAGES
    ),
}
"""Keys of each source type, beyond those that every source knows; types not listed here are not checked."""
