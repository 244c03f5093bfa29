"""Mutations that recipes accept, and why each is sound."""

from __future__ import annotations

import fnmatch
from dataclasses import dataclass

from .mutations import Mutation


@dataclass(frozen=True)
class Accepted:
    """Kinds of values (separated by ``|``) that are sound at places (patterns, separated by spaces) of a section."""

    section: str
    places: str
    kinds: str
    reason: str


_EXPERIMENT = "exp_manager"
_CHECKPOINTS = f"{_EXPERIMENT}.checkpoint_callback_params"
_TEXTS = "text|false as text"

ACCEPTED = (
    # Trainer, experiment manager, keys at the top
    Accepted(
        "run",
        "seed num_threads export_dir export exp_manager trainer.limit_*_batches trainer.val_check_interval "
        "trainer.num_sanity_val_steps trainer.gradient_clip_val trainer.enable_progress_bar "
        "trainer.enable_model_summary trainer.callbacks exp_manager.explicit_log_dir exp_manager.resume_if_exists "
        f"{_CHECKPOINTS}.save_last",
        "null",
        "the same as leaving the key out, by Lightning's and NeMo's annotations",
    ),
    Accepted(
        "run",
        "export_dir trainer.default_root_dir exp_manager.exp_dir exp_manager.explicit_log_dir exp_manager.name "
        f"exp_manager.version {_CHECKPOINTS}.*path {_CHECKPOINTS}.filename {_CHECKPOINTS}.p*fix",
        _TEXTS,
        "any text is the name of a folder or a file",
    ),
    Accepted(
        "run",
        f"{_CHECKPOINTS}.monitor {_EXPERIMENT}.early_stopping_callback_params.monitor trainer.callbacks.0.monitor",
        _TEXTS,
        "which scores there are is known after the first validation, which ends with a sentence",
    ),
    Accepted(
        "run",
        "trainer.max_* trainer.min_* trainer.limit_*_batches trainer.overfit_batches trainer.fast_dev_run "
        "trainer.log_every_n_steps trainer.reload_dataloaders_every_n_epochs trainer.gradient_clip_val "
        f"exp_manager.seconds_to_sleep {_CHECKPOINTS}.save_* {_CHECKPOINTS}.every_n_* *.patience",
        "zero",
        "Lightning's way to switch something off",
    ),
    Accepted(
        "run",
        "trainer.limit_*_batches trainer.overfit_batches trainer.val_check_interval trainer.gradient_clip_val "
        "exp_manager.seconds_to_sleep",
        "fraction",
        "a share of the batches, or a number that need not be whole",
    ),
    Accepted(
        "run",
        "trainer.* exp_manager.*",
        "huge",
        "numbers of steps, epochs, batches, seconds and nodes have no upper limit",
    ),
    Accepted(
        "run",
        "trainer.enable_progress_bar trainer.enable_model_summary trainer.use_distributed_sampler "
        "trainer.fast_dev_run trainer.deterministic trainer.benchmark trainer.inference_mode trainer.detect_anomaly "
        "trainer.barebones trainer.sync_batchnorm exp_manager.use_* exp_manager.resume_past_end exp_manager.create_* "
        f"exp_manager.log_* exp_manager.disable_validation_on_resume {_CHECKPOINTS}.verbose {_CHECKPOINTS}.*save* "
        f"{_CHECKPOINTS}.auto_insert_metric_name",
        "true",
        "the key is true or false",
    ),
    Accepted("run", "trainer.callbacks trainer.plugins exp_manager.files_to_copy", "empty list", "there are none"),
    Accepted(
        "run",
        "exp_manager.wandb_logger_kwargs exp_manager.neptune_logger_kwargs",
        "mapping",
        "no such logger is created, so that its arguments are not read",
    ),
    # Data
    Accepted(
        "data",
        "train_ds.sampler_weights train_ds.max_bad_records train_ds.token_equivalent_duration *.m*_duration *.weight "
        "*.tags",
        "null",
        "the same as leaving the key out",
    ),
    Accepted(
        "data",
        "train_ds.sampler_weights.* *.weight *.max_* *.seed *.shard_seed *.token_equivalent_duration *.quadratic_* "
        "*.bucket_buffer_size *.shuffle_buffer_size *.num_cuts_for_bins_estimate *.reweight_temperature *.slice_length "
        "*.channel_selector *.concatenate_* *.db_norm *.pad_min_duration *.truncate_duration *.cut_into_windows_*",
        "huge",
        "weights count in proportion; filters, seeds, buffers and lengths of audio have no upper limit",
    ),
    Accepted("data", "*.max_*", "infinite", "no limit, as NeMo's default has it"),
    Accepted(
        "data",
        "train_ds.sampler_weights.* *.weight *.token_equivalent_duration *.batch_duration *.quadratic_* "
        "*.bucket_duration_bins.0 *.bucket_duration_bins.0.0 *_prob *_prob_hard *.m*_* *.db_norm *.concatenate_* "
        "*.cut_into_windows_* *.truncate_duration *.pad_min_duration *.reweight_temperature",
        "fraction",
        "a number that need not be whole, in range; bins stay sorted",
    ),
    Accepted("data", "*.min_* *.db_norm", "negative|zero", "no limit, as NeMo's default (-1) has it; decibels"),
    Accepted("data", "*_prob *_prob_hard *.max_bad_records *.concatenate_gap_seconds", "zero", "never, none"),
    Accepted("data", "*.tags", "mapping", "any tag may be given to a source"),
    Accepted("data", "*.index_dir *_field *.channel_selector", _TEXTS, "any text is the name of a folder or a field"),
    Accepted(
        "data",
        "*.concurrent_bucketing *.allow_commands *.use_emmett *.tarred_random_access *.skip_missing_manifest_entries "
        "*.bucketing_2d_strict_mode *.multi_config *.pretokenize *.measure_total_length *.shuffle *.pin_memory "
        "*.perturb_speed *.keep_excessive_supervisions *_enabled *.metadata_only *_normalize *.force_* *.drop_last "
        "*.cuda_expandable_segments *.compression_enable_for_custom_fields *.concatenate_merge_supervisions",
        "true",
        "the key is true or false",
    ),
    Accepted("data", "*.bucket_duration_bins", "more than sizes", "the sentence names bucket_batch_size"),
    # Model
    Accepted("model", "audio_locator_tag", _TEXTS, "any text can be added to the tokenizer"),
    Accepted(
        "model",
        "audio_locator_tag prompt_format perception max_new_tokens label_smoothing freeze modality_loss_weights "
        "lr_scheduler lr_scheduler.warmup_steps objectives objectives.* objectives.*.end_step",
        "null",
        "the same as leaving the key out",
    ),
    Accepted(
        "model",
        "max_new_tokens encoder_chunk_size_seconds modality_loss_weights.* optimizer.lr optimizer.weight_decay "
        "optimizer.eps lr_scheduler.*_steps objectives.*.*",
        "huge",
        "how much is too much depends on model and data",
    ),
    Accepted(
        "model",
        "label_smoothing modality_loss_weights.* optimizer.betas.0 optimizer.weight_decay optimizer.eps "
        "lr_scheduler.warmup_steps lr_scheduler.min_lr objectives.*.weight objectives.*.*_step*",
        "zero",
        "switches it off",
    ),
    Accepted("model", "optimizer.lr", "zero", "the sentence names lr_scheduler.min_lr, which must be lower"),
    Accepted(
        "model",
        "label_smoothing encoder_chunk_size_seconds modality_loss_weights.* optimizer.lr optimizer.betas.0 "
        "optimizer.weight_decay optimizer.eps objectives.*.weight objectives.*.temperature",
        "fraction",
        "a number in range",
    ),
    Accepted("model", "freeze *freeze_params", "empty list", "nothing is frozen, or excepted from it"),
    Accepted(
        "model",
        "pretrained_weights incremental_loading resize_token_embeddings activation_checkpointing compile "
        "validation_bleu optimizer.amsgrad",
        "true",
        "the key is true or false",
    ),
    Accepted(
        "model",
        "perception.output_dim",
        "*",
        "set to the language model's width whatever it was, as by NeMo's setup_speech_encoder",
    ),
    # OOMptimizer
    Accepted(
        "oomptimizer",
        "memory_fraction safety_margin modality_share tokens_per_second precision",
        "fraction",
        "a number in range",
    ),
    Accepted("oomptimizer", "safety_margin precision", "zero", "nothing is left free; the search goes on to the end"),
    Accepted("oomptimizer", "memory_budget tokens_per_second max_batch_size", "huge", "the device decides"),
    Accepted("oomptimizer", "guard then_train", "null", "the same as leaving the key out"),
    Accepted("oomptimizer", "guard", "true", "the key is true or false; a training after a plan is watched"),
    Accepted("oomptimizer", "profile", _TEXTS, "any text is the name of a file, which is written"),
    # Evaluation
    Accepted("evaluation", "name", f"{_TEXTS}|empty text|null", "any text is a name; none is taken from the folder"),
    Accepted("evaluation", "model output log_dir", _TEXTS, "any text is the name of a folder"),
    Accepted(
        "evaluation",
        "output num_beams max_new_tokens metrics examples baseline test_ds.*",
        "null",
        "the same as leaving the key out",
    ),
    Accepted("evaluation", "num_beams max_new_tokens examples test_ds.batch_size", "huge", "there is no upper limit"),
    Accepted("evaluation", "examples", "zero", "the page shows none"),
    Accepted("evaluation", "test_ds.datasets.test_*", "misspelt key", "a test set may have any name"),
    Accepted("evaluation", "metrics baseline", "empty list", "BLEU alone, which is always computed; no baseline"),
    Accepted("evaluation", "trust_remote_code test_ds.shuffle", "true", "the key is true or false"),
    Accepted(
        "data",
        "train_ds.audio.manifest_filepath train_ds.audio.tarred_audio_filepaths train_ds.audio.cuts_path "
        "train_ds.audio.shar_path",
        "text|false as text",
        "NeMo reads input_cfg if there is one; a warning says so",
    ),
    Accepted("data", "*.reweight_temperature", "zero", "all weights of a group become equal"),
    Accepted("evaluation", "comet", "*", "read only if metrics name COMET"),
    Accepted("evaluation", "baseline", "no folder", "the sentence names the folder, an argument of its own"),
    Accepted(
        "model", "perception.preprocessor*", "*", "as in NeMo's SALM, whose recipes have one: the .nemo's is used"
    ),
)
"""The table; an entry that no mutation matches fails its test."""


def entries_of(section: str, mutation: Mutation) -> list[Accepted]:
    """The entries of the table that a mutation matches."""
    return [
        entry
        for entry in ACCEPTED
        if entry.section == section
        and (entry.kinds == "*" or mutation.kind in entry.kinds.split("|"))
        and any(fnmatch.fnmatchcase(mutation.place, pattern) for pattern in entry.places.split())
    ]
