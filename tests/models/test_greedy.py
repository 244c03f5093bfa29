"""Greedy search in which finished answers leave the batch, against Hugging Face's, where they stay in it."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch

from nemo_emmett.models import SALMGPT, SALMT5, BestowGPT, generation
from nemo_emmett.models.causal import unwrap_peft
from nemo_emmett.models.greedy import leaves_early

from .backbones import DECODER_ONLY, ENCODER_DECODERS, model_config
from .batches import prompted_batch, with_recordings
from .test_generation import livelier

MESSAGES = ["one red house", "six", "four old doors and five new keys", "two", "three green trees", "six red"]
NEW_TOKENS = 10
PLAIN = {"num_beams": 1, "do_sample": False, "max_new_tokens": 5, "pad_token_id": 0}
LORA = {"task_type": "CAUSAL_LM", "r": 2, "target_modules": ["q_proj"]}


def build(kind, name: str, folder, asr=None, **overrides):
    model = livelier(kind(model_config(name, folder, asr, **overrides)).eval())
    if kind is BestowGPT:
        torch.nn.init.normal_(model.cross_attention.project_out.weight, std=0.3)
    return model


def check(model, batch: dict, monkeypatch, **options) -> None:
    """The ids of both searches, and rows that become fewer."""
    options = {"no_repeat_ngram_size": 1, "max_new_tokens": NEW_TOKENS, "pad_token_id": model.pad_id} | options
    with torch.no_grad():
        with monkeypatch.context() as patch:
            patch.setattr(generation, "leaves_early", lambda *_: False)
            endless = model._generate_answers(batch, options | {"eos_token_id": [-1]}).tolist()
            ends = ends_of(endless)
            expected = model._generate_answers(batch, options | {"eos_token_id": ends})
        sizes = []
        handle = unwrap_peft(model.llm).register_forward_pre_hook(
            lambda _, args, kwargs: sizes.append(len(_first(kwargs))), with_kwargs=True
        )
        found = model._generate_answers(batch, options | {"eos_token_id": ends})
        handle.remove()
    assert torch.equal(found, expected)
    assert sizes[0] == len(batch["context_ids"])
    assert sizes[-1] < sizes[0]
    assert sizes == sorted(sizes, reverse=True)


def ends_of(endless: list[list[int]]) -> list[int]:
    """Two tokens that end the rows after as many different numbers of tokens as possible, not all at once."""

    def lengths(ends: tuple[int, int]) -> set[int]:
        return {min([row.index(end) for end in ends if end in row], default=len(row)) for row in endless}

    ends = max(combinations(sorted({token for row in endless for token in row}), 2), key=lambda two: len(lengths(two)))
    assert len(lengths(ends)) > 1
    return list(ends)


def _first(kwargs: dict) -> torch.Tensor:
    names = ("decoder_input_ids", "inputs_embeds", "input_ids")
    return next(kwargs[name] for name in names if kwargs.get(name) is not None)


@pytest.mark.parametrize("name", ENCODER_DECODERS)
def test_encoder_decoders_give_the_same_ids(folder, name, monkeypatch) -> None:
    model = build(SALMT5, name, folder)
    check(model, prompted_batch(model, MESSAGES, MESSAGES), monkeypatch)


def test_a_model_without_a_cache_gives_the_same_ids(folder, monkeypatch) -> None:
    model = build(SALMT5, "t5", folder)
    model.llm.generation_config.use_cache = False
    check(model, prompted_batch(model, MESSAGES, MESSAGES), monkeypatch)


@pytest.mark.parametrize("name", DECODER_ONLY)
def test_decoder_only_models_give_the_same_ids(folder, name, monkeypatch) -> None:
    model = build(SALMGPT, name, folder)
    check(model, prompted_batch(model, MESSAGES, MESSAGES), monkeypatch)


@pytest.mark.parametrize(
    ("kind", "name", "overrides"),
    [
        (SALMT5, "t5", {}),
        (SALMGPT, "qwen2", {"lora": LORA, "lora_modality": "audio"}),
        (BestowGPT, "llama", {"cross_attention": {"num_layers": 2, "num_heads": 4}}),
        (BestowGPT, "gemma3", {"cross_attention": {"num_layers": 1, "num_heads": 2}}),
    ],
)
def test_speech_and_its_adapters_follow_the_rows(folder, tiny_asr, kind, name, overrides, monkeypatch) -> None:
    model = build(kind, name, folder, tiny_asr, **overrides)
    messages = [model.options.audio_locator_tag] * 4
    if kind is not SALMT5:
        messages[1] = "six"  # without speech
    batch = prompted_batch(model, messages, ["six"] * 4)
    recordings = [0.4, 0.9, 0.6, 0.5][: messages.count(model.options.audio_locator_tag)]
    check(model, with_recordings(model, batch, recordings), monkeypatch)


@pytest.mark.parametrize(
    ("options", "batch_size", "device", "expected"),
    [
        (PLAIN, 2, "cpu", True),
        (PLAIN, 1, "cpu", False),
        (PLAIN, 2, "cuda", False),
        ({"max_new_tokens": 5, "pad_token_id": 0}, 2, "cpu", False),
        (PLAIN | {"pad_token_id": None}, 2, "cpu", False),
        (PLAIN | {"num_beams": 2}, 2, "cpu", False),
        (PLAIN | {"do_sample": True}, 2, "cpu", False),
        (PLAIN | {"cache_implementation": "static"}, 2, "cpu", False),
        (PLAIN | {"logits_processor": [print]}, 2, "cpu", False),
        (PLAIN | {"return_dict_in_generate": True}, 2, "cpu", False),
    ],
)
def test_what_generate_does_otherwise_stays_its_own(options, batch_size, device, expected) -> None:
    assert leaves_early(options, batch_size, torch.device(device)) is expected


def test_the_options_of_translate_are_searched_so(folder, monkeypatch) -> None:
    model, seen, original = build(SALMT5, "t5", folder), [], generation.leaves_early
    monkeypatch.setattr(generation, "leaves_early", lambda *given: seen.append(original(*given)) or seen[-1])
    model.translate(MESSAGES, "en", "de")
    model.translate(MESSAGES, "en", "de", num_beams=2)
    assert seen == [True, False]


@pytest.mark.parametrize("num_beams", [1, 4])
@pytest.mark.parametrize(("kind", "name"), [(SALMT5, "t5"), (SALMGPT, "llama"), (BestowGPT, "llama")])
def test_speech_is_encoded_once_whatever_the_number_of_beams(folder, tiny_asr, kind, name, num_beams) -> None:
    model = build(kind, name, folder, tiny_asr)
    calls = []
    parts = [model.perception] + ([model.llm.get_encoder()] if kind is SALMT5 else [])
    for part in parts:
        part.register_forward_hook(lambda _, args, output: calls.append(output))
    batch = prompted_batch(model, [model.options.audio_locator_tag] * 2, ["six"] * 2)
    model.answer_batch(with_recordings(model, batch, [0.5, 0.7]), num_beams=num_beams)
    assert len(calls) == len(parts)
