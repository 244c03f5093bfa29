"""Chat formats: the same turns as written by hand for NeMo's own formats, for text and for speech."""

from __future__ import annotations

import random

import pytest
import torch
from nemo.collections.common.data.lhotse.text_adapters import (
    NeMoMultimodalConversation,
    SourceTargetTextExample,
    TextExample,
    TextTurn,
)
from nemo.collections.common.data.prompt_fn import apply_prompt_format_fn
from nemo.collections.common.prompts import PromptFormatter

from nemo_emmett.errors import ConfigError, DataError
from nemo_emmett.prompts.chat import CHAT_FORMATS
from nemo_emmett.prompts.instruction import translation_instruction, translation_turns
from nemo_emmett.prompts.translation import register_prompt_formats

register_prompt_formats()
ANSWER = "une maison rouge"
OURS = [f"emmett_{name}" for name in (*CHAT_FORMATS, "nemotron-nano-v3", "qwen3")]


@pytest.fixture(scope="session")
def tokenizer(tokenizers_of):
    return tokenizers_of("chat")[1]


def turns(message: str, answer: str | None = ANSWER) -> list[dict]:
    asked = [{"role": "user", "slots": {"message": message}}]
    return asked + ([{"role": "assistant", "slots": {"message": answer}}] if answer else [])


def as_trained(original: PromptFormatter, dialog: list[dict]) -> dict:
    """What NeMo makes of a dialog, divided where its own generation begins; ended by EOS where nothing ends it."""
    options = {"enable_thinking": False} if original.NAME == "nemotron-nano-v3" else {}
    asked = original.encode_dialog([dict(turn) for turn in dialog[:-1]], **options)["context_ids"].tolist()
    ids = original.encode_dialog([dict(turn) for turn in dialog], **options)["input_ids"].tolist()
    if original.NAME in ("nemotron-h", "phi2_chat", "phi2_qa"):
        ids.append(original.tokenizer.eos)
    assert ids[: len(asked)] == asked
    answer = ids[len(asked) :]
    parts = {"input_ids": ids, "context_ids": asked, "answer_ids": answer}
    mask = torch.tensor([False] * len(asked) + [True] * len(answer))
    return {name: torch.tensor(tokens) for name, tokens in parts.items()} | {"mask": mask}


def assert_same(ours: dict, theirs: dict) -> None:
    assert {key: value.tolist() for key, value in ours.items()} == {key: v.tolist() for key, v in theirs.items()}


@pytest.mark.parametrize("name", [*CHAT_FORMATS, "nemotron-nano-v3"])
@pytest.mark.parametrize(
    ("source_lang", "instruction"), [("de", "Translate from German to French:"), (None, "Translate to French:")]
)
def test_text_and_speech_are_asked_for_in_the_same_words(tokenizer, pair, cut, name, source_lang, instruction) -> None:
    original = PromptFormatter.resolve(name)(tokenizer)
    ours = PromptFormatter.resolve(f"emmett_{name}")(tokenizer)
    text = apply_prompt_format_fn(pair(source_lang, "fr"), ours)
    assert_same(text, as_trained(original, turns(f"{instruction} ein rotes haus")))
    speech = apply_prompt_format_fn(cut(source_lang=source_lang, target_lang="fr"), ours)
    assert_same(speech, as_trained(original, turns(f"{instruction} <|audio|>")))
    assert speech["context_ids"].tolist().count(tokenizer.token_to_id("<|audio|>")) == 1


def test_the_ids_say_what_llama_3_reads(tokenizer, pair) -> None:
    encoded = apply_prompt_format_fn(pair("de", "fr"), PromptFormatter.resolve("emmett_llama3")(tokenizer))
    assert tokenizer.ids_to_text(encoded["context_ids"].tolist(), remove_special_tokens=False) == (
        "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\n"
        "Translate from German to French: ein rotes haus<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
    )
    assert tokenizer.ids_to_text(encoded["answer_ids"].tolist(), remove_special_tokens=False) == (
        "une maison rouge<|eot_id|>"
    )


def test_qwen3_answers_without_a_thought_and_draws_nothing(tokenizer, pair) -> None:
    prompt = PromptFormatter.resolve("emmett_qwen3")(tokenizer)
    state = random.getstate()
    encoded = apply_prompt_format_fn(pair("de", "fr"), prompt)
    assert random.getstate() == state
    user = "<|im_start|>user\nTranslate from German to French: ein rotes haus<|im_end|>\n"
    user += "<|im_start|>assistant\n<think>\n\n</think>\n\n"
    answer = "une maison rouge<|im_end|>\n"
    assert tokenizer.ids_to_text(encoded["context_ids"].tolist(), remove_special_tokens=False) == user
    assert tokenizer.ids_to_text(encoded["answer_ids"].tolist(), remove_special_tokens=False) == answer


@pytest.mark.parametrize("name", OURS)
def test_what_is_asked_at_inference_begins_what_was_trained(tokenizer, pair, name) -> None:
    prompt = PromptFormatter.resolve(name)(tokenizer)
    asked = prompt.encode_dialog(translation_turns(prompt, "ein rotes haus", "fr", "de"))["context_ids"].tolist()
    trained = apply_prompt_format_fn(pair("de", "fr"), prompt)["input_ids"].tolist()
    text = tokenizer.ids_to_text(asked, remove_special_tokens=False)
    assert tokenizer.ids_to_text(trained, remove_special_tokens=False).startswith(text)


@pytest.mark.parametrize("name", OURS)
def test_speech_whose_answer_is_not_known(tokenizer, cut, name) -> None:
    prompt = PromptFormatter.resolve(name)(tokenizer)
    encoded = apply_prompt_format_fn(cut(None, target_lang="fr"), prompt)
    assert_same(encoded, prompt.encode_dialog(turns("Translate to French: <|audio|>", answer=None)))
    assert "answer_ids" not in encoded


def test_a_context_of_its_own_takes_the_place_of_the_instruction(tokenizer, pair, cut) -> None:
    original, ours = (PromptFormatter.resolve(name)(tokenizer) for name in ("qwen", "emmett_qwen"))
    said = apply_prompt_format_fn(cut(target_lang="fr", context="En français :"), ours)
    assert_same(said, as_trained(original, turns("En français : <|audio|>")))
    asked = SourceTargetTextExample(TextExample("rot"), TextExample(ANSWER), question=TextExample("In French:"))
    assert_same(apply_prompt_format_fn(asked, ours), as_trained(original, turns("In French: rot")))


def test_a_system_prompt_is_said_where_the_format_has_a_place_for_it(tokenizer, pair) -> None:
    example = pair("de", "fr", system_prompt="Be brief.")
    message = "Translate from German to French: ein rotes haus"
    _, answer = turns(message)
    for name, first in [
        ("llama3", [{"role": "system", "slots": {"message": "Be brief."}}, turns(message)[0]]),
        ("llama2", [{"role": "system_and_user", "slots": {"system": "Be brief.", "message": message}}]),
    ]:
        expected = as_trained(PromptFormatter.resolve(name)(tokenizer), [*first, answer])
        assert_same(apply_prompt_format_fn(example, PromptFormatter.resolve(f"emmett_{name}")(tokenizer)), expected)
    with pytest.raises(DataError) as refused:
        apply_prompt_format_fn(example, PromptFormatter.resolve("emmett_gemma")(tokenizer))
    assert str(refused.value) == (
        "example p: it has a system_prompt, for which prompt_format emmett_gemma has no place; take it out of the "
        "source's tags, or put it in their `context`."
    )


def test_conversations_are_as_nemo_has_them(tokenizer) -> None:
    talk = NeMoMultimodalConversation("talk", [TextTurn("say:", "user"), TextTurn("oui", "assistant")])
    original, ours = (PromptFormatter.resolve(name)(tokenizer) for name in ("qwen", "emmett_qwen"))
    assert_same(apply_prompt_format_fn(talk, ours), as_trained(original, turns("say:", "oui")))


def test_without_a_target_language_nothing_is_prompted(tokenizer, pair) -> None:
    with pytest.raises(DataError, match="example p: its target language is not known"):
        apply_prompt_format_fn(pair("de", None), PromptFormatter.resolve("emmett_llama3")(tokenizer))


def test_the_same_language_on_both_sides_asks_for_a_transcript() -> None:
    assert translation_instruction("de", "de") == "Transcribe in German:"


def test_a_tokenizer_without_the_formats_first_token_is_told(tokenizer, pair, monkeypatch) -> None:
    monkeypatch.setattr(type(tokenizer), "bos", None)
    with pytest.raises(ConfigError, match="prompt_format emmett_llama2: it needs the tokenizer's BOS token"):
        apply_prompt_format_fn(pair("de", "fr"), PromptFormatter.resolve("emmett_llama2")(tokenizer))
