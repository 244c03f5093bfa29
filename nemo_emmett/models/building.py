"""What a model is built of: tokenizer, language model, LoRA, speech encoder; each as NeMo's SALM builds it."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from hydra.errors import InstantiationException
from nemo.collections.asr.models import ASRModel
from nemo.collections.common.tokenizers import AutoTokenizer
from nemo.collections.speechlm2.parts.pretrained import setup_speech_encoder
from nemo.core.classes.common import UnsafeTargetError
from nemo.utils import logging
from omegaconf import OmegaConf, open_dict
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AddedToken, AutoConfig, PreTrainedModel

from nemo_emmett.config import check_model_file
from nemo_emmett.errors import ConfigError, EmmettError, ModelError
from nemo_emmett.models.causal import unwrap_peft
from nemo_emmett.modules.modality_adapters import check_modality_adapter, leave_out_collectives
from nemo_emmett.prompts.families import may_be_read

if TYPE_CHECKING:
    from nemo_emmett.models.base import SpeechTextModel

_NO_WEIGHTS_ONLY = "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"
_ASR_MODELS = "nemo.collections.asr.models."
_NOT_RESTORED = ("train_ds", "validation_ds", "test_ds", "optim", "trainer", "exp_manager")
"""Sections of a ``.nemo`` file's config that restoring a model does not read."""


def build_tokenizer(model: SpeechTextModel) -> AutoTokenizer:
    """The language model's tokenizer, with the audio locator among its special tokens."""
    options = model.options
    source = options.tokenizer_path or options.pretrained_llm
    _check_local_path(source, "model.tokenizer_path" if options.tokenizer_path else "model.pretrained_llm")
    with _as_model_error(source):
        tokenizer = AutoTokenizer(source, use_fast=True, trust_remote_code=model.trust_remote_code)
    # Not NeMo's add_special_tokens: it replaces the list in which multilingual tokenizers keep their languages.
    tokenizer.tokenizer.add_tokens(
        [AddedToken(options.audio_locator_tag, special=True, normalized=False)], special_tokens=True
    )
    tokenizer.audio_locator_tag = options.audio_locator_tag  # for prompts that callers write by hand
    return tokenizer


def build_llm(model: SpeechTextModel) -> PreTrainedModel:
    """The language model, in float32 and in training mode.

    Raises:
        ModelError: if it cannot be found, or is of the kind that the model is not built on.
    """
    name, auto_class = model.options.pretrained_llm, model.auto_class
    trust = {"trust_remote_code": model.trust_remote_code}
    if not model.trust_remote_code:
        _check_adapter_config(Path(name))
    with _as_model_error(name):
        config = AutoConfig.from_pretrained(name, **trust)
    if config.is_encoder_decoder != model.is_encoder_decoder:
        kinds = {True: "an encoder-decoder", False: "a decoder-only model"}
        raise ModelError(
            f"model.pretrained_llm: '{name}' is {kinds[config.is_encoder_decoder]} ({config.model_type}), "
            f"but {type(model).__name__} is built on {kinds[model.is_encoder_decoder]}; choose another of either."
        )
    if model.options.pretrained_weights:
        # Weights in pickles (pytorch_model.bin) are read as data, whatever the environment says.
        llm = auto_class.from_pretrained(name, dtype=torch.float32, weights_only=True, **trust)
    else:
        llm = auto_class.from_config(config, dtype=torch.float32, **trust)
    # transformers hands it over in evaluation mode, and Lightning's fit leaves modes as they are.
    return llm.train()


def fit_embeddings(model: SpeechTextModel) -> None:
    """Look that every token a text or prompt can hold has its row in the embedding table; the audio locator needs none.

    With ``model.resize_token_embeddings`` rows are added for those that have none, of input and output layer.

    Raises:
        ConfigError: if tokens have no row, and none are to be added.
    """
    options, rows = model.options, model.llm.get_input_embeddings().num_embeddings
    beyond = {
        token: number
        for token, number in model.tokenizer.tokenizer.get_vocab().items()
        if number >= rows
        and token != options.audio_locator_tag
        and may_be_read(token, options.prompt_format, model.tokenizer)
    }
    if not beyond:
        return
    last, number = max(beyond.items(), key=lambda item: item[1])
    if not options.resize_token_embeddings:
        key = "tokenizer_path" if options.tokenizer_path else "pretrained_llm"
        raise ConfigError(
            f"model.{key}: the tokenizer of '{getattr(options, key)}' has tokens up to '{last}', whose id is {number}, "
            f"but the embedding table of '{options.pretrained_llm}' has {rows} rows, not {number + 1}; set "
            f"model.resize_token_embeddings: true to add {number + 1 - rows}, or take the model's own tokenizer."
        )
    _resize(model.llm, number + 1)
    logging.info(f"The embedding table was resized from {rows} to {number + 1} rows, for tokens up to '{last}'.")


def _resize(llm: PreTrainedModel, rows: int) -> None:
    """transformers' own; an output layer that is not tied stays so."""
    is_tied = llm.config.tie_word_embeddings
    # T5 1.1 and its like are configured as tied, whatever the checkpoint had: their output layer would be lost.
    llm.config.tie_word_embeddings = llm.get_output_embeddings().weight is llm.get_input_embeddings().weight
    llm.resize_token_embeddings(rows)
    llm.config.tie_word_embeddings = is_tied


def install_lora(model: SpeechTextModel) -> None:
    """Put peft's low-rank adapters into the language model (LoRA, arXiv 2106.09685); its parameters get the names that
    they have in NeMo's SALM.

    Raises:
        ConfigError: for an argument that peft does not know, or target modules that the language model does not have.
    """
    try:
        # peft looks at the embeddings, which decoder-only models keep outside of their language model.
        with model.embeddings_inside():
            embeddings = model.token_embedding
            model.llm = get_peft_model(model.llm, LoraConfig(**model.options.lora))
            is_out_of_reach = (
                hasattr(model, "embed_tokens") and unwrap_peft(model.llm).model.embed_tokens is not embeddings
            )
    except (ValueError, TypeError) as error:
        linear = sorted({name.rsplit(".", 1)[-1] for name, m in model.llm.named_modules() if isinstance(m, nn.Linear)})
        raise ConfigError(
            f"model.lora: peft cannot use {model.options.lora} ({str(error).splitlines()[0].rstrip('.')}); "
            f"the linear layers of this language model are {', '.join(linear)}."
        ) from error
    if is_out_of_reach:
        raise ConfigError(
            f"model.lora: {type(model).__name__} keeps its token embeddings outside of the language model, where peft "
            "does not reach them; leave embed_tokens and trainable_token_indices out, and to train all embeddings "
            "write model.prevent_freeze_params: ['^embed_tokens\\..+$']."
        )
    if model.options.lora.get("bias", "none") != "none":
        raise ConfigError(
            f"model.lora.bias: '{model.options.lora['bias']}' is not possible, the language model's own biases stay as "
            "they are; leave the key out, or name them in model.prevent_freeze_params."
        )
    # peft freezes all but its own, and NeMo's freezing never thaws: what the recipe wants to train must be thawed here.
    wanted = [re.compile(pattern) for pattern in model.options.prevent_freeze_params]
    for name, parameter in model.named_parameters():
        if any(pattern.match(name) for pattern in wanted):
            parameter.requires_grad = True
    logging.info(f"LoRA in the language model: {model.options.lora}")


def build_perception(model: SpeechTextModel) -> None:
    """Speech encoder and modality adapter: ``model.perception``, completed in ``model.cfg``."""
    options = model.options
    if options.pretrained_weights:
        if not options.pretrained_asr:
            raise ConfigError("model.pretrained_asr is missing: give a .nemo file or the name of a NeMo ASR model.")
        _check_local_path(options.pretrained_asr, "model.pretrained_asr")
        if not model.trust_remote_code:
            read_asr_config(options.pretrained_asr)
    with open_dict(model.cfg):
        # FastConformer all-reduces its longest input by default: a rank that has only text would leave the others
        # waiting in that collective.
        model.cfg.perception.setdefault("encoder", {})
        model.cfg.perception.encoder.sync_max_audio_length = False
    try:
        with nullcontext() if model.trust_remote_code else _weights_only():
            setup_speech_encoder(model, pretrained_weights=options.pretrained_weights)
    except (InstantiationException, UnsafeTargetError) as error:  # Hydra hides what an adapter says in its own words
        if isinstance(error.__cause__, EmmettError):
            raise error.__cause__ from error
        said = str(error.__cause__ or error).splitlines()[0].rstrip(".")
        raise ConfigError(f"model.perception cannot be built: {said}; correct the `_target_` or its keys.") from error
    leave_out_collectives(model.perception)
    check_modality_adapter(model.perception, model.llm.config.hidden_size)


def read_asr_config(source: str, trusted: bool = False) -> dict[str, Any]:
    """The config of a NeMo ASR model; nothing that it names is built.

    Args:
        source: a ``.nemo`` file, or the name of a model.
        trusted: do not check it.

    Raises:
        ModelError: if it could run code.
    """
    is_file = source.endswith(".nemo") and Path(source).exists()  # as NeMo tells them apart
    read = ASRModel.restore_from if is_file else ASRModel.from_pretrained
    config = read(source, return_config=True)
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
    """transformers applies a LoRA that lies beside a language model, whose config can have peft import a module."""
    path = folder / "adapter_config.json"
    if not path.is_file():
        return
    try:
        check_model_file(json.loads(path.read_text()), f"'{path}'")
    except ValueError as error:
        raise ModelError(f"'{path}' is not JSON ({error}); correct or remove it.") from error


def transformer_blocks(llm: nn.Module) -> list[nn.Module]:
    """The Transformer blocks of a language model, in order: what it says may not be split between devices."""
    names = set(getattr(llm, "_no_split_modules", None) or ())
    return [module for module in llm.modules() if type(module).__name__ in names]


def enable_activation_checkpointing(model: SpeechTextModel) -> None:
    """Activation checkpointing (arXiv 1604.06174) of language model and speech encoder, block by block, and of the
    cross-attention layers between them."""
    with model.embeddings_inside():
        model.llm.gradient_checkpointing_enable({"use_reentrant": False})
        # transformers gives every embedding a gradient, which checkpointing of this kind needs not; a language model
        # that is frozen would keep its activations of text for nothing.
        model.llm.disable_input_require_grads()
    if model.perception is not None:
        model.perception.set_activation_checkpointing(True)
    if model.has_cross_attention:
        model.cross_attention.activation_checkpointing = True


def compile_blocks(llm: nn.Module, options: bool | dict) -> None:
    """``torch.compile`` each Transformer block in place: blocks are alike, so one compilation serves all of them.

    Args:
        llm: the language model.
        options: True, or the arguments of ``torch.compile``; lengths vary, so shapes are dynamic unless they say not.

    Raises:
        ModelError: if the language model does not tell which its blocks are.
    """
    arguments = {"dynamic": True} | (options if isinstance(options, dict) else {})
    blocks = transformer_blocks(llm)
    if not blocks:
        raise ModelError(
            f"model.compile: {type(llm).__name__} does not tell which its Transformer blocks are; leave `compile` out."
        )
    for block in blocks:
        block.compile(**arguments)


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
