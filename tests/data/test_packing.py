"""Packed batches from recipe to tensors: what is in a row fits into it, a pass has every example once, and what cannot
be packed is refused or reported."""

from __future__ import annotations

import gzip
import logging as python_logging
from itertools import islice

import pytest
import torch
from nemo.collections.common.tokenizers import AutoTokenizer

from nemo_emmett.data import SpeechTextDataset, get_multimodal_dataloader
from nemo_emmett.data.config.dataset_config import parse_dataset
from nemo_emmett.errors import ConfigError
from nemo_emmett.models import SALMT5
from nemo_emmett.models.head import answer_scores

from ..prompts.tiny_tokenizers import chat_tokenizer
from .corpora import Corpus, ids_of

COMMON = {
    "prompt_format": "emmett_t5",
    "audio_locator_tag": "<|audio|>",
    "shuffle": True,
    "seed": 1,
    "shard_seed": 1,
    "force_finite": True,
}
ROWS = {"packing": True, "row_tokens": 40, "batch_size": 3}
SPEECH = {**ROWS, "token_equivalent_duration": 0.08}


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> dict[str, dict]:
    corpus = Corpus(tmp_path_factory.mktemp("packed"), seconds=(0.3, 2.0))
    return {"speech": corpus.source("speech_de", 60), "text": corpus.source("text_de", 300)}


def config_of(source: dict, **keys) -> dict:
    return {**COMMON, "input_cfg": [source], **keys}


def loader(config: dict, tokenizer, rank: int = 0, world_size: int = 1):
    return get_multimodal_dataloader(config, rank, world_size, SpeechTextDataset(tokenizer), tokenizer)


@pytest.mark.parametrize("modality", ["text", "speech"])
def test_a_pass_has_every_example_once_in_rows_that_hold_it(sources, tokenizer, modality) -> None:
    key = "audio" if modality == "speech" else "text"
    config = config_of(sources[modality], **(SPEECH if modality == "speech" else ROWS))
    seen = []
    for batch in loader(config, tokenizer):
        part = batch[key]
        rows, (number, size, answers) = part["packed_rows"], part["packed_sizes"]
        assert rows.tolist() == sorted(rows.tolist())
        assert set(rows.tolist()) == set(range(number))
        assert number <= 3
        assert size == 40
        positions = part["context_lens"].clone()
        if modality == "speech":
            positions += torch.ceil((part["audio_lens"] // 160 + 1) / 8).long() - 1
        assert torch.bincount(rows, positions).max() <= 40
        assert torch.bincount(rows, part["answer_lens"]).max() == answers <= 40
        seen += ids_of(batch)
    unpacked = [i for batch in loader(config_of(sources[modality], batch_size=7), tokenizer) for i in ids_of(batch)]
    assert sorted(seen) == sorted(unpacked)


def test_decoder_only_formats_count_contexts_and_answers_together(sources, tmp_path) -> None:
    chat_tokenizer(tmp_path).save_pretrained(tmp_path)
    chat = AutoTokenizer(str(tmp_path), use_fast=True)
    config = {**config_of(sources["text"], **ROWS), "prompt_format": "emmett_qwen", "row_tokens": 90}
    for batch in islice(loader(config, chat), 5):
        part = batch["text"]
        assert torch.bincount(part["packed_rows"], part["context_lens"] + part["answer_lens"]).max() <= 90
    with pytest.raises(ConfigError, match=r"row_tokens: \[90, 40\] is for an encoder-decoder"):
        loader({**config, "row_tokens": [90, 40]}, chat)


def test_examples_longer_than_a_row_are_left_out_and_counted(sources, tokenizer, caplog) -> None:
    config = config_of(sources["text"], **{**ROWS, "row_tokens": 9})
    whole, found = loader(config_of(sources["text"], batch_size=7), tokenizer), loader(config, tokenizer)
    parts = [batch["text"] for batch in whole]
    lens = [n for p in parts for n in torch.maximum(p["context_lens"], p["answer_lens"]).tolist()]
    logger = python_logging.getLogger("nemo_logger")
    logger.addHandler(caplog.handler)
    try:
        kept = sum(len(ids_of(batch)) for batch in found)
    finally:
        logger.removeHandler(caplog.handler)
    assert kept == sum(n <= 9 for n in lens) < len(lens)
    assert f"{len(lens) - kept:,} by row_tokens" in caplog.text


def test_recordings_that_cannot_be_read_leave_rows_without_gaps(tmp_path, tokenizer) -> None:
    corpus = Corpus(tmp_path, seconds=(0.8, 1.0))
    config = config_of(corpus.source("speech_de", 20), **SPEECH) | {"max_bad_records": None}
    batches = list(loader(config, tokenizer))
    gone = [number for batch in batches[:1] for number in batch["audio"]["packed_rows"].tolist()].count(0)
    for one in batches[0]["audio"]["examples"][:gone]:  # the whole of a row
        open(one["audio_path"], "wb").close()
    first = next(iter(loader(config, tokenizer)))["audio"]
    assert first["packed_rows"].tolist()[0] == 0
    assert first["packed_sizes"][0] == batches[0]["audio"]["packed_sizes"][0] - 1
    assert len(first["packed_rows"]) == len(batches[0]["audio"]["packed_rows"]) - gone


def test_a_model_reads_packed_batches_as_it_reads_padded_ones(recipe, salm_t5_config) -> None:
    """Also where recordings are longer than the index says: the encoder's frames decide."""
    torch.manual_seed(0)
    model = SALMT5(salm_t5_config).eval()
    data = recipe["data"]["train_ds"]
    for name, modality in (("audio", "audio"), ("text", "text")):
        rows = {"packing": True, "row_tokens": 60, "batch_size": 2, "token_equivalent_duration": 0.08}
        config = {**COMMON, "prompt_format": "emmett_t5", "input_cfg": data[name]["input_cfg"], **rows}
        config |= {key: data[key] for key in ("source_lang", "target_lang") if key in data}
        loss = {}
        batches = {
            True: list(loader(config, model.tokenizer)),
            False: list(
                loader({k: v for k, v in config.items() if k not in ("packing", "row_tokens")}, model.tokenizer)
            ),
        }
        for packed, found in batches.items():
            for batch in found:
                part = batch[modality]
                assert ("packed_rows" in part) == packed
                scores = answer_scores(model.llm, model.llm_inputs(part))[0].sum(1)
                for example, score in zip(part["examples"], scores.tolist(), strict=True):
                    loss.setdefault((example["id"], example["target_lang"]), []).append(score)
        assert len(loss) > 4
        assert all(len(pair) == 2 and pair[0] == pytest.approx(pair[1], rel=1e-4) for pair in loss.values())


def test_two_groups_of_text_keep_their_rows_apart(sources, tokenizer) -> None:
    groups = {name: {"input_cfg": [sources["text"]], **ROWS} for name in ("one", "two")}
    config = {**COMMON, "multi_config": True, "sampler_fusion": "zip", **groups}
    for batch in islice(loader(config, tokenizer), 5):
        part = batch["text"]
        assert part["packed_sizes"][:2] == (6, 40)
        assert torch.bincount(part["packed_rows"], part["context_lens"]).max() <= 40
        assert torch.bincount(part["packed_rows"], part["answer_lens"]).max() <= 40
    config["two"] = {"input_cfg": [sources["text"]], "batch_size": 3}
    with pytest.raises(ConfigError, match=r"data.train_ds.two.packing: groups of text are joined in a step of zip"):
        parse_dataset(config, "data.train_ds")


REFUSED = {
    r"row_tokens: has a meaning with packing: true alone": {"row_tokens": 40, "batch_size": 3},
    r"packing: needs row_tokens": {"packing": True, "batch_size": 3},
    r"packing: needs batch_size": {"packing": True, "row_tokens": 40},
    r"bucket_batch_size: cannot be combined with packing": {
        **ROWS,
        "bucket_duration_bins": [5, 9],
        "bucket_batch_size": [3, 2],
    },
    r"batch_tokens: cannot be combined with packing": {**ROWS, "batch_tokens": 100},
    r"pretokenize: packing needs tokens": {**ROWS, "pretokenize": False},
    r"row_tokens: 0 cannot be used": {**ROWS, "row_tokens": 0},
    r"row_tokens: \[40, 20, 10\] cannot be used": {**ROWS, "row_tokens": [40, 20, 10]},
    r"packing: 'yes' cannot be used": {**ROWS, "packing": "yes"},
}


@pytest.mark.parametrize("message", REFUSED)
def test_keys_that_do_not_go_together_are_refused(sources, message) -> None:
    with pytest.raises(ConfigError, match=rf"^data.train_ds.{message}"):
        parse_dataset(config_of(sources["text"], **REFUSED[message]), "data.train_ds")


def test_sources_that_cannot_share_rows_are_refused(sources, tokenizer) -> None:
    with pytest.raises(ConfigError, match="packing: rows hold speech or text, and this group has both"):
        parse_dataset({**COMMON, "input_cfg": list(sources.values()), **SPEECH}, "data.train_ds")
    with pytest.raises(ConfigError, match="packing: needs token_equivalent_duration for speech"):
        loader(config_of(sources["speech"], **ROWS), tokenizer)
    above = {**COMMON, "multi_config": True, "sampler_fusion": "zip", "a": {"input_cfg": [sources["text"]]}, **ROWS}
    with pytest.raises(ConfigError, match=r"^data.train_ds.packing: is a key of a group"):
        parse_dataset(above, "data.train_ds")
    conversations = {"type": "lhotse_as_conversation", "cuts_path": "cuts.jsonl"}
    with pytest.raises(ConfigError, match="type: lhotse_as_conversation cannot be packed"):
        parse_dataset(config_of(conversations, **SPEECH), "data.train_ds")
    with pytest.raises(ConfigError, match=r"packing: NeMo's samplers do not have it"):
        loader(config_of(sources["text"], **ROWS, sampling="nemo"), tokenizer)


def test_data_that_can_only_be_streamed_cannot_be_packed(tmp_path, tokenizer) -> None:
    source = Corpus(tmp_path).source("text_de", 30)
    for key in ("source_paths", "target_paths"):
        with open(source[key], "rb") as plain, gzip.open(f"{source[key]}.gz", "wb") as packed:
            packed.write(plain.read())
        source[key] += ".gz"
    with pytest.raises(ConfigError, match="packing: needs data that can be read at any place"):
        loader(config_of(source, **ROWS), tokenizer)
