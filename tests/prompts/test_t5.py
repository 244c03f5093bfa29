"""``emmett_t5``: the token ids of each kind of example, against ids counted in the vocabulary by hand."""

from __future__ import annotations

import pytest
import torch
from lhotse import CutSet, SupervisionSegment
from lhotse.testing.dummies import dummy_cut
from nemo.collections.common.data.lhotse.text_adapters import (
    AudioTurn,
    NeMoMultimodalConversation,
    SourceTargetTextExample,
    TextExample,
    TextTurn,
)
from nemo.collections.common.data.prompt_fn import apply_prompt_format_fn
from nemo.collections.common.tokenizers import AutoTokenizer
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from nemo_emmett.errors import DataError
from nemo_emmett.prompts.t5 import EmmettT5PromptFormatter

LOCATOR = "<|audio|>"
VOCABULARY = ["<pad>", "</s>", "<unk>", LOCATOR, "<de>", "<en>", "one", "two", "eins", "zwei", "say:"]
EOS, AUDIO, DE, ONE, TWO, EINS, ZWEI, SAY = 1, 3, 4, 6, 7, 8, 9, 10


@pytest.fixture(scope="module")
def prompt(tmp_path_factory) -> EmmettT5PromptFormatter:
    """The format over a tokenizer for which every word, tag and locator is one token."""
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(VOCABULARY)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        additional_special_tokens=[LOCATOR, "<de>", "<en>"],
    )
    folder = tmp_path_factory.mktemp("tokenizer")
    fast.save_pretrained(folder)
    return EmmettT5PromptFormatter(AutoTokenizer(str(folder)))


def cut(text: str = "eins zwei", **custom):
    spoken = dummy_cut(0, supervisions=[SupervisionSegment("s", "r", 0, 1.0, text=text)])
    spoken.custom = {"audio_locator_tag": LOCATOR, **custom}
    return spoken


def ids_of(example, prompt) -> tuple[list[int], list[int]]:
    encoded = apply_prompt_format_fn(example, prompt)
    assert encoded["input_ids"].tolist() == [*encoded["context_ids"], *encoded["answer_ids"]]
    return encoded["context_ids"].tolist(), encoded["answer_ids"].tolist()


def test_speech(prompt) -> None:
    assert ids_of(cut(target_lang="de"), prompt) == ([DE, AUDIO, EOS], [EINS, ZWEI, EOS])


def test_speech_whose_answer_is_not_known(prompt) -> None:
    silent = cut(target_lang="de")
    silent.supervisions = []
    assert apply_prompt_format_fn(silent, prompt)["context_ids"].tolist() == [DE, AUDIO, EOS]


def test_speech_mixed_with_noise(prompt) -> None:
    mixed = cut(target_lang="de").pad(duration=3.0)
    assert len(CutSet([mixed])) == 1
    assert ids_of(mixed, prompt) == ([DE, AUDIO, EOS], [EINS, ZWEI, EOS])


def test_a_pair_of_sentences(prompt) -> None:
    pair = SourceTargetTextExample(TextExample("one two", "en"), TextExample("eins zwei", "de"))
    assert ids_of(pair, prompt) == ([DE, ONE, TWO, EOS], [EINS, ZWEI, EOS])


def test_a_conversation(prompt) -> None:
    turns = [
        TextTurn("say:", "user"),
        AudioTurn(cut(), "user", LOCATOR),
        TextTurn("two", "user"),
        TextTurn("zwei", "assistant"),
    ]
    talk = NeMoMultimodalConversation("talk", turns, custom={"target_lang": "de"})
    assert ids_of(talk, prompt) == ([DE, SAY, AUDIO, TWO, EOS], [ZWEI, EOS])


def test_a_tag_that_is_no_token_is_spelled(prompt) -> None:
    context, _ = ids_of(cut(target_lang="fr"), prompt)
    assert context == [VOCABULARY.index("<unk>"), AUDIO, EOS]


@pytest.mark.parametrize(
    ("example", "name"),
    [
        (cut(), dummy_cut(0).id),
        (SourceTargetTextExample(TextExample("one"), TextExample("eins"), custom={"id": "a.en:3"}), "a.en:3"),
        (SourceTargetTextExample(TextExample("one"), TextExample("eins")), "one"),
        (NeMoMultimodalConversation("talk", [TextTurn("one", "user")], custom=None), "talk"),
    ],
)
def test_without_a_target_language_nothing_is_prompted(prompt, example, name) -> None:
    with pytest.raises(DataError) as refused:
        apply_prompt_format_fn(example, prompt)
    assert str(refused.value) == (
        f"example {name}: its target language is not known; "
        "give its source a `target_lang`, or each of its records one."
    )


def test_ids_are_what_the_model_takes(prompt) -> None:
    encoded = apply_prompt_format_fn(cut(target_lang="de"), prompt)
    assert encoded["context_ids"].dtype == torch.int64
