"""Batches that the benchmarks make on the spot: random tokens, and noise as speech."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

SAMPLING_RATE = 16_000
PROMPT_TOKENS = 12
_FIRST_ID, _END_ID = 10, 50  # within the tokenizer of measuring.models, between its special tokens


@dataclass(frozen=True)
class Speech:
    """How long the examples of a speech batch are; spread evenly from the shortest to the longest.

    Args:
        examples: B.
        seconds: of the shortest and the longest recording.
        answer_tokens: of the shortest and the longest answer.
    """

    examples: int
    seconds: tuple[float, float]
    answer_tokens: tuple[int, int]

    def seconds_B(self) -> list[float]:
        """Seconds of each recording."""
        return _spread(*self.seconds, self.examples)

    def answer_tokens_B(self) -> list[int]:
        """Tokens of each answer."""
        return [round(tokens) for tokens in _spread(*self.answer_tokens, self.examples)]


def speech_batch(model: Any, speech: Speech) -> dict[str, Tensor]:
    """One recording in the middle of each prompt, in our form.

    Args:
        model: one of ours.
        speech: how long the examples are.
    """
    import torch

    batch = _text(_spread(PROMPT_TOKENS + 1, PROMPT_TOKENS + 1, speech.examples), speech.answer_tokens_B())
    batch["context_ids"][:, PROMPT_TOKENS // 2] = model.audio_locator_id
    recordings = [0.1 * torch.randn(round(seconds * SAMPLING_RATE)) for seconds in speech.seconds_B()]
    batch["audios"] = torch.nn.utils.rnn.pad_sequence(recordings, True)
    batch["audio_lens"] = torch.tensor(list(map(len, recordings)))
    return batch


def text_batch(examples: int, tokens: tuple[int, int]) -> dict[str, Tensor]:
    """Sentences of so many tokens, the shortest and the longest, and their translations of as many."""
    lens = _spread(*tokens, examples)
    return _text([PROMPT_TOKENS + length for length in lens], lens)


def text_and_speech(
    context_lens: list[int], answer_lens: list[int], samples: list[int] | None = None, locator_id: int | None = None
) -> dict[str, Tensor]:
    """Examples of these lengths in tokens, with a recording of so many samples each in place of a locator."""
    import torch

    batch = _text(context_lens, answer_lens)
    if samples is not None:
        batch["context_ids"][:, PROMPT_TOKENS // 2] = locator_id
        recordings = [0.1 * torch.randn(number) for number in samples]
        batch["audios"] = torch.nn.utils.rnn.pad_sequence(recordings, True)
        batch["audio_lens"] = torch.tensor(samples)
    return batch


def as_nemo(batch: Mapping[str, Tensor], nemo: Any) -> dict[str, Tensor]:
    """A batch in our form as NeMo's SALM takes it: contexts with their answers behind them, padded on the left.

    Args:
        batch: of speech.
        nemo: NeMo's SALM.
    """
    import torch
    from torch.nn.utils.rnn import pad_sequence

    contexts, answers = (
        [row[:length] for row, length in zip(batch[f"{name}_ids"], batch[f"{name}_lens"].tolist(), strict=True)]
        for name in ("context", "answer")
    )
    rows = [torch.cat(parts) for parts in zip(contexts, answers, strict=True)]
    masks = [torch.arange(len(row)) >= len(context) for row, context in zip(rows, contexts, strict=True)]
    return {
        "input_ids": pad_sequence(rows, True, nemo.text_pad_id, padding_side="left"),
        "loss_mask": pad_sequence(masks, True, False, padding_side="left"),
        "audios": batch["audios"],
        "audio_lens": batch["audio_lens"],
    }


def tensors_of(batch: Mapping[str, Any]) -> Iterator[Tensor]:
    """All tensors of a batch, of one modality or of several."""
    for value in batch.values():
        if isinstance(value, Mapping):
            yield from tensors_of(value)
        elif not isinstance(value, tuple):  # sizes
            yield value


def _text(context_lens: list[float], answer_lens: list[float]) -> dict[str, Tensor]:
    import torch

    torch.manual_seed(0)
    batch = {}
    for name, lens in (("context", context_lens), ("answer", answer_lens)):
        lens_B = torch.tensor([round(length) for length in lens])
        ids_BT = torch.randint(_FIRST_ID, _END_ID, (len(lens_B), int(lens_B.max())))
        is_padding_BT = torch.arange(ids_BT.shape[1]) >= lens_B[:, None]
        batch |= {f"{name}_ids": ids_BT.masked_fill(is_padding_BT, 0), f"{name}_lens": lens_B}
    return batch


def _spread(least: float, most: float, examples: int) -> list[float]:
    return [least + (most - least) * i / max(1, examples - 1) for i in range(examples)]
