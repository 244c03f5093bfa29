"""Tokenizers for models that are trained from nothing."""

from __future__ import annotations

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from nemo_emmett.corpora.tokenizers import file_texts, train_llama_tokenizer
from nemo_emmett.errors import DataError
from nemo_emmett.prompts.translation import translation_instruction

TEXTS = ("one red house", "two blue cars", "ein rotes haus", "zwei blaue autos")


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> PreTrainedTokenizerBase:
    folder = train_llama_tokenizer(TEXTS * 4, tmp_path_factory.mktemp("llama"), vocab_size=120, languages=["en", "de"])
    return AutoTokenizer.from_pretrained(folder)


def test_llamas_special_tokens_have_llamas_ids_and_can_be_written_out(llama):
    assert (llama.unk_token_id, llama.bos_token_id, llama.eos_token_id) == (0, 1, 2)
    assert llama.encode("<s>[INST]", add_special_tokens=False) == [1, llama.convert_tokens_to_ids("[INST]")]
    assert llama.pad_token_id not in (0, 1, 2)


@pytest.mark.parametrize(("target", "source"), [("de", "en"), ("en", "de")])
def test_each_word_of_an_instruction_is_one_token(llama, target, source):
    instruction = translation_instruction(target, source)
    pieces = llama.tokenize(f"[INST] {instruction} two blue cars [/INST]")
    assert pieces[:6] == ["[INST]", *(f"▁{word}" for word in instruction.split())]
    assert pieces[-1] == "[/INST]"


def test_texts_come_back_from_their_ids(llama):
    for text in TEXTS:
        assert llama.decode(llama.encode(text, add_special_tokens=False)) == text


def test_no_more_tokens_than_asked(llama):
    assert len(llama) <= 120


def test_a_missing_text_file_is_named(tmp_path):
    with pytest.raises(DataError, match=r"train\.en' does not exist"):
        list(file_texts([tmp_path / "train.en"]))
