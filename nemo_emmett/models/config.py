"""The keys of a recipe's ``model`` section."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from nemo.utils import logging

from nemo_emmett.config import check_keys
from nemo_emmett.errors import ConfigError
from nemo_emmett.models.initial_weights import PERCEPTION_KEY, WHOLE_MODEL_KEYS
from nemo_emmett.models.nemo_keys import NEMO_KEYS, is_off
from nemo_emmett.modules.batch import MODALITIES
from nemo_emmett.modules.linear_cross_entropy import check_implementation
from nemo_emmett.prompts.markup import AUDIO_LOCATOR

PARTS = {
    "llm": r"^(llm|embed_tokens)\..+$",
    "encoder": r"^perception\.(preprocessor|encoder|encoder_multilayer)\..+$",
}
"""What ``freeze`` names, as regular expressions of parameters."""

LORA_PARAMETERS = r"^.+\.lora_.+$"
"""Parameters that peft adds; NeMo's SALM keeps them from freezing by the same expression."""

PEFT_COPIES = r"^llm\..+\.(modules_to_save|trainable_tokens_\w+)\..+$"
"""What peft trains beside them: copies of the layers in ``modules_to_save``, rows of ``trainable_token_indices``."""

# What else stands in the config of an exported folder, or is read by NeMo's own functions.
_TOLERATED_KEYS = ("model_type", "architectures", "trust_remote_code", "torch_dtype", "dtype")


@dataclass
class ModelConfig:
    """The keys of a recipe's ``model`` section. Those up to ``lr_scheduler`` mean what they mean for NeMo's SALM."""

    pretrained_llm: str  # folder or Hugging Face name of the language model
    pretrained_asr: str | None = None  # .nemo file or NGC/Hugging Face name of the speech encoder's ASR model
    pretrained_weights: bool = True  # False: the same architecture with random weights
    init_from_checkpoint: str | None = None  # checkpoint of the whole model whose weights the training starts from
    pretrained_s2s_model: str | None = None  # the same by NeMo's older name
    pretrained_perception_from_s2s: str | None = None  # checkpoint whose speech encoder and adapter it starts from
    incremental_loading: bool = False  # accepted: weights are always read tensor by tensor
    tokenizer_path: str | None = None  # folder or name of the tokenizer; default: that of pretrained_llm
    resize_token_embeddings: bool = False  # add rows for tokens that the embedding table does not have
    audio_locator_tag: str = AUDIO_LOCATOR  # stands in the prompt where a recording belongs
    prompt_format: str | None = None  # name of a NeMo prompt format; default: the one of the language model's family
    perception: dict | None = None  # NeMo's AudioPerceptionModule; None: a model that reads text only
    encoder_chunk_size_seconds: float | None = None  # longer recordings are encoded in chunks of so many seconds
    lora: dict | None = None  # arguments of peft's LoraConfig; the language model's own weights stay as they are
    freeze_params: list[str] = field(default_factory=list)  # regular expressions of parameters that stay as they are
    prevent_freeze_params: list[str] = field(default_factory=list)  # exceptions to freeze_params
    optimizer: dict | None = None
    lr_scheduler: dict | None = None
    freeze: list[str] = field(default_factory=list)  # parts that stay as they are: llm, encoder
    cross_attention: dict | None = None  # BestowGPT's layers between text and speech
    modality_loss_weights: dict[str, float] = field(default_factory=dict)  # {"audio": 1.0, "text": 1.0} by default
    label_smoothing: float = 0.0  # share of a target's probability that goes to all tokens alike
    loss_implementation: str = "auto"  # auto, chunked, liger, cut_cross_entropy, naive
    activation_checkpointing: bool = False  # compute activations again in the backward pass instead of keeping them
    compile: bool | dict = False  # torch.compile each Transformer block of the language model; a dict: its arguments
    max_new_tokens: int = 256  # longest translation that is generated, in tokens
    validation_bleu: bool = True  # translate the validation sets and log their BLEU

    def __post_init__(self) -> None:
        for key in ("freeze", "freeze_params", "prevent_freeze_params"):
            if isinstance(value := getattr(self, key), str):
                raise ConfigError(f"model.{key}: '{value}' is not a list; write ['{value}'].")
        for key, path in self.initial_weights().items():
            if not isinstance(path, str):
                raise ConfigError(f"model.{key}: {path!r} is not a path; give that of a checkpoint, or null.")
        if isinstance(self.compile, Mapping) and "enabled" in self.compile:
            raise ConfigError(
                "model.compile.enabled: is a key of NeMo Automodel; write model.compile: true or false, or the "
                "arguments of torch.compile."
            )
        for part in self.freeze:
            if part not in PARTS:
                raise ConfigError(f"model.freeze: there is no part '{part}'; name any of {', '.join(PARTS)}.")
        for stranger in check_keys(self.modality_loss_weights, MODALITIES, "model.modality_loss_weights"):
            raise ConfigError(
                f"model.modality_loss_weights.{stranger}: there is no such modality; use {' and '.join(MODALITIES)}."
            )
        for modality, weight in self.modality_loss_weights.items():
            _check_number(f"modality_loss_weights.{modality}", weight, "from 0", lambda number: number >= 0)
        _check_number("label_smoothing", self.label_smoothing, "from 0 to 1", lambda number: 0 <= number <= 1)
        _check_number("max_new_tokens", self.max_new_tokens, "of at least 1", lambda number: number >= 1)
        if self.encoder_chunk_size_seconds is not None:
            seconds = self.encoder_chunk_size_seconds
            _check_number("encoder_chunk_size_seconds", seconds, "above 0", lambda number: number > 0)
        check_implementation(self.loss_implementation, self.label_smoothing)

    @classmethod
    def from_section(cls, section: Mapping[str, Any], model_name: str, for_loading: bool = False) -> ModelConfig:
        """Read a ``model`` section.

        Args:
            section: resolved to plain Python.
            model_name: of the model's class, for messages.
            for_loading: the section came with weights; keys of NeMo's other models are ignored with a warning.

        Raises:
            ConfigError: for a key that is missing, misspelt, of another model of NeMo's, or has a value that cannot be.
        """
        known = [f.name for f in fields(cls)]
        for key in check_keys(section, known, "model", tolerated=(*_TOLERATED_KEYS, *NEMO_KEYS)):
            logging.warning(f"model.{key} is not a key that {model_name} knows; it is ignored.")
        for key, value in section.items():
            if key in NEMO_KEYS and not is_off(value):
                sentence = f"model.{key}: {model_name} does not have this key of NeMo's; {NEMO_KEYS[key]}."
                if not for_loading:
                    raise ConfigError(sentence)
                logging.warning(sentence)
        if not section.get("pretrained_llm"):
            raise ConfigError("model.pretrained_llm is missing: give a folder or a Hugging Face name.")
        return cls(**{key: value for key, value in section.items() if key in known and value is not None})

    def initial_weights(self) -> dict[str, str]:
        """The checkpoints that the training starts from, by the keys that name them."""
        paths = {key: getattr(self, key) for key in (PERCEPTION_KEY, *WHOLE_MODEL_KEYS)}
        return {key: path for key, path in paths.items() if path is not None}

    def frozen_parameters(self) -> list[str]:
        """Regular expressions of all parameters that stay as they are."""
        parts = [*self.freeze, *(["llm"] if self.lora is not None else [])]
        return list(dict.fromkeys([*self.freeze_params, *(PARTS[part] for part in parts)]))

    def trainable_parameters(self) -> list[str]:
        """Exceptions to :meth:`frozen_parameters`."""
        lora = [LORA_PARAMETERS, PEFT_COPIES] if self.lora is not None else []
        return list(dict.fromkeys([*self.prevent_freeze_params, *lora]))

    def loss_weights(self) -> list[float]:
        """(M,) weights of the modalities' losses."""
        return [float(self.modality_loss_weights.get(modality, 1.0)) for modality in MODALITIES]


def _check_number(key: str, value: object, bounds: str, is_possible: Callable[[float], bool]) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not is_possible(value):
        raise ConfigError(f"model.{key}: {value!r} cannot be; give a number {bounds}.")
