"""Chat templates: a tokenizer gives by them the ids that the prompt format encodes."""

from __future__ import annotations

import jinja2
import pytest
import torch
from nemo.collections.common.prompts import PromptFormatter
from nemo.collections.common.tokenizers import AutoTokenizer

from nemo_emmett.models.building import build_tokenizer
from nemo_emmett.models.config import ModelConfig
from nemo_emmett.prompts.chat import CHAT_FORMATS
from nemo_emmett.prompts.chat_template import chat_template, is_chat
from nemo_emmett.prompts.control_tokens import ControlTokens
from nemo_emmett.prompts.families import prompt_formatter
from nemo_emmett.prompts.instruction import translation_instruction, translation_turns
from nemo_emmett.prompts.markup import Markup

from ..models.backbones import DECODER_ONLY, PROMPT_FORMAT, backbone
from .tiny_tokenizers import chat_tokenizer

LOCATOR = "<|audio|>"
TEXTS = ("one red house", "  drei grüne  Bäume\n\n- 3 ½ °C", "?", "[INST", "user\nmodel")


@pytest.fixture(scope="module", params=DECODER_ONLY)
def formatter(request, tmp_path_factory) -> PromptFormatter:
    """Of a family, with its tokenizer, as its models are built with it."""
    folder = backbone(request.param, tmp_path_factory.mktemp("backbones"))
    tokenizer = build_tokenizer(ModelConfig(pretrained_llm=str(folder)), trusted=False)
    return prompt_formatter(PROMPT_FORMAT[request.param], tokenizer)


def by_template(formatter: PromptFormatter, messages: list[dict], generate: bool = True) -> list[int]:
    tokenizer = formatter.tokenizer.tokenizer
    template = chat_template(formatter, LOCATOR)
    return tokenizer.apply_chat_template(
        messages, chat_template=template, add_generation_prompt=generate, return_dict=False
    )


def encoded(formatter: PromptFormatter, *turns: tuple[str, str]) -> list[int]:
    dialog = [{"role": role, "slots": {"message": message}} for role, message in turns]
    return formatter.encode_dialog(dialog)["input_ids"].tolist()


@pytest.mark.parametrize("message", [*TEXTS, LOCATOR])
def test_a_request_to_translate_has_the_formats_ids(formatter, message) -> None:
    turns = translation_turns(formatter, Markup(LOCATOR) if message == LOCATOR else message, "de", "en")
    expected = formatter.encode_dialog(turns)["context_ids"].tolist()
    instruction = translation_instruction("de", "en")
    assert by_template(formatter, [{"role": "user", "content": f"{instruction} {message}"}]) == expected
    part = {"type": "text", "text": message}
    for audio in ("audio", "input_audio", "audio_url"):
        parts = [{"type": "text", "text": instruction}, {"type": audio} if message == LOCATOR else part]
        assert by_template(formatter, [{"role": "user", "content": parts}]) == expected


@pytest.mark.parametrize("message", TEXTS)
def test_plain_chat_has_the_formats_ids(formatter, message) -> None:
    asked = {"role": "user", "content": message}
    assert by_template(formatter, [asked]) == encoded(formatter, ("user", message))
    system, slots = {"role": "system", "content": "Be brief."}, {"system": "Be brief.", "message": message}
    if "system" in formatter.TEMPLATE:
        expected = encoded(formatter, ("system", "Be brief."), ("user", message))
        assert by_template(formatter, [system, asked]) == expected
    if "system_and_user" in formatter.TEMPLATE:
        expected = formatter.encode_dialog([{"role": "system_and_user", "slots": slots}])["context_ids"].tolist()
        assert by_template(formatter, [system, asked]) == expected


def test_earlier_turns_have_the_formats_text_and_its_ids_but_for_where_an_answer_begins(formatter) -> None:
    turns = [("user", f"What is this? {LOCATOR}"), ("assistant", "It is a red house."), ("user", "Is it?")]
    expected = encoded(formatter, *turns)
    got = by_template(formatter, [{"role": role, "content": message} for role, message in turns])
    decode = formatter.tokenizer.tokenizer.decode
    # Mistral's format ends a user's turn in a space, which its tokenizer puts in front of an answer once more.
    assert "".join(decode(got).split()) == "".join(decode(expected).split())
    assert len(set(expected) ^ set(got)) <= 2
    assert got[-10:] == expected[-10:]


@pytest.mark.parametrize("name", [f"emmett_{name}" for name in (*CHAT_FORMATS, "nemotron-nano-v3", "qwen3")])
def test_every_chat_format_has_a_template(tokenizers_of, name) -> None:
    formatter = prompt_formatter(name, tokenizers_of("chat")[1])
    for message in TEXTS:
        assert by_template(formatter, [{"role": "user", "content": message}]) == encoded(formatter, ("user", message))


@pytest.mark.parametrize(
    "name", ["emmett_t5", "emmett_ul2_two_step", "emmett_nllb", "emmett_mbart", "t5nmt", "canary2"]
)
def test_formats_that_are_no_chat_have_none(tokenizers_of, name) -> None:
    assert not is_chat(prompt_formatter(name, tokenizers_of("chat")[1]))


def test_a_format_whose_ids_no_text_has_gets_no_template(tokenizers_of, monkeypatch) -> None:
    formatter = prompt_formatter("emmett_qwen", tokenizers_of("chat")[1])
    encode = formatter.encode_dialog
    changed = lambda turns: {"context_ids": torch.cat([encode(turns)["context_ids"], torch.tensor([7])])}  # noqa: E731
    monkeypatch.setattr(formatter, "encode_dialog", changed)
    assert chat_template(formatter, LOCATOR) is None


@pytest.mark.parametrize(
    ("message", "said"),
    [
        ({"role": "tool", "content": "x"}, "role: 'tool' is unknown; use assistant, "),
        ({"role": "user", "content": [{"type": "image"}]}, "type: 'image' is unknown; use text or audio."),
    ],
)
def test_what_the_format_has_no_place_for_is_refused(formatter, message, said) -> None:
    with pytest.raises(jinja2.TemplateError, match=said):
        by_template(formatter, [message])


def test_what_the_language_models_own_template_made_a_control_token_stays_one(tmp_path) -> None:
    inner = chat_tokenizer(tmp_path)
    inner.add_tokens(["<tool_call>", "<other>"])
    inner.chat_template = "{{ '<tool_call>' }}"
    inner.save_pretrained(tmp_path)
    for _ in range(2):  # exported, loaded and exported again
        tokenizer = AutoTokenizer(str(tmp_path), use_fast=True)
        control = ControlTokens(tokenizer.tokenizer)
        assert control.ids.keys() & {"<tool_call>", "<other>"} == {"<tool_call>"}
        tokenizer.tokenizer.chat_template = chat_template(prompt_formatter("emmett_llama3", tokenizer), LOCATOR)
        assert "<tool_call>" not in tokenizer.tokenizer.apply_chat_template(
            [{"role": "user", "content": "x"}], tokenize=False
        )
        tokenizer.tokenizer.save_pretrained(tmp_path)
