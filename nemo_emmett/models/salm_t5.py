"""SALM-T5: a speech encoder in front of a pretrained encoder-decoder.

Speech is encoded to embeddings of the language model's width and stands in the text encoder's input where the prompt
has its audio locator token, so that speech and text translation differ in nothing but the input's origin
(EMMeTT, arXiv 2409.13523, section 3.1). The decoder is the language model's own.

Shapes: B examples, T context tokens, S encoder positions, A answer tokens, V vocabulary, H hidden size.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor
from transformers import AutoModelForSeq2SeqLM, PreTrainedModel

from nemo_emmett.models.base import SpeechTextModel
from nemo_emmett.modules.batch import length_mask
from nemo_emmett.modules.loss import mask_padding


class SALMT5(SpeechTextModel):
    """Speech and text translation by one encoder-decoder (T5, mT5/UMT5 and their kin).

    Args:
        cfg: the ``model`` section of a recipe; :class:`~nemo_emmett.models.base.ModelConfig` lists its keys.

    Raises:
        ModelError: if ``pretrained_llm`` is not an encoder-decoder, or a pretrained part cannot be found.
        ConfigError: for a misspelt key.
    """

    auto_class = AutoModelForSeq2SeqLM
    is_encoder_decoder = True

    def encoder_inputs(self, batch: Mapping) -> tuple[Tensor, Tensor]:
        """What the text encoder reads: (B, S, H) embeddings and their (B, S) bool mask, right-padded."""
        if batch.get("audios") is not None:
            return self.embed_with_audio(
                batch["context_ids"], batch["context_lens"], batch["audios"], batch["audio_lens"]
            )
        context_ids_BT = batch["context_ids"]
        mask_BT = length_mask(batch["context_lens"], context_ids_BT.shape[1])
        return self.llm.get_input_embeddings()(context_ids_BT), mask_BT

    def forward(self, batch: Mapping) -> tuple[Tensor, Tensor]:
        """Predict the answers of a one-modality batch.

        Args:
            batch: see docs/architecture.md, "The batch".

        Returns:
            (B, A, V) logits and (B, A) targets, which are ``IGNORE_INDEX`` on padding.
        """
        embeds_BSH, mask_BS = self.encoder_inputs(batch)
        answer_ids_BA = batch["answer_ids"]
        targets_BA = mask_padding(answer_ids_BA, length_mask(batch["answer_lens"], answer_ids_BA.shape[1]))
        logits_BAV = self.llm(
            inputs_embeds=embeds_BSH,
            attention_mask=mask_BS,
            decoder_input_ids=self.llm.prepare_decoder_input_ids_from_labels(targets_BA),
            use_cache=False,
        ).logits
        return logits_BAV, targets_BA

    def generate_answers(self, batch: Mapping, **generate_options) -> Tensor:
        """(B, A) ids that Hugging Face ``generate`` gives for the contexts of a one-modality batch."""
        embeds_BSH, mask_BS = self.encoder_inputs(batch)
        llm: PreTrainedModel = self.llm
        return llm.generate(inputs_embeds=embeds_BSH, attention_mask=mask_BS, **generate_options)
