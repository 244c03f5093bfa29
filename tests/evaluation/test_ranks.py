"""Several processes share an evaluation: what comes out is what one process finds, and each sentence counts once."""

from __future__ import annotations

import json
import os
import socket
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lhotse import Recording
from omegaconf import OmegaConf

from nemo_emmett.data.sampling.shard_batches import ShardedBatches
from nemo_emmett.errors import ConfigError, DataError
from nemo_emmett.evaluation import evaluate, from_json
from nemo_emmett.evaluation.distributed import ProcessGroup, process_group
from nemo_emmett.evaluation.run import _merge, _RankOutput
from nemo_emmett.evaluation.translation import Translated
from nemo_emmett.models import SALMT5

from ..conftest import SENTENCES
from ..fork_server import fork_server, print_to

RANKS = 2
SECONDS_TO_END = 120


def run_on_ranks(job: Callable[..., None], folder: Path, *arguments: Any) -> list[str]:
    """Call ``job(rank, *arguments)`` in processes such as torchrun starts; what each of them printed."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = fork_server()
    logs = [folder / f"rank{rank}.log" for rank in range(RANKS)]
    ranks = [context.Process(target=_rank, args=(rank, port, log, job, arguments)) for rank, log in enumerate(logs)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(SECONDS_TO_END)
        process.kill()
        process.join()
    printed = [log.read_text() for log in logs]
    assert [process.exitcode for process in ranks] == [0] * RANKS, "\n".join(text[-5000:] for text in printed)
    return printed


def _rank(rank: int, port: int, log: Path, job: Callable[..., None], arguments: tuple) -> None:
    print_to(log)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_RUN_ID": "test"}
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(RANKS), "LOCAL_RANK": str(rank)}
    job(rank, *arguments)


@pytest.fixture(scope="module")
def recipe(tiny_corpus, tmp_path_factory) -> dict:
    """Test sets of 3 and 1 batches of text, and of 3 of speech, of which the second cannot be read at all."""
    folder = tmp_path_factory.mktemp("recipe")
    records = [json.loads(line) for line in (tiny_corpus / "speech" / "train.en.jsonl").read_text().splitlines()]
    for record in records:
        record["audio_filepath"] = str(tiny_corpus / "audio" / Path(record["audio_filepath"]).name)
    for record in records[2:4]:
        record["audio_filepath"] = str(folder / "gone.wav")
        Path(record["audio_filepath"]).write_bytes(b"no sound")
    lines = [json.dumps(record) for record in records]
    (folder / "speech.jsonl").write_text("\n".join([*lines[:1], "{", *lines[1:]]) + "\n")
    (folder / "one.en").write_text("one\n")
    (folder / "one.de").write_text("eins\n")
    text = {language: str(tiny_corpus / "text" / f"train.{language}") for language in ("en", "de")}
    few = {language: str(folder / f"one.{language}") for language in ("en", "de")}
    return {
        "test_ds": {
            "batch_size": 2,
            "num_workers": 0,
            "max_bad_records": None,
            "datasets": {
                "texts": {"batch_size": 5, "input_cfg": [{"type": "parallel_text", "paths": text}]},
                "few": {"input_cfg": [{"type": "parallel_text", "paths": few}], "batch_size": 2},
                "talks": {"input_cfg": [{"type": "nemo", "manifest_filepath": str(folder / "speech.jsonl")}]},
            },
        }
    }


@pytest.fixture
def model_folder(salm_t5_config, tmp_path) -> Path:
    model = SALMT5(salm_t5_config)
    torch.manual_seed(0)
    for parameter in model.llm.parameters():
        torch.nn.init.normal_(parameter, std=0.5)  # so that it says something, of each input something else
    model.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def evaluate_recorded(rank: int, model: Path, recipe: dict, output: Path) -> None:
    """Evaluate, and write down which recordings this process reads."""
    load_audio, read = Recording.load_audio, []

    def recorded(self, *arguments, **options):
        read.append(str(self.sources[0].source))
        return load_audio(self, *arguments, **options)

    Recording.load_audio = recorded
    try:
        evaluation = evaluate(model, OmegaConf.create(recipe), output=output)
    finally:
        Recording.load_audio = load_audio
    assert (evaluation is None) == (rank > 0)
    output.mkdir(exist_ok=True)
    (output / f"read{rank}.json").write_text(json.dumps(read))


def test_two_ranks_find_what_one_process_finds(model_folder, recipe, tmp_path):
    evaluate_recorded(0, model_folder, recipe, tmp_path / "alone")

    printed = run_on_ranks(evaluate_recorded, tmp_path, model_folder, recipe, tmp_path / "shared")

    alone, shared = (from_json(tmp_path / name / "evaluation.json") for name in ("alone", "shared"))
    assert shared.translations == alone.translations
    assert shared.scores == alone.scores
    assert Counter(one.test_set for one in alone.translations) == {
        "texts": 12,
        "few": 2,
        "talks": len(SENTENCES["en"]) - 2,
    }
    assert len({one.hypothesis for one in alone.translations}) > 10
    # Two recordings that one rank each has skipped, and a line that both have.
    assert alone.skipped == shared.skipped == {"talks": 3}

    records = [json.loads((tmp_path / name / "evaluation.json").read_text()) for name in ("alone", "shared")]
    of_one, of_both = [
        {key: value for key, value in record.items() if key not in ("date", "command", "throughput")}
        for record in records
    ]
    assert of_both == of_one
    for modality, speed in alone.throughput.items():
        together = shared.throughput[modality]
        assert (together.sentences, together.tokens) == (speed.sentences, speed.tokens)
        assert together.audio_seconds == pytest.approx(speed.audio_seconds)
    # The second batch of speech, the other rank's, holds nothing that can be read.
    assert {modality: speed.processes for modality, speed in shared.throughput.items()} == {"text": 2, "audio": 1}
    for name in ("few.text.en-de.hyp", "talks.audio.en-de.ref"):
        kept = [(tmp_path / of_each / "hypotheses" / name).read_text() for of_each in ("alone", "shared")]
        assert kept[0] == kept[1]

    reads = [json.loads((tmp_path / "shared" / f"read{rank}.json").read_text()) for rank in range(RANKS)]
    whole = json.loads((tmp_path / "alone" / "read0.json").read_text())
    assert Counter(reads[0]) + Counter(reads[1]) == Counter(whole)
    assert set(reads[0]).isdisjoint(reads[1])
    assert ["average" in text for text in printed] == [True, False]


# What they do when something differs


def test_ranks_that_read_in_different_orders_are_refused():
    outputs = [_RankOutput(Translated({}, {}), {"news": order}, {"news": frozenset()}) for order in ("a", "b")]
    _merge(outputs[:1])
    with pytest.raises(DataError, match="test set 'news' in different orders"):
        _merge(outputs)


def test_a_record_that_several_ranks_skipped_counts_once():
    skipped = [{("m", "line 2"), ("m", "line 5")}, {("m", "line 2"), ("n", "line 2")}]
    outputs = [
        _RankOutput(Translated({}, {}), {}, {"news": frozenset(records), "talks": frozenset()}) for records in skipped
    ]
    _, counts = _merge(outputs)
    assert counts == {"news": 3}


def test_batches_are_dealt_in_turns_and_their_order_is_the_same_to_all():
    batches = [list("ab"), list("cd"), list("e"), list("fg"), list("h")]
    dealt = [ShardedBatches(batches, rank, 3) for rank in range(3)]
    assert [list(of_rank) for of_rank in dealt] == [batches[0::3], batches[1::3], batches[2::3]]
    assert len({of_rank.order for of_rank in dealt}) == 1
    other = ShardedBatches(batches[::-1], 0, 3)
    list(other)
    assert other.order != dealt[0].order


def test_test_sets_that_nemo_does_not_sample_cannot_be_dealt_out(model_folder, recipe):
    config = OmegaConf.create(recipe)
    config.test_ds.datasets.few.sampling = "emmett"
    with pytest.raises(ConfigError, match=r"data\.test_ds\.datasets\.few\.sampling: batches are dealt out from NeMo's"):
        evaluate(model_folder, config)


def test_a_process_alone_gathers_from_itself():
    with process_group() as processes:
        assert processes == ProcessGroup(rank=0, world_size=1)
        assert processes.gather("all") == ["all"]
