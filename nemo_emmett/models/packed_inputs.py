"""The arguments with which Hugging Face models read rows that hold several examples.

Decoder-only models take positions that start again with each example, from which transformers makes the masks of all
kinds of layers (``find_packed_sequence_indices``), or FlashAttention the lengths. Encoder-decoders take masks; the
decoder's of the encoder's output has to be put in its place, and so have the positions of those that count them.

Shapes: B examples, L rows, S positions of the encoder's input or the decoder-only model's, A of the decoder's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from inspect import signature
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from nemo_emmett.models.causal import unwrap_peft
from nemo_emmett.modules.packing import Layout, attention_mask


def packed_causal(layout: Layout) -> dict[str, Tensor]:
    """Arguments of a decoder-only model."""
    return {"position_ids": layout.examples_and_positions()[1]}


def packed_seq2seq(llm: PreTrainedModel, source: Layout, target: Layout) -> tuple[dict[str, Any], Callable]:
    """Arguments of an encoder-decoder, and the context in which it is called.

    Args:
        llm: the model.
        source: of the encoder's input.
        target: of the decoder's.

    Raises:
        ModelError: if the model's attention takes no such masks.
    """
    (from_LS, from_position_LS), (to_LA, to_position_LA) = (one.examples_and_positions() for one in (source, target))
    mask = partial(attention_mask, llm.config, dtype=llm.dtype)
    kwargs = {
        "attention_mask": mask(from_LS, from_LS),
        "decoder_attention_mask": mask(to_LA, to_LA, is_causal=True),
    }
    return kwargs, partial(_reading, llm, mask(to_LA, from_LS), from_position_LS, to_position_LA)


@contextmanager
def _reading(llm: PreTrainedModel, cross_mask: Any, source_LS: Tensor, target_LA: Tensor) -> Iterator[None]:
    """Within it the decoder attends to the encoder's output by this mask, and positions are counted so."""

    def put_mask(_: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        return args, kwargs | {"encoder_attention_mask": cross_mask}

    def restart(positions: Tensor, table: nn.Module, args: tuple, kwargs: dict, found: Tensor) -> Tensor:
        # Embeddings of 0, 1, ... in order are made once for a row; those of another order are looked up in them.
        table_SH = found.view(-1, *found.shape[-2:])[0]
        if "inputs_embeds" in signature(type(table).forward).parameters:  # M2M100 leaves out padding, which ids show
            table_SH = table.forward(None, table_SH[None])[0]
        return table_SH.index_select(0, positions.flatten()).view(*positions.shape, -1)

    model = unwrap_peft(llm)
    encoder, decoder = model.get_encoder(), model.get_decoder()
    with ExitStack() as stack:
        stack.callback(decoder.register_forward_pre_hook(put_mask, with_kwargs=True).remove)
        for part, positions in ((encoder, source_LS), (decoder, target_LA)):
            if (table := getattr(part, "embed_positions", None)) is not None:
                stack.callback(table.register_forward_hook(partial(restart, positions), with_kwargs=True).remove)
        yield
