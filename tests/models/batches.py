"""Batches made by hand, without the data pipeline."""

from __future__ import annotations

import torch
from torch.nn.utils.rnn import pad_sequence

from nemo_emmett.prompts.families import prompt_formatter
from nemo_emmett.prompts.instruction import translation_turns
from nemo_emmett.prompts.seq2seq import Seq2SeqPrompt


def encode(model, text: str) -> list[int]:
    return [*model.tokenizer.text_to_ids(text), model.tokenizer.eos_id]


def padded(rows: list[list[int]], pad_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    ids = pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=pad_id)
    return ids, torch.tensor([len(row) for row in rows])


def text_batch(model, pairs: list[tuple[str, str]], target_lang: str = "de", source_lang: str = "en") -> dict:
    contexts = [encode(model, f"<{target_lang}> {source}") for source, _ in pairs]
    batch = dict(zip(("context_ids", "context_lens"), padded(contexts, model.pad_id), strict=True))
    answers = padded([encode(model, target) for _, target in pairs], model.pad_id)
    examples = [
        {"id": str(i), "source_lang": source_lang, "target_lang": target_lang, "target_text": target}
        for i, (_, target) in enumerate(pairs)
    ]
    return batch | dict(zip(("answer_ids", "answer_lens"), answers, strict=True)) | {"examples": examples}


def audio_batch(model, seconds_and_targets: list[tuple[float, str]], seed: int = 0, **languages: str) -> dict:
    locator = model.options.audio_locator_tag
    batch = text_batch(model, [(locator, target) for _, target in seconds_and_targets], **languages)
    lens = torch.tensor([round(seconds * model.sampling_rate) for seconds, _ in seconds_and_targets])
    noise = torch.randn(len(lens), int(lens.max()), generator=torch.Generator().manual_seed(seed)) * 0.1
    noise[torch.arange(noise.shape[1])[None, :] >= lens[:, None]] = 0.0
    return batch | {"audios": noise, "audio_lens": lens}


def prompted_batch(
    model, messages: list[str], answers: list[str], source_lang: str = "en", target_lang: str = "de"
) -> dict:
    """Messages and answers as the model's own prompt format writes them."""
    formatter = prompt_formatter(model.options.prompt_format, model.tokenizer)
    encoded = [
        formatter.encode_dialog(
            [
                *translation_turns(formatter, message, target_lang, source_lang),
                {"role": "assistant", "slots": _answer_slots(formatter, answer, target_lang)},
            ]
        )
        for message, answer in zip(messages, answers, strict=True)
    ]
    batch = {}
    for part in ("context", "answer"):
        rows = [example[f"{part}_ids"].tolist() for example in encoded]
        batch[f"{part}_ids"], batch[f"{part}_lens"] = padded(rows, model.pad_id)
    batch["examples"] = [
        {"id": str(i), "source_lang": source_lang, "target_lang": target_lang, "target_text": answer}
        for i, answer in enumerate(answers)
    ]
    return batch


def with_recordings(model, batch: dict, seconds: list[float], seed: int = 0) -> dict:
    """The batch with a recording of noise for each locator in it."""
    lens = torch.tensor([round(s * model.sampling_rate) for s in seconds])
    noise = torch.randn(len(lens), int(lens.max()), generator=torch.Generator().manual_seed(seed)) * 0.1
    noise[torch.arange(noise.shape[1])[None, :] >= lens[:, None]] = 0.0
    return batch | {"audios": noise, "audio_lens": lens}


def packed(batch: dict, of_examples: list[int]) -> dict:
    """A one-modality batch with its examples in these rows, which may hold much more than they do."""
    rows_B, number = torch.tensor(of_examples), max(of_examples) + 1
    answers = batch["answer_lens"].new_zeros(number).index_add(0, rows_B, batch["answer_lens"])
    return batch | {"packed_rows": rows_B, "packed_sizes": (number, 1000, int(answers.max()))}


def rows(batch: dict, chosen: list[int]) -> dict:
    """Some rows of a batch whose examples have one recording each, or none."""
    return {
        key: [value[i] for i in chosen] if isinstance(value, list) else value[chosen] for key, value in batch.items()
    }


def _answer_slots(formatter, answer: str, target_lang: str) -> dict:
    slots = {"message": answer, "target_lang": target_lang}
    return {name: value for name, value in slots.items() if name == "message" or isinstance(formatter, Seq2SeqPrompt)}
