"""The keys of a recipe's ``model`` section."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from nemo.utils import logging

from nemo_emmett.config import check_keys
from nemo_emmett.errors import ConfigError, Help, ModelError
from nemo_emmett.models.exported import BASE_MODELS_KEY, TRAINING_KEY
from nemo_emmett.models.exported_files import FILES_KEY
from nemo_emmett.models.initial_weights import PERCEPTION_KEY, WHOLE_MODEL_KEYS
from nemo_emmett.models.nemo_keys import NEMO_KEYS, is_off
from nemo_emmett.modules.batch import MODALITIES
from nemo_emmett.modules.linear_cross_entropy import KERNEL_PACKAGES, check_implementation
from nemo_emmett.objectives.objective import Objective, TokenObjective
from nemo_emmett.objectives.registry import parse_objectives
from nemo_emmett.objectives.teaching import START, WITHOUT_LORA, Distillation, TeachingObjective
from nemo_emmett.prompts.answers import SUFFIX, is_two_step
from nemo_emmett.prompts.markup import AUDIO_LOCATOR
from nemo_emmett.typed_config import NonEmpty, NonNegative, Positive, PositiveWhole, Share, Switch, Text, parse_section

PARTS = {
    "llm": r"^(llm|embed_tokens)\..+$",
    "encoder": r"^perception\.(preprocessor|encoder|encoder_multilayer)\..+$",
}
"""Values of ``freeze``, with a regular expression of the parameters of each."""

Attention = Literal["eager", "sdpa", "flex_attention", "flash_attention_2", "flash_attention_3"]
"""Values of ``attn_implementation``: names of transformers."""

LORA_PARAMETERS = r"^.+\.lora_.+$"
"""Parameters that peft adds; NeMo's SALM keeps them from freezing by the same expression."""

PEFT_COPIES = r"^llm\..+\.(modules_to_save|trainable_tokens_\w+)\..+$"
"""Other parameters that peft trains: copies of the layers in ``modules_to_save``, rows of
``trainable_token_indices``."""

# Keys of an exported folder's config, and keys that NeMo's own functions read.
_TOLERATED_KEYS = (
    "model_type",
    "architectures",
    "trust_remote_code",
    "torch_dtype",
    "dtype",
    TRAINING_KEY,
    BASE_MODELS_KEY,
    FILES_KEY,
)


@dataclass(frozen=True)
class ModelConfig:
    """The keys of a recipe's ``model`` section. Those up to ``lr_scheduler`` mean what they mean for NeMo's SALM."""

    pretrained_llm: Text  # folder or Hugging Face name of the language model
    pretrained_asr: Text | None = None  # .nemo file or NGC/Hugging Face name of the speech encoder's ASR model
    pretrained_weights: Switch = True  # False: the same architecture with random weights
    init_from_checkpoint: Text | None = None  # checkpoint of the whole model whose weights the training starts from
    pretrained_s2s_model: Text | None = None  # the same by NeMo's older name
    pretrained_perception_from_s2s: Text | None = None  # checkpoint whose speech encoder and adapter it starts from
    incremental_loading: Switch = False  # accepted: weights are always read tensor by tensor
    tokenizer_path: NonEmpty | None = None  # folder or name; default: that of pretrained_llm
    resize_token_embeddings: Switch = False  # add rows for tokens that the embedding table does not have
    audio_locator_tag: Text = AUDIO_LOCATOR  # marks the place of a recording in the prompt
    prompt_format: Text | None = None  # name of a NeMo prompt format; default: the one of the language model's family
    perception: dict | None = None  # NeMo's AudioPerceptionModule; None: a model that reads text only
    encoder_chunk_size_seconds: Positive | None = None  # longer recordings are encoded in chunks of so many seconds
    cache_encoder: Switch | NonEmpty = False  # keep the outputs of a frozen encoder on disk; a text: in this folder
    lora: dict | None = None  # arguments of peft's LoraConfig; the language model's own weights are frozen
    freeze_params: list[Text] = field(default_factory=list)  # regular expressions of parameters that are frozen
    prevent_freeze_params: list[Text] = field(default_factory=list)  # exceptions to freeze_params
    optimizer: dict | None = None  # _target_ and arguments of an optimizer, such as torch.optim.AdamW
    lr_scheduler: dict | None = None  # _target_ and arguments of a schedule of PyTorch or NeMo
    freeze: list[Literal["llm", "encoder"]] = field(default_factory=list)  # parts that are frozen
    cross_attention: dict | None = None  # BestowGPT's layers between text and speech
    modality_loss_weights: dict[str, NonNegative] = field(default_factory=dict)  # by default 1.0 each
    label_smoothing: Share = 0.0  # share of a target's probability that is spread over all tokens
    loss_implementation: Text = "auto"  # auto, chunked, liger, cut_cross_entropy, naive
    activation_checkpointing: Switch | Share = False  # compute activations again, not keep them; or a share of blocks
    compile: Switch | dict = False  # torch.compile each Transformer block of the language model
    attn_implementation: Attention | None = None  # kernels of the language model's attention
    max_new_tokens: PositiveWhole = 256  # longest translation that is generated, in tokens
    validation_bleu: Switch = True  # translate the validation sets and log their BLEU
    objectives: dict[str, dict | None] = field(default_factory=dict)  # further terms of the loss, by name
    lora_modality: Literal["all", "audio"] = "all"  # audio: LoRA acts on examples with speech alone, text stays exact
    optim_param_groups: dict[str, dict] | None = None  # encoder, adapter, llm: their lr and other optimizer settings
    gradient_conflict: Text | dict | None = None  # monitor, harmonise: compare gradients of speech and text; or a dict

    def __post_init__(self) -> None:
        if isinstance(self.compile, Mapping) and "enabled" in self.compile:
            raise ConfigError(
                "model.compile.enabled: is a key of NeMo Automodel; write model.compile: true or false, or the "
                "arguments of torch.compile."
            )
        for unknown in check_keys(self.modality_loss_weights, MODALITIES, "model.modality_loss_weights"):
            raise ConfigError(
                f"model.modality_loss_weights.{unknown}: there is no such modality; use {' and '.join(MODALITIES)}."
            )
        for key in ("freeze_params", "prevent_freeze_params"):
            for index, pattern in enumerate(getattr(self, key)):
                try:
                    re.compile(pattern)
                except re.error as error:
                    raise ConfigError(
                        f"model.{key}.{index}: '{pattern}' is not a regular expression ({error}); correct it."
                    ) from error
        if isinstance(self.cache_encoder, str) and self.cache_encoder.lower() in ("true", "false", "yes", "no"):
            raise ConfigError(
                f"model.cache_encoder: '{self.cache_encoder}' is a text, and would be a folder of that name; write "
                f"true or false without quotes, or ./{self.cache_encoder} for the folder."
            )
        if not self.audio_locator_tag.strip():
            raise ConfigError(f"model.audio_locator_tag: is empty; leave it out for {AUDIO_LOCATOR}.")
        check_implementation(self.loss_implementation, self.label_smoothing)
        self._check_objectives()
        if self.optim_param_groups is not None and self.optimizer is None:
            raise ConfigError("model.optim_param_groups: needs model.optimizer, whose settings it changes; add it.")

    @classmethod
    def from_section(cls, section: Mapping[str, Any], model_name: str, for_loading: bool = False) -> ModelConfig:
        """Read a ``model`` section.

        Args:
            section: resolved to plain Python.
            model_name: of the model's class, for messages.
            for_loading: the section came with weights; keys of NeMo's other models are ignored with a warning.

        Raises:
            ConfigError: for a key that is missing, misspelt or of another model of NeMo's, or a value of another type.
        """
        known = [f.name for f in fields(cls)]
        for key in check_keys(section, known, "model", tolerated=(*_TOLERATED_KEYS, *NEMO_KEYS)):
            logging.warning(f"model.{key} is not a key of {model_name}; it is ignored.")
        for key, value in section.items():
            if key in NEMO_KEYS and not is_off(value):
                sentence = f"model.{key}: {model_name} does not have this key of NeMo's; {NEMO_KEYS[key]}."
                if not for_loading:
                    raise ConfigError(sentence, page=Help.NEMO_KEY)
                logging.warning(sentence)
        if not section.get("pretrained_llm"):
            raise ConfigError("model.pretrained_llm is missing: give a folder or a Hugging Face name.")
        # What a training was trained on and with is no part of the model.
        unread = ("objectives", "attn_implementation", "cache_encoder") if for_loading else ()
        given = {key: value for key, value in section.items() if value is not None and key not in unread}
        return parse_section(cls, given, "model")

    def training_objectives(self) -> tuple[Objective, ...]:
        """The objectives whose weight is not 0."""
        return tuple(objective for objective in parse_objectives(self.objectives) if objective.weight > 0)

    def _check_objectives(self) -> None:
        for objective in self.training_objectives():
            if objective.modality == "audio" and self.perception is None:
                raise ConfigError(
                    f"{objective.place}: needs speech, but this model reads text only; give it model.perception, or "
                    "leave the objective out."
                )
            if isinstance(objective, Distillation) and is_two_step(self.prompt_format):
                raise ConfigError(
                    f"{objective.place}: its teacher reads the transcript, with which the answers of "
                    f"{self.prompt_format} begin; use {self.prompt_format.removesuffix(SUFFIX)}, or leave the "
                    "objective out."
                )
            if isinstance(objective, TeachingObjective):
                self._check_teacher(objective.teacher, f"{objective.place}.teacher")
            if isinstance(objective, TokenObjective) and self.loss_implementation in KERNEL_PACKAGES:
                raise ConfigError(
                    f"model.loss_implementation: {self.loss_implementation} does not compute {objective.place}; choose "
                    "auto or chunked, or leave the objective out."
                )

    def _check_teacher(self, teacher: str | None, place: str) -> None:
        """What can be known before anything is built; the rest is found by ``models/teachers.py``."""
        if teacher == WITHOUT_LORA and self.lora is None:
            raise ConfigError(f"{place}: {WITHOUT_LORA} needs LoRA; give the model model.lora, or write {START}.")
        if teacher not in (None, START, WITHOUT_LORA) and not Path(teacher).expanduser().is_dir():
            raise ModelError(
                f"{place}: '{teacher}' is no folder; give {START}, {WITHOUT_LORA}, the folder of an exported model, or "
                "that of a Hugging Face language model."
            )

    def initial_weights(self) -> dict[str, str]:
        """The checkpoints that the training starts from, by the keys that name them."""
        paths = {key: getattr(self, key) for key in (PERCEPTION_KEY, *WHOLE_MODEL_KEYS)}
        return {key: path for key, path in paths.items() if path is not None}

    def frozen_parameters(self) -> list[str]:
        """Regular expressions of all frozen parameters."""
        parts = [*self.freeze, *(["llm"] if self.lora is not None else [])]
        return list(dict.fromkeys([*self.freeze_params, *(PARTS[part] for part in parts)]))

    def trainable_parameters(self) -> list[str]:
        """Exceptions to :meth:`frozen_parameters`."""
        lora = [LORA_PARAMETERS, PEFT_COPIES] if self.lora is not None else []
        return list(dict.fromkeys([*self.prevent_freeze_params, *lora]))

    def freezes(self, name: str) -> bool:
        """Whether a parameter of that name is frozen, as NeMo's ``freeze_and_subset`` decides it."""
        is_kept, is_frozen = (
            any(re.match(pattern, name) for pattern in patterns)
            for patterns in (self.trainable_parameters(), self.frozen_parameters())
        )
        return is_frozen and not is_kept

    def loss_weights(self) -> list[float]:
        """(M,) weights of the modalities' losses."""
        return [float(self.modality_loss_weights.get(modality, 1.0)) for modality in MODALITIES]
