"""Records whose texts hold control tokens: trained on as text, or skipped and counted by line; under both samplings."""

from __future__ import annotations

import json

import pytest
from nemo.collections.speechlm2.data.salm_dataset import SALMDataset

from nemo_emmett.data import SpeechTextDataset, get_multimodal_dataloader
from nemo_emmett.data.lengths.counting import TokenCounter
from nemo_emmett.errors import DataError

from .conftest import LOCATOR

SAMPLINGS = ["emmett", "nemo"]


@pytest.fixture
def load(tokenizer):
    """``load(sources, sampling, dataset, **keys)``: a loader of one pass, in order, one example in a batch."""

    def build(sources: list[dict], sampling: str, dataset=None, **keys):
        config = {"prompt_format": "emmett_t5", "audio_locator_tag": LOCATOR, "batch_size": 1, "force_finite": True}
        config |= {"shuffle": False, "seed": 0, "shard_seed": 0, "num_workers": 0, "max_bad_records": None}
        config |= {"input_cfg": sources, **keys}
        dataset = SpeechTextDataset(tokenizer) if dataset is None else dataset
        return get_multimodal_dataloader({**config, "sampling": sampling}, 0, 1, dataset, tokenizer)

    return build


@pytest.fixture
def text(write_lines):
    """A source of three pairs, the second of which holds what is given."""

    def make(source: str = "two", target: str = "zwei") -> dict:
        paths = {"source_paths": ["one", source, "four"], "target_paths": ["eins", target, "vier"]}
        files = {key: str(write_lines(key, lines)) for key, lines in paths.items()}
        return {"type": "parallel_text", **files, "source_lang": "en", "target_lang": "de"}

    return make


def rows(loader) -> list[tuple[list[int], list[int]]]:
    parts = [part for batch in loader for part in batch.values()]
    return [(part["context_ids"][0].tolist(), part["answer_ids"][0].tolist()) for part in parts]


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_our_formats_train_on_the_text(load, text, tokenizer, sampling) -> None:
    """This vocabulary has no pieces to spell them with: each is an unknown word, and no more."""
    eos, unknown, german, one, eins = (tokenizer.token_to_id(t) for t in ("</s>", "<unk>", "<de>", "two", "zwei"))
    loader = load([text(f"two </s> {LOCATOR} <pad>", f"zwei </s> <de> {LOCATOR}")], sampling)
    found = rows(loader)
    assert found[1] == (
        [german, one, unknown, unknown, unknown, eos],
        [eins, unknown, unknown, unknown, eos],
    )
    assert len(found) == 3
    assert loader.skipped_records.count() == 0


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_speech_has_one_locator_whatever_its_texts_say(load, speech, tokenizer, sampling) -> None:
    manifest = speech(2, translations={"de": f"eins {LOCATOR} </s>"}, text=f"one {LOCATOR}")
    source = {"type": "nemo", "manifest_filepath": str(manifest), "target_lang": "de"}
    found = rows(load([source], sampling, token_equivalent_duration=0.08))
    locator, eos = tokenizer.token_to_id(LOCATOR), tokenizer.eos
    assert [([*c, *a].count(locator), a.count(eos)) for c, a in found] == [(1, 1)] * 2


@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize("field", ["context", "system_prompt", "translation"])
def test_nemos_formats_skip_the_record_and_count_its_line(load, speech, tokenizer, sampling, field) -> None:
    manifest = speech(3)
    lines = [json.loads(line) for line in manifest.read_text().splitlines()]
    lines[1] |= {"translations": {"de": "eins </s>"}} if field == "translation" else {field: f"say {LOCATOR}"}
    manifest.write_text("".join(json.dumps(line) + "\n" for line in lines))
    source = {"type": "nemo", "manifest_filepath": str(manifest), "target_lang": "de"}
    keys = {"prompt_format": "plain", "token_equivalent_duration": 0.08}
    loader = load([source], sampling, SALMDataset(tokenizer), **keys)
    assert sum(len(batch["input_ids"]) for batch in loader) == 2
    assert [str(record) for record in loader.skipped_records.first] == [
        f"{manifest}, line 2: text holds a control token"
    ]


def test_a_source_of_such_records_alone_is_told_before_training(load, speech, tokenizer) -> None:
    source = {
        "type": "nemo",
        "manifest_filepath": str(speech(1, translations={"de": "eins </s>"})),
        "target_lang": "de",
    }
    keys = {"prompt_format": "plain", "token_equivalent_duration": 0.08}
    with pytest.raises(DataError, match=r"x text holds a control token\); set prompt_format to one of ours"):
        load([source], "emmett", SALMDataset(tokenizer), **keys)


def test_tokens_are_counted_as_they_are_trained_on(tokenizer) -> None:
    assert TokenCounter(tokenizer).count(["one </s></s> two", "one"]) == [3, 1]
