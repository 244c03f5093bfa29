"""Examples prompted together get what each of them gets alone, from any tokenizer."""

from __future__ import annotations

import copy

import pytest
from lhotse.cut import Cut
from lhotse.testing.dummies import dummy_cut
from nemo.collections.common.data.lhotse.dataloader import tokenize_with_prompt
from nemo.collections.common.data.lhotse.text_adapters import (
    AudioTurn,
    NeMoMultimodalConversation,
    TextExample,
    TextTurn,
)
from nemo.collections.common.prompts import PromptFormatter
from nemo.collections.common.tokenizers import AutoTokenizer, SentencePieceTokenizer

from nemo_emmett.corpora.tokenizers import train_sentencepiece
from nemo_emmett.errors import DataError
from nemo_emmett.prompts.encoding import encode_texts
from nemo_emmett.prompts.formatting import format_many
from nemo_emmett.prompts.translation import register_prompt_formats

register_prompt_formats()
KEYS = ("input_ids", "context_ids", "answer_ids", "mask")
TEXTS = ["", " ", "ein rotes haus", "  two  blue cars ", "<de> straße ☃", "</s> <|audio|> x", "a" * 300]


@pytest.fixture
def examples(pair, cut) -> list:
    talk = NeMoMultimodalConversation(
        "talk",
        [TextTurn("say:", "user"), AudioTurn(cut(), "user", "<|audio|>"), TextTurn("zwei autos", "assistant")],
        custom={"target_lang": "de"},
    )
    noisy = cut("deux voitures", source_lang="de", target_lang="fr").mix(dummy_cut(1), snr=10)
    return [
        pair("de", "fr"),
        pair(None, "de"),
        cut(source_lang="de", target_lang="fr"),
        cut(None, target_lang="es"),
        noisy,
        talk,
    ]


def prompted(example) -> dict:
    holder = example._first_non_padding_cut if hasattr(example, "tracks") else example
    values = {key: getattr(holder, key, None) for key in KEYS}
    return {key: (value.dtype, value.tolist()) for key, value in values.items() if value is not None}


@pytest.mark.parametrize(
    ("name", "family"),
    [
        ("emmett_t5", "nllb"),
        ("emmett_m2m100", "m2m100"),
        ("emmett_nllb", "nllb"),
        ("emmett_mbart", "mbart"),
        ("emmett_mbart50", "mbart50"),
        ("emmett_llama3", "chat"),
    ],
)
def test_together_as_one_by_one(tokenizers_of, examples, name, family) -> None:
    tokenizer = tokenizers_of(family)[1]
    alone = [prompted(tokenize_with_prompt(copy.deepcopy(example), tokenizer, name)) for example in examples]
    assert format_many(examples, PromptFormatter.resolve(name)(tokenizer)) is None
    assert [prompted(example) for example in examples] == alone
    assert [("answer_ids" in each, "mask" in each) for each in alone] == [(i != 3, i != 3) for i in range(6)]


def test_t5_is_what_nemo_makes_of_its_template(tokenizers_of, pair) -> None:
    """NeMo's own code, which fills the template and has the whole turn tokenised, is the independent path."""
    prompt = PromptFormatter.resolve("emmett_t5")(tokenizers_of("nllb")[1])
    turns = [
        {"role": "user", "slots": {"target_lang": "fr", "message": "ein rotes haus"}},
        {"role": "assistant", "slots": {"message": "une maison rouge"}},
    ]
    expected = {key: value.tolist() for key, value in PromptFormatter.encode_dialog(prompt, turns).items()}
    example = pair("de", "fr")
    format_many([example], prompt)
    assert {key: getattr(example, key).tolist() for key in KEYS} == expected
    assert {key: value.tolist() for key, value in prompt.encode_dialog(turns).items()} == expected


def test_examples_that_are_no_translations_are_left_to_nemo(tokenizers_of, pair) -> None:
    prompt = PromptFormatter.resolve("emmett_t5")(tokenizers_of("nllb")[1])
    mixed = [pair("de", "fr"), TextExample("une maison rouge", "fr")]
    format_many(mixed, prompt)
    answer = mixed[0].answer_ids.tolist()
    assert mixed[1].answer_ids.tolist() == answer
    assert mixed[1].context_ids.tolist() == []


def test_one_that_cannot_be_prompted_is_named_and_none_is_changed(tokenizers_of, pair, cut) -> None:
    prompt = PromptFormatter.resolve("emmett_nllb")(tokenizers_of("nllb")[1])
    examples = [pair("de", "fr"), cut(source_lang="de")]
    with pytest.raises(DataError, match=f"example {examples[1].id}: its target language is not known"):
        format_many(examples, prompt)
    assert prompted(examples[0]) == {}


def test_speech_without_a_locator_is_refused(tokenizers_of, cut) -> None:
    example: Cut = cut(target_lang="fr", audio_locator_tag=None)
    with pytest.raises(DataError, match="there is no token to mark the place of its audio; set audio_locator_tag"):
        format_many([example], PromptFormatter.resolve("emmett_nllb")(tokenizers_of("nllb")[1]))


def test_what_is_mixed_into_speech_does_not_change_its_prompt(tokenizers_of, cut) -> None:
    clean, babble = cut(source_lang="de", target_lang="fr"), cut("nein", source_lang="fr", target_lang="de")
    noisy = copy.deepcopy(clean).mix(babble, snr=10)
    format_many([clean, noisy], PromptFormatter.resolve("emmett_nllb")(tokenizers_of("nllb")[1]))
    assert prompted(noisy) == prompted(clean) != {}


@pytest.mark.parametrize("family", ["m2m100", "nllb", "mbart", "mbart50", "chat"])
@pytest.mark.parametrize("repeated", [1, 3])
def test_texts_are_encoded_as_the_tokenizer_does_it(tokenizers_of, family, repeated) -> None:
    tokenizer = tokenizers_of(family)[1]
    texts = TEXTS * repeated  # few are encoded one by one, many in a batch
    expected = [tokenizer.text_to_ids(text) for text in texts]
    if family in ("nllb", "mbart"):
        # What a call with padding and truncation leaves behind must not show.
        tokenizer.tokenizer(["a", "one two"], padding=True, truncation=True, max_length=3)
        assert tokenizer.tokenizer.backend_tokenizer.truncation is not None
    assert encode_texts(tokenizer, texts) == expected


def test_a_tokenizer_that_adds_special_tokens_is_asked_itself(tokenizers_of, tmp_path) -> None:
    tokenizers_of("mbart50")[0].save_pretrained(tmp_path)
    tokenizer = AutoTokenizer(str(tmp_path), include_special_tokens=True)
    (ids,) = encode_texts(tokenizer, ["ein rotes haus"])
    assert ids == tokenizer.tokenizer("ein rotes haus").input_ids
    assert ids[-1] == tokenizer.eos


def test_a_sentencepiece_tokenizer_of_nemo(tmp_path) -> None:
    train_sentencepiece(["ein rotes haus", "one red house", "two blue cars"] * 3, tmp_path, vocab_size=40)
    tokenizer = SentencePieceTokenizer(str(tmp_path / "tokenizer.model"))
    assert encode_texts(tokenizer, ["ein rotes haus", "cars"]) == [
        tokenizer.tokenizer.encode_as_ids("ein rotes haus"),
        tokenizer.tokenizer.encode_as_ids("cars"),
    ]
