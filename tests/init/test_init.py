"""``nemo-emmett init``: what it writes is what the data holds, and trains."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from omegaconf import OmegaConf
from rich.console import Console
from transformers import AutoTokenizer

from nemo_emmett.cli import main
from nemo_emmett.errors import ConfigError
from nemo_emmett.init import command, questions, writing
from nemo_emmett.init.choices import Choices
from nemo_emmett.init.data_files import describe_file, describe_pair
from nemo_emmett.models import load
from nemo_emmett.planning import plan
from nemo_emmett.runner import compose_recipe
from nemo_emmett.training import build_training, train

from ..conftest import SENTENCES, write_tone
from ..models.backbones import backbone

SECONDS = [0.5 + 0.1 * number for number in range(6)]
ENGLISH_TO_GERMAN = {"source_lang": "en", "target_lang": "de"}
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
    write_tone(corpus / "audio" / "click.wav", 0.1)
    bad = ["6\taudio/gone.wav\tone\teins", "7\tone\teins", "8\taudio/click.wav\tone\teins"]
    (corpus / "train.tsv").write_text("\n".join([*rows, *bad]) + "\n")
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


def counter_of(tokenizer_folder: Path) -> Callable[[str], int]:
    """Counts the tokens of texts and prompts, with Hugging Face's own tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    tokenizer.add_tokens(["<|audio|>"], special_tokens=True)
    return lambda text: len(tokenizer(text, add_special_tokens=False).input_ids)


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
    groups, count = cfg.data.train_ds, counter_of(tiny_t5)
    answers = [count(german) + 1 for german in SENTENCES["de"]]  # each ends in </s>
    # One bucket up to the longest: of speech in seconds, and the tokens of prompt and answer; of text both in tokens.
    of_speech = [max(SECONDS), count("<de> <|audio|>") + 1 + max(answers)]
    of_text = [max(count(f"<de> {english}") + 1 for english in SENTENCES["en"]), max(answers)]
    assert [OmegaConf.to_container(groups[name].bucket_duration_bins) for name in ("audio", "text")] == [
        [pytest.approx(of_speech)],
        [pytest.approx(of_text)],
    ]
    assert groups.audio.bucket_batch_size == [6 + 2]  # all there is, since 120 s would hold more
    assert groups.text.bucket_batch_size == [6]
    assert "audio: left out by min_duration, max_duration: 1 example(s)." in done.output
    hours = [(sum(SECONDS) + 0.1) / 3600, sum(SECONDS[:2]) / 3600]
    assert [source.weight for source in groups.audio.input_cfg] == pytest.approx(hours, rel=1e-3)
    assert [source.paths for source in groups.audio.input_cfg] == [f"{folder}/train.tsv", f"{folder}/short.tsv"]
    tokens = sum(count(sentence) for sentences in SENTENCES.values() for sentence in sentences)
    for shown in ("train.tsv", "en → de", "skipped: missing audio", "skipped: missing column", f"{tokens}\n"):
        assert shown in done.output
    for group in ("audio", "text"):  # one batch each, so that a step is a pass
        assert f"{group}: is read 1,000 times in trainer.max_steps=1000, and data that" in done.output
    comment = "# 20 times limit_train_batches; 1,000 passes over audio and 1,000 passes over text on one GPU"
    assert f"max_steps: 1000  {comment}\n" in Path("my recipe.yaml").read_text()
    assert done.output.rstrip().endswith("Next: nemo-emmett train 'my recipe.yaml'")
    train(cfg)
    assert list(Path("exp/my recipe/checkpoints").glob("*-last.ckpt"))
    assert load("exp/my recipe/model").translate(["one red house"], "en", "de")


@pytest.mark.parametrize(("option", "named"), [("--from", "mdw"), ("--to", "fr")])
def test_a_language_that_the_data_contradicts_is_refused(tmp_path, tiny_t5, tiny_asr, option, named) -> None:
    record = {"audio_filepath": "a.wav", "duration": 1.0, "text": "a", "lang": "mdw", "translations": {"fr": "b"}}
    (tmp_path / "train.jsonl").write_text(json.dumps(record))
    parts = ("--backbone", tiny_t5, "--encoder", tiny_asr)
    assert sentence_of(run("r.yaml", "--data", tmp_path / "train.jsonl", option, "de", *parts)) == (
        f"{option}: 'de' would have no effect, since all records name their languages ({named}); leave the option out, "
        "or correct the data."
    )


@pytest.fixture
def llama(tmp_path_factory) -> Path:
    """A decoder-only language model."""
    return backbone("llama", tmp_path_factory.getbasetemp() / "backbones")


def test_text_alone_with_a_decoder_only_model_and_nothing_to_validate_on(folder: Path, llama: Path) -> None:
    done = run("text.yaml", "--data", folder / "text.tsv", "--from", "en", "--to", "de", "--backbone", llama)
    assert done.exit_code == 0, done.output
    cfg = compose_recipe(
        "text.yaml", [*ON_CPU, "trainer.max_steps=2", "trainer.limit_train_batches=1", "data.train_ds.num_workers=0"]
    )
    assert (cfg.model._target_, cfg.model.prompt_format, cfg.model.perception) == ("salm_gpt", "emmett_llama2", None)
    (source,) = cfg.data.train_ds.text.input_cfg
    assert source == {
        "type": "parallel_text",
        "paths": f"{folder}/text.tsv",
        "source_column": "source",
        "target_column": "target",
        "source_lang": "en",
        "target_lang": "de",
    }
    train(cfg)
    assert load("exp/text/model").translate(["one red house"], "en", "de")


def test_batch_sizes_of_a_plan(folder: Path, llama: Path, tmp_path: Path) -> None:
    memory = "1500KiB"
    done = run(
        *("planned.yaml", "--text", folder / "text.en", folder / "text.de", "--backbone", llama),
        *("--model", "salm_gpt", "--gpu-memory", memory),
    )
    assert done.exit_code == 0, done.output
    cfg = compose_recipe("planned.yaml", ON_CPU)
    OmegaConf.set_struct(cfg, False)
    (written,) = cfg.data.train_ds.text.pop("bucket_batch_size")
    found = plan(cfg, build_training, memory=memory, profile=tmp_path / "plan.yaml", console=Console(quiet=True))
    assert written == found.groups["text"].bucket_batch_size[0] < 6
    assert f"By a plan for {memory}" in Path("planned.yaml").read_text()
    assert "--memory" not in done.output


def test_questions_in_a_terminal(folder: Path, tiny_t5: Path, tiny_asr: Path, monkeypatch) -> None:
    chosen: list[Choices] = []
    monkeypatch.setattr(questions, "is_terminal", lambda: True)
    monkeypatch.setattr(command, "_write", chosen.append)
    answers = [
        *("gone.tsv", folder / "train.tsv", f"'{folder}/text.en' '{folder}/text.de'", ""),  # the first is refused
        "",  # nothing to validate on
        *("english", "en", "de", "nowhere/at/all", tiny_t5, folder, tiny_asr, "own.yaml"),
    ]
    done = run(answers="".join(f"{answer}\n" for answer in answers))
    assert done.exit_code == 0, done.output
    for shown in ("there is no file 'gone.tsv'", "'english' is not a known language", "no folder 'nowhere/at/all'"):
        assert shown in done.output
    assert "is not a .nemo file" in done.output
    (choices,) = chosen
    assert [choices.entry(file) for file in choices.train] == [
        {"type": "speech_tsv", "paths": f"{folder}/train.tsv", **ENGLISH_TO_GERMAN},
        {
            "type": "parallel_text",
            "source_paths": f"{folder}/text.en",
            "target_paths": f"{folder}/text.de",
            **ENGLISH_TO_GERMAN,
        },
    ]
    assert (choices.recipe, choices.backbone, choices.encoder) == (Path("own.yaml"), str(tiny_t5), str(tiny_asr))


def test_an_answered_recipe_that_exists_is_not_overwritten(folder: Path, monkeypatch) -> None:
    monkeypatch.setattr(questions, "is_terminal", lambda: True)
    Path("recipe.yaml").write_text("seed: 1\n")
    arguments = ["--text", folder / "text.en", folder / "text.de", "--backbone", "t5"]
    assert "RECIPE: 'recipe.yaml' exists already" in sentence_of(run(*arguments, answers="\n\n"))  # its default
    assert Path("recipe.yaml").read_text() == "seed: 1\n"


def described(path: str, columns: dict[str, str] | None = None, **languages: str | None) -> tuple[dict, tuple]:
    """The entry of a file, and its languages in the summary."""
    file = describe_file(path, "--data", columns or {}, None)
    known = {"source_lang": None, "target_lang": None, **languages}
    choices = Choices(Path("r.yaml"), (file,), (), **known, backbone="t5")
    return choices.entry(file), choices.languages_of(file)


def test_manifests_and_jsonl_have_their_languages(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    record = {"audio_filepath": "a.wav", "duration": 0.6, "text": "one", "lang": "en"}
    records = [{**record, "translations": {"de": "eins", "fr": "un"}}, {**record, "target_lang": "es"}]
    Path("m.json").write_text("".join(json.dumps(one) + "\n" for one in records))
    entry = {"type": "nemo", "manifest_filepath": "m.json"}
    assert described("m.json", target_lang="it") == (entry, ("en", "de, fr, es"))
    Path("plain.jsonl").write_text('{"audio_filepath": "a.wav", "text": "eins"}\n')
    entry = {"type": "nemo", "manifest_filepath": "plain.jsonl", **ENGLISH_TO_GERMAN}
    assert described("plain.jsonl", **ENGLISH_TO_GERMAN) == (entry, ("en", "de"))
    Path("t.jsonl").write_text('{"source": "one", "target": "eins", "source_lang": "en", "target_lang": "de"}\n')
    assert described("t.jsonl") == ({"type": "parallel_text", "paths": "t.jsonl"}, ("en", "de"))


def test_usual_names_of_columns_and_folders_of_recordings(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_tone(Path("cv/clips/c.wav"), 1.0)
    Path("cv/covost_v2.en_de.tsv").write_text("path\tsentence\ttranslation\tclient_id\nc.wav\tone\teins\tx\n")
    columns = {"audio_column": "path", "source_column": "sentence", "target_column": "translation"}
    entry = {"type": "speech_tsv", "paths": "cv/covost_v2.en_de.tsv", **columns, "audio_dir": "cv/clips"}
    assert described("cv/covost_v2.en_de.tsv")[0] == entry
    Path("fairseq.tsv").write_text("id\taudio\tn_frames\ttgt_text\ttgt_lang\n0\ta.wav\t90\teins\tde\n")
    columns = {"target_column": "tgt_text", "target_lang_column": "tgt_lang"}
    assert described("fairseq.tsv", source_lang="en", target_lang="fr") == (
        {"type": "speech_tsv", "paths": "fairseq.tsv", **columns, "source_lang": "en"},
        ("en", None),
    )
    Path("fleurs.tsv").write_text("1\ta.wav\tOne.\teins\n")
    columns = {"audio_column": 1, "source_column": 2, "target_column": 3}
    assert described("fleurs.tsv", {"audio": "1", "source": "2", "target": "3"})[0] == {
        "type": "speech_tsv",
        "paths": "fleurs.tsv",
        **columns,
    }
    Path("two.tsv").write_text("one\teins\n")
    assert described("two.tsv")[0] == {"type": "parallel_text", "paths": "two.tsv"}


def test_ends_of_names_that_are_languages(tmp_path: Path) -> None:
    for name in ("a.en", "a.de", "a.src", "a.tgt", "b.en.gz"):
        (tmp_path / name).write_bytes(gzip.compress(b"one\n") if name.endswith("gz") else b"one\n")

    def languages(*names: str) -> tuple:
        return describe_pair(*(str(tmp_path / name) for name in names), "--text").languages

    assert languages("a.en", "a.de") == languages("b.en.gz", "a.de") == ("en", "de")
    assert languages("a.src", "a.tgt") == languages("a.en", "a.tgt") == (None, None)


def test_a_recipe_that_cannot_be_built_is_kept(folder: Path, tiny_t5: Path, monkeypatch) -> None:
    def refuse(*_: object) -> None:
        raise ConfigError("trainer.devices: 0 cannot be used.")

    monkeypatch.setattr(writing, "build_training", refuse)
    Path("r.yaml").write_text("seed: 1\n")
    done = run("r.yaml", "--force", "--text", folder / "text.en", folder / "text.de", "--backbone", tiny_t5)
    sentence = sentence_of(done)
    assert sentence == "'r.yaml' is written, but cannot be trained as it is: trainer.devices: 0 cannot be used."
    entry = compose_recipe("r.yaml").data.train_ds.text.input_cfg[0]
    assert (entry.source_lang, entry.target_lang) == ("en", "de")  # by the ends of the names


def test_a_model_of_the_other_kind_of_backbone(folder: Path, tiny_t5: Path) -> None:
    text = ("--text", folder / "text.en", folder / "text.de")
    sentence = sentence_of(run("r.yaml", *text, "--backbone", tiny_t5, "--model", "salm_gpt"))
    assert sentence == (
        f"--model: 'salm_gpt' is built on a decoder-only model, and '{tiny_t5}' is an encoder-decoder (t5); leave it "
        "out, or choose another backbone."
    )


PAIR = ["--text", "a.en", "a.de"]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (
            [],
            "RECIPE, --data or --text, --backbone: missing; give them, or start the command in a terminal to be asked.",
        ),
        (["r.yaml", "--data", "s.tsv"], "--to, --backbone, --encoder: missing; give them, or start the command in a"),
        (["r.yaml", *PAIR], "--backbone: missing; give it, or start"),
        (["r.yaml", *PAIR, "--backbone", "a/b/c"], "--backbone: there is no folder 'a/b/c'; correct the path."),
        (
            ["r.yaml", *PAIR, "--backbone", "."],
            "--backbone: '.' has no config.json; give the folder of a Hugging Face mo",
        ),
        (["r.yaml", *PAIR, "--backbone", "t5", "--to", "german"], "--to: 'german' is not a known language;"),
        (
            ["r.yaml", *PAIR, "--backbone", "t5", "--encoder", "e.nemo"],
            "--encoder: 'e.nemo' does not exist; give the .ne",
        ),
        (
            ["there.yaml", *PAIR],
            "RECIPE: 'there.yaml' exists already; name another file, or overwrite it with --force.",
        ),
        (["there.yaml/r.yaml", *PAIR], "RECIPE: '"),
        (["recipe", *PAIR], "RECIPE: 'recipe' does not end in .yaml; give the path of the recipe to write."),
        (["r.yaml", "--data", "gone.tsv"], "--data: there is no file 'gone.tsv'; correct the path."),
        (
            ["r.yaml", "--dev", "gone_{0..1}.tsv"],
            "--dev: there is no file 'gone_0.tsv' (of 'gone_{0..1}.tsv'); correct",
        ),
        (
            ["r.yaml", "--data", "a.en"],
            "--data: 'a.en' does not end in .tsv, .json or .jsonl; give such a file, or plain",
        ),
        (["r.yaml", "--data", "empty.tsv"], "--data: 'empty.tsv' is empty; give a file with records."),
        (
            ["r.yaml", "--data", "x.json"],
            "--data: 'x.json' has neither records with audio_filepath (a NeMo manifest) no",
        ),
        (
            ["r.yaml", "--data", "odd.tsv"],
            "--column: 'odd.tsv' has no column for 'target' under a usual name; its column",
        ),
        (
            ["r.yaml", "--data", "s.tsv", "--column", "to=x"],
            "--column: 'to=x' is not FIELD=NAME with a FIELD of audio, so",
        ),
        (
            ["r.yaml", "--data", "s.tsv", "--column", "target=x"],
            "--column: 's.tsv' has no column 'x'; its columns are au",
        ),
    ],
)
def test_mistakes_are_one_sentence(tmp_path: Path, monkeypatch, arguments: list[str], sentence: str) -> None:
    monkeypatch.chdir(tmp_path)
    for name, content in {
        "s.tsv": "audio\ttarget\na.wav\teins\n",
        "odd.tsv": "wav\tthe text\tits German\nx\ty\tz\n",
        "empty.tsv": "\n",
        "x.json": '{"text": "one"}\n',
        "a.en": "one\n",
        "a.de": "eins\n",
        "there.yaml": "seed: 1\n",
    }.items():
        Path(name).write_text(content)
    assert sentence_of(run(*arguments)).startswith(sentence)
    assert Path("there.yaml").read_text() == "seed: 1\n"
    assert not Path("r.yaml").exists()


@pytest.mark.parametrize("option", ["--backbone", "--encoder"])
def test_names_that_cannot_be_fetched(folder: Path, tiny_t5: Path, option: str) -> None:
    parts = {"--backbone": tiny_t5, "--encoder": "nvidia/nothing-of-this-name"}
    if option == "--backbone":
        parts |= {"--backbone": "google/nothing-of-this-name"}
    arguments = [part for pair in parts.items() for part in pair]
    sentence = sentence_of(run("r.yaml", "--text", folder / "text.en", folder / "text.de", *arguments))
    assert "nothing-of-this-name' cannot be read (" in sentence
    assert sentence.startswith({"--backbone": "--backbone: ", "--encoder": "model.pretrained_asr: "}[option])


def test_arguments_are_checked_before_nemo_is_imported(tmp_path: Path) -> None:
    code = (
        "import sys\nfrom nemo_emmett.cli import main\n"
        "try:\n    main(['init', 'r.yaml', '--data', 's.tsv', '--to', 'de'])\n"
        "finally:\n    print({'torch', 'nemo', 'transformers'} & set(sys.modules))\n"
    )
    (tmp_path / "s.tsv").write_text("audio\ttarget\na.wav\teins\n")
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        check=False,
    )
    assert (done.returncode, done.stdout) == (2, "Looking at the data ...\nset()\n")
    assert done.stderr.startswith("Error: --backbone, --encoder: missing;")
