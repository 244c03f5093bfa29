"""The base of our models: all but how context and answer pass through the language model.

A model is built as NeMo's speechlm2 models are, from a config dict, with NeMo's perception module (speech encoder and
modality adapter), NeMo's freezing and NeMo's optimizer set-up.

Shapes: B examples, T tokens, A answer tokens, V vocabulary, H hidden size, R recordings, N samples, F frames,
M modalities.
"""

from __future__ import annotations

import re
from abc import abstractmethod
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any, ClassVar

import torch
from hydra.errors import InstantiationException
from lightning import LightningModule
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.plugins import MixedPrecision, Precision
from lightning.pytorch.utilities import GradClipAlgorithmType
from nemo.collections.speechlm2.data.utils import get_pad_id
from nemo.collections.speechlm2.parts.encoder_chunking import encode_audio_with_optional_chunking
from nemo.collections.speechlm2.parts.hf_hub import HFHubMixin
from nemo.collections.speechlm2.parts.optim_setup import configure_optimizers
from nemo.utils import logging
from omegaconf import DictConfig, OmegaConf, open_dict
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.optim import Optimizer

from nemo_emmett.callbacks.nonfinite import SkipNonFiniteSteps
from nemo_emmett.callbacks.random_state import RandomState
from nemo_emmett.errors import ConfigError, ModelError
from nemo_emmett.models.building import add_lora, build_llm, build_tokenizer, fit_embeddings
from nemo_emmett.models.config import ModelConfig
from nemo_emmett.models.export import Export
from nemo_emmett.models.generation import Generation
from nemo_emmett.models.head import LLMInputs, answer_logits, answer_scores, output_layer
from nemo_emmett.models.initial_weights import INITIAL_WEIGHTS_KEYS, check_initial_weights, load_initial_weights
from nemo_emmett.models.learning_rates import configure_by_part
from nemo_emmett.models.lora_modality import check_lora_modality, refuse_trained_text_weights
from nemo_emmett.models.oomptimizer_schema import oomptimizer_schema
from nemo_emmett.models.optimization import parse_optimization
from nemo_emmett.models.perception import build_perception, cache_encoder
from nemo_emmett.models.sharding import add_up_gradients, clip_gradients, shard, validated_parts
from nemo_emmett.models.teachers import Teachers
from nemo_emmett.models.tensor_parallel import check_tensor_parallel, make_alike, parallelize
from nemo_emmett.models.training_step import TrainingStep
from nemo_emmett.models.transformer_blocks import (
    checkpoint_activations,
    checkpoint_encoder,
    compile_blocks,
    transformer_blocks,
)
from nemo_emmett.models.validation import Tallies, count_batch, gather_tallies, validation_metrics
from nemo_emmett.modules.gated_lora import gate_lora
from nemo_emmett.modules.loss import IGNORE_INDEX
from nemo_emmett.modules.placement import Placed, merge_audio_embeddings
from nemo_emmett.prompts.families import check_prompt_format, default_prompt_format
from nemo_emmett.typed_config import Switch, parse_value


class SpeechTextModel(TrainingStep, Export, Generation, LightningModule, HFHubMixin):
    """A speech encoder and a language model that translate speech and text.

    A subclass defines what its language model reads of a batch, :meth:`llm_inputs`, and how it generates,
    :meth:`generate_answers`.

    Args:
        cfg: the ``model`` section of a recipe, see :class:`~nemo_emmett.models.config.ModelConfig`.
        trust_remote_code: run code that came with the language model or its tokenizer, and build what the config of a
            ``.nemo`` file names; None: the value in ``cfg``, by default false. It is never saved with the model.
        for_loading: all weights are loaded afterwards: what the keys of
            :mod:`~nemo_emmett.models.initial_weights` name is not read, and keys of NeMo's other models are not
            refused.

    Raises:
        ConfigError: for a misspelt or missing key, or one of NeMo's other models.
        ModelError: if a pretrained part cannot be found or is of the wrong kind.
    """

    auto_class: ClassVar[type]  # the transformers Auto class that builds the language model
    is_encoder_decoder: ClassVar[bool]
    has_cross_attention: ClassVar[bool] = False  # whether `cross_attention` means something to it

    def __init__(
        self, cfg: dict | DictConfig, trust_remote_code: bool | None = None, for_loading: bool = False
    ) -> None:
        super().__init__()
        cfg = OmegaConf.to_container(cfg, resolve=True) if isinstance(cfg, DictConfig) else dict(cfg)
        name = type(self).__name__
        trusted = parse_value(Switch | None, cfg.pop("trust_remote_code", None), "model.trust_remote_code") or False
        self.trust_remote_code = trusted = trusted if trust_remote_code is None else trust_remote_code
        options = ModelConfig.from_section(cfg, name, for_loading)
        start = {} if for_loading else options.initial_weights()
        check_initial_weights(start)
        check_lora_modality(options)
        if options.cross_attention is not None and not self.has_cross_attention:
            raise ConfigError(
                f"model.cross_attention: {name} has no such layers; leave the key out, or set model._target_: "
                "bestow_gpt."
            )
        if not for_loading:
            cfg |= parse_optimization(options)
        # NeMo's helpers test `"key" in cfg`, so null keys are left out, and those that its SALM needs are added.
        # Where the training started is no part of the model: loading it must not need that checkpoint.
        cfg = {key: value for key, value in cfg.items() if value is not None and key not in INITIAL_WEIGHTS_KEYS} | {
            "pretrained_weights": options.pretrained_weights,
            "audio_locator_tag": options.audio_locator_tag,
            "freeze_params": options.frozen_parameters(),
            "prevent_freeze_params": options.trainable_parameters(),
        }
        self.audio_locator_tag = options.audio_locator_tag
        self.tokenizer = build_tokenizer(options, trusted)
        self.llm = build_llm(options, self.auto_class, name, trusted)
        if options.prompt_format is None:
            options = replace(options, prompt_format=default_prompt_format(self.tokenizer, self.llm.config))
        elif not for_loading:
            check_prompt_format(options.prompt_format, self.tokenizer, self.llm.config)
        self.options = options
        cfg["prompt_format"] = options.prompt_format
        self.cfg = DictConfig(cfg)
        self.save_hyperparameters({"cfg": cfg})
        fit_embeddings(self.llm, self.tokenizer, options)
        self._post_init_llm()
        if options.lora is not None:
            self.llm = add_lora(self.llm, options.lora, getattr(self, "embed_tokens", None), name)
            # peft freezes all but its own, and NeMo's freezing never thaws.
            thawed = [re.compile(pattern) for pattern in options.prevent_freeze_params]
            for parameter_name, parameter in self.named_parameters():
                if any(pattern.match(parameter_name) for pattern in thawed):
                    parameter.requires_grad = True
            if options.lora_modality == "audio":
                refuse_trained_text_weights(self.named_parameters())
                gate_lora(self.llm, output_layer(self.llm))
        self.perception = None
        if options.perception is not None:
            self.perception, section = build_perception(options, self.llm, trusted)
            with open_dict(self.cfg):
                self.cfg.perception = section
        if options.cache_encoder:
            cache_encoder(self.perception, options)
        load_initial_weights(self, start, trusted)
        # Before DDP wraps the model, which waits for gradients of all that is not frozen then. NeMo's freezing comes
        # later.
        for parameter_name, parameter in self.named_parameters():
            if options.freezes(parameter_name):
                parameter.requires_grad = False
        self._init_training_step(options.training_objectives())
        self.teachers = Teachers(self, self.objectives)
        if options.activation_checkpointing:
            self._checkpoint_activations()
        if options.compile:
            compile_blocks(self.llm, options.compile if isinstance(options.compile, Mapping) else {})
        self._tallies: Tallies = {}
        self.is_sharded = False

    def _post_init_llm(self) -> None:
        """A subclass's changes to the language model, before LoRA and weights are added."""

    def embeddings_inside(self) -> AbstractContextManager[None]:
        """Within it the language model has its token embeddings where transformers has them."""
        return nullcontext()

    def _checkpoint_activations(self) -> None:
        share = float(self.options.activation_checkpointing)
        with self.embeddings_inside():
            checkpoint_activations(self.llm, share)
        if self.perception is not None and share == 1:
            self.perception.set_activation_checkpointing(True)
        elif self.perception is not None:
            checkpoint_encoder(self.perception.encoder, share)
        if self.has_cross_attention:
            self.cross_attention.activation_checkpointing = True

    # Properties.

    @property
    def pad_id(self) -> int:
        """The id that fills batches of token ids."""
        return get_pad_id(self.tokenizer)

    @property
    def audio_locator_id(self) -> int:
        """The id of the token that marks a recording's place in the prompt."""
        return self.tokenizer.token_to_id(self.audio_locator_tag)

    @property
    @abstractmethod
    def token_embedding(self) -> torch.nn.Module:
        """Token ids to embeddings of the language model."""

    @property
    def sampling_rate(self) -> int:
        """Samples per second that the speech encoder expects."""
        return self._perception().preprocessor.featurizer.sample_rate

    @property
    def token_equivalent_duration(self) -> float:
        """Seconds of audio behind one position of the language model's input."""
        return self._perception().token_equivalent_duration

    @property
    def data_defaults(self) -> dict[str, Any]:
        """Keys of a dataset's config that the model fills in: prompt format, locator, sampling rate, frame, and whether
        its objectives need transcripts."""
        known = {"prompt_format": self.options.prompt_format, "audio_locator_tag": self.options.audio_locator_tag}
        if any(objective.needs_transcripts for objective in self.objectives):
            known["transcripts"] = True
        if self.perception is None:
            return known
        return known | {"sample_rate": self.sampling_rate, "token_equivalent_duration": self.token_equivalent_duration}

    def _perception(self) -> torch.nn.Module:
        if self.perception is None:
            raise ModelError("this model reads text only: its config has no `perception`, so it cannot take audio.")
        return self.perception

    def oomptimizer_schema(self, schema: str = "audio") -> dict:
        """The types of a batch of one modality, for OOMptimizer (the format is NeMo's).

        Args:
            schema: ``"audio"`` or ``"text"``.

        Raises:
            ConfigError: for another modality.
        """
        transcripts = any(objective.needs_transcripts for objective in self.objectives)
        return oomptimizer_schema(schema, self.token_embedding.num_embeddings, transcripts)

    # Forward.

    @abstractmethod
    def llm_inputs(self, batch: Mapping) -> LLMInputs:
        """The inputs of the language model for a one-modality batch, and its targets."""

    @abstractmethod
    def generate_answers(self, batch: Mapping, **generate_options: Any) -> Tensor:
        """Generated ids (B, A) for the contexts of a one-modality batch."""

    def forward(self, batch: Mapping) -> tuple[Tensor, Tensor]:
        """Predict the answers of a one-modality batch.

        Args:
            batch: see docs/architecture.md, "The batch".

        Returns:
            (B, A, V) logits and (B, A) targets, which are ``IGNORE_INDEX`` on padding.
        """
        inputs = self.llm_inputs(batch)
        return answer_logits(self.llm, inputs), inputs.targets_BA

    def encode_speech(self, audios_RN: Tensor, audio_lens_R: Tensor) -> tuple[Tensor, Tensor]:
        """Recordings as the language model reads them: (R, F, H) embeddings and (R,) frames.

        Recordings longer than ``encoder_chunk_size_seconds`` are encoded in chunks of it, as NeMo's SALM does it.
        """
        encoded = self._encode_speech(audios_RN, audio_lens_R)
        if self._encoded is not None:
            self._encoded.append(encoded)
        return encoded

    def _encode_speech(self, audios_RN: Tensor, audio_lens_R: Tensor) -> tuple[Tensor, Tensor]:
        chunk_seconds = self.options.encoder_chunk_size_seconds
        if chunk_seconds is None:
            return self._perception()(input_signal=audios_RN, input_signal_length=audio_lens_R)
        rows = encode_audio_with_optional_chunking(
            self._perception(),
            audios_RN,
            audio_lens_R,
            chunk_size_seconds=chunk_seconds,
            sampling_rate=self.sampling_rate,
        )
        lens = torch.tensor([len(frames) for frames in rows], device=audios_RN.device)
        return pad_sequence(rows, batch_first=True), lens

    def embed(self, ids_BT: Tensor) -> Tensor:
        """(B, T, H) embeddings; those of audio locators, whose id may be beyond the table, are arbitrary."""
        return self.token_embedding(ids_BT.masked_fill(ids_BT == self.audio_locator_id, 0))

    def place(self, batch: Mapping, ids_BT: Tensor, mask_BT: Tensor, **options: Any) -> Placed:
        """Embeddings of tokens, with the batch's encoded recordings at their locators.

        Args:
            batch: one-modality batch, for its ``audios`` and ``audio_lens``.
            ids_BT: (B, T) int64.
            mask_BT: (B, T) bool, false where there is no token.
            options: of :func:`~nemo_emmett.modules.placement.merge_audio_embeddings`.
        """
        has_audio = batch.get("audios") is not None
        audio = self.encode_speech(batch["audios"], batch["audio_lens"]) if has_audio else (None, None)
        return merge_audio_embeddings(self.embed(ids_BT), ids_BT, mask_BT, *audio, self.audio_locator_id, **options)

    # Training.

    def configure_model(self) -> None:
        """Shard the model where Lightning's ModelParallelStrategy has made a device mesh: tensor parallelism, FSDP2.

        Raises:
            ConfigError: for a model that cannot be split over ``tensor_parallel_size`` ranks.
        """
        if self.device_mesh is None or self.is_sharded:
            return
        # Lightning converts the model later (`bf16-true`), and FSDP2 needs one type in each unit.
        self.trainer.precision_plugin.convert_module(self)
        parts, parallel = (self, *self.teachers.language_models()), self.device_mesh["tensor_parallel"]
        if parallel.size() > 1:
            check_tensor_parallel(self, parallel.size())
            for part in parts:
                parallelize(part, parallel)
            make_alike(self, parallel)
        units = [unit for part in parts for unit in _units(part)]
        shard(self, units, [] if self.perception is None else [self.perception], self.device_mesh)
        self.is_sharded = True
        if self.options.validation_bleu:
            logging.info(
                "Validation does not log val_bleu: a model that is sharded (FSDP2) does not translate in validation; "
                "monitor val_loss, and run `nemo-emmett evaluate` on the exported model."
            )

    def configure_optimizers(self) -> dict:
        """NeMo's: freezing, optimizer and schedule by the config.

        Raises:
            ConfigError: if there is no optimizer section, or no parameter left to train.
        """
        if self.options.optimizer is None:
            raise ConfigError("model.optimizer is missing: give it a `_target_`, such as torch.optim.AdamW, and an lr.")
        try:
            groups = self.cfg.get("optim_param_groups")
            return configure_optimizers(self) if groups is None else configure_by_part(self, groups)
        except InstantiationException as error:
            if any(parameter.requires_grad for parameter in self.parameters()):
                raise
            raise ConfigError(
                "model.freeze, model.freeze_params: all parameters are frozen; leave some of the patterns out, or name "
                "what to train in model.prevent_freeze_params."
            ) from error

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Complete the gradients of a model that is split over ranks."""
        if self.is_sharded:
            add_up_gradients(self.parameters())

    def configure_gradient_clipping(
        self, optimizer: Optimizer, gradient_clip_val: float | None = None, gradient_clip_algorithm: str | None = None
    ) -> None:
        """Lightning's, also for a fused optimizer under ``bf16-mixed``, where there is no loss scale that it would have
        to divide gradients by."""
        plugin = self.trainer.precision_plugin
        if self.is_sharded and (gradient_clip_val or 0) > 0 and gradient_clip_algorithm != GradClipAlgorithmType.VALUE:
            clip_gradients(plugin.main_params(optimizer), gradient_clip_val)
        elif isinstance(plugin, MixedPrecision) and plugin.scaler is None:
            algorithm = GradClipAlgorithmType(gradient_clip_algorithm or GradClipAlgorithmType.NORM)
            Precision.clip_gradients(plugin, optimizer, gradient_clip_val or 0.0, algorithm)
        else:
            super().configure_gradient_clipping(optimizer, gradient_clip_val, gradient_clip_algorithm)

    def configure_callbacks(self) -> list[Callback]:
        """Random states for every checkpoint (dropout would differ after resuming), and steps skipped whose loss is not
        finite; unless the trainer has these callbacks."""
        present = {type(callback) for callback in self.trainer.callbacks}
        return [callback() for callback in (RandomState, SkipNonFiniteSteps) if callback not in present]

    # Validation.

    def on_validation_epoch_start(self) -> None:
        """Reset the counts."""
        self._tallies = {}

    def validation_step(self, batch: Mapping, batch_idx: int) -> None:
        """Count losses and collect translations of ``{dataset_name: batch or None}``."""
        # None: this set is shorter than the others.
        parts = {dataset: {} if part is None else self._parts(part) for dataset, part in batch.items()}
        for dataset, modality in validated_parts(parts, self.is_sharded, self.device):
            if modality in parts[dataset]:
                self._validate(dataset, modality, parts[dataset][modality])
            else:
                with self._dummy_batch(modality) as dummy:
                    answer_scores(self.llm, self.llm_inputs(dummy))

    def _validate(self, dataset: str, modality: str, part: Mapping) -> None:
        inputs = self.llm_inputs(part)
        losses_BA, correct_BA = answer_scores(self.llm, inputs)
        examples = part.get("examples")
        count_batch(
            self._tallies,
            dataset,
            modality,
            examples,
            losses_B=losses_BA.sum(1),
            tokens_B=(inputs.targets_BA != IGNORE_INDEX).sum(1),
            correct_B=(correct_BA & (inputs.targets_BA != IGNORE_INDEX)).sum(1),
            # Generation takes as long as its longest answer, which differs between ranks; a sharded model's must not.
            hypotheses=self.translate_batch(part)
            if examples and self.options.validation_bleu and not self.is_sharded
            else None,
        )

    def on_validation_epoch_end(self) -> None:
        """Log :func:`validation_metrics` of all ranks' counts."""
        metrics = validation_metrics(gather_tallies(self._tallies))
        self.log_dict({k: torch.tensor(v) for k, v in metrics.items()}, batch_size=1)
        self._tallies = {}

    def on_test_epoch_start(self) -> None:
        """Reset the counts."""
        self.on_validation_epoch_start()

    def test_step(self, batch: Mapping, batch_idx: int) -> None:
        """As in validation."""
        self.validation_step(batch, batch_idx)

    def on_test_epoch_end(self) -> None:
        """As in validation."""
        self.on_validation_epoch_end()


def _units(language_model: torch.nn.Module) -> list[torch.nn.Module]:
    """The parts of a language model that are sharded one by one: its blocks, embeddings and output layer."""
    units, head = transformer_blocks(language_model.llm), output_layer(language_model.llm)
    if hasattr(language_model, "embed_tokens") and language_model.embed_tokens.weight is not head.weight:
        units += [language_model.embed_tokens, head]
    return units
