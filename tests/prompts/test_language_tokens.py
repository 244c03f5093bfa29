"""M2M100, NLLB, mBART: ids against those of Hugging Face's own tokenizers, and what the models make of them."""

from __future__ import annotations

import pytest
import torch
from nemo.collections.common.data.prompt_fn import apply_prompt_format_fn
from nemo.collections.common.prompts import PromptFormatter
from transformers import (
    M2M100Config,
    M2M100ForConditionalGeneration,
    MBartConfig,
    MBartForConditionalGeneration,
    PreTrainedModel,
)

from nemo_emmett.errors import ConfigError, DataError
from nemo_emmett.prompts.instruction import translation_turns
from nemo_emmett.prompts.translation import register_prompt_formats

register_prompt_formats()
GERMAN_AND_FRENCH = {
    "m2m100": ("de", "fr"),
    "nllb": ("deu_Latn", "fra_Latn"),
    "mbart": ("de_DE", "fr_XX"),
    "mbart50": ("de_DE", "fr_XX"),
}
FAMILIES = list(GERMAN_AND_FRENCH)


@pytest.fixture(params=FAMILIES)
def family(request) -> str:
    return request.param


@pytest.fixture
def prompt(tokenizers_of, family) -> PromptFormatter:
    return PromptFormatter.resolve(f"emmett_{family}")(tokenizers_of(family)[1])


@pytest.fixture
def reference(tokenizers_of, family):
    """Hugging Face's tokenizer, set to translate from German to French."""
    tokenizer = tokenizers_of(family)[0]
    tokenizer.src_lang, tokenizer.tgt_lang = GERMAN_AND_FRENCH[family]
    return tokenizer


def test_text_is_tokenised_as_hugging_face_does_it(prompt, reference, pair) -> None:
    encoded = apply_prompt_format_fn(pair("de", "fr"), prompt)
    expected = reference("ein rotes haus", text_target="une maison rouge")
    assert encoded["context_ids"].tolist() == expected["input_ids"]
    assert encoded["answer_ids"].tolist() == expected["labels"]
    assert encoded["input_ids"].tolist() == expected["input_ids"] + expected["labels"]
    assert encoded["mask"].tolist() == [False] * len(expected["input_ids"]) + [True] * len(expected["labels"])


def test_speech_stands_where_the_text_would(prompt, reference, family, cut) -> None:
    encoded = apply_prompt_format_fn(cut(source_lang="de", target_lang="fr"), prompt)
    german = reference.convert_tokens_to_ids("__de__" if family == "m2m100" else GERMAN_AND_FRENCH[family][0])
    audio, eos = prompt.tokenizer.token_to_id("<|audio|>"), reference.eos_token_id
    expected = [audio, eos, german] if family == "mbart" else [german, audio, eos]
    assert encoded["context_ids"].tolist() == expected
    assert encoded["answer_ids"].tolist() == reference("x", text_target="une maison rouge")["labels"]


def test_the_tokens_in_words(tokenizers_of, pair, cut) -> None:
    tokenizer = tokenizers_of("m2m100")[1]
    prompt = PromptFormatter.resolve("emmett_m2m100")(tokenizer)
    encoded = apply_prompt_format_fn(cut("rot", source_lang="en", target_lang="de"), prompt)
    assert tokenizer.ids_to_tokens(encoded["context_ids"].tolist()) == ["__en__", "<|audio|>", "</s>"]
    answer = tokenizer.ids_to_tokens(encoded["answer_ids"].tolist())
    assert (answer[0], "".join(answer[1:-1]), answer[-1]) == ("__de__", "▁rot", "</s>")


def test_without_a_source_language_its_token_is_left_out(prompt, reference, pair, cut) -> None:
    eos = reference.eos_token_id
    text = reference("ein rotes haus", add_special_tokens=False)["input_ids"]
    assert apply_prompt_format_fn(pair(None, "fr"), prompt)["context_ids"].tolist() == [*text, eos]
    audio = prompt.tokenizer.token_to_id("<|audio|>")
    assert apply_prompt_format_fn(cut(target_lang="fr"), prompt)["context_ids"].tolist() == [audio, eos]


def test_inference_asks_with_the_context_of_training(prompt, pair) -> None:
    for source_lang in ("de", None):
        turns = translation_turns(prompt, "ein rotes haus", "fr", source_lang)
        encoded = prompt.encode_dialog(turns)
        trained = apply_prompt_format_fn(pair(source_lang, "fr"), prompt)["context_ids"]
        assert encoded["context_ids"].tolist() == encoded["input_ids"].tolist() == trained.tolist()
        assert "answer_ids" not in encoded


def test_speech_whose_answer_is_not_known(prompt, cut) -> None:
    encoded = apply_prompt_format_fn(cut(None, target_lang="fr"), prompt)
    assert set(encoded) == {"input_ids", "context_ids"}


def test_a_language_of_another_family_is_refused(prompt, family, pair) -> None:
    named = {"m2m100": "M2M100", "nllb": "NLLB", "mbart": "mBART", "mbart50": "mBART-50"}[family]
    with pytest.raises(DataError) as refused:
        apply_prompt_format_fn(pair("de", "la"), prompt)
    assert str(refused.value) == (
        f"example p: {named} has no token for the language 'la' (Latin); leave out the data in that language "
        f"(prompt_format emmett_{family}), or use another model: T5 and decoder-only ones take any language."
    )
    with pytest.raises(ConfigError, match=r"no token for the language 'mdw' \(Mbosi\)"):
        prompt.encode_dialog(translation_turns(prompt, "ein rotes haus", "fr", "mdw"))
    with pytest.raises(ConfigError, match=r"no token for the language 'la' \(Latin\)"):
        prompt.encode_dialog(translation_turns(prompt, "ein rotes haus", "fr", "la"))


def test_a_tokenizer_of_another_family_is_refused(tokenizers_of, pair) -> None:
    prompt = PromptFormatter.resolve("emmett_nllb")(tokenizers_of("mbart50")[1])
    with pytest.raises(DataError, match="the tokenizer has no token 'deu_Latn' for the language 'de'"):
        apply_prompt_format_fn(pair(), prompt)


def test_mbart_does_not_take_the_languages_of_mbart50(tokenizers_of, pair) -> None:
    assert apply_prompt_format_fn(
        pair("pl", "de"), PromptFormatter.resolve("emmett_mbart50")(tokenizers_of("mbart50")[1])
    )
    with pytest.raises(DataError, match="the tokenizer has no token 'pl_PL' for the language 'pl'"):
        apply_prompt_format_fn(pair("pl", "de"), PromptFormatter.resolve("emmett_mbart")(tokenizers_of("mbart")[1]))


def test_a_language_whose_id_was_given_to_the_locator_is_refused(tokenizers_of, pair) -> None:
    tokenizer = tokenizers_of("m2m100_bare")[1]
    assert tokenizer.token_to_id("<|audio|>") == tokenizer.token_to_id("__af__")
    with pytest.raises(DataError, match="the tokenizer has no token '__af__'"):
        apply_prompt_format_fn(pair("de", "af"), PromptFormatter.resolve("emmett_m2m100")(tokenizer))


@pytest.mark.parametrize("turn", [{"role": "user", "slots": {"target_lang": "fr"}}, {"role": "system", "content": "x"}])
def test_a_turn_that_says_nothing_is_refused(prompt, turn) -> None:
    with pytest.raises(ConfigError, match="is no turn of it"):
        prompt.encode_dialog([turn])


def model_of(family: str, vocab_size: int) -> PreTrainedModel:
    """A random model of a family, as its published checkpoints are configured."""
    torch.manual_seed(0)
    sizes = {
        "vocab_size": vocab_size,
        "d_model": 16,
        "encoder_layers": 1,
        "decoder_layers": 1,
        "encoder_attention_heads": 2,
        "decoder_attention_heads": 2,
        "encoder_ffn_dim": 16,
        "decoder_ffn_dim": 16,
        "max_position_embeddings": 64,
        "bos_token_id": 0,
        "pad_token_id": 1,
        "eos_token_id": 2,
        "init_std": 1.0,
        "decoder_start_token_id": 2,
    }
    if family.startswith("mbart"):
        return MBartForConditionalGeneration(MBartConfig(**sizes, forced_eos_token_id=None)).eval()
    return M2M100ForConditionalGeneration(M2M100Config(**sizes)).eval()


@pytest.mark.filterwarnings("ignore")
def test_training_and_generation_agree_on_how_the_decoder_starts(prompt, reference, family, pair) -> None:
    encoded = apply_prompt_format_fn(pair("de", "fr"), prompt)
    context, answer = encoded["context_ids"][None], encoded["answer_ids"][None]
    start = torch.tensor([prompt.decoder_start("fr")])
    text = reference("une maison rouge", add_special_tokens=False)["input_ids"]
    ends_before = [2] if family == "mbart" else []  # its labels end in the language, which is read after </s>
    read = torch.cat([start, torch.tensor([[*text, *ends_before]])], dim=1)
    assert read.shape == answer.shape

    model = model_of(family, vocab_size=len(prompt.tokenizer.tokenizer) + 10)
    trained = model(input_ids=context, labels=answer).logits
    assert torch.equal(trained, model(input_ids=context, decoder_input_ids=read).logits)

    options = {"input_ids": context, "max_new_tokens": 6, "do_sample": False, "num_beams": 1}
    ours = model.generate(**options, decoder_input_ids=start, decoder_start_token_id=start[:, 0].tolist())
    french = int(start[0, -1])
    forced = {"decoder_start_token_id": french} if family == "mbart" else {"forced_bos_token_id": french}
    theirs = model.generate(**options | {"max_new_tokens": 6 + start.shape[1] - 1}, **forced)
    assert ours.tolist() == theirs.tolist()
    assert ours.shape[1] > start.shape[1]
