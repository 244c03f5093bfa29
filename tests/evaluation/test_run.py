"""From a recipe's test sets and a model to the table, the JSON and the page, through the real dataloader."""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from nemo.collections.common.tokenizers import AutoTokenizer
from omegaconf import OmegaConf
from rich.console import Console
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch.utils.tensorboard import SummaryWriter
from transformers import PreTrainedTokenizerFast

from nemo_emmett.errors import EXIT_NOT_WRITTEN, ConfigError, DataError, ModelError, OutputError
from nemo_emmett.evaluation import evaluate, evaluate_recipe, from_json, run, significance
from nemo_emmett.models.card import model_card

from ..conftest import fill
from .samples import DIRECTIONS, LANGUAGES, SAMPLING_RATE, SENTENCES, sentence, tone

LOCATOR = "<|audio|>"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> AutoTokenizer:
    """A tokenizer with every word of the test sets."""
    folder = tmp_path_factory.mktemp("tokenizer")
    words = {word for lang in LANGUAGES for number in range(SENTENCES) for word in sentence(number, lang).split()}
    vocabulary = ["<pad>", "</s>", "<unk>", LOCATOR, *(f"<{lang}>" for lang in LANGUAGES), *sorted(words)]
    words = Tokenizer(WordLevel({word: number for number, word in enumerate(vocabulary)}, unk_token="<unk>"))
    words.pre_tokenizer = WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder)
    tokenizer = AutoTokenizer(str(folder), use_fast=True)
    tokenizer.tokenizer.add_tokens([LOCATOR], special_tokens=True)
    return tokenizer


@pytest.fixture(autouse=True)
def few_resamples(monkeypatch):
    """What a thousand find is the matter of test_significance."""
    monkeypatch.setattr(significance, "RESAMPLES", 20)


class Oracle:
    """Returns the references; for speech without the last word."""

    device = torch.device("cpu")
    pad_id = 0
    sampling_rate = SAMPLING_RATE
    data_defaults = {"sample_rate": SAMPLING_RATE}  # noqa: RUF012

    def __init__(self, tokenizer) -> None:
        self.tokenizer = tokenizer

    def to(self, device):
        return self

    def translate_batch(self, batch, num_beams=1, max_new_tokens=None):
        references = [example["target_text"] for example in batch["examples"]]
        return [one.rsplit(" ", 1)[0] for one in references] if "audios" in batch else references


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    """Text and speech in twelve directions; the file of a recipe with ``data.test_ds``."""
    folder = tmp_path_factory.mktemp("data")
    pairs, manifest = [], []
    for source, target in DIRECTIONS:
        for number in range(SENTENCES):
            texts = {"source": sentence(number, source), "target": sentence(number, target)}
            pairs.append({**texts, "source_lang": source, "target_lang": target})
            audio = tone(folder / f"{source}{number}.wav", hertz=200 + 50 * number)
            manifest.append(
                {
                    "audio_filepath": str(audio),
                    "duration": 0.1,
                    "text": texts["target"],
                    "source_lang": source,
                    "target_lang": target,
                }
            )
    for name, records in {"pairs.jsonl": pairs, "manifest.json": manifest}.items():
        (folder / name).write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    test_ds = {
        "batch_size": 5,
        "num_workers": 0,
        "shuffle": False,
        "prompt_format": "emmett_t5",
        "audio_locator_tag": "${tag}",
        "datasets": {
            "test_text": {"input_cfg": [{"type": "parallel_text", "paths": str(folder / "pairs.jsonl")}]},
            "test_speech": {"input_cfg": [{"type": "nemo", "manifest_filepath": str(folder / "manifest.json")}]},
        },
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump({"tag": LOCATOR, "data": {"test_ds": test_ds}}))
    return path


def test_a_recipe_becomes_a_table_a_json_file_and_a_page(recipe, tokenizer, tmp_path):
    logs = SummaryWriter(str(tmp_path / "logs"))
    for step in range(3):
        logs.add_scalar("loss_text", 3.0 - step, step)
    logs.close()
    terminal = io.StringIO()

    evaluation = evaluate(
        Oracle(tokenizer),
        recipe,
        output=tmp_path / "out",
        log_dir=tmp_path / "logs",
        console=Console(file=terminal, width=100),
    )

    assert len(evaluation.translations) == 2 * 12 * SENTENCES
    assert len(evaluation.scores) == 2 * 12
    text = [one for one in evaluation.scores if one.modality == "text"]
    speech = [one for one in evaluation.scores if one.modality == "audio"]
    assert all(one.bleu == pytest.approx(100.0) and one.sentences == SENTENCES for one in text)
    # The last of eight words is missing: precisions are perfect, the brevity penalty is exp(1 - 8/7).
    assert all(one.bleu == pytest.approx(100 * 2.718281828459045 ** (1 - 8 / 7)) for one in speech)
    assert evaluation.throughput["audio"].audio_seconds == pytest.approx(12 * SENTENCES * 0.1)
    assert evaluation.config["audio_locator_tag"] == LOCATOR
    assert from_json(tmp_path / "out" / "evaluation.json") == evaluation
    # Each word is one token, eight to a sentence.
    assert (evaluation.throughput["text"].tokens, evaluation.throughput["audio"].tokens) == (36 * 8, 36 * 7)
    assert len(list((tmp_path / "out" / "hypotheses").iterdir())) == 2 * 12 * 2
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert page.count("<audio controls") >= 10
    assert "Training loss" in page
    assert "│ average   │ 36 │ 100.0 │  100.0 │" in terminal.getvalue()


def test_the_config_is_left_as_it_was_and_may_hold_test_ds_at_its_top(recipe, tokenizer, tmp_path):
    whole = OmegaConf.load(recipe)
    config = OmegaConf.create({"tag": LOCATOR, "test_ds": whole.data.test_ds})
    del config.test_ds.datasets["test_speech"]
    before = OmegaConf.to_yaml(config)
    evaluation = evaluate(Oracle(tokenizer), config, console=Console(file=io.StringIO()))
    assert OmegaConf.to_yaml(config) == before
    assert {one.modality for one in evaluation.scores} == {"text"}
    assert list(tmp_path.iterdir()) == []


def test_an_earlier_evaluation_is_the_baseline_of_a_later(recipe, tokenizer, tmp_path):
    evaluate(Oracle(tokenizer), recipe, output=tmp_path / "before", console=Console(file=io.StringIO()))
    terminal = io.StringIO()
    evaluate(
        Oracle(tokenizer),
        recipe,
        name="after",
        baselines=[tmp_path / "before" / "evaluation.json"],
        console=Console(file=terminal, width=120),
    )
    assert terminal.getvalue().count("+0.0 ") == 2 * 13


class Deaf(Oracle):
    """Leaves out the first words of texts, too."""

    def translate_batch(self, batch, num_beams=1, max_new_tokens=None):
        found = super().translate_batch(batch)
        return found if "audios" in batch else [one.split(" ", 2)[-1] for one in found]


def test_the_folder_of_another_model_is_evaluated_first_and_its_result_kept(recipe, tokenizer, tmp_path, monkeypatch):
    other = tmp_path / "exp" / "other"
    other.mkdir(parents=True)
    (other / "config.json").touch()
    monkeypatch.setattr(run, "load", lambda folder: Deaf(tokenizer))
    quiet = Console(file=io.StringIO())

    evaluation = evaluate(Oracle(tokenizer), recipe, output=tmp_path / "out", baselines=[other], console=quiet)

    kept = from_json(tmp_path / "out" / "baselines" / "exp_other" / "evaluation.json")
    assert (kept.name, kept.model, evaluation.name) == ("exp/other", str(other), "Oracle")
    assert (tmp_path / "out" / "baselines" / "exp_other" / "hypotheses" / "test_text.text.de-en.hyp").exists()
    by_modality = {}
    for one in evaluation.comparisons:
        by_modality.setdefault((one.modality, one.metric), []).append(one)
    assert {key: len(of_key) for key, of_key in by_modality.items()} == {
        (modality, metric): 12 for modality in ("text", "audio") for metric in ("BLEU", "chrF++")
    }
    assert all(one.difference > 10 and one.baseline == "exp/other" for one in by_modality["text", "BLEU"])
    assert all((one.difference, one.p_value) == (0.0, 1.0) for one in by_modality["audio", "BLEU"])

    again = evaluate(Oracle(tokenizer), recipe, baselines=[tmp_path / "out" / "baselines" / "exp_other"], console=quiet)
    assert again.comparisons == evaluation.comparisons


def test_baselines_of_one_name_get_numbers(recipe, tokenizer, tmp_path):
    quiet = Console(file=io.StringIO())
    evaluate(Oracle(tokenizer), recipe, output=tmp_path, console=quiet)
    evaluation = evaluate(Oracle(tokenizer), recipe, baselines=[tmp_path, tmp_path], console=quiet)
    assert {one.baseline for one in evaluation.comparisons} == {"Oracle (2)", "Oracle (3)"}


def test_a_baseline_that_does_not_compare_costs_no_translations(recipe, tokenizer, tmp_path):
    quiet = Console(file=io.StringIO())
    config = OmegaConf.load(recipe)
    del config.data.test_ds.datasets["test_text"]
    evaluate(Oracle(tokenizer), config, output=tmp_path / "speech", console=quiet)
    config = OmegaConf.load(recipe)
    del config.data.test_ds.datasets["test_speech"]
    with pytest.raises(DataError, match="no common direction"):
        evaluate(Oracle(tokenizer), config, output=tmp_path, baselines=[tmp_path / "speech"], console=quiet)
    assert len(from_json(tmp_path / "evaluation.json").translations) == 12 * SENTENCES


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (None, "cannot be read"),
        ("a: [", "is not YAML"),
        ("- a", "holds a list"),
        (
            "data: {train_ds: {}}",
            "data.test_ds.datasets is missing in .*, which a recipe names as `test_ds: {datasets: ",
        ),
        ("data: {validation_ds: {datasets: {}}}", r"or copy its data\.validation_ds under the name test_ds"),
        ("test_ds: {batch_size: 1}", "data.test_ds.datasets is missing in"),
        ("test_ds: 3", "data.test_ds.datasets is missing in"),
        ("test_ds: {datasets: [a, b]}", "or holds no keys"),
        (b"\xff\xfea", "is not YAML"),
        ("test_ds: ${nowhere}", "test_ds: Interpolation key 'nowhere' not found"),
        ("test_ds: {datasets: {a: {input_cfg: '${nowhere}'}}}", "test_ds: Interpolation key 'nowhere' not found"),
    ],
)
def test_a_config_without_test_sets_is_refused_before_the_model_is_loaded(content, sentence, tmp_path):
    path = tmp_path / "recipe.yaml"
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ConfigError, match=sentence):
        evaluate(tmp_path / "no_model", path)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"num_beams": 0}, "num_beams: 0 cannot be used; give a whole number from 1"),
        ({"num_beams": "two"}, "num_beams: 'two' cannot be used; give a whole number"),
        ({"max_new_tokens": 0}, "max_new_tokens: 0 cannot be used; give a whole number from 1, or null"),
        ({"examples": -1}, "examples: -1 cannot be used; give a whole number from 0"),
        ({"examples": True}, "examples: True cannot be used"),
        ({"trust_remote_code": "false"}, "trust_remote_code: 'false' cannot be used; give true or false"),
        ({"metrics": 3}, "metrics: 3 cannot be used; give a list"),
        ({"metrics": "BLEU"}, "metrics: 'BLEU' cannot be used; give a list"),
        ({"metrics": {"BLEU": 1}}, "metrics: .* cannot be used; give a list"),
        ({"name": 3}, "name: 3 cannot be used; give a text, or null"),
        ({"output": ["exp"]}, "output: .* cannot be used; give a path, or null"),
        ({"log_dir": 3}, "log_dir: 3 cannot be used; give a path, or null"),
        ({"baseline": {"exp": 1}}, "baseline: .* cannot be used; give a path, or a list, each item a path, or null"),
        ({"baseline": ["exp", 3]}, "baseline.1: 3 cannot be used; give a path"),
        ({"output": "???"}, r"output: \?\?\? has to be replaced by a value"),
        ({"num_beams": "${nowhere}"}, "num_beams: Interpolation key 'nowhere' not found"),
        ({"outptu": "exp"}, "there is no such key; did you mean 'output'"),
    ],
)
def test_a_value_that_cannot_be_used_is_refused_before_the_model_is_loaded(settings, sentence, recipe, tmp_path):
    config = OmegaConf.create({"tag": LOCATOR, "test_ds": OmegaConf.load(recipe).data.test_ds, **settings})
    with pytest.raises(ConfigError, match=sentence):
        evaluate_recipe(config, tmp_path / "no_model")


def test_a_folder_that_cannot_be_written_to_is_refused_before_the_model_is_loaded(recipe, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"output: '.*file/out' cannot be written to \(Not a directory\)"):
        evaluate(tmp_path / "no_model", recipe, output=tmp_path / "file" / "out")


def test_baselines_that_share_a_name_are_kept_each_in_its_folder(recipe, tokenizer, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    others = [Path(place, "salm", "model") for place in ("one", "two")]
    for other in others:
        other.mkdir(parents=True)
        (other / "config.json").touch()
    monkeypatch.setattr(run, "load", lambda folder: Oracle(tokenizer))
    quiet = Console(file=io.StringIO())
    evaluate(Oracle(tokenizer), recipe, output="out", baselines=others, console=quiet)
    kept = [from_json(Path("out", "baselines", name, "evaluation.json")) for name in ("salm_model", "salm_model-2")]
    assert [one.model for one in kept] == [str(other) for other in others]


@pytest.mark.parametrize("with_baseline", [False, True])
def test_translations_that_find_the_disk_full_are_elsewhere(
    recipe, tokenizer, small_disk, tmp_path, monkeypatch, with_baseline
):
    disk = small_disk("2m")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").touch()

    class Filling(Oracle):
        def translate_batch(self, batch, **options):
            fill(disk)
            return super().translate_batch(batch, **options)

    monkeypatch.setattr(run, "load", lambda folder: Filling(tokenizer))
    terminal = io.StringIO()
    baselines = [tmp_path / "other"] if with_baseline else []
    console = Console(file=terminal)
    with pytest.raises(OutputError) as error:
        evaluate(Filling(tokenizer), recipe, output=disk / "out", baselines=baselines, console=console)
    said = re.fullmatch(
        rf"output: '{disk}/out' could not be written to \(No space left on device\); translations and scores are in "
        rf"'({tmp_path}/evaluation-\w+)'\.",
        str(error.value),
    )
    assert said, str(error.value)
    assert error.value.exit_code == EXIT_NOT_WRITTEN
    kept = Path(said[1])
    assert max(score.bleu for score in from_json(kept / "evaluation.json").scores) == pytest.approx(100)
    assert (kept / "report.html").exists()
    assert sum(1 for _ in (kept / "hypotheses").glob("*.hyp")) == 2 * len(DIRECTIONS)
    assert with_baseline == (len(list((kept / "baselines").glob("*/evaluation.json"))) == 1)
    assert "direction" in terminal.getvalue()


def test_a_page_that_cannot_be_written_costs_neither_scores_nor_table(recipe, tokenizer, tmp_path, monkeypatch):
    def write_report(*arguments, **options) -> None:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(run, "write_report", write_report)
    terminal = io.StringIO()
    with pytest.raises(OutputError, match=rf"\(No space left on device\); translations and scores are in '{tmp_path}'"):
        evaluate(Oracle(tokenizer), recipe, output=tmp_path, console=Console(file=terminal))
    assert from_json(tmp_path / "evaluation.json").scores
    assert "direction" in terminal.getvalue()


def test_a_second_evaluation_in_a_folder_is_refused(recipe, tmp_path):
    code = "import sys, time; from nemo_emmett.files import hold_folder\nwith hold_folder(sys.argv[1]):\n"
    code += "    print(flush=True); time.sleep(600)"
    with subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE) as first:
        first.stdout.readline()
        try:
            with pytest.raises(ConfigError, match=rf"output: '{tmp_path}' is in use by process {first.pid} on"):
                evaluate(tmp_path / "no_model", recipe, output=tmp_path)
        finally:
            first.kill()


def test_a_model_in_the_working_folder_is_called_as_from_elsewhere(recipe, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(run, "load", lambda folder: Oracle(tokenizer))
    folder = tmp_path / "salm" / "model"
    folder.mkdir(parents=True)
    monkeypatch.chdir(folder)
    names = [evaluate(place, recipe, console=Console(file=io.StringIO())).name for place in (".", "../model")]
    assert names == ["salm/model"] * 2


def test_a_missing_baseline_is_refused_before_the_model_is_loaded(recipe, tmp_path):
    with pytest.raises(DataError, match=r"evaluation .*baseline\.json cannot be read"):
        evaluate(tmp_path / "no_model", recipe, baselines=[tmp_path / "baseline.json"])
    with pytest.raises(DataError, match=r"holds neither an evaluation.json nor an exported model"):
        evaluate(tmp_path / "no_model", recipe, baselines=[tmp_path])


def test_importing_the_package_imports_neither_torch_nor_nemo():
    program = "import nemo_emmett.evaluation, sys; assert not {'torch', 'nemo', 'sacrebleu'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True)


def test_unreadable_records_of_a_test_set_are_reported(recipe, tokenizer, tmp_path):
    config = OmegaConf.load(recipe)
    manifest = config.data.test_ds.datasets.test_speech.input_cfg[0].manifest_filepath
    lines = Path(manifest).read_text().splitlines()
    damaged = tmp_path / "damaged.json"
    damaged.write_text("\n".join([*lines[:-1], lines[-1].replace(".wav", ".gone.wav"), "{"]) + "\n")
    config.data.test_ds.datasets.test_speech.input_cfg[0].manifest_filepath = str(damaged)
    terminal = io.StringIO()
    evaluation = evaluate(Oracle(tokenizer), config, output=tmp_path, console=Console(file=terminal, width=100))
    assert evaluation.skipped == {"test_speech": 2}
    report = "test_speech: 2 records could not be read and are not scored"
    assert report in terminal.getvalue()
    assert report in (tmp_path / "report.html").read_text()
    assert from_json(tmp_path / "evaluation.json") == evaluation


def test_a_recipe_may_say_how_it_is_evaluated_and_options_overrule_it(recipe, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(run, "load", lambda folder: Oracle(tokenizer))
    config = OmegaConf.load(recipe)
    settings = {"model": "exp/model", "output": str(tmp_path / "recipe"), "examples": 3, "num_beams": 2}
    settings |= {"metrics": ["TER"], "baseline": None}
    config = OmegaConf.merge(config, settings)
    del config.data.test_ds.datasets["test_speech"]
    evaluation = evaluate_recipe(config, output=tmp_path / "option", max_new_tokens=None)
    assert list(evaluation.scores[0].metrics) == list(evaluation.signatures)[:2] == ["BLEU", "TER"]
    assert (evaluation.model, evaluation.decoding) == ("exp/model", {"num_beams": 2, "max_new_tokens": None})
    assert (tmp_path / "option" / "report.html").exists()
    assert not (tmp_path / "recipe").exists()
    config.baseline = str(tmp_path / "option")
    other = evaluate_recipe(config, "other/model", metrics=("chrF",), name="other")
    assert (other.model, other.name, list(other.scores[0].metrics)) == ("other/model", "other", ["BLEU", "chrF"])
    assert {one.baseline for one in other.comparisons} == {"exp/model"}
    assert (tmp_path / "recipe" / "evaluation.json").exists()
    config.model = {"_target_": "salm_t5"}
    with pytest.raises(ConfigError, match="names no exported model"):
        evaluate_recipe(config)


def test_the_last_line_is_where_the_report_is(recipe, tokenizer, tmp_path):
    for output, last in ((tmp_path / "out", f"Report: {tmp_path}/out/report.html"), (None, run.NOT_SAVED)):
        terminal = io.StringIO()
        evaluate(Oracle(tokenizer), recipe, output=output, console=Console(file=terminal, width=60))
        lines = terminal.getvalue().splitlines()
        assert lines[-1] == last
        assert ("Report: " in terminal.getvalue()) == (output is not None)
        if output is not None:
            assert (output / "report.html").is_file()


def test_languages_that_the_model_never_saw_are_named(recipe, tokenizer):
    oracle, terminal = Oracle(tokenizer), io.StringIO()
    oracle.cfg = OmegaConf.create({"training": {"directions": {"text": [["en", "de"]], "audio": [["de", "en"]]}}})
    evaluate(oracle, recipe, console=Console(file=terminal, width=60))
    unseen = ", ".join(sorted({*LANGUAGES} - {"de", "en"}))
    assert f"Warning: the model was not trained to translate to {unseen}, but to de, en; expect" in terminal.getvalue()
    terminal = io.StringIO()
    evaluate(Oracle(tokenizer), recipe, console=Console(file=terminal, width=60))
    assert "not trained" not in terminal.getvalue(), "nothing is known of this one"


RECORD = {"nemo_emmett": "1", "precision": "32-true", "optimizer": {"name": "", "lr": None}, "examples": {}, "data": {}}


def test_the_card_of_the_model_gets_the_scores(recipe, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(run, "load", lambda folder: Oracle(tokenizer))
    config = {"_target_": "nemo_emmett.models.SALMT5"}
    card = tmp_path / "README.md"
    card.write_text(model_card(config | {"training": {**RECORD, "validation": {"val_bleu": 31.4}}}))
    for _ in range(2):  # the second replaces those of the first
        shown = io.StringIO()
        evaluation = evaluate(tmp_path, recipe, update_card=True, console=Console(file=shown, width=500))
        assert shown.getvalue().endswith(f"Scores are in {tmp_path / 'README.md'}.\n")  # and nothing of "not saved"
        text = card.read_text()
        assert "No evaluation on test sets is recorded." not in text
        assert "`val_bleu` on the validation data: 31.4" in text
        (row,) = [line for line in text.splitlines() if line.startswith("| test_speech | speech | en → de |")]
        (score,) = [one for one in evaluation.scores if one.modality == "audio" and one.direction == ("en", "de")]
        assert row.endswith(f"| {SENTENCES} | {score.bleu:.1f} | {score.metrics['chrF++']:.1f} |")
        assert text.count("- BLEU: `nrefs:1|") == 1
        metadata = ModelCard(text).data
        assert (metadata.model_name, metadata.license) == (tmp_path.name, "unknown")
        found = {
            (one.dataset_type, one.task_name, one.dataset_config, one.metric_type) for one in metadata.eval_results
        }
        assert len(found) == len(metadata.eval_results) == sum(len(one.metrics) for one in evaluation.scores)
        (bleu,) = [
            one
            for one in metadata.eval_results
            if (one.task_name, one.dataset_config, one.metric_type) == ("translation of speech", "en-de", "bleu")
        ]
        assert (bleu.dataset_name, bleu.metric_value) == ("test_speech", pytest.approx(score.bleu, abs=0.01))
    with pytest.raises(ConfigError, match="update_card: the card is in the folder of an exported model"):
        evaluate(Oracle(tokenizer), recipe, update_card=True)
    card.write_text("# mine\n")
    with pytest.raises(ModelError, match=f"'{card}' has no place for scores"):
        evaluate(tmp_path, recipe, update_card=True)


@pytest.mark.parametrize("key", ["output", "log_dir", "baseline", "model"])
def test_an_empty_path_is_refused(recipe, key):
    cfg = OmegaConf.merge(OmegaConf.load(recipe).data, {"model": "m", key: ""})
    cfg.test_ds.audio_locator_tag = LOCATOR
    with pytest.raises(ConfigError, match=f"^{key}: "):
        evaluate_recipe(cfg)
    if key in ("output", "log_dir"):
        with pytest.raises(ConfigError, match=f"^{key}: '' cannot be used; give a path"):
            evaluate("m", recipe, **{key: ""})
