"""SALM-T5: a speech encoder in front of a pretrained encoder-decoder.

Speech is encoded to embeddings of the language model's width, which replace the audio locator token in the text
encoder's input, so that speech and text translation differ in the input's origin only (EMMeTT, arXiv 2409.13523,
section 3.1). The decoder is the language model's own.

The prompt format (:class:`~nemo_emmett.prompts.seq2seq.Seq2SeqPrompt`) defines how a family names languages: in the
context, in the answer, and in the tokens with which the decoder starts generation.

Shapes: B examples, L rows into which they may be packed, T context tokens, S encoder positions, A answer tokens, D
tokens that begin the decoder, H hidden size.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForSeq2SeqLM

from nemo_emmett.errors import DataError
from nemo_emmett.models.base import SpeechTextModel
from nemo_emmett.models.checkpoint import shared_names
from nemo_emmett.models.head import LLMInputs
from nemo_emmett.models.packed_inputs import packed_seq2seq
from nemo_emmett.modules.batch import length_mask, speech_rows
from nemo_emmett.modules.gated_lora import gated
from nemo_emmett.modules.loss import mask_padding
from nemo_emmett.modules.packing import Rows
from nemo_emmett.modules.placement import Placed
from nemo_emmett.prompts.seq2seq import Seq2SeqPrompt


class SALMT5(SpeechTextModel):
    """Speech and text translation by one encoder-decoder (T5, mT5, UMT5, UL2, M2M100, NLLB, mBART, mBART-50).

    Args:
        cfg: the ``model`` section of a recipe; :class:`~nemo_emmett.models.config.ModelConfig` lists its keys.

    Raises:
        ModelError: if ``pretrained_llm`` is not an encoder-decoder, or a pretrained part cannot be found.
        ConfigError: for a misspelt key.
    """

    auto_class = AutoModelForSeq2SeqLM
    is_encoder_decoder = True

    def _post_init_llm(self) -> None:
        self.register_load_state_dict_pre_hook(_untie_output_layer)

    @property
    def token_embedding(self) -> nn.Module:
        """The table that encoder and decoder share."""
        return self.llm.get_input_embeddings()

    def llm_inputs(self, batch: Mapping) -> LLMInputs:
        """The context for the encoder, and the answer for the decoder."""
        answer_ids_BA, answer_lens_B = batch["answer_ids"], batch["answer_lens"]
        is_answer_BA = length_mask(answer_lens_B, answer_ids_BA.shape[1])
        # The decoder has no embedding for a locator, nor a logit.
        locators = (is_answer_BA & (answer_ids_BA == self.audio_locator_id)).sum()
        rows = Rows.of_batch(batch)
        options = {"locators_elsewhere": locators, "targets_elsewhere": is_answer_BA.sum(), "rows": rows}
        placed = self.encoder_inputs(batch, **options)
        decoder_ids_BA = self.decoder_inputs(answer_ids_BA, answer_lens_B)
        targets_BA, speech_L = mask_padding(answer_ids_BA, is_answer_BA), speech_rows(batch, self.audio_locator_id)
        if rows is None:
            masks = {"attention_mask": placed.mask_LS}
            kwargs = {"inputs_embeds": placed.embeds_LSH, **masks, "decoder_input_ids": decoder_ids_BA}
            return LLMInputs(kwargs, targets_BA, None, speech_L, placed.num_targets)
        target = rows.answer_layout(answer_lens_B)
        masks, around = packed_seq2seq(self.llm, placed.layout, target)
        decoder_ids_LA = target.pack(decoder_ids_BA, self.pad_id)
        kwargs = {"inputs_embeds": placed.embeds_LSH, **masks, "decoder_input_ids": decoder_ids_LA}
        positions_BA = target.positions(targets_BA.shape[1])
        return LLMInputs(kwargs, targets_BA, positions_BA, speech_L, placed.num_targets, rows.row_B, around)

    def encoder_inputs(self, batch: Mapping, **options: Any) -> Placed:
        """The text encoder's input, padded on the right, since some families count positions from the left.

        Args:
            batch: one-modality batch.
            options: of :func:`~nemo_emmett.modules.placement.merge_audio_embeddings`.

        Raises:
            DataError: if an example is longer than the language model has positions for.
        """
        context_ids_BT = batch["context_ids"]
        is_context_BT = length_mask(batch["context_lens"], context_ids_BT.shape[1])
        placed = self.place(batch, context_ids_BT, is_context_BT, **options)
        config, S = self.llm.config, placed.embeds_LSH.shape[1]
        # mBART has a learned embedding for each position, and so a greatest length, also of a row.
        if config.model_type == "mbart" and config.max_position_embeddings < S:
            what = "an example" if placed.layout is None else "a packed row"
            raise DataError(
                f"{what} is {S} tokens long, speech included, but the language model reads at most "
                f"{config.max_position_embeddings}; lower the longest duration or number of tokens in the dataset's "
                "config, or choose a modality adapter that shortens speech."
            )
        return placed

    def decoder_inputs(self, answer_ids_BA: Tensor, answer_lens_B: Tensor) -> Tensor:
        """(B, A) ids that the decoder reads to predict the answers: these, one position later, as the Hugging Face
        model makes them of its ``labels``."""
        if self.llm.config.model_type == "mbart":  # no start token: the answer's last token is taken for it
            first_B1 = answer_ids_BA.gather(1, (answer_lens_B[:, None] - 1).clamp(min=0))
        else:
            first_B1 = torch.full_like(answer_ids_BA[:, :1], self.llm.config.decoder_start_token_id)
        return torch.cat([first_B1, answer_ids_BA[:, :-1]], 1)

    def generate_answers(self, batch: Mapping, **generate_options: Any) -> Tensor:
        """Answer the contexts of a one-modality batch.

        Args:
            batch: its ``examples`` hold the target languages, where the family needs them.
            generate_options: of Hugging Face ``generate``; the caller's own ``decoder_input_ids`` (B, D),
                ``decoder_start_token_id`` or ``forced_bos_token_id`` replace those of the target languages.

        Returns:
            (B, A) generated ids, without those that the decoder started with.

        Raises:
            ConfigError: if the target language is needed and not known, or not the model's.
        """
        placed = self.encoder_inputs(batch)
        start_BD = self._decoder_start(batch, generate_options)
        own = {"decoder_input_ids": start_BD, "decoder_start_token_id": start_BD[:, 0].tolist()}
        with gated(self.llm, speech_rows(batch, self.audio_locator_id)):
            ids = self.search_answers(
                {"inputs_embeds": placed.embeds_LSH, "attention_mask": placed.mask_LS.long()}, generate_options | own
            )
        return ids[:, start_BD.shape[1] :]

    def _decoder_start(self, batch: Mapping, options: Mapping[str, Any]) -> Tensor:
        """(B, D) ids that the decoder reads before it generates."""
        if options.get("decoder_input_ids") is not None:
            return options["decoder_input_ids"].to(self.device)
        B = len(batch["context_ids"])
        start, forced = options.get("decoder_start_token_id"), options.get("forced_bos_token_id")
        prompt = self._prompt_formatter()
        own_start = self.llm.config.decoder_start_token_id
        if start is not None or forced is not None:
            begun = [[own_start if start is None else start] + ([] if forced is None else [forced])] * B
        elif isinstance(prompt, Seq2SeqPrompt):
            languages = [example.get("target_lang") for example in batch.get("examples") or [{}] * B]
            begun = [prompt.decoder_start(language) or [own_start] for language in languages]
        else:
            begun = [[own_start]] * B
        return torch.tensor(begun, device=self.device)


def _untie_output_layer(model: SALMT5, weights: Mapping[str, Tensor], *_: Any) -> None:
    """Give the output layer weights of its own before such are loaded into it.

    T5 1.1, mT5, UMT5 and UL2 have them, but transformers ties them until it loads the published weights, which it does
    not for a model that is built from its config alone.
    """
    for names in shared_names(model):
        # peft puts the layer that it adapts, or copies, one level deeper.
        heads = [name for name in names if ".lm_head." in f".{name}" and name in weights]
        others = [weights[name] for name in names if name in weights and name not in heads]
        for name in heads:
            if any(not torch.equal(weights[name], other) for other in others):
                layer = model.get_submodule(name.rpartition(".")[0])
                layer.weight = nn.Parameter(layer.weight.detach().clone())
