"""``nemo-emmett init``: what it writes is what the data holds, and trains."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from omegaconf import OmegaConf
from transformers import AutoTokenizer

from nemo_emmett.cli import main
from nemo_emmett.models import load
from nemo_emmett.runner import compose_recipe
from nemo_emmett.training import train

from ..conftest import SENTENCES, write_tone

SECONDS = [0.5 + 0.1 * number for number in range(6)]
ON_CPU = ("trainer.accelerator=cpu", "trainer.devices=1", "trainer.strategy=auto", "trainer.precision=32-true")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch) -> Path:
    """A user's corpus, as FLEURS has it, in a folder with an awkward name."""
    monkeypatch.chdir(tmp_path)
    corpus = Path("my corpus (v1) ü")
    rows = ["id\taudio\tsource\ttarget"]
    pairs = list(zip(SENTENCES["en"], SENTENCES["de"], strict=True))
    for number, (english, german) in enumerate(pairs):
        write_tone(corpus / "audio" / f"clip {number}.wav", SECONDS[number])
        rows.append(f"{number}\taudio/clip {number}.wav\t{english}\t{german}")
    (corpus / "train.tsv").write_text("\n".join([*rows, "6\taudio/gone.wav\tone\teins", "7\tone\teins"]) + "\n")
    (corpus / "short.tsv").write_text("\n".join(rows[:3]) + "\n")
    (corpus / "text.tsv").write_text("\n".join(["source\ttarget", *map("\t".join, pairs)]) + "\n")
    for language in ("en", "de"):
        (corpus / f"text.{language}").write_text("\n".join(SENTENCES[language]) + "\n")
    return corpus


def run(*arguments: object, answers: str | None = None) -> Result:
    return CliRunner().invoke(main, ["init", *map(str, arguments)], input=answers, catch_exceptions=False)


def sentence_of(done: Result) -> str:
    """The one sentence of a refusal."""
    assert done.exit_code == 2
    (line,) = [line for line in done.output.splitlines() if line.startswith("Error: ")]
    return line.removeprefix("Error: ")


def test_an_own_corpus_trains(folder: Path, tiny_t5: Path, tiny_asr: Path) -> None:
    done = run(
        *("my recipe.yaml", "--data", folder / "train.tsv", "--data", folder / "short.tsv"),
        *("--text", folder / "text.en", folder / "text.de", "--from", "en", "--to", "de"),
        *("--dev", folder / "short.tsv", "--dev-text", folder / "text.en", folder / "text.de"),
        *("--backbone", tiny_t5, "--encoder", tiny_asr),
    )
    assert done.exit_code == 0, done.output
    overrides = [*ON_CPU, "trainer.max_steps=2", "trainer.limit_train_batches=2", "data.train_ds.num_workers=0"]
    cfg = compose_recipe("my recipe.yaml", overrides)
    groups, of_text = cfg.data.train_ds, AutoTokenizer.from_pretrained(tiny_t5)
    tokens = {lang: [len(of_text(text).input_ids) for text in SENTENCES[lang]] for lang in ("en", "de")}  # with </s>
    # One bucket up to the longest: of speech in seconds, and the tokens of `<de> <|audio|> </s>` and the answer; of text
    # in the tokens of `<de> text </s>`, and those of the answer.
    longest = [[max(SECONDS), 3 + max(tokens["de"])], [1 + max(tokens["en"]), max(tokens["de"])]]
    assert [OmegaConf.to_container(groups[name].bucket_duration_bins) for name in ("audio", "text")] == [
        [pytest.approx(of_group)] for of_group in longest
    ]
    assert groups.audio.bucket_batch_size == [6 + 2]  # all there is, since 120 s would hold more
    assert groups.text.bucket_batch_size == [6]
    hours = [sum(SECONDS) / 3600, sum(SECONDS[:2]) / 3600]
    assert [source.weight for source in groups.audio.input_cfg] == pytest.approx(hours, rel=1e-3)
    assert [source.paths for source in groups.audio.input_cfg] == [f"{folder}/train.tsv", f"{folder}/short.tsv"]
    text_tokens = sum(map(sum, tokens.values())) - 2 * 6  # without </s>
    for shown in ("train.tsv", "en → de", "skipped: missing audio", "skipped: missing column", str(text_tokens)):
        assert shown in done.output
    assert done.output.rstrip().endswith("Next: nemo-emmett train 'my recipe.yaml'")
    train(cfg)
    assert list(Path("exp/my recipe/checkpoints").glob("*-last.ckpt"))
    assert load("exp/my recipe/model").translate(["one red house"], "en", "de")
