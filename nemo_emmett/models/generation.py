"""What a model does once it is trained: it answers prompts, and translates texts and recordings.

Shapes: B examples, T context tokens, A answer tokens, R recordings, N samples.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from nemo.collections.common.prompts import PromptFormatter
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from nemo_emmett.models.inputs import check_inputs, is_audio_path, load_recordings
from nemo_emmett.modules.batch import pack_left
from nemo_emmett.prompts.languages import check_language
from nemo_emmett.prompts.translation import register_prompt_formats, translation_turns


class Generation:
    """Generation and translation for :class:`~nemo_emmett.models.base.SpeechTextModel`, which brings the rest."""

    @torch.no_grad()
    def generate(
        self,
        prompts: Tensor | Sequence[Sequence[dict]],
        audios: Tensor | None = None,
        audio_lens: Tensor | None = None,
        **generate_options: Any,
    ) -> Tensor:
        """Answer prompts; the arguments are those of NeMo's ``SALM.generate``.

        Args:
            prompts: (B, T) context ids, padded on either side; or conversations, lists of turns such as
                ``{"role": "user", "slots": {...}, "audio": ["a.wav"]}``.
            audios: (R, N) float32 recordings in the order of the locators, unless the conversations name files.
            audio_lens: (R,) int64, samples.
            generate_options: passed on to Hugging Face ``generate``.

        Returns:
            (B, A) int64 generated ids.
        """
        if isinstance(prompts, Tensor):
            context_ids, context_lens = pack_left(prompts, prompts != self.pad_id, self.pad_id)
        else:
            formatter = self._prompt_formatter()
            contexts = [formatter.encode_dialog(turns=list(turns))["context_ids"] for turns in prompts]
            context_ids, context_lens = self._collate_contexts(contexts)
            if paths := [path for turns in prompts for turn in turns for path in _paths(turn.get("audio"))]:
                audios, audio_lens = load_recordings(paths, self.sampling_rate)
        batch = {"context_ids": context_ids.to(self.device), "context_lens": context_lens.to(self.device)}
        if audios is not None:
            batch |= {"audios": audios.to(self.device), "audio_lens": audio_lens.to(self.device)}
        generate_options.setdefault("max_new_tokens", self.options.max_new_tokens)
        with self._in_evaluation_mode():
            return self.generate_answers(batch, **generate_options)

    @contextmanager
    def _in_evaluation_mode(self) -> Iterator[None]:
        """Without dropout; every part gets its mode back."""
        modes = {module: module.training for module in self.modules()}
        self.eval()
        try:
            yield
        finally:
            for module, training in modes.items():
                module.training = training

    @torch.no_grad()
    def translate_batch(self, batch: Mapping, num_beams: int = 1, max_new_tokens: int | None = None) -> list[str]:
        """Translations of the contexts of a one-modality batch, B strings."""
        with self._in_evaluation_mode():
            answer_ids = self.generate_answers(
                batch,
                num_beams=num_beams,
                do_sample=False,
                max_new_tokens=max_new_tokens or self.options.max_new_tokens,
            )
        return [text.strip() for text in self.tokenizer.tokenizer.batch_decode(answer_ids, skip_special_tokens=True)]

    @torch.no_grad()
    def translate(
        self,
        inputs: Sequence[str | Path],
        target_lang: str,
        source_lang: str | None = None,
        num_beams: int = 1,
        batch_size: int = 16,
    ) -> list[str]:
        """Translate texts and recordings.

        Args:
            inputs: sentences, and paths of audio files (a ``Path``, or a string that ends like one).
            target_lang: language code of the translations.
            source_lang: language code of the inputs, for prompts that name it.
            num_beams: beams of the search; 1 is greedy.
            batch_size: inputs translated at once.

        Returns:
            One translation per input, in their order.

        Raises:
            ConfigError: for an unknown language.
            DataError: for an audio file that is missing or cannot be read.
        """
        check_language(target_lang, "target_lang")
        if source_lang is not None:
            check_language(source_lang, "source_lang")
        formatter = self._prompt_formatter()
        check_inputs(inputs)
        is_audio = [is_audio_path(item) for item in inputs]
        translations: list[str] = [""] * len(inputs)
        for modality in (True, False):
            indexes = [i for i, audio in enumerate(is_audio) if audio == modality]
            # Inputs of similar length share a batch.
            indexes.sort(key=lambda i: Path(inputs[i]).stat().st_size if modality else len(str(inputs[i])))
            for start in range(0, len(indexes), batch_size):
                chosen = indexes[start : start + batch_size]
                messages = [self.options.audio_locator_tag if modality else str(inputs[i]) for i in chosen]
                turns = [translation_turns(formatter, message, target_lang, source_lang) for message in messages]
                contexts = [formatter.encode_dialog(turns=turn)["context_ids"] for turn in turns]
                batch = dict(zip(("context_ids", "context_lens"), self._collate_contexts(contexts), strict=True))
                if modality:
                    audios, audio_lens = load_recordings([inputs[i] for i in chosen], self.sampling_rate)
                    batch |= {"audios": audios.to(self.device), "audio_lens": audio_lens.to(self.device)}
                for i, translation in zip(chosen, self.translate_batch(batch, num_beams), strict=True):
                    translations[i] = translation
        return translations

    def _prompt_formatter(self) -> PromptFormatter:
        register_prompt_formats()
        return PromptFormatter.resolve(self.options.prompt_format)(self.tokenizer)

    def _collate_contexts(self, contexts: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        lens = torch.tensor([len(ids) for ids in contexts])
        ids = pad_sequence(list(contexts), batch_first=True, padding_value=self.pad_id)
        return ids.to(self.device), lens.to(self.device)


def _paths(audio: str | Path | Sequence | None) -> Sequence:
    if audio is None:
        return []
    return [audio] if isinstance(audio, (str, Path)) else audio
