"""Tokenizers for models that are trained from nothing."""

from __future__ import annotations

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from nemo_emmett.corpora.tokenizers import file_texts, manifest_texts, train_llama_tokenizer, train_t5_tokenizer
from nemo_emmett.errors import DataError
from nemo_emmett.prompts.instruction import translation_instruction

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


def test_t5s_tags_of_languages_are_those_of_its_prompts(tmp_path):
    languages = ["deu", "mdw", "fra_Latn"]
    tokenizer = AutoTokenizer.from_pretrained(
        train_t5_tokenizer(TEXTS * 4, tmp_path, vocab_size=60, languages=languages)
    )
    assert [tokenizer.tokenize(f"<{code}>") for code in ("de", "mdw", "fr")] == [["<de>"], ["<mdw>"], ["<fr>"]]


def test_no_more_tokens_than_asked(llama):
    assert len(llama) <= 120


def test_a_missing_text_file_is_named(tmp_path):
    with pytest.raises(DataError, match=r"train\.en' does not exist"):
        list(file_texts([tmp_path / "train.en"]))


def test_texts_are_read_without_empty_lines_and_byte_order_marks(tmp_path):
    (tmp_path / "a.en").write_bytes(b"\xef\xbb\xbfone red house\r\n\n  two blue cars\n")
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n\n{"text": "", "lang": "en"}\n')
    assert list(file_texts([tmp_path / "a.en"])) == ["one red house", "two blue cars"]
    assert list(manifest_texts([tmp_path / "a.jsonl"])) == ["one", ""]


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        (b'{"text": "gr\xfcn"}', r"a\.jsonl', line 3: not UTF-8 \(invalid start byte\); convert it with iconv"),
        (b'{"text": "one"', r"a\.jsonl', line 3: not JSON \(.*\); write the manifest again"),
        (b'{"audio_filepath": "a.wav"}', r"a\.jsonl', line 3: there is no 'text'; add it, or leave the line out"),
        (b'{"text": null}', r"a\.jsonl', line 3: there is no 'text'"),
        (b'["text"]', r"a\.jsonl', line 3: there is no 'text'"),
    ],
)
def test_a_line_that_is_no_record_with_a_text_is_named(line, sentence, tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "one"}\n\n' + line + b"\n")
    with pytest.raises(DataError, match=sentence):
        list(manifest_texts([tmp_path / "a.jsonl"]))


def test_a_text_file_that_is_not_utf_8_is_named(tmp_path):
    (tmp_path / "train.de").write_bytes("rot\ngrün\n".encode("latin-1"))
    with pytest.raises(DataError, match=r"train\.de', line 2: not UTF-8"):
        list(file_texts([tmp_path / "train.de"]))
