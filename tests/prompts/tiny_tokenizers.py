"""Tiny tokenizers of each family, trained here on a few sentences, with the special tokens of the published ones."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import sentencepiece
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    M2M100Tokenizer,
    MBart50Tokenizer,
    MBartTokenizer,
    NllbTokenizer,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)
from transformers.models.m2m_100.tokenization_m2m_100 import FAIRSEQ_LANGUAGE_CODES as M2M100_CODES
from transformers.models.mbart50.tokenization_mbart50 import FAIRSEQ_LANGUAGE_CODES as MBART50_CODES

TEXTS = (
    "one red house",
    "two blue cars",
    "ein rotes haus",
    "zwei blaue autos",
    "une maison rouge",
    "deux voitures bleues",
)
SPECIAL = ["<s>", "<pad>", "</s>", "<unk>"]


def train_pieces(prefix: Path, texts: Sequence[str], vocab_size: int) -> list[str]:
    """A SentencePiece model next to ``prefix``, and its pieces but for the special ones."""
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(list(texts) * 3),
        model_prefix=str(prefix),
        vocab_size=vocab_size,
        hard_vocab_limit=False,
        model_type="bpe",
        num_threads=1,
        minloglevel=2,
    )
    model = sentencepiece.SentencePieceProcessor(f"{prefix}.model")
    return [model.id_to_piece(i) for i in range(3, len(model))]


def m2m100_tokenizer(folder: Path, texts: Sequence[str] = TEXTS, vocab_size: int = 60) -> M2M100Tokenizer:
    """As in the published checkpoints, whose additional special tokens are the languages."""
    languages = [f"__{code}__" for code in M2M100_CODES["m2m100"]]
    return m2m100_bare_tokenizer(folder, texts, vocab_size, additional_special_tokens=languages)


def m2m100_bare_tokenizer(
    folder: Path, texts: Sequence[str] = TEXTS, vocab_size: int = 60, **special_tokens: list[str]
) -> M2M100Tokenizer:
    """Its languages are not in its vocabulary, so that the next token to be added takes the id of the first."""
    prefix = folder / "sentencepiece.bpe"
    vocabulary = {token: i for i, token in enumerate([*SPECIAL, *train_pieces(prefix, texts, vocab_size)])}
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    return M2M100Tokenizer(str(folder / "vocab.json"), f"{prefix}.model", **special_tokens)


def nllb_tokenizer(folder: Path, texts: Sequence[str] = TEXTS, vocab_size: int = 80) -> NllbTokenizer:
    """A BPE as NLLB's; ``folder`` stays empty."""
    backend = Tokenizer(models.BPE(unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=SPECIAL, show_progress=False)
    backend.train_from_iterator(texts, trainer)
    model = json.loads(backend.to_str())["model"]
    return NllbTokenizer(vocab=model["vocab"], merges=[tuple(merge) for merge in model["merges"]])


def mbart_tokenizer(folder: Path, texts: Sequence[str] = TEXTS, vocab_size: int = 60) -> MBartTokenizer:
    """Of 25 languages."""
    return MBartTokenizer(vocab=scored_pieces(folder, texts, vocab_size))


def mbart50_tokenizer(folder: Path, texts: Sequence[str] = TEXTS, vocab_size: int = 60) -> MBart50Tokenizer:
    """Of 50 languages."""
    languages = [(code, 0.0) for code in MBART50_CODES]
    return MBart50Tokenizer(vocab=[*scored_pieces(folder, texts, vocab_size), *languages, ("<mask>", 0.0)])


def scored_pieces(folder: Path, texts: Sequence[str], vocab_size: int) -> list[tuple[str, float]]:
    """Pieces of a unigram model; those found first score highest."""
    pieces = train_pieces(folder / "pieces", texts, vocab_size)
    return [*((token, 0.0) for token in SPECIAL), *((piece, -float(i)) for i, piece in enumerate(pieces))]


def t5_tokenizer(folder: Path, texts: Sequence[str] = TEXTS, vocab_size: int = 120) -> PreTrainedTokenizerBase:
    """T5's special tokens, and a tag for each of two languages."""
    from nemo_emmett.corpora.tokenizers import train_t5_tokenizer

    train_t5_tokenizer(texts, folder, vocab_size, languages=("en", "de"))
    return PreTrainedTokenizerFast.from_pretrained(folder)


def chat_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer with the markers of several chat formats as tokens, as Llama 3 and Qwen have them."""
    markers = ["<|start_header_id|>", "<|end_header_id|>", "<|im_start|>", "<|im_end|>"]
    special = {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>", "pad_token": "<pad>"}
    return byte_level_tokenizer(markers, special)


def byte_level_tokenizer(
    markers: Sequence[str], special: dict[str, str], texts: Sequence[str] = TEXTS, vocab_size: int = 300
) -> PreTrainedTokenizerFast:
    """Every text can be written in it; the markers of turns and the special tokens are one token each."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, additional_special_tokens=list(markers), **special)


BUILDERS: dict[str, Callable[[Path], PreTrainedTokenizerBase]] = {
    "m2m100": m2m100_tokenizer,
    "m2m100_bare": m2m100_bare_tokenizer,
    "nllb": nllb_tokenizer,
    "mbart": mbart_tokenizer,
    "mbart50": mbart50_tokenizer,
    "chat": chat_tokenizer,
}
