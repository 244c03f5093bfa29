"""Mboshi to French, from the published manifests to a BLEU, by the commands of docs/how-to/low-resource-language.md.

The recordings are human speech (arXiv 1710.03501) and no part of the repository: without them these tests are skipped.
"""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from transformers import AutoTokenizer, T5Config, T5ForConditionalGeneration

from nemo_emmett.cli import main
from nemo_emmett.corpora.tokenizers import train_t5_tokenizer
from nemo_emmett.evaluation.results import from_json
from nemo_emmett.runner import compose_recipe
from nemo_emmett.training import train

MBOSHI = Path(__file__).parents[2] / "shared" / "data" / "mboshi"

pytestmark = pytest.mark.skipif(
    not (MBOSHI / "train.jsonl").exists(), reason=f"there is no Mboshi-French corpus in {MBOSHI}"
)

ON_CPU = ("trainer.accelerator=cpu", "trainer.devices=1", "trainer.strategy=auto", "trainer.precision=32-true")
FEW_STEPS = ("trainer.max_steps=2", "trainer.limit_train_batches=2", "data.train_ds.num_workers=0")


def first_records(split: str, number: int) -> list[str]:
    with open(MBOSHI / f"{split}.jsonl", encoding="utf-8") as lines:
        return list(islice(lines, number))


@pytest.fixture
def corpus(tmp_path: Path, monkeypatch) -> Path:
    """The first records of each split, next to the folder that their paths are relative to."""
    monkeypatch.chdir(tmp_path)
    folder = Path("mboshi")
    folder.mkdir()
    (folder / "audio").symlink_to(MBOSHI / "audio", target_is_directory=True)
    for split, number in {"train": 24, "dev": 4, "test": 6}.items():
        (folder / f"{split}.jsonl").write_text("".join(first_records(split, number)), encoding="utf-8")
    return folder


@pytest.fixture
def small_t5(tmp_path: Path) -> Path:
    """A T5 of random weights, with a tokenizer of the French sentences."""
    folder = tmp_path / "t5"
    french = [json.loads(line)["translations"]["fr"] for line in first_records("train", 200)]
    train_t5_tokenizer(french, folder, vocab_size=300, languages=["fr"])
    torch.manual_seed(0)
    size = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 1, "num_heads": 4, "decoder_start_token_id": 0}
    T5ForConditionalGeneration(T5Config(vocab_size=len(AutoTokenizer.from_pretrained(folder)), **size)).save_pretrained(
        folder
    )
    return folder


def run(*arguments: object) -> str:
    done = CliRunner().invoke(main, [*map(str, arguments)], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.output


def test_from_a_manifest_to_a_bleu(corpus: Path, small_t5: Path, tiny_asr: Path) -> None:
    printed = run(
        *("init", "mdw_fr.yaml", "--data", corpus / "train.jsonl", "--dev", corpus / "dev.jsonl"),
        *("--backbone", small_t5, "--encoder", tiny_asr),
    )
    assert "mdw → fr" in printed
    cfg = compose_recipe("mdw_fr.yaml", [*ON_CPU, *FEW_STEPS])
    assert [source.manifest_filepath for source in cfg.data.train_ds.audio.input_cfg] == [f"{corpus}/train.jsonl"]
    train(cfg)
    exported = json.loads(Path("exp/mdw_fr/model/config.json").read_text())
    assert exported["training"]["directions"] == {"audio": [["mdw", "fr"]]}
    assert "Mbosi (mdw)" in Path("exp/mdw_fr/model/README.md").read_text()

    test_set = {"datasets": {"mboshi": {"batch_size": 4, "input_cfg": [{"type": "nemo"}]}}}
    test_set["datasets"]["mboshi"]["input_cfg"][0] |= {
        "manifest_filepath": str(corpus / "test.jsonl"),
        "target_lang": "fra",  # the manifest has fr
    }
    Path("test.yaml").write_text(json.dumps({"test_ds": test_set}))
    run("evaluate", "exp/mdw_fr/model", "test.yaml", "--output", "scores", "--num-beams", 1, "--max-new-tokens", 12)
    (score,) = from_json("scores/evaluation.json").scores
    assert (score.direction, score.modality, score.sentences) == (("mdw", "fr"), "audio", 6)
    assert 0 <= score.bleu <= 100
    assert [one.reference for one in from_json("scores/evaluation.json").translations] == [
        json.loads(line)["translations"]["fr"] for line in first_records("test", 6)
    ]
