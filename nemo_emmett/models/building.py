"""Builders of a model's tokenizer, language model and LoRA, as NeMo's SALM has them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.constants import CONFIG_NAME
from huggingface_hub.errors import StrictDataclassError
from nemo.collections.common.tokenizers import AutoTokenizer
from nemo.utils import logging
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import AddedToken, AutoConfig, AutoModelForSeq2SeqLM, PretrainedConfig, PreTrainedModel

from nemo_emmett.config import check_model_file
from nemo_emmett.errors import ConfigError, Help, ModelError
from nemo_emmett.models.causal import reattach_embeddings, unwrap_peft
from nemo_emmett.models.config import ModelConfig
from nemo_emmett.models.targets import BUILD_FAULTS, check_local_path, first_line, parse_arguments
from nemo_emmett.prompts.families import may_be_read
from nemo_emmett.typed_config import Number, PositiveWhole, Share, Switch, Text

_LORA_TYPES = {
    "r": PositiveWhole,
    "lora_alpha": Number,  # annotated as a whole number
    "lora_dropout": Share,
    "init_lora_weights": Switch | Text,  # annotated without `pissa_niter_16` and the like
}


def build_tokenizer(config: ModelConfig, trusted: bool) -> AutoTokenizer:
    """The language model's tokenizer, with the audio locator among its special tokens.

    Args:
        config: names the tokenizer.
        trusted: run code that came with it.
    """
    source = config.tokenizer_path or config.pretrained_llm
    check_local_path(source, "model.tokenizer_path" if config.tokenizer_path else "model.pretrained_llm")
    with _as_model_error(source):
        tokenizer = AutoTokenizer(source, use_fast=True, trust_remote_code=trusted)
    # Not NeMo's add_special_tokens: it replaces the list in which multilingual tokenizers keep their languages.
    inner = tokenizer.tokenizer
    if config.audio_locator_tag in (inner.bos_token, inner.eos_token, inner.pad_token, inner.unk_token):
        raise ConfigError(
            f"model.audio_locator_tag: '{config.audio_locator_tag}' has another meaning for the tokenizer; choose a "
            "token that it does not use."
        )
    locator = AddedToken(config.audio_locator_tag, special=True, normalized=False)
    inner.add_tokens([locator], special_tokens=True)
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
    attention = {} if config.attn_implementation is None else {"attn_implementation": config.attn_implementation}
    if not trusted:
        _check_configs(Path(name))
    with _as_model_error(name):
        llm_config = AutoConfig.from_pretrained(name, **trust)
    if llm_config.is_encoder_decoder != (auto_class is AutoModelForSeq2SeqLM):
        kinds = {True: "an encoder-decoder", False: "a decoder-only model"}
        raise ModelError(
            f"model.pretrained_llm: '{name}' is {kinds[llm_config.is_encoder_decoder]} ({llm_config.model_type}), "
            f"but {model_name} is built on {kinds[not llm_config.is_encoder_decoder]}; choose another of either."
        )
    if attention:
        _check_attention(llm_config, auto_class, attention)
    if config.pretrained_weights:
        # Weights in pickles (pytorch_model.bin) are read as data, whatever the environment sets.
        llm = auto_class.from_pretrained(name, dtype=torch.float32, weights_only=True, **trust, **attention)
    else:
        try:
            llm = auto_class.from_config(llm_config, dtype=torch.float32, **trust, **attention)
        except (*BUILD_FAULTS, ImportError) as error:
            raise ModelError(
                f"'{name}': transformers cannot build the language model of its {CONFIG_NAME} ({first_line(error)}); "
                "correct it, or copy the folder again."
            ) from error
    # transformers returns it in evaluation mode, and Lightning's fit does not change modes.
    return llm.train()


def _check_attention(llm_config: PretrainedConfig, auto_class: type, attention: Mapping[str, str]) -> None:
    """Check that a model of this config can have that attention."""
    try:
        with torch.device("meta"):
            auto_class.from_config(llm_config, **attention)
    except (ImportError, ValueError) as error:
        raise ConfigError(
            f"model.attn_implementation: {attention['attn_implementation']} is not possible ({first_line(error)}); "
            "install what it needs, or leave the key out."
        ) from error


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
            f"model.resize_token_embeddings: true to add {number + 1 - rows}, or take the model's own tokenizer.",
            page=Help.TOKENIZER,
        )
    if config.lora_modality == "audio":
        raise ConfigError(
            f"model.resize_token_embeddings: adds {number + 1 - rows} rows, to which text would give probabilities, "
            "but with model.lora_modality: audio text stays as it is; take the model's own tokenizer, or write "
            "model.lora_modality: all."
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
    arguments = parse_arguments(LoraConfig, lora, "model.lora", types=_LORA_TYPES)
    try:
        # peft needs the embeddings, which decoder-only models keep outside of their language model.
        with nullcontext() if embed_tokens is None else reattach_embeddings(llm, embed_tokens):
            adapted = get_peft_model(llm, LoraConfig(**arguments))
            wraps_embeddings = embed_tokens is not None and unwrap_peft(adapted).model.embed_tokens is not embed_tokens
    except BUILD_FAULTS as error:
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


def _check_configs(folder: Path) -> None:
    """Refuse configs that could run code: transformers applies a LoRA in the language model's folder, whose config can
    have peft import a module, and fetches a kernel that the config names."""
    for path in (folder / "adapter_config.json", folder / CONFIG_NAME):
        if not path.is_file():
            continue
        try:
            check_model_file(json.loads(path.read_text(encoding="utf-8")), f"'{path}'")
        except ValueError as error:
            raise ModelError(f"'{path}' is not JSON ({error}); correct or remove it.") from error


@contextmanager
def _as_model_error(name: str) -> Iterator[None]:
    """Errors of transformers and NeMo for a name that does not exist, as one sentence."""
    try:
        yield
    except (OSError, ValueError, StrictDataclassError) as error:
        if "trust_remote_code" in str(error):
            raise ModelError(
                f"'{name}' needs code that came with it, which is not run unless you trust it: pass "
                "trust_remote_code=True (--trust-remote-code, or model.trust_remote_code: true in a recipe).",
                page=Help.CODE_IN_MODEL,
            ) from error
        reason = f" ({first_line(error).rstrip(':')})" if Path(name).is_dir() else ""
        raise ModelError(
            f"'{name}' is neither a folder with a Hugging Face model nor the name of one that could be fetched"
            f"{reason}; check model.pretrained_llm and model.tokenizer_path.",
            page=Help.NO_MODEL,
        ) from error
