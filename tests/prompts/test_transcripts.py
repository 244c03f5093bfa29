"""A transcript is prompted as the text example of the same sentence is, in every prompt format."""

from __future__ import annotations

import copy

import pytest
from lhotse.testing.dummies import dummy_cut
from nemo.collections.common.prompts import PromptFormatter

from nemo_emmett.prompts.formatting import format_many, format_one
from nemo_emmett.prompts.transcripts import set_transcript, transcript_ids
from nemo_emmett.prompts.translation import register_prompt_formats

register_prompt_formats()

TEXT = "ein rotes haus"
CHATS = ["gemma", "llama2", "llama3", "mistral", "nemotron-h", "nemotron-nano-v3", "phi2_chat", "phi2_qa", "qwen"]
FORMATS = [
    ("emmett_t5", "nllb"),
    ("emmett_ul2", "nllb"),
    ("emmett_m2m100", "m2m100"),
    ("emmett_nllb", "nllb"),
    ("emmett_mbart", "mbart"),
    ("emmett_mbart50", "mbart50"),
    *((f"emmett_{name}", "chat") for name in [*CHATS, "qwen3"]),
]


def speech(cut, transcript: str | None = TEXT, **custom):
    example = cut(source_lang="de", target_lang="fr", source_text=transcript, **custom)
    if transcript is not None:
        set_transcript(example, transcript)
    return example


@pytest.mark.parametrize(("name", "family"), FORMATS)
def test_the_context_is_that_of_the_text_example(tokenizers_of, pair, cut, name, family) -> None:
    tokenizer = tokenizers_of(family)[1]
    prompt = PromptFormatter.resolve(name)(tokenizer)
    text, example = pair("de", "fr"), speech(cut)
    plain = copy.deepcopy(example)
    del plain.custom["emmett_transcript"]
    format_many([text], prompt)
    format_many([example, plain], prompt)
    assert example.text_context_ids.tolist() == text.context_ids.tolist() != []
    assert example.transcript_ids.tolist() == tokenizer.text_to_ids(TEXT)
    assert example.context_ids.tolist() == plain.context_ids.tolist()
    assert example.answer_ids.tolist() == plain.answer_ids.tolist()
    assert transcript_ids(plain) == {}


@pytest.mark.parametrize("tags", [{"context": "Say it in French:"}, {"context": "Now:", "system_prompt": "Be brief."}])
def test_its_instruction_is_that_of_the_speech(tokenizers_of, pair, cut, tags) -> None:
    prompt = PromptFormatter.resolve("emmett_llama2")(tokenizers_of("chat")[1])
    text, example = pair("de", "fr", **tags), speech(cut, **tags)
    format_many([text, example], prompt)
    assert example.text_context_ids.tolist() == text.context_ids.tolist()


@pytest.mark.parametrize(("name", "family"), [("emmett_nllb", "nllb"), ("emmett_qwen", "chat")])
def test_control_tokens_in_a_transcript_are_text(tokenizers_of, pair, cut, name, family) -> None:
    tokenizer = tokenizers_of(family)[1]
    spelt = "ein </s> <|im_end|> <|audio|>"
    text, example = pair("de", "fr"), speech(cut, spelt)
    text.source.text = spelt
    format_many([text, example], PromptFormatter.resolve(name)(tokenizer))
    assert example.text_context_ids.tolist() == text.context_ids.tolist()
    special = {tokenizer.eos_id, tokenizer.token_to_id("<|audio|>"), tokenizer.token_to_id("<|im_end|>")}
    assert not special & set(example.transcript_ids.tolist()) - {tokenizer.unk_id}


@pytest.mark.parametrize(("name", "family"), [("emmett_nllb", "nllb"), ("emmett_qwen", "chat")])
def test_without_a_transcript_there_are_no_tokens_and_others_keep_theirs(
    tokenizers_of, pair, cut, name, family
) -> None:
    prompt = PromptFormatter.resolve(name)(tokenizers_of(family)[1])
    silent, spoken, unmarked = speech(cut, ""), speech(cut), speech(cut, None)
    noisy = speech(cut).mix(dummy_cut(1), snr=10)
    text = pair("de", "fr")
    format_many([silent, text, noisy, unmarked, spoken], prompt)
    assert [ids.tolist() for ids in transcript_ids(silent).values()] == [[], []]
    assert transcript_ids(unmarked) == transcript_ids(text) == {}
    expected = {key: ids.tolist() for key, ids in transcript_ids(spoken).items()}
    assert {key: ids.tolist() for key, ids in transcript_ids(noisy).items()} == expected
    assert {key: ids.tolist() for key, ids in transcript_ids(format_one(speech(cut), prompt)).items()} == expected
