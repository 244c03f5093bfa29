"""Cross-attention from text to speech in front of the language model (BESTOW, arXiv 2406.19954).

In a few pre-norm transformer decoder layers each text position attends to the text up to it, then to the encoded
speech. The output is added to the text's embeddings, so the language model's sequence stays as long as its text,
however long the speech is.

Shapes: B utterances, K recordings in each, F frames, S = K x F, T text positions, P text positions read before,
H hidden size of the language model, W width of the layers, N heads, D size of a head.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Annotated

import annotated_types
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.cache_utils import CacheLayerMixin

from nemo_emmett.errors import ConfigError
from nemo_emmett.typed_config import NonNegative, Positive, PositiveWhole

WAVELENGTH = 10_000.0
"""The longest wavelength of positions over 2 pi, in tokens or frames (as in arXiv 1706.03762 and 2104.09864)."""


@dataclass(frozen=True)
class SpeechMemory:
    """Keys and values of the speech of B utterances, computed once and used for every token.

    Attributes:
        keys_BNSD: one (B, N, S, D) tensor for each layer.
        values_BNSD: the same.
        mask_BS: bool, true where there is a frame to attend to. An utterance without speech attends to everything, so
            that its softmax is not NaN; the result is not used.
        has_speech_B: bool.
    """

    keys_BNSD: tuple[Tensor, ...]
    values_BNSD: tuple[Tensor, ...]
    mask_BS: Tensor
    has_speech_B: Tensor

    def select(self, kept_R: Tensor) -> SpeechMemory:
        """The speech of some of the utterances, by their numbers (R,) int64."""
        keys, values = (tuple(layer[kept_R] for layer in layers) for layers in (self.keys_BNSD, self.values_BNSD))
        return SpeechMemory(keys, values, self.mask_BS[kept_R], self.has_speech_B[kept_R])


class SpeechCrossAttention(nn.Module):
    """Adds to text embeddings what they attend to in speech.

    It follows the ``TransformerCrossAttention`` of NeMo's BESTOW (dropped in 2025): causal self-attention,
    cross-attention and feed-forward in each layer, an inner size equal to the width, a final layer norm. What differs:

    - Self-attention has rotary positions, which encode distances only: the side of padding has no effect.
    - The output projection starts at zero, so that a new model has the outputs of its language model. In the first step
      only the projection has a gradient, from then on all parameters have.
    - A position in the utterance's speech, counted over all its recordings, is added to each frame: attention ignores
      order, and conformers encode distances only.

    Args:
        hidden_size: H, of text embeddings and encoded speech.
        num_layers: decoder layers.
        num_heads: attention heads of each.
        width: W of the layers; None: as wide as the language model.
        ffn_ratio: inner size of the feed-forward part over W.
        dropout: of each part's output, in training.

    Attributes:
        activation_checkpointing: compute the layers' activations again in the backward pass (arXiv 1604.06174).

    Raises:
        ConfigError: for heads that do not divide the width.

    Example:
        >>> attend = SpeechCrossAttention(hidden_size=16, num_heads=4)
        >>> memory = attend.memory(torch.randn(2, 1, 50, 16), torch.ones(2, 1, 50, dtype=torch.bool))
        >>> attend(torch.randn(2, 7, 16), memory).shape
        torch.Size([2, 7, 16])
    """

    def __init__(
        self,
        hidden_size: int,
        num_layers: PositiveWhole = 2,
        num_heads: PositiveWhole = 8,
        width: PositiveWhole | None = None,
        ffn_ratio: Positive = 1.0,
        dropout: Annotated[NonNegative, annotated_types.Lt(1)] = 0.0,
    ) -> None:
        super().__init__()
        width = hidden_size if width is None else width
        if width % (2 * num_heads):
            raise ConfigError(
                f"model.cross_attention.num_heads: {num_heads} heads do not divide the width {width} into even parts "
                "(rotary positions turn pairs); choose another number of heads, or another "
                "model.cross_attention.width."
            )
        if round(ffn_ratio * width) < 1:
            raise ConfigError(
                f"model.cross_attention.ffn_ratio: {ffn_ratio} leaves nothing of the width {width}; 1.0 is usual."
            )
        self.activation_checkpointing = False
        self.project_in = nn.Identity() if width == hidden_size else nn.Linear(hidden_size, width)
        self.memory_norm = nn.LayerNorm(hidden_size)
        self.layers = nn.ModuleList(
            _Layer(hidden_size, width, num_heads, round(ffn_ratio * width), dropout) for _ in range(num_layers)
        )
        self.norm = nn.LayerNorm(width)
        self.project_out = nn.Linear(width, hidden_size)
        nn.init.zeros_(self.project_out.weight)
        nn.init.zeros_(self.project_out.bias)

    def memory(self, speech_BKFH: Tensor, mask_BKF: Tensor) -> SpeechMemory:
        """Keys and values of every layer.

        Args:
            speech_BKFH: (B, K, F, H) encoded speech, the recordings of each utterance in their order.
            mask_BKF: (B, K, F) bool, true on frames; all false for an utterance without speech.
        """
        mask_BS = mask_BKF.flatten(1)
        memory_BSH = self.memory_norm(speech_BKFH.flatten(1, 2))
        memory_BSH = memory_BSH + _places(mask_BS, memory_BSH.shape[2]).to(memory_BSH.dtype)
        keys, values = zip(*(layer.cross_attention.keys_and_values(memory_BSH) for layer in self.layers), strict=True)
        has_speech_B = mask_BS.any(1)
        return SpeechMemory(keys, values, mask_BS | ~has_speech_B[:, None], has_speech_B)

    def forward(
        self,
        text_BTH: Tensor,
        memory: SpeechMemory,
        text_mask_BT: Tensor | None = None,
        cache: Sequence[CacheLayerMixin] | None = None,
    ) -> Tensor:
        """Text embeddings plus what they attend to in speech.

        Args:
            text_BTH: (B, T, H); or a multiple of B rows, the hypotheses of each utterance one after another.
            memory: of the B utterances.
            text_mask_BT: as many rows as the text, P + T columns, bool: false where text is padded. Padding on the
                right needs no mask, since no position attends to later ones.
            cache: for each layer a transformers cache layer (``DynamicLayer``) that holds the P positions read before
                and takes these T.

        Returns:
            The shape and type of the text; an utterance without speech gives its text's embeddings, to the bit.
        """
        past = cache[0].get_seq_length() if cache else 0
        mask = _self_attention_mask(text_mask_BT, past, text_BTH.shape[1], text_BTH.device)
        hidden_BTW = self.project_in(text_BTH)
        # Once for queries and keys of all layers.
        rotation = _rotation(past, hidden_BTW, self.layers[0].self_attention.num_heads)
        is_recomputed = self.activation_checkpointing and self.training and not cache
        caches = cache or [None] * len(self.layers)
        for layer, keys, values, own in zip(self.layers, memory.keys_BNSD, memory.values_BNSD, caches, strict=True):
            run = partial(checkpoint, layer, use_reentrant=False) if is_recomputed else layer
            hidden_BTW = run(hidden_BTW, keys, values, memory.mask_BS, mask, rotation, own)
        found_BTH = self.project_out(self.norm(hidden_BTW)).to(text_BTH.dtype)
        has_speech_B = memory.has_speech_B.repeat_interleave(len(text_BTH) // len(memory.has_speech_B))
        return text_BTH + torch.where(has_speech_B[:, None, None], found_BTH, 0.0)


class _Layer(nn.Module):
    """Self-attention, cross-attention, feed-forward: each reads a normed input and adds to it."""

    def __init__(self, hidden_size: int, width: int, num_heads: int, inner_size: int, dropout: float) -> None:
        super().__init__()
        self.self_attention_norm = nn.LayerNorm(width)
        self.self_attention = _SelfAttention(width, num_heads)
        self.cross_attention_norm = nn.LayerNorm(width)
        self.cross_attention = _CrossAttention(width, num_heads, memory_size=hidden_size)
        self.feed_forward_norm = nn.LayerNorm(width)
        self.feed_forward = nn.Sequential(nn.Linear(width, inner_size), nn.GELU(), nn.Linear(inner_size, width))
        self.dropout = nn.Dropout(dropout)

    def forward(
        self,
        x_BTW: Tensor,
        keys_BNSD: Tensor,
        values_BNSD: Tensor,
        frame_mask_BS: Tensor,
        text_mask: Tensor | None,
        rotation: tuple[Tensor, Tensor],
        cache: CacheLayerMixin | None,
    ) -> Tensor:
        attended_BTW = self.self_attention(self.self_attention_norm(x_BTW), text_mask, rotation, cache)
        x_BTW = x_BTW + self.dropout(attended_BTW)
        x_BTW = x_BTW + self.dropout(
            self.cross_attention(self.cross_attention_norm(x_BTW), keys_BNSD, values_BNSD, frame_mask_BS)
        )
        return x_BTW + self.dropout(self.feed_forward(self.feed_forward_norm(x_BTW)))


class _SelfAttention(nn.Module):
    """Causal, with rotary positions."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.query_key_value = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(
        self, x_BTW: Tensor, mask: Tensor | None, rotation: tuple[Tensor, Tensor], cache: CacheLayerMixin | None
    ) -> Tensor:
        """``mask`` is (B, 1, T, P + T) bool, or None where being causal is all there is to it."""
        T = x_BTW.shape[1]
        parts_3BNTD = self.query_key_value(x_BTW).unflatten(2, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        query, key = _rotate(parts_3BNTD[:2], *rotation)
        value = parts_3BNTD[2]
        if cache is not None:
            key, value = cache.update(key, value)
        # A single position attends to all before it; several without a past are causal from the first on.
        found = F.scaled_dot_product_attention(query, key, value, mask, is_causal=mask is None and T > 1)
        return self.out(_join_heads(found))


class _CrossAttention(nn.Module):
    """To a memory whose keys and values are computed once."""

    def __init__(self, width: int, num_heads: int, memory_size: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.query = nn.Linear(width, width)
        self.key_value = nn.Linear(memory_size, 2 * width)
        self.out = nn.Linear(width, width)

    def keys_and_values(self, memory_BSH: Tensor) -> tuple[Tensor, Tensor]:
        """(B, N, S, D) each."""
        key_BSW, value_BSW = self.key_value(memory_BSH).chunk(2, dim=2)
        return _split_heads(key_BSW, self.num_heads), _split_heads(value_BSW, self.num_heads)

    def forward(self, x_BTW: Tensor, keys_BNSD: Tensor, values_BNSD: Tensor, mask_BS: Tensor) -> Tensor:
        rows, T, W = x_BTW.shape
        B = len(keys_BNSD)
        # Cross-attention does not depend on the order of its queries: the hypotheses of an utterance are concatenated
        # as if they were one text, so that the memory is not repeated for each.
        query = _split_heads(self.query(x_BTW).reshape(B, rows // B * T, W), self.num_heads)
        found = F.scaled_dot_product_attention(query, keys_BNSD, values_BNSD, mask_BS[:, None, None, :])
        return self.out(_join_heads(found).reshape(rows, T, W))


def _split_heads(x_BTW: Tensor, num_heads: int) -> Tensor:
    """(B, N, T, D)."""
    return x_BTW.unflatten(2, (num_heads, -1)).transpose(1, 2)


def _join_heads(x_BNTD: Tensor) -> Tensor:
    """(B, T, W)."""
    return x_BNTD.transpose(1, 2).flatten(2)


def _rotation(past: int, x_BTW: Tensor, num_heads: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines of rotary positions, (T, D / 2) each, for T positions after ``past`` others."""
    T, half = x_BTW.shape[1], x_BTW.shape[2] // num_heads // 2
    frequency = WAVELENGTH ** -(torch.arange(half, device=x_BTW.device) / half)
    angle = torch.arange(past, past + T, device=x_BTW.device)[:, None] * frequency
    return angle.cos(), angle.sin()


def _rotate(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Rotary positions: pairs of features (..., T, D) are turned by angles proportional to the position (arXiv
    2104.09864)."""
    cosine, sine = cosine.to(x.dtype), sine.to(x.dtype)
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cosine - second * sine, second * cosine + first * sine], dim=-1)


def _places(mask_BS: Tensor, size: int) -> Tensor:
    """(B, S, size): sines and cosines of each frame's place among its utterance's frames (arXiv 1706.03762, 3.5)."""
    half = (size + 1) // 2
    frequency = WAVELENGTH ** -(torch.arange(half, device=mask_BS.device) / half)
    angle = (mask_BS.cumsum(1) - 1)[..., None] * frequency
    return torch.cat([angle.sin(), angle.cos()], dim=2)[..., :size]


def _self_attention_mask(text_mask_BT: Tensor | None, past: int, T: int, device: torch.device) -> Tensor | None:
    """(B or 1, 1, T, P + T) bool, true where a position may attend; None where a causal mask, or none, is enough."""
    if text_mask_BT is None and (past == 0 or T == 1):
        return None
    query_T = torch.arange(past, past + T, device=device)[:, None]
    key_S = torch.arange(past + T, device=device)[None, :]
    if text_mask_BT is None:
        return (key_S <= query_T)[None, None]
    # Padding attends to itself: the softmax of a row without any position would be NaN.
    return ((key_S <= query_T) & text_mask_BT[:, None, :] | (key_S == query_T))[:, None]
