"""Tiny tokenizers of each family, trained here, and examples to prompt."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import sentencepiece
from lhotse import SupervisionSegment
from lhotse.cut import Cut
from lhotse.testing.dummies import dummy_cut
from nemo.collections.common.data.lhotse.text_adapters import SourceTargetTextExample, TextExample
from nemo.collections.common.tokenizers import AutoTokenizer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AddedToken,
    M2M100Tokenizer,
    MBart50Tokenizer,
    MBartTokenizer,
    NllbTokenizer,
    PreTrainedTokenizer,
    PreTrainedTokenizerFast,
)
from transformers.models.m2m_100.tokenization_m2m_100 import FAIRSEQ_LANGUAGE_CODES as M2M100_CODES
from transformers.models.mbart50.tokenization_mbart50 import FAIRSEQ_LANGUAGE_CODES as MBART50_CODES

LOCATOR = "<|audio|>"
TEXTS = [
    "one red house",
    "two blue cars",
    "ein rotes haus",
    "zwei blaue autos",
    "une maison rouge",
    "deux voitures bleues",
]
SPECIAL = ["<s>", "<pad>", "</s>", "<unk>"]


def train_pieces(prefix: Path) -> list[str]:
    """A SentencePiece model beside ``prefix``, and its pieces but for the special ones."""
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS * 3),
        model_prefix=str(prefix),
        vocab_size=60,
        model_type="bpe",
        minloglevel=2,
    )
    model = sentencepiece.SentencePieceProcessor(f"{prefix}.model")
    return [model.id_to_piece(i) for i in range(3, len(model))]


def m2m100_tokenizer(folder: Path) -> M2M100Tokenizer:
    """As in the published checkpoints, whose additional special tokens are the languages."""
    languages = [f"__{code}__" for code in M2M100_CODES["m2m100"]]
    return m2m100_bare_tokenizer(folder, additional_special_tokens=languages)


def m2m100_bare_tokenizer(folder: Path, **special_tokens: list[str]) -> M2M100Tokenizer:
    """Its languages are not in its vocabulary, so that the next token to be added takes the id of the first."""
    prefix = folder / "sentencepiece.bpe"
    vocabulary = {token: i for i, token in enumerate([*SPECIAL, *train_pieces(prefix)])}
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    return M2M100Tokenizer(str(folder / "vocab.json"), f"{prefix}.model", **special_tokens)


def nllb_tokenizer(folder: Path) -> NllbTokenizer:
    backend = Tokenizer(models.BPE(unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.train_from_iterator(TEXTS, trainers.BpeTrainer(vocab_size=80, special_tokens=SPECIAL, show_progress=False))
    model = json.loads(backend.to_str())["model"]
    return NllbTokenizer(vocab=model["vocab"], merges=[tuple(merge) for merge in model["merges"]])


def mbart_tokenizer(folder: Path) -> MBartTokenizer:
    return MBartTokenizer(vocab=scored_pieces(folder))


def mbart50_tokenizer(folder: Path) -> MBart50Tokenizer:
    return MBart50Tokenizer(vocab=[*scored_pieces(folder), *((code, 0.0) for code in MBART50_CODES), ("<mask>", 0.0)])


def scored_pieces(folder: Path) -> list[tuple[str, float]]:
    special = [(token, 0.0) for token in SPECIAL]
    return [*special, *((piece, -float(i)) for i, piece in enumerate(train_pieces(folder / "pieces")))]


def chat_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer with the markers of several chat formats as tokens, as Llama 3 and Qwen have them."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator(TEXTS, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<|begin_of_text|>",
        eos_token="<|eot_id|>",
        pad_token="<pad>",
        additional_special_tokens=["<|start_header_id|>", "<|end_header_id|>", "<|im_start|>", "<|im_end|>"],
    )


BUILDERS = {
    "m2m100": m2m100_tokenizer,
    "m2m100_bare": m2m100_bare_tokenizer,
    "nllb": nllb_tokenizer,
    "mbart": mbart_tokenizer,
    "mbart50": mbart50_tokenizer,
    "chat": chat_tokenizer,
}


@pytest.fixture(scope="session")
def tokenizers_of(tmp_path_factory) -> Callable[[str], tuple[PreTrainedTokenizer, AutoTokenizer]]:
    """``tokenizers_of(family)``: Hugging Face's own, and NeMo's around it with the audio locator, as a model has it."""
    made = {}

    def make(family: str) -> tuple[PreTrainedTokenizer, AutoTokenizer]:
        if family not in made:
            folder = tmp_path_factory.mktemp(family)
            original = BUILDERS[family](folder)
            original.save_pretrained(folder / "saved")
            of_nemo = AutoTokenizer(str(folder / "saved"), use_fast=True)
            locator = AddedToken(LOCATOR, special=True, normalized=False)
            of_nemo.tokenizer.add_tokens([locator], special_tokens=True)
            made[family] = original, of_nemo
        return made[family]

    return make


def make_pair(source_lang: str | None = "de", target_lang: str | None = "fr", **custom: str) -> SourceTargetTextExample:
    source, target = TextExample("ein rotes haus", source_lang), TextExample("une maison rouge", target_lang)
    return SourceTargetTextExample(source, target, custom={"id": "p", **custom})


def make_cut(text: str | None = "une maison rouge", **custom: str | None) -> Cut:
    cut = dummy_cut(0, supervisions=[SupervisionSegment("s", "r", 0, 1.0, text=text)] if text else [])
    cut.custom = {"audio_locator_tag": LOCATOR, **custom}
    return cut


@pytest.fixture
def pair() -> Callable[..., SourceTargetTextExample]:
    """``pair(source_lang, target_lang)``: "ein rotes haus" and "une maison rouge"."""
    return make_pair


@pytest.fixture
def cut() -> Callable[..., Cut]:
    """``cut(text, source_lang=..., target_lang=...)``: speech, its answer "une maison rouge"."""
    return make_cut
