"""Two-step answers in batches: those of speech with a transcript, under all samplers; and their length indexes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from nemo.collections.common.tokenizers import AutoTokenizer
from transformers import AddedToken

from nemo_emmett.data import SpeechTextDataset, get_multimodal_dataloader
from nemo_emmett.data.checks import check_data_config
from nemo_emmett.data.config.dataset_config import parse_dataset
from nemo_emmett.data.lengths.building import open_length_indexes
from nemo_emmett.data.readers.examples import ExampleKind
from nemo_emmett.errors import ConfigError, DataError

SETTINGS = {
    "prompt_format": "emmett_qwen_two_step",
    "audio_locator_tag": "<|audio|>",
    "batch_size": 8,
    "seed": 0,
    "shard_seed": 0,
    "force_finite": True,
    "source_lang": "en",
    "target_lang": "de",
}
WITH, WITHOUT = "one two\neins zwei", "eins zwei"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> AutoTokenizer:
    from tests.prompts.tiny_tokenizers import chat_tokenizer

    folder = tmp_path_factory.mktemp("chat")
    tokenizer = chat_tokenizer(folder)
    tokenizer.add_tokens([AddedToken("<|audio|>", special=True, normalized=False)], special_tokens=True)
    tokenizer.save_pretrained(folder)
    return AutoTokenizer(str(folder), use_fast=True)


@pytest.fixture
def sources(write_tone, write_manifest, write_lines) -> list[dict]:
    """Two recordings, one with a transcript, and two lines of text."""
    record = {"audio_filepath": str(write_tone("a.wav")), "duration": 1.0, "sampling_rate": 16000, "text": "eins zwei"}
    manifest = write_manifest("speech.json", [{**record, "source_text": "one two"}, record])
    text = write_lines("text.tsv", ["one two\teins zwei"] * 2)
    return [
        {"type": "nemo", "manifest_filepath": str(manifest)},
        {"type": "parallel_text", "paths": str(text), "source_column": 0, "target_column": 1},
    ]


@pytest.mark.parametrize("sampling", ["emmett", "nemo"])
def test_speech_with_a_transcript_is_answered_in_two_steps(sources, tokenizer, sampling) -> None:
    section = {**SETTINGS, "input_cfg": sources, "sampling": sampling, "transcripts": True}
    (batch,) = get_multimodal_dataloader(section, 0, 1, SpeechTextDataset(tokenizer), tokenizer)
    found = {
        name: [
            tokenizer.tokenizer.decode(ids[:length]).removesuffix("<|im_end|>\n")
            for ids, length in zip(part["answer_ids"], part["answer_lens"], strict=True)
        ]
        for name, part in batch.items()
    }
    assert sorted(found["audio"]) == sorted([WITH, WITHOUT])
    assert found["text"] == [WITHOUT] * 2
    assert {example["target_text"] for part in batch.values() for example in part["examples"]} == {"eins zwei"}
    # Its transcript is prompted as the text is, whose answer has one step.
    longest = max(range(2), key=batch["audio"]["text_context_lens"].tolist().__getitem__)
    assert batch["audio"]["text_context_ids"][longest].tolist() == batch["text"]["context_ids"][0].tolist()


def test_its_length_index_is_its_own(sources, tokenizer) -> None:
    places = []
    for name in ("emmett_qwen", "emmett_qwen_two_step"):
        section = {**SETTINGS, "prompt_format": name, "input_cfg": sources[:1]}
        groups = parse_dataset(section, "train_ds").groups
        (index,) = open_length_indexes(groups, tokenizer, ExampleKind.TRANSLATION).values()
        places.append(index.sidecar.places[0])
    assert places[0] != places[1]


def test_training_data_without_transcripts_is_refused_and_test_data_is_not(sources) -> None:
    path = Path(sources[0]["manifest_filepath"])
    records = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps({**record, "source_text": None}) + "\n" for record in records))
    section = {**SETTINGS, "input_cfg": sources}
    sentence = (
        r"input_cfg.0: none of the first 2 examples has a transcript \(.*\), but prompt_format: "
        r"emmett_qwen_two_step has answers begin with them; .* or use emmett_qwen\.$"
    )
    with pytest.raises(DataError, match=sentence):
        check_data_config(section)
    check_data_config(section, place="data.test_ds")


def test_nemos_dataset_is_refused(sources) -> None:
    with pytest.raises(ConfigError, match="_two_step needs nemo_emmett's SpeechTextDataset; use emmett_qwen"):
        check_data_config({**SETTINGS, "input_cfg": sources[:1]}, examples=ExampleKind.CONVERSATION)
