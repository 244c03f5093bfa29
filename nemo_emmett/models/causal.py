"""The common parts of the decoder-only models: context and answer as one sequence, embeddings outside of the LLM.

Shapes: B examples, T tokens, H hidden size.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from nemo_emmett.errors import ModelError
from nemo_emmett.modules.batch import length_mask


class Sequences(NamedTuple):
    """Contexts and answers, each padded: where ``mask_BT`` is false there is no token.

    Args:
        ids_BT: (B, T) int64.
        mask_BT: (B, T) bool.
        is_target_BT: (B, T) bool, tokens that the model should predict.
    """

    ids_BT: Tensor
    mask_BT: Tensor
    is_target_BT: Tensor


def context_and_answer(batch: Mapping) -> Sequences:
    """The sequences of a one-modality batch in training."""
    contexts, answers = context_only(batch), batch["answer_ids"]
    answer_mask = length_mask(batch["answer_lens"], answers.shape[1])
    return Sequences(
        torch.cat([contexts.ids_BT, answers], 1),
        torch.cat([contexts.mask_BT, answer_mask], 1),
        torch.cat([contexts.is_target_BT, answer_mask], 1),
    )


def context_only(batch: Mapping) -> Sequences:
    """The sequences of a one-modality batch in generation."""
    ids_BT = batch["context_ids"]
    mask_BT = length_mask(batch["context_lens"], ids_BT.shape[1])
    targets_BT = batch.get("context_targets")
    return Sequences(ids_BT, mask_BT, torch.zeros_like(mask_BT) if targets_BT is None else targets_BT)


def detach_embeddings(llm: nn.Module) -> nn.Module:
    """Take the token embeddings out of a decoder-only LLM, as NeMo's SALM does: speech is merged with the embedded
    tokens before the LLM, and FSDP2 shards the embeddings as a unit of their own.

    Raises:
        ModelError: if the LLM does not keep them where NeMo expects them.
    """
    try:
        embed_tokens = llm.model.embed_tokens
        del llm.model.embed_tokens
    except AttributeError as error:
        raise ModelError(
            f"model.pretrained_llm: {type(llm).__name__} has no `model.embed_tokens`, so it cannot be built as NeMo's "
            "SALM is; use a model of the Llama, Qwen, Mistral or Gemma family, or another of that layout."
        ) from error
    return embed_tokens


@contextmanager
def reattach_embeddings(llm: nn.Module, embed_tokens: nn.Module) -> Iterator[None]:
    """Put the token embeddings back for a while, for ``generate`` and peft, which expect them in the LLM.

    Args:
        llm: the language model, with or without peft around it.
        embed_tokens: what :func:`detach_embeddings` returned.
    """
    decoder = unwrap_peft(llm).model
    decoder.embed_tokens = embed_tokens
    try:
        yield
    finally:
        del decoder.embed_tokens


class DecoderOnly:
    """Mixin of the models on a decoder-only language model, whose token embeddings are kept outside of it."""

    auto_class = AutoModelForCausalLM
    is_encoder_decoder = False

    def _post_init_llm(self) -> None:
        self.embed_tokens = detach_embeddings(self.llm)

    @property
    def token_embedding(self) -> nn.Module:
        """Kept outside of the language model."""
        return self.embed_tokens

    def embeddings_inside(self) -> AbstractContextManager[None]:
        """See :meth:`SpeechTextModel.embeddings_inside`."""
        return reattach_embeddings(self.llm, self.embed_tokens)


def unwrap_peft(llm: nn.Module) -> nn.Module:
    """The Hugging Face model itself, without peft around it."""
    return llm.get_base_model() if hasattr(llm, "get_base_model") else llm
