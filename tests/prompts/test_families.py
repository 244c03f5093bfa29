"""Which format a backbone gets by itself, and where its answers end."""

from __future__ import annotations

import pytest
from nemo.collections.common.prompts import PromptFormatter
from nemo.collections.common.tokenizers import AutoTokenizer
from transformers import AutoConfig, GPT2Config

from nemo_emmett.errors import ConfigError
from nemo_emmett.prompts.families import default_prompt_format, prompt_formatter, stop_ids
from tests.models.backbones import DECODER_ONLY, ENCODER_DECODERS, PROMPT_FORMAT, backbone

FAMILIES = [*ENCODER_DECODERS, *DECODER_ONLY]
CLOSING = {
    **dict.fromkeys(ENCODER_DECODERS, "</s>"),
    "llama": "</s>",
    "llama3": "<|eot_id|>",
    "mistral": "</s>",
    **dict.fromkeys(("qwen2", "qwen3"), "<|im_end|>"),
    **dict.fromkeys(("gemma", "gemma2", "gemma3"), "<eos> <end_of_turn>"),
}


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("backbones")


@pytest.mark.parametrize("family", FAMILIES)
def test_a_backbone_gets_the_format_it_was_made_for(family, folder) -> None:
    made = backbone(family, folder)
    assert default_prompt_format(AutoTokenizer(str(made)), AutoConfig.from_pretrained(made)) == PROMPT_FORMAT[family]


@pytest.mark.parametrize("family", FAMILIES)
def test_answers_end_with_eos_or_with_the_assistants_turn(family, folder) -> None:
    tokenizer = AutoTokenizer(str(backbone(family, folder)))
    formatter = prompt_formatter(PROMPT_FORMAT[family], tokenizer)
    assert tokenizer.ids_to_tokens(stop_ids(formatter, tokenizer)) == CLOSING[family].split()


def test_llama_3_stops_at_the_end_of_its_turn_also_where_eos_ends_the_text(folder) -> None:
    tokenizer = AutoTokenizer(str(backbone("llama3", folder)), eos_token="<|end_of_text|>")
    stops = stop_ids(prompt_formatter("emmett_llama3", tokenizer), tokenizer)
    assert tokenizer.ids_to_tokens(stops) == ["<|end_of_text|>", "<|eot_id|>"]


def test_a_format_whose_closing_token_the_tokenizer_lacks_ends_with_eos_alone(folder) -> None:
    tokenizer = AutoTokenizer(str(backbone("llama", folder)))
    assert stop_ids(prompt_formatter("emmett_qwen", tokenizer), tokenizer) == [tokenizer.eos_id]


def test_a_family_that_is_not_known_has_to_be_told(folder) -> None:
    tokenizer = AutoTokenizer(str(backbone("llama", folder)))
    with pytest.raises(ConfigError) as refused:
        default_prompt_format(tokenizer, GPT2Config())
    sentence = str(refused.value)
    assert sentence.startswith(
        "model.prompt_format is missing, and none is known for models of the kind 'gpt2'; choose"
    )
    listed = sentence.rsplit("one of ", 1)[1].removesuffix(".").split(", ")
    assert set(listed) >= set(PROMPT_FORMAT.values())
    assert all(PromptFormatter.resolve(name) for name in listed)


def test_a_misspelt_format_is_told_with_the_nearest(folder) -> None:
    tokenizer = AutoTokenizer(str(backbone("llama", folder)))
    with pytest.raises(ConfigError, match=r"'emmett_lama2' is not a prompt format; did you mean 'emmett_llama2'\?"):
        prompt_formatter("emmett_lama2", tokenizer)
