"""Random token ids and recordings for synthetic batches.

They are drawn without changing the random states of the training. Token ids and lengths are made by ``torch.tensor``,
whose values are known under fake tensors too (:mod:`nemo_emmett.oomptimizer.adapters.fakes`).

Shapes: B examples, T tokens, N samples.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from functools import reduce
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nemo_emmett.errors import ConfigError

SEED = 20240913
"""The same shape and size always give the same batch."""

_OF_TOKENIZER = ("pad_id", "eos_id", "bos_id", "unk_id", "pad", "eos", "bos")
_OF_MODEL = ("audio_locator_id", "audio_locator_tag_id", "text_pad_id", "pad_id")


def random_ids(size: int, length: int, vocab_size: int, banned: Collection[int], device: torch.device) -> Tensor:
    """(B, T) int64, each below ``vocab_size`` and none of them banned.

    Raises:
        ConfigError: if no id is left.
    """
    allowed = np.delete(np.arange(vocab_size), [token for token in banned if 0 <= token < vocab_size])
    if not len(allowed):
        raise ConfigError(
            f"oomptimizer_schema: a vocabulary of {vocab_size} holds nothing but special tokens; "
            "give the vocab_size of the embedding table."
        )
    draws = np.random.default_rng(SEED).integers(len(allowed), size=(size, length))
    return torch.tensor(allowed[draws], device=device)


def random_recordings(size: int, samples: int, device: torch.device) -> Tensor:
    """(B, N) float32 noise of a tenth of full scale."""
    generator = torch.Generator(device).manual_seed(SEED)
    return torch.randn(size, samples, generator=generator, device=device).mul_(0.1)


def full_lengths(size: int, length: int, device: torch.device) -> Tensor:
    """(B,) int64: every example is as long as the longest."""
    return torch.tensor([length] * size, device=device)


def special_ids(model: Any) -> set[int]:
    """Ids of the tokenizer's special tokens and of the audio locator, which have a function in any position."""
    tokenizer = getattr(model, "tokenizer", None)
    found = [getattr(tokenizer, name, None) for name in _OF_TOKENIZER]
    found += [getattr(model, name, None) for name in _OF_MODEL]
    return {value for value in found if isinstance(value, int) and value >= 0}


def sampling_rate(model: Any) -> int:
    """Samples per second that a model expects.

    Raises:
        ConfigError: if the model does not define it.
    """
    for path in (
        "sampling_rate",
        "preprocessor._sample_rate",
        "preprocessor.featurizer.sample_rate",
        "cfg.sample_rate",
        "cfg.preprocessor.sample_rate",
    ):
        if value := reduce(lambda holder, name: getattr(holder, name, None), path.split("."), model):
            return int(value)
    raise ConfigError(
        f"model: {type(model).__name__} does not define the samples per second of its speech; give it an attribute "
        "`sampling_rate`."
    )


def samples_of(model: Any, seconds: float, seconds_per_token: float = 0.0) -> int:
    """Samples of the longest recording that is measured as so long, at least one.

    Args:
        model: defines the sampling rate.
        seconds: of speech.
        seconds_per_token: the loader counts these tokens, rounded up; 0: it measures seconds.
    """
    rate = sampling_rate(model)
    samples = round(seconds * rate)
    if seconds_per_token:
        # As NeMo computes it: 0.56 / 0.08 is a little more than 7 in floating point, and counts as 8.
        tokens = round(seconds / seconds_per_token)
        while math.ceil(samples / rate / seconds_per_token) > tokens:
            samples -= 1
    elif samples / rate > seconds:
        samples -= 1
    return max(1, samples)
