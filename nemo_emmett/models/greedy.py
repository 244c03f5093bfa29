"""Greedy search in which finished answers leave the batch.

Hugging Face ``generate`` computes every row of a batch until the last one ends. On a CPU a step takes time in
proportion to the rows, so that one long answer costs as much as a batch of them. This search, which ``generate`` takes
as its ``custom_generate``, selects the rows that are left, and gives the same ids.

Shapes: B examples, R rows that are left, T tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, GenerationConfig, LogitsProcessorList, PreTrainedModel, StoppingCriteriaList
from transformers.utils import ModelOutput

MOST_LEFT = 0.75
"""Rows are selected when at most this part of them is left, since that copies the cache."""

_ROWWISE = frozenset(
    {
        *("num_beams", "do_sample", "early_stopping", "length_penalty", "temperature", "top_k", "top_p", "typical_p"),
        *("min_p", "repetition_penalty", "no_repeat_ngram_size", "bad_words_ids", "suppress_tokens"),
        *("begin_suppress_tokens", "forced_bos_token_id", "forced_eos_token_id", "eos_token_id", "pad_token_id"),
        *("min_length", "max_length", "min_new_tokens", "max_new_tokens"),
        *("decoder_input_ids", "decoder_start_token_id"),
    }
)
"""Options of ``generate`` that act on each row alone, whichever place it has in the batch."""


def leaves_early(options: Mapping[str, Any], batch_size: int, device: torch.device) -> bool:
    """Whether :func:`greedy_search` gives what ``generate`` gives with these options, and is faster.

    Args:
        options: of ``generate``.
        batch_size: B.
        device: of the model; on a GPU a step takes the same time for fewer rows.
    """
    # What is not among the options is decided by the checkpoint's generation config.
    is_greedy = options.get("num_beams") == 1 and options.get("do_sample") is False
    is_known = options.keys() <= _ROWWISE and options.get("pad_token_id") is not None
    return is_greedy and is_known and batch_size > 1 and device.type == "cpu"


def greedy_search(select: Callable[[Tensor], None] = lambda rows_R: None) -> Callable[..., Tensor]:
    """A greedy search for the argument ``custom_generate`` of Hugging Face ``generate``.

    Args:
        select: called with the rows (R,) int64 that are left, numbered as they are in the batch at the time, for what
            the caller keeps of each row.
    """

    @torch.no_grad()
    def search(
        model: PreTrainedModel,
        input_ids: Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        **model_kwargs: Any,
    ) -> Tensor:
        """(B, T) ids: those that the search began with, and those that it found, padded on the right."""
        begun_BT, columns_B = input_ids, []
        pad_id, new_tokens = generation_config.pad_token_id, 1 if model_kwargs.get("use_cache") else None
        rows_R = torch.arange(len(input_ids))  # their numbers in the original batch
        is_open_R = torch.ones(len(input_ids), dtype=torch.bool)
        inputs = model.prepare_inputs_for_generation(input_ids, is_first_iteration=True, **model_kwargs)
        while True:
            outputs = model(**inputs, return_dict=True)
            # transformers' hook for what grows with each token: masks, positions, the cache.
            model_kwargs = model._update_model_kwargs_for_generation(
                outputs, model_kwargs, is_encoder_decoder=model.config.is_encoder_decoder
            )
            scores = logits_processor(input_ids, outputs.logits[:, -1].to(copy=True, dtype=torch.float32))
            del outputs  # the logits of the prompt are large
            next_R = scores.argmax(-1).masked_fill(~is_open_R, pad_id)
            column_B = torch.full((len(begun_BT),), pad_id)
            column_B[rows_R] = next_R
            columns_B.append(column_B)
            input_ids = torch.cat([input_ids, next_R[:, None]], 1)
            is_open_R &= ~stopping_criteria(input_ids, scores)
            left = int(is_open_R.sum())
            if left == 0:
                return torch.cat([begun_BT, torch.stack(columns_B, 1)], 1)
            if left <= MOST_LEFT * len(rows_R):
                kept_R = is_open_R.nonzero()[:, 0]
                model_kwargs = {name: _rows(value, kept_R, len(rows_R)) for name, value in model_kwargs.items()}
                select(kept_R)
                input_ids, rows_R, is_open_R = input_ids[kept_R], rows_R[kept_R], is_open_R[kept_R]
            inputs = model.prepare_inputs_for_generation(input_ids, next_sequence_length=new_tokens, **model_kwargs)

    return search


def _rows(value: Any, kept_R: Tensor, batch_size: int) -> Any:
    """What the model is given for the rows that are left."""
    if isinstance(value, Cache):
        value.batch_select_indices(kept_R)
        return value
    if isinstance(value, ModelOutput):  # of the encoder
        return type(value)(**{name: _rows(part, kept_R, batch_size) for name, part in value.items()})
    if isinstance(value, Tensor) and value.dim() > 1 and len(value) == batch_size:
        return value[kept_R]
    return value
