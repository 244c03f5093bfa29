"""Tiny tokenizers of each family, and examples to prompt."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from lhotse import SupervisionSegment
from lhotse.cut import Cut
from lhotse.testing.dummies import dummy_cut
from nemo.collections.common.data.lhotse.text_adapters import SourceTargetTextExample, TextExample
from nemo.collections.common.tokenizers import AutoTokenizer
from transformers import AddedToken, PreTrainedTokenizer

from .tiny_tokenizers import BUILDERS

LOCATOR = "<|audio|>"


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
