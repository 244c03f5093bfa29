"""Answers in two steps: transcript, separator, translation; what differs from one step, and how they are read."""

from __future__ import annotations

import copy
from functools import partial

import pytest
from nemo.collections.common.prompts import PromptFormatter
from nemo.collections.common.tokenizers import AutoTokenizer
from transformers import AddedToken

from nemo_emmett.errors import ConfigError, DataError
from nemo_emmett.prompts.answers import Answer, is_two_step
from nemo_emmett.prompts.families import check_prompt_format, stop_ids
from nemo_emmett.prompts.formatting import format_many
from nemo_emmett.prompts.translation import register_prompt_formats

register_prompt_formats()
T5, CHATS = ["emmett_t5", "emmett_ul2"], ["emmett_llama3", "emmett_qwen", "emmett_qwen3", "emmett_nemotron-nano-v3"]
SPOKEN, ANSWER = "ein rotes haus", "une maison rouge"


@pytest.fixture(scope="module")
def tokenizer_for(tokenizers_of, tmp_path_factory):
    """``tokenizer_for(format)``: with T5's sentinel token, or for chat formats."""
    folder = tmp_path_factory.mktemp("sentinel")
    tokenizer = copy.deepcopy(tokenizers_of("nllb")[0])
    tokenizer.add_tokens([AddedToken("<extra_id_0>", special=True, normalized=False)], special_tokens=True)
    tokenizer.add_tokens([AddedToken("<|audio|>", special=True, normalized=False)], special_tokens=True)
    tokenizer.save_pretrained(folder)
    of_t5 = AutoTokenizer(str(folder), use_fast=True)
    return lambda name: of_t5 if name in T5 else tokenizers_of("chat")[1]


def prompted(example, tokenizer, name) -> tuple[list[int], list[int]]:
    format_many([example], PromptFormatter.resolve(name)(tokenizer))
    return example.context_ids.tolist(), example.answer_ids.tolist()


def separator_of(name: str) -> str:
    return " <extra_id_0> " if name in T5 else "\n"


@pytest.mark.parametrize("name", T5 + CHATS)
def test_the_answer_is_the_transcript_and_then_the_translation(tokenizer_for, cut, pair, name) -> None:
    tokenizer, languages = tokenizer_for(name), {"source_lang": "de", "target_lang": "fr"}
    speech = cut(source_text="  ein\trotes\nhaus ", **languages)
    context, answer = prompted(speech, tokenizer, f"{name}_two_step")
    whole = cut(f"{SPOKEN}{separator_of(name)}{ANSWER}", **languages)
    if name not in T5:  # the same turn, with the answer written by hand
        assert (context, answer) == prompted(whole, tokenizer, name)
    else:
        sentinel = tokenizer.token_to_id("<extra_id_0>")
        text = tokenizer.text_to_ids(f"{SPOKEN} <extra_id_0> {ANSWER}")
        assert answer == [*text, tokenizer.eos]
        assert answer.count(sentinel) == 1
        assert context == prompted(cut(ANSWER, **languages), tokenizer, name)[0]
    assert len(answer) > len(prompted(cut(ANSWER, **languages), tokenizer, name)[1]) + 3


@pytest.mark.parametrize("name", T5 + CHATS)
def test_all_else_is_as_in_one_step(tokenizer_for, cut, pair, name) -> None:
    """Text, speech without a transcript, and speech that is transcribed."""
    tokenizer = tokenizer_for(name)
    examples = [
        lambda: pair("de", "fr"),
        lambda: cut(source_lang="de", target_lang="fr"),
        lambda: cut(source_lang="de", target_lang="fr", source_text=" "),
        lambda: cut(source_lang="fr", target_lang="fr", source_text=ANSWER),
    ]
    for make in examples:
        assert prompted(make(), tokenizer, f"{name}_two_step") == prompted(make(), tokenizer, name)


@pytest.mark.parametrize("name", T5 + CHATS)
def test_a_generated_answer_is_read_as_it_was_written(tokenizer_for, cut, name) -> None:
    tokenizer = tokenizer_for(name)
    prompt = PromptFormatter.resolve(f"{name}_two_step")(tokenizer)
    stops, decode = stop_ids(prompt, tokenizer), partial(tokenizer.tokenizer.decode, skip_special_tokens=True)

    def parsed(text: str | None = ANSWER, **custom) -> Answer:
        speech = cut(text, source_lang="de", target_lang="fr", **custom)
        _, answer = prompted(speech, tokenizer, f"{name}_two_step")
        return prompt.parse_answer([token for token in answer if token not in stops], decode)

    assert parsed(source_text=SPOKEN) == Answer(ANSWER, SPOKEN)
    assert parsed() == Answer(ANSWER, None, is_malformed=True)
    assert parsed("une maison\nrouge" if name not in T5 else ANSWER, source_text=SPOKEN).transcript == SPOKEN


@pytest.mark.parametrize("name", T5)
def test_a_text_cannot_hold_the_separator_of_t5(tokenizer_for, cut, name) -> None:
    tokenizer = tokenizer_for(name)
    speech = cut("une <extra_id_0> maison", source_lang="de", target_lang="fr", source_text="ein <extra_id_0> haus")
    _, answer = prompted(speech, tokenizer, f"{name}_two_step")
    assert answer.count(tokenizer.token_to_id("<extra_id_0>")) == 1


def test_a_tokenizer_without_the_separator_is_refused(tokenizers_of, cut) -> None:
    from transformers import T5Config

    tokenizer = tokenizers_of("chat")[1]
    with pytest.raises(ConfigError, match=r"model.prompt_format: 'emmett_t5_two_step' does not fit .*'<extra_id_0>'"):
        check_prompt_format("emmett_t5_two_step", tokenizer, T5Config())
    speech = cut(source_lang="de", target_lang="fr", source_text=SPOKEN)
    with pytest.raises(DataError, match=r"the tokenizer has no token '<extra_id_0>'.*; use emmett_t5, or a tokenizer"):
        prompted(speech, tokenizer, "emmett_t5_two_step")


def test_names() -> None:
    assert is_two_step("emmett_gemma_two_step")
    assert not any(map(is_two_step, (None, "emmett_gemma", "gemma_two_step")))
