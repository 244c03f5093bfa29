"""BESTOW-GPT: cross-attention layers from text to speech in front of a decoder-only language model.

The embeddings of prompt and answer attend to the encoded speech in a few causal layers (BESTOW, arXiv 2406.19954),
whose output is added to them. The language model's sequence stays as long as its text: locator tokens are removed from
it. Text batches bypass the layers.

Shapes: B examples, T tokens, A target tokens, H hidden size, R recordings, K recordings of an example, F frames.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from nemo_emmett.errors import DataError, ModelError
from nemo_emmett.models.base import SpeechTextModel
from nemo_emmett.models.causal import DecoderOnly, Sequences, context_and_answer, context_only, unwrap_peft
from nemo_emmett.models.head import LLMInputs
from nemo_emmett.models.packed_inputs import packed_causal
from nemo_emmett.models.targets import parse_arguments
from nemo_emmett.modules.batch import pack, speech_rows
from nemo_emmett.modules.cross_attention import SpeechCrossAttention, SpeechMemory
from nemo_emmett.modules.gated_lora import gated
from nemo_emmett.modules.loss import IGNORE_INDEX
from nemo_emmett.modules.packing import Rows
from nemo_emmett.modules.placement import value_of


class BestowGPT(DecoderOnly, SpeechTextModel):
    """Speech and text translation by one decoder-only language model (Llama, Qwen, Mistral, Gemma).

    Args:
        cfg: the ``model`` section of a recipe; :class:`~nemo_emmett.models.config.ModelConfig` lists its keys.

    Raises:
        ModelError: if ``pretrained_llm`` is an encoder-decoder, or a pretrained part cannot be found.
        ConfigError: for a misspelt key, or a value of another type.
    """

    has_cross_attention = True

    def _post_init_llm(self) -> None:
        super()._post_init_llm()
        section = self.options.cross_attention or {}
        options = parse_arguments(SpeechCrossAttention, section, "model.cross_attention", ["hidden_size"])
        self.cross_attention = SpeechCrossAttention(self.embed_tokens.embedding_dim, **options)

    def llm_inputs(self, batch: Mapping) -> LLMInputs:
        """Contexts and answers one after another, padded on the right, which needs no attention mask, or packed once
        they have attended to speech."""
        read, rows = context_and_answer(batch), Rows.of_batch(batch)
        layout = self._layout(batch, read, rows)
        ids_BT = pack(read.ids_BT, layout.is_text_BT, layout.T, self.pad_id)
        if rows is None:
            # Nothing is predicted from the last token of the longest example, unless there is no other.
            ids_BT = ids_BT[:, : max(layout.T - 1, 1)]
        embeds_BTH = self.embed(ids_BT)
        if (memory := self._memory(batch, layout)) is not None:
            embeds_BTH = self.cross_attention(embeds_BTH, memory)
        targets_BA, positions_BA = layout.targets_and_positions(read)
        speech_L = speech_rows(batch, self.audio_locator_id)
        if rows is None:
            return LLMInputs({"inputs_embeds": embeds_BTH}, targets_BA, positions_BA, speech_L, layout.num_targets)
        packed = rows.layout(layout.is_text_BT.sum(1), layout.width)
        kwargs = {"inputs_embeds": packed.pack(embeds_BTH, 0.0), **packed_causal(packed)}
        positions_BA = (positions_BA + packed.start_B[:, None]).clamp(max=layout.width - 1)
        return LLMInputs(kwargs, targets_BA, positions_BA, speech_L, layout.num_targets, rows.row_B)

    def generate_answers(self, batch: Mapping, **generate_options: Any) -> Tensor:
        """(B, A) ids that Hugging Face ``generate`` gives for the contexts of a one-modality batch.

        Speech is encoded once, with its keys and values; every new token attends to them as the prompt did.

        Raises:
            ModelError: if the options name a cache other than the default, growing one.
        """
        read = context_only(batch)
        layout = self._layout(batch, read)
        # Packed from the other end: generation goes on from the right.
        ids_BT, mask_BT = (
            pack(values_BT.flip(1), layout.is_text_BT.flip(1), layout.T, fill).flip(1)
            for values_BT, fill in ((read.ids_BT, self.pad_id), (layout.is_text_BT, False))
        )
        memory = self._memory(batch, layout)
        gate = gated(self.llm, speech_rows(batch, self.audio_locator_id))
        with self.embeddings_inside(), self._looking_up(memory) as select, gate:
            return self.search_answers(
                {"inputs_embeds": self.embed(ids_BT), "attention_mask": mask_BT.long()}, generate_options, select
            )

    def _layout(self, batch: Mapping, read: Sequences, rows: Rows | None = None) -> _Layout:
        is_locator_BT = read.mask_BT & (read.ids_BT == self.audio_locator_id)
        is_text_BT, recordings_B = read.mask_BT & ~is_locator_BT, is_locator_BT.sum(1)
        num_recordings = 0 if batch.get("audios") is None else len(batch["audio_lens"])
        if isinstance(is_text_BT, FakeTensor):
            # OOMptimizer plans on tensors without values, in batches whose longest row is full.
            B, T = is_text_BT.shape
            A = batch["answer_ids"].shape[1] if "answer_ids" in batch else 0
            T, width = T - num_recordings // B, None if rows is None else rows.size
            num_targets = value_of(read.is_target_BT.sum())
            return _Layout(is_text_BT, recordings_B, T, A, -(-num_recordings // B), width, num_targets)
        is_target_BT, lens_B = read.is_target_BT & is_text_BT, is_text_BT.sum(1)
        num_targets = (is_target_BT & (is_text_BT.cumsum(1) > 1)).sum()  # nothing predicts the first token
        used = lens_B if rows is None else rows.used(lens_B)
        sizes = [lens_B.max(), is_target_BT.sum(1).max(), recordings_B.max(), recordings_B.sum(), used.max()]
        # The only read of the device by the host, before anything large is computed there.
        T, A, K, num_locators, width, num_targets = torch.stack([*sizes, num_targets]).tolist()
        if num_locators != num_recordings:
            raise DataError(
                f"a batch has {num_recordings} recordings but {num_locators} audio locator tokens: "
                "each recording needs exactly one locator in its context."
            )
        # A language model needs at least one position, even for a batch of padding.
        if rows is not None:
            rows.check(width)
        return _Layout(is_text_BT, recordings_B, max(T, 1), A, K, max(width, 1), num_targets)

    def _memory(self, batch: Mapping, layout: _Layout) -> SpeechMemory | None:
        """The cross-attention's keys and values of a batch's speech; None for text."""
        if batch.get("audios") is None:
            return None
        audio_RFH, lens_R = self.encode_speech(batch["audios"], batch["audio_lens"])
        return self.cross_attention.memory(*layout.by_example(audio_RFH, lens_R))

    @contextmanager
    def _looking_up(self, memory: SpeechMemory | None) -> Iterator[Callable[[Tensor], None]]:
        """Within it, all input of the language model passes the cross-attention layers, unless there is no speech.

        Yields:
            A function that keeps only some rows of the batch's speech.
        """
        if memory is None:
            yield lambda kept_R: None
            return

        def select(kept_R: Tensor) -> None:
            nonlocal memory
            memory = memory.select(kept_R)

        # The layers' own cache goes on top of the language model's, so that a beam search reorders both.
        cache_layers = [DynamicLayer() for _ in self.cross_attention.layers]

        def look_up(llm: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
            cache = kwargs.get("past_key_values")
            past = cache_layers[0].get_seq_length()
            if type(cache) is not DynamicCache or cache.get_seq_length() != past:
                raise ModelError(
                    "BestowGPT generates with a cache that grows and is its own: leave `past_key_values` and "
                    "`cache_implementation` out of the options."
                )
            if past == 0:
                cache.layers.extend(cache_layers)
            text_BTH = kwargs.get("inputs_embeds")
            if text_BTH is None:
                text_BTH = self.embed(kwargs["input_ids"])
            # `generate` omits it where there is no padding; then no mask is needed here either.
            mask_BT = kwargs.get("attention_mask")
            mask_BT = None if mask_BT is None else mask_BT.bool()
            embeds_BTH = self.cross_attention(text_BTH, memory, mask_BT, cache_layers)
            return args, kwargs | {"input_ids": None, "inputs_embeds": embeds_BTH}

        # peft's wrapper calls `generate` of the model inside.
        handle = unwrap_peft(self.llm).register_forward_pre_hook(look_up, with_kwargs=True)
        try:
            yield select
        finally:
            handle.remove()


@dataclass(frozen=True)
class _Layout:
    """The text tokens of a batch, the recordings of each example, and the sizes that the host needs.

    Attributes:
        is_text_BT: (B, T) bool, tokens that the language model reads: neither padding nor locators.
        recordings_B: (B,) int64, recordings per example; the batch holds them in this order.
        T: most tokens of text in an example.
        A: most targets in an example.
        K: most recordings in an example.
        width: most tokens of text in a row, into which examples may be packed.
        num_targets: targets that there are; None of tensors without values.
    """

    is_text_BT: Tensor
    recordings_B: Tensor
    T: int
    A: int
    K: int
    width: int | None = None
    num_targets: int | None = None

    def targets_and_positions(self, read: Sequences) -> tuple[Tensor, Tensor]:
        """(B, A) targets, ``IGNORE_INDEX`` where there is none, and the positions of text that predict them."""
        position_BT = self.is_text_BT.cumsum(1) - 1
        is_target_BT = read.is_target_BT & self.is_text_BT
        # Nothing predicts the first token.
        ids_BT = read.ids_BT.masked_fill(position_BT == 0, IGNORE_INDEX)
        return (
            pack(ids_BT, is_target_BT, self.A, IGNORE_INDEX),
            pack((position_BT - 1).clamp(min=0), is_target_BT, self.A, 0),
        )

    def by_example(self, audio_RFH: Tensor, lens_R: Tensor) -> tuple[Tensor, Tensor]:
        """Recordings by example, (B, K, F, H), and the mask of their frames, (B, K, F) bool."""
        B, device = len(self.recordings_B), lens_R.device
        slot_K = torch.arange(self.K, device=device)
        is_there_BK = slot_K < self.recordings_B[:, None]
        first_B = self.recordings_B.cumsum(0) - self.recordings_B
        recording_BK = torch.where(is_there_BK, first_B[:, None] + slot_K, 0)
        frame_F = torch.arange(audio_RFH.shape[1], device=device)
        mask_BKF = (frame_F < lens_R[recording_BK][..., None]) & is_there_BK[..., None]
        return audio_RFH.index_select(0, recording_BK.flatten()).unflatten(0, (B, self.K)), mask_BKF
