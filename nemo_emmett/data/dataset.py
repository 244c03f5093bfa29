"""Collates examples into a dict of one-modality batches, so that text is not padded to the length of speech.

The keys and shapes of a batch are described in ``docs/architecture.md``.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from lhotse import CutSet
from lhotse.cut import Cut, MixedCut
from lhotse.dataset.collation import collate_vectors
from nemo.collections.common.data.lhotse.text_adapters import (
    Formattable,
    NeMoMultimodalConversation,
    SourceTargetTextExample,
    TextTurn,
)
from nemo.collections.speechlm2.data.utils import get_pad_id
from torch.nn.utils.rnn import pad_sequence

from nemo_emmett.audio_file import AudioFault
from nemo_emmett.data.io.audio import audio_path, audio_start, load_waveform
from nemo_emmett.data.io.skipped_records import SkippedRecords
from nemo_emmett.data.readers.examples import origin_of, packed_row
from nemo_emmett.errors import DataError
from nemo_emmett.prompts.transcripts import TRANSCRIPT_KEYS, transcript_ids


class SpeechTextDataset(torch.utils.data.Dataset):
    """Collates prompted examples of speech and text into ``{"audio": {...}, "text": {...}}``.

    A modality without examples is left out. Examples whose audio cannot be read are counted in ``skipped_records`` and
    left out; a batch without any other examples is an empty dict. Speech of sources with ``transcripts: true`` has the
    tokens of its transcripts as well.

    Args:
        tokenizer: NeMo tokenizer, for its pad id.

    Example:
        >>> batch = SpeechTextDataset(tokenizer)[cuts]
        >>> batch["text"]["context_ids"].shape
        torch.Size([32, 17])
    """

    def __init__(self, tokenizer: Any) -> None:
        self.pad_id = get_pad_id(tokenizer)
        self.skipped_records = SkippedRecords()
        self.has_transcripts = False  # every batch of speech has them; set by a loader, some of whose sources do

    def __getitem__(self, examples: CutSet) -> dict[str, dict]:
        """Collate the examples of one batch.

        Args:
            examples: lhotse cuts, text pairs and conversations, each with ``context_ids`` and ``answer_ids``.

        Raises:
            DataError: if an example was not prompted.
        """
        speech, text = [], []
        for example in examples:
            (speech if recordings_of(example) else text).append(example)
        batch = {}
        if speech and (audio := self._collate_speech(speech)):
            batch["audio"] = audio
        if text:
            batch["text"] = self._collate_tokens(text)
        return batch

    def _collate_speech(self, examples: Sequence[Cut | NeMoMultimodalConversation]) -> dict | None:
        readable, waveforms = [], []
        for example in examples:
            try:
                of_example = [load_waveform(cut) for cut in recordings_of(example)]
            except AudioFault as fault:
                note_audio_fault(self.skipped_records, example, fault)
                continue
            readable.append(example)
            waveforms += of_example
        if not readable:
            return None
        tokens = self._collate_tokens(readable)
        return {
            **tokens,
            **self._collate_transcripts(readable, tokens["examples"]),
            "audios": collate_vectors(waveforms, padding_value=0.0),
            "audio_lens": torch.tensor([len(waveform) for waveform in waveforms]),
        }

    def _collate_transcripts(
        self, examples: Sequence[Cut | NeMoMultimodalConversation], described: Sequence[dict]
    ) -> dict:
        """Nothing where no source of the dataset asks for transcripts."""
        rows = [transcript_ids(example) for example in examples]
        if not (self.has_transcripts or any(rows)):
            return {}
        nothing = dict.fromkeys(TRANSCRIPT_KEYS, torch.zeros(0, dtype=torch.int64))
        batch: dict[str, torch.Tensor] = {}
        for key in TRANSCRIPT_KEYS:
            ids = [(row or nothing)[key] for row in rows]
            batch[key] = pad_sequence(ids, batch_first=True, padding_value=self.pad_id)
            batch[key.replace("_ids", "_lens")] = torch.tensor(list(map(len, ids)))
        batch["is_transcription"] = torch.tensor(
            [
                isinstance(example, Cut) and one["source_lang"] == one["target_lang"]
                for example, one in zip(examples, described, strict=True)
            ]
        )
        return batch

    def _collate_tokens(self, examples: Sequence[Cut | Formattable]) -> dict:
        """The tokens of a batch, and its rows if the examples are packed."""
        contexts = [_tokens(example, "context_ids") for example in examples]
        answers = [_tokens(example, "answer_ids") for example in examples]
        return {
            "context_ids": self._pad(contexts),
            "context_lens": torch.tensor([len(context) for context in contexts]),
            "answer_ids": self._pad(answers),
            "answer_lens": torch.tensor([len(answer) for answer in answers]),
            "examples": [describe(example) for example in examples],
            **_collate_rows([packed_row(example) for example in examples], list(map(len, answers))),
        }

    def _pad(self, token_ids: Iterable[torch.Tensor]) -> torch.Tensor:
        return collate_vectors(token_ids, padding_value=self.pad_id).to(torch.int64)


def _collate_rows(rows: Sequence[tuple[int, int] | None], answer_lens: Sequence[int]) -> dict:
    """Rows without gaps, though of some all examples may have been left out; nothing if examples are not packed."""
    if None in rows:
        return {}
    row_B = torch.tensor([row for row, _ in rows]).unique_consecutive(return_inverse=True)[1]
    answers = torch.bincount(row_B, torch.tensor(answer_lens))
    sizes = (len(answers), max(size for _, size in rows), int(answers.max()))
    return {"packed_rows": row_B, "packed_sizes": sizes}


def recordings_of(example: Cut | Formattable) -> list[Cut]:
    """The cuts of an example, in the order of their locator tokens."""
    if isinstance(example, Cut):
        return [example]
    if isinstance(example, NeMoMultimodalConversation):
        return example.list_cuts()
    return []


def note_audio_fault(
    skipped_records: SkippedRecords, example: Cut | NeMoMultimodalConversation, fault: AudioFault
) -> None:
    """Count a skipped example, with the path of the audio file, which may be that of a noise."""
    source, place = origin_of(example)
    record = (source or "cuts", place)
    files = fault.path or ", ".join(filter(None, map(audio_path, recordings_of(example))))
    shown = f"{place} ({files})" if files else place
    skipped_records.add(record[0], shown, str(fault), record, example.id)


def _tokens(example: Cut | Formattable, key: str) -> torch.Tensor:
    holder = example._first_non_padding_cut if isinstance(example, MixedCut) else example
    ids = getattr(holder, key, None)
    if ids is None:
        raise DataError(
            f"example {origin_of(example)[1]} has no {key}: set prompt_format (for example emmett_t5) in the dataset's "
            "config, so that examples are prompted before they are batched."
        )
    return torch.as_tensor(ids)


def describe(example: Cut | Formattable) -> dict[str, str | None]:
    """The ``examples`` entry of a batch, which evaluation needs."""
    custom = getattr(example._first_non_padding_cut if isinstance(example, MixedCut) else example, "custom", None) or {}
    recordings = recordings_of(example)
    source_text = target_text = None
    if isinstance(example, Cut):
        target_text = example.supervisions[0].text if example.supervisions else None
        source_text = custom.get("source_text")
    elif isinstance(example, SourceTargetTextExample):
        source_text, target_text = example.source.text, example.target.text
    elif isinstance(example, NeMoMultimodalConversation):
        texts = [turn for turn in example.turns if isinstance(turn, TextTurn)]
        source_text = " ".join(turn.value for turn in texts if turn.role == "user") or None
        target_text = next((turn.value for turn in reversed(texts) if turn.role == "assistant"), None)
    return {
        "id": str(getattr(example, "id", None) or custom.get("id")),
        "modality": "audio" if recordings else "text",
        "source_lang": custom.get("source_lang"),
        "target_lang": custom.get("target_lang"),
        "source_text": source_text,
        "target_text": target_text,
        "audio_path": audio_path(recordings[0]) if len(recordings) == 1 else None,
        "audio_start": audio_start(recordings[0]) if len(recordings) == 1 else None,
    }
