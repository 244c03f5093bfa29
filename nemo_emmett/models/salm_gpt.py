"""SALM-GPT: encoded speech among the prompt's tokens, read by a decoder-only language model.

The layout is that of SALM (arXiv 2310.09424) as NeMo has it (``nemo.collections.speechlm2.models.SALM``): a recording
replaces its locator token in the prompt. Parameters have NeMo's names, so checkpoints and folders are interchangeable
with NeMo's SALM. Unlike it, a batch may hold speech, text, or both (EMMeTT, arXiv 2409.13523, section 3.1), and logits
are never made but for the answers' tokens.

Shapes: B examples, T tokens, S positions after audio is placed, A answer tokens, V vocabulary, H hidden size.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from nemo_emmett.models.base import SpeechTextModel
from nemo_emmett.models.causal import DecoderOnly, context_and_answer, context_only
from nemo_emmett.models.head import LLMInputs
from nemo_emmett.models.packed_inputs import packed_causal
from nemo_emmett.modules.batch import padding_mask, speech_rows
from nemo_emmett.modules.gated_lora import gated
from nemo_emmett.modules.loss import IGNORE_INDEX
from nemo_emmett.modules.packing import Rows


class SALMGPT(DecoderOnly, SpeechTextModel):
    """Speech and text translation by one decoder-only language model (Llama, Qwen, Mistral, Gemma).

    Args:
        cfg: the ``model`` section of a recipe; :class:`~nemo_emmett.models.config.ModelConfig` lists its keys.

    Raises:
        ModelError: if ``pretrained_llm`` is an encoder-decoder, or a pretrained part cannot be found.
        ConfigError: for a misspelt key.
    """

    def llm_inputs(self, batch: Mapping) -> LLMInputs:
        """Contexts and answers one after another, padded on the right or packed.

        There is no attention mask: a causal model does not attend to the right.
        """
        read, rows = context_and_answer(batch), Rows.of_batch(batch)
        # Where earlier turns are trained on as well, the most targets of a row depend on the values.
        max_targets = batch["answer_ids"].shape[1] if batch.get("context_targets") is None else None
        options = {"is_target_BT": read.is_target_BT, "max_targets": max_targets, "rows": rows}
        placed = self.place(batch, read.ids_BT, read.mask_BT, **options)
        speech_L = speech_rows(batch, self.audio_locator_id)
        if rows is not None:
            kwargs = {"inputs_embeds": placed.embeds_LSH, **packed_causal(placed.layout)}
        else:
            # Nothing is predicted from the last token of the longest example, unless there is no other.
            kwargs = {"inputs_embeds": placed.embeds_LSH[:, : max(placed.embeds_LSH.shape[1] - 1, 1)]}
        row_B = None if rows is None else rows.row_B
        return LLMInputs(kwargs, placed.targets_BA, placed.positions_BA, speech_L, placed.num_targets, row_B)

    def generate_answers(self, batch: Mapping, **generate_options: Any) -> Tensor:
        """(B, A) ids that Hugging Face ``generate`` gives for the contexts of a one-modality batch."""
        read = context_only(batch)
        placed = self.place(batch, read.ids_BT, read.mask_BT, pad_left=True)
        with self.embeddings_inside(), gated(self.llm, speech_rows(batch, self.audio_locator_id)):
            return self.search_answers(
                {"inputs_embeds": placed.embeds_LSH, "attention_mask": placed.mask_LS.long()}, generate_options
            )

    # As NeMo's SALM has it.

    def training_step(self, batch: Mapping, batch_idx: int) -> dict[str, Tensor]:
        """See :meth:`SpeechTextModel.training_step`; the loss under ``loss``, as NeMo's SALM returns it."""
        return {"loss": super().training_step(batch, batch_idx)}

    def forward(
        self, input_embeds: Mapping | Tensor, attention_mask: Tensor | None = None, cache: Any = None
    ) -> tuple[Tensor, Tensor] | dict[str, Any]:
        """Predict the answers of a one-modality batch, or what follows embeddings.

        Args:
            input_embeds: a batch (docs/architecture.md, "The batch"), or (B, S, H) embeddings, as NeMo's SALM takes.
            attention_mask: (B, S) bool, with embeddings only.
            cache: key-value cache of transformers, with embeddings only.

        Returns:
            Of a batch, (B, A, V) logits and (B, A) targets, which are ``IGNORE_INDEX`` on padding; of embeddings, a
            dict with ``logits`` (B, S, V) and, if one was given, ``cache``.

        Raises:
            ModelError: for embeddings, if LoRA acts on speech alone: they do not say which examples have speech.
        """
        if isinstance(input_embeds, Mapping):
            return super().forward(input_embeds)
        output = self.llm(
            inputs_embeds=input_embeds,
            attention_mask=attention_mask,
            past_key_values=cache,
            use_cache=cache is not None,
        )
        return {"logits": output.logits} | ({"cache": output.past_key_values} if cache is not None else {})

    def prepare_inputs(self, batch: Mapping) -> dict[str, Tensor]:
        """The inputs that NeMo's SALM makes of its flat batch, padded on the left as there.

        Args:
            batch: ``input_ids`` (B, T), ``loss_mask`` (B, T), ``audios`` (R, N), ``audio_lens`` (R,).

        Returns:
            ``input_embeds`` (B, S, H), ``attention_mask`` (B, S) bool, and ``target_ids`` (B, S), the id that each
            position should predict.
        """
        ids_BT = batch["input_ids"]
        has_audio = batch.get("audios") is not None and batch["audios"].numel() > 0
        placed = self.place(
            batch if has_audio else {},
            ids_BT,
            padding_mask(ids_BT, self.pad_id),
            is_target_BT=batch["loss_mask"].bool(),
            pad_left=True,
        )
        S = placed.embeds_LSH.shape[1]
        # Columns without a target go to one more position, which is cut off.
        positions_BA = torch.where(placed.targets_BA == IGNORE_INDEX, S, placed.positions_BA)
        target_ids = torch.full((len(ids_BT), S + 1), IGNORE_INDEX, device=ids_BT.device)
        target_ids.scatter_(1, positions_BA, placed.targets_BA)
        return {
            "input_embeds": placed.embeds_LSH[:, :-1],
            "attention_mask": placed.mask_LS[:, :-1],
            "target_ids": target_ids[:, : S - 1],
        }

    @property
    def text_vocab_size(self) -> int:
        """Rows of the embedding table."""
        return self.embed_tokens.num_embeddings

    @property
    def text_bos_id(self) -> int:
        """The tokenizer's BOS."""
        return self.tokenizer.bos_id

    @property
    def text_eos_id(self) -> int:
        """The tokenizer's EOS."""
        return self.tokenizer.eos_id

    @property
    def text_pad_id(self) -> int:
        """The id that fills batches of token ids."""
        return self.pad_id

    @property
    def audio_locator_tag_id(self) -> int:
        """The id of the audio locator token."""
        return self.audio_locator_id
