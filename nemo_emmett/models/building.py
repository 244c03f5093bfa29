"""What a model is built of: tokenizer, language model, LoRA, speech encoder; each as NeMo's SALM builds it."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from nemo.collections.asr.models import ASRModel
from nemo.collections.common.tokenizers import AutoTokenizer
from nemo.collections.speechlm2.modules.perception import AudioPerceptionModule
from nemo.collections.speechlm2.parts.pretrained import setup_speech_encoder
from nemo.utils import logging
from omegaconf import DictConfig, OmegaConf
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import AddedToken, AutoConfig, AutoModelForSeq2SeqLM, PreTrainedModel

from nemo_emmett.config import check_keys, check_model_file
from nemo_emmett.errors import ConfigError, EmmettError, ModelError
from nemo_emmett.models.causal import reattach_embeddings, unwrap_peft
from nemo_emmett.models.config import ModelConfig
from nemo_emmett.models.targets import BUILD_FAULTS, class_of, first_line, parse_arguments
from nemo_emmett.modules.modality_adapters import check_modality_adapter, leave_out_collectives
from nemo_emmett.prompts.families import may_be_read

_NO_WEIGHTS_ONLY = "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"
_ASR_MODELS = "nemo.collections.asr.models."
_NOT_RESTORED = ("train_ds", "validation_ds", "test_ds", "optim", "trainer", "exp_manager")
"""Sections of a ``.nemo`` file's config that restoring a model does not read."""

_PERCEPTION_KEYS = ("target", "output_dim", "preprocessor", "encoder", "spec_augment", "modality_adapter")
"""Keys of NeMo's ``AudioPerceptionModule``."""


def build_tokenizer(config: ModelConfig, trusted: bool) -> AutoTokenizer:
    """The language model's tokenizer, with the audio locator among its special tokens.

    Args:
        config: names the tokenizer.
        trusted: run code that came with it.
    """
    source = config.tokenizer_path or config.pretrained_llm
    _check_local_path(source, "model.tokenizer_path" if config.tokenizer_path else "model.pretrained_llm")
    with _as_model_error(source):
        tokenizer = AutoTokenizer(source, use_fast=True, trust_remote_code=trusted)
    # Not NeMo's add_special_tokens: it replaces the list in which multilingual tokenizers keep their languages.
    locator = AddedToken(config.audio_locator_tag, special=True, normalized=False)
    tokenizer.tokenizer.add_tokens([locator], special_tokens=True)
    tokenizer.audio_locator_tag = config.audio_locator_tag  # for prompts that callers write by hand
    return tokenizer


def build_llm(config: ModelConfig, auto_class: type, model_name: str, trusted: bool) -> PreTrainedModel:
    """The language model, in float32 and in training mode.

    Args:
        config: names the language model.
        auto_class: the class of transformers that builds it.
        model_name: of the model that is built on it, for messages.
        trusted: run code that came with it.

    Raises:
        ModelError: if it cannot be found, or is of the kind that the model is not built on.
    """
    name, trust = config.pretrained_llm, {"trust_remote_code": trusted}
    if not trusted:
        _check_adapter_config(Path(name))
    with _as_model_error(name):
        llm_config = AutoConfig.from_pretrained(name, **trust)
    if llm_config.is_encoder_decoder != (auto_class is AutoModelForSeq2SeqLM):
        kinds = {True: "an encoder-decoder", False: "a decoder-only model"}
        raise ModelError(
            f"model.pretrained_llm: '{name}' is {kinds[llm_config.is_encoder_decoder]} ({llm_config.model_type}), "
            f"but {model_name} is built on {kinds[not llm_config.is_encoder_decoder]}; choose another of either."
        )
    if config.pretrained_weights:
        # Weights in pickles (pytorch_model.bin) are read as data, whatever the environment says.
        llm = auto_class.from_pretrained(name, dtype=torch.float32, weights_only=True, **trust)
    else:
        llm = auto_class.from_config(llm_config, dtype=torch.float32, **trust)
    # transformers returns it in evaluation mode, and Lightning's fit does not change modes.
    return llm.train()


def fit_embeddings(llm: PreTrainedModel, tokenizer: AutoTokenizer, config: ModelConfig) -> None:
    """Check that every token of a text or prompt has a row in the embedding table; the audio locator needs none.

    With ``model.resize_token_embeddings`` the missing rows are added to input and output layer.

    Args:
        llm: resized in place.
        tokenizer: of NeMo.
        config: with the prompt format filled in.

    Raises:
        ConfigError: if tokens have no row, and none are to be added.
    """
    rows = llm.get_input_embeddings().num_embeddings
    beyond = {
        token: number
        for token, number in tokenizer.tokenizer.get_vocab().items()
        if number >= rows and token != config.audio_locator_tag and may_be_read(token, config.prompt_format, tokenizer)
    }
    if not beyond:
        return
    last, number = max(beyond.items(), key=lambda item: item[1])
    if not config.resize_token_embeddings:
        key = "tokenizer_path" if config.tokenizer_path else "pretrained_llm"
        raise ConfigError(
            f"model.{key}: the tokenizer of '{getattr(config, key)}' has tokens up to '{last}', whose id is {number}, "
            f"but the embedding table of '{config.pretrained_llm}' has {rows} rows, not {number + 1}; set "
            f"model.resize_token_embeddings: true to add {number + 1 - rows}, or take the model's own tokenizer."
        )
    # T5 1.1 and its like are configured as tied, whatever the checkpoint had; transformers would tie their output layer
    # while it resizes, and its weights would be lost.
    is_tied = llm.config.tie_word_embeddings
    llm.config.tie_word_embeddings = llm.get_output_embeddings().weight is llm.get_input_embeddings().weight
    llm.resize_token_embeddings(number + 1)
    llm.config.tie_word_embeddings = is_tied
    logging.info(f"The embedding table was resized from {rows} to {number + 1} rows, for tokens up to '{last}'.")


def add_lora(
    llm: PreTrainedModel, lora: Mapping[str, Any], embed_tokens: nn.Module | None, model_name: str
) -> PeftModel:
    """Put peft's low-rank adapters into the language model (LoRA, arXiv 2106.09685); its parameters get the names that
    they have in NeMo's SALM. All parameters but peft's own are frozen.

    Args:
        llm: changed in place.
        lora: arguments of peft's ``LoraConfig``.
        embed_tokens: the token embeddings, where they are kept outside of the language model.
        model_name: for messages.

    Raises:
        ConfigError: for an argument that peft does not take, or target modules that the language model does not have.
    """
    if lora.get("bias", "none") != "none":
        raise ConfigError(
            f"model.lora.bias: '{lora['bias']}' is not possible, the language model's own biases stay as "
            "they are; leave the key out, or name them in model.prevent_freeze_params."
        )
    arguments = parse_arguments(LoraConfig, lora, "model.lora")
    try:
        # peft looks for the embeddings, which decoder-only models keep outside of their language model.
        with nullcontext() if embed_tokens is None else reattach_embeddings(llm, embed_tokens):
            adapted = get_peft_model(llm, LoraConfig(**arguments))
            wraps_embeddings = embed_tokens is not None and unwrap_peft(adapted).model.embed_tokens is not embed_tokens
    except (ValueError, TypeError, AttributeError, KeyError, RuntimeError) as error:
        linear = sorted({name.rsplit(".", 1)[-1] for name, m in llm.named_modules() if isinstance(m, nn.Linear)})
        raise ConfigError(
            f"model.lora: peft cannot use {dict(lora)} ({first_line(error)}); "
            f"the linear layers of this language model are {', '.join(linear)}."
        ) from error
    if wraps_embeddings:
        raise ConfigError(
            f"model.lora: {model_name} keeps its token embeddings outside of the language model, where peft "
            "does not reach them; leave embed_tokens and trainable_token_indices out, and to train all embeddings "
            "write model.prevent_freeze_params: ['^embed_tokens\\..+$']."
        )
    logging.info(f"LoRA in the language model: {dict(lora)}")
    return adapted


def build_perception(
    config: ModelConfig, llm: PreTrainedModel, trusted: bool
) -> tuple[AudioPerceptionModule, DictConfig]:
    """Speech encoder and modality adapter, and their section, completed from the ``.nemo`` file.

    Args:
        config: with ``perception``.
        llm: whose width the adapter must give.
        trusted: build whatever the ``.nemo`` file names.

    Raises:
        ConfigError: if they cannot be built, or do not fit one another, the ``.nemo`` file or the language model.
    """
    asr: dict[str, Any] = {}
    if config.pretrained_weights:
        if not config.pretrained_asr:
            raise ConfigError("model.pretrained_asr is missing: give a .nemo file or the name of a NeMo ASR model.")
        _check_local_path(config.pretrained_asr, "model.pretrained_asr")
        asr = read_asr_config(config.pretrained_asr, trusted)
    encoder = config.perception.get("encoder") or {}
    _check_perception(config.perception, encoder, asr.get("encoder", {}))
    # FastConformer all-reduces its longest input by default: a rank that has only text would leave the others waiting
    # in that collective.
    perception = {**config.perception, "encoder": {**encoder, "sync_max_audio_length": False}}
    # NeMo's function takes the half-built model; it reads these attributes, and sets `perception`.
    model = SimpleNamespace(
        cfg=OmegaConf.create({"pretrained_asr": config.pretrained_asr, "perception": perception}), llm=llm
    )
    try:
        with nullcontext() if trusted else _weights_only():
            setup_speech_encoder(model, pretrained_weights=config.pretrained_weights)
    except BUILD_FAULTS as error:
        if isinstance(error.__cause__, EmmettError):  # Hydra wraps what an adapter raises
            raise error.__cause__ from error
        _refuse_contradictions(config, encoder, asr.get("encoder", {}), error)
        reason = first_line(error.__cause__ or error)
        raise ConfigError(f"model.perception cannot be built: {reason}; correct the `_target_` or its keys.") from error
    leave_out_collectives(model.perception)
    check_modality_adapter(model.perception, llm.config.hidden_size)
    return model.perception, model.cfg.perception


def _check_perception(
    perception: Mapping[str, Any], encoder: Mapping[str, Any], asr_encoder: Mapping[str, Any]
) -> None:
    """Check the parts of ``model.perception`` by the signatures of their classes.

    Args:
        perception: the section.
        encoder: its keys of the encoder, which override those of the ``.nemo`` file.
        asr_encoder: the encoder's section in the ``.nemo`` file, if that is read.
    """
    check_keys(perception, _PERCEPTION_KEYS, "model.perception")
    parts = {name: perception.get(name) for name in ("preprocessor", "spec_augment", "modality_adapter")}
    if parts["modality_adapter"] is None:
        raise ConfigError(
            "model.perception.modality_adapter is missing: give it a `_target_`, such as "
            "nemo_emmett.modules.modality_adapters.MLPConnector."
        )
    own = {key: value for key, value in encoder.items() if value is not None}
    for name, section in {**parts, "encoder": {**asr_encoder, **own}}.items():
        place = f"model.perception.{name}"
        if section is not None and not isinstance(section, Mapping):
            raise ConfigError(f"{place}: {section!r} cannot be used; give a mapping with a `_target_`.")
        if section and "_target_" in section:  # NeMo reads older keys (`cls`) as well
            parse_arguments(class_of(section, place), section, place)


def _refuse_contradictions(
    config: ModelConfig, encoder: Mapping[str, Any], asr_encoder: Mapping[str, Any], error: Exception
) -> None:
    """Name the first key of the encoder that differs from the ``.nemo`` file."""
    for key, value in encoder.items():
        if asr_encoder and value is not None and asr_encoder.get(key) != value:
            raise ConfigError(
                f"model.perception.encoder.{key}: {value!r} does not fit the weights of '{config.pretrained_asr}', in "
                f"which it is {asr_encoder.get(key)!r}; leave the key out."
            ) from error


def read_asr_config(source: str, trusted: bool = False) -> dict[str, Any]:
    """The config of a NeMo ASR model; nothing that it names is built.

    Args:
        source: a ``.nemo`` file, or the name of a model.
        trusted: do not check it.

    Raises:
        ModelError: if it could run code, or cannot be read.
    """
    is_file = source.endswith(".nemo") and Path(source).exists()  # NeMo's rule
    read = ASRModel.restore_from if is_file else ASRModel.from_pretrained
    try:
        config = read(source, return_config=True)
    except Exception as error:  # of NeMo, Hugging Face, the network, or an archive
        raise ModelError(
            f"model.pretrained_asr: the config of '{source}' cannot be read ({first_line(error)}); give a .nemo file "
            "or the name of a NeMo ASR model."
        ) from error
    if not trusted:
        # Unresolved, and without what restoring does not build: NeMo's own files have resolvers there.
        parts = {key: value for key, value in OmegaConf.to_container(config).items() if key not in _NOT_RESTORED}
        target = str(parts.pop("target", _ASR_MODELS))
        if not target.startswith(_ASR_MODELS):
            raise ModelError(f"'{source}': target: '{target}' is not an ASR model of NeMo; give another file.")
        check_model_file(parts, f"'{source}'")
    return OmegaConf.to_container(config, resolve=True)


@contextmanager
def _weights_only() -> Iterator[None]:
    """torch reads pickled weights as data by default; a variable that turns this off is hidden from it meanwhile."""
    hidden = os.environ.pop(_NO_WEIGHTS_ONLY, None)
    try:
        yield
    finally:
        if hidden is not None:
            os.environ[_NO_WEIGHTS_ONLY] = hidden


def _check_adapter_config(folder: Path) -> None:
    """transformers applies a LoRA in the language model's folder, whose config can have peft import a module."""
    path = folder / "adapter_config.json"
    if not path.is_file():
        return
    try:
        check_model_file(json.loads(path.read_text()), f"'{path}'")
    except ValueError as error:
        raise ModelError(f"'{path}' is not JSON ({error}); correct or remove it.") from error


def _check_local_path(source: str, key: str) -> None:
    """Refuse what is plainly a path on this machine and is not there; other names may be a hub's."""
    looks_local = source.startswith((".", "/", "~")) or source.endswith(".nemo") or source.count("/") > 1
    if looks_local and not Path(source).expanduser().exists():
        raise ModelError(f"{key}: '{source}' does not exist; give a folder or file that does, or the name of a model.")


@contextmanager
def _as_model_error(name: str) -> Iterator[None]:
    """What transformers and NeMo raise where a name leads to nothing, in one sentence."""
    try:
        yield
    except (OSError, ValueError) as error:
        if "trust_remote_code" in str(error):
            raise ModelError(
                f"'{name}' needs code that came with it, which is not run unless you trust it: pass "
                "trust_remote_code=True (--trust-remote-code, or model.trust_remote_code: true in a recipe)."
            ) from error
        raise ModelError(
            f"'{name}' is neither a folder with a Hugging Face model nor the name of one that could be fetched; "
            "check model.pretrained_llm and model.tokenizer_path."
        ) from error
