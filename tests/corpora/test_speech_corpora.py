"""CoVoST 2, Europarl-ST, MuST-C and mTEDx from their publishers' files to batches."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
import yaml
from nemo.collections.common.tokenizers import AutoTokenizer
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from nemo_emmett.corpora.corpus import Corpus, Part, Selection, Sentence
from nemo_emmett.corpora.preparing import prepare_corpus
from nemo_emmett.corpora.readers import covost2, europarl_st, fleurs, mtedx, must_c
from nemo_emmett.corpora.readers.pairs import Segment, joined
from nemo_emmett.data import SpeechTextDataset, get_multimodal_dataloader
from nemo_emmett.errors import ConfigError, DataError

from .speech_layouts import (
    NUM_SENTENCES,
    covost_transcript,
    europarl_number,
    fleurs_id,
    make_covost2,
    make_europarl_st,
    make_fleurs,
    make_mtedx,
    make_must_c,
    sentence,
    speakers,
    split_of,
    ted_text,
    write_lines,
)

LOCATOR = "<|audio|>"


def parts_of(
    corpus: Corpus, source: Path, languages=None, splits=None, extra_sources: dict[str, Path] | None = None
) -> dict[str, Part]:
    return {part.name: part for part in corpus.read(source, Selection(languages, splits, extra_sources or {}))}


def texts_of(part: Part) -> dict[str, dict[str, str]]:
    sentences = list(part.sentences())
    texts = {one.id: dict(one.texts) for one in sentences}
    assert len(texts) == len(sentences), "ids are unique in a part"
    return texts


# CoVoST 2


@pytest.fixture
def covost(tmp_path: Path) -> Path:
    make_covost2(tmp_path / "covost", tmp_path / "cv")
    return tmp_path / "covost"


def covost_parts(source: Path, languages=None, splits=None) -> dict[str, Part]:
    return parts_of(covost2.CORPUS, source, languages, splits, {"common-voice": source.parent / "cv"})


def covost_texts(spoken: str, numbers: range | list[int], codes: dict[str, str]) -> dict[str, dict[str, str]]:
    """``codes``: the language of a translation in our words and in the file's."""
    return {
        f"common_voice_{spoken}_{number}": {
            spoken: covost_transcript(spoken, number),
            **{language: sentence(code, number) for language, code in codes.items()},
        }
        for number in numbers
    }


def test_a_clip_of_covost_is_one_entry_with_its_transcript_and_all_translations(covost) -> None:
    parts = covost_parts(covost)
    assert sorted(parts) == ["dev.en", "dev.fr", "test.en", "test.fr", "train.en", "train.fr"]
    into = {"de": "de", "zh": "zh-CN"}
    assert texts_of(parts["train.en"]) == covost_texts("en", [0, 1, 2, 3], into)  # with train_covost, an odd quote
    assert texts_of(parts["dev.en"]) == covost_texts("en", [4, 5], into)
    assert texts_of(parts["test.fr"]) == covost_texts("fr", [6, 7], {"en": "en"})
    assert all(one.recording.path.is_file() for one in parts["train.en"].sentences())


def test_covost_reads_archives_as_downloaded_and_rows_in_any_order(covost, tmp_path) -> None:
    make_covost2(tmp_path / "archives", tmp_path / "cv", archives=True, shuffled=5)
    published, others = covost_parts(covost), covost_parts(tmp_path / "archives")
    assert {n: list(texts_of(p).items()) for n, p in published.items()} == {
        n: list(texts_of(p).items()) for n, p in others.items()
    }


def test_covost_reads_the_splits_that_its_own_script_writes(covost, tmp_path) -> None:
    expected = texts_of(covost_parts(covost, ("en", "de"), ("dev",))["dev.en"])
    rows = [f"common_voice_en_{n}.mp3\t{sentence('en', n)}\t{sentence('de', n)}\tspeaker{n}" for n in (4, 5)]
    write_lines(tmp_path / "split" / "covost_v2.en_de.dev.tsv", ["path\tsentence\ttranslation\tclient_id", *rows])
    assert texts_of(covost_parts(tmp_path / "split", splits=("dev",))["dev.en"]) == expected
    with pytest.raises(DataError, match=r"covost_v2.en_de.train.tsv' is missing: translations of the train split"):
        covost_parts(tmp_path / "split")


def test_covost_needs_common_voice(covost) -> None:
    with pytest.raises(ConfigError, match="CoVoST 2 needs --common-voice: the folder of Common Voice release 4"):
        parts_of(covost2.CORPUS, covost)


def test_another_release_of_common_voice_is_refused(covost, tmp_path) -> None:
    path = tmp_path / "cv/en/validated.tsv"
    path.write_text(path.read_text().replace("common_voice_en_", "common_voice_en_9"))
    with pytest.raises(DataError, match=r"has 0 of the 4 clips that CoVoST 2 has translated; give release 4"):
        list(covost_parts(covost)["train.en"].sentences())


def test_a_file_without_its_column_is_refused(covost) -> None:
    path = covost / "covost_v2.en_de.tsv"
    path.write_text(path.read_text().replace("translation", "text", 1))
    with pytest.raises(DataError, match=r"covost_v2.en_de.tsv' has no column 'translation'"):
        list(covost_parts(covost)["train.en"].sentences())


# Europarl-ST


@pytest.fixture
def europarl(tmp_path: Path) -> Path:
    return make_europarl_st(tmp_path)


def test_a_segment_of_europarl_is_one_entry_with_all_translations_joined_by_speech_and_times(europarl) -> None:
    parts = parts_of(europarl_st.CORPUS, europarl)
    assert list(parts) == [
        f"{split}.{spoken}" for split in ("train", "train-noisy", "dev", "test") for spoken in ("de", "en")
    ]
    assert parts["train.en"].languages == ("en", "de", "es")
    expected = {}
    for speech in range(2):
        for place in range(6):
            start, end = 500 * place, 500 * place + 400
            number = europarl_number(3, speech, place)
            texts = {language: sentence(language, number) for language in ("en", "de", "es")}
            if place == 1:
                del texts["es"]
            expected[f"en.20080924.3.3-00{speech}_{start:08}_{end:08}"] = texts
    assert texts_of(parts["test.en"]) == expected


def test_a_segment_of_europarl_says_where_it_lies(europarl) -> None:
    third = list(parts_of(europarl_st.CORPUS, europarl)["train.de"].sentences())[2]
    assert third.recording.path == europarl / "de/audios/de.20080924.0.3-000.m4a"
    assert (third.recording.start, third.recording.duration) == (1.0, 0.4)


def test_selected_languages_limit_the_pairs(europarl) -> None:
    parts = parts_of(europarl_st.CORPUS, europarl, ("en", "es"), ("dev",))
    assert {name: part.languages for name, part in parts.items()} == {"dev.en": ("en", "es")}
    with pytest.raises(
        DataError, match=r"No pair of Europarl-ST is among the languages de, es; there are de-en, en-de"
    ):
        parts_of(europarl_st.CORPUS, europarl, ("de", "es"))


@pytest.mark.parametrize("missing", ["en/es/dev/segments.es", "en/de/dev/segments.lst", "de/audios"])
def test_a_missing_file_of_europarl_is_named(europarl, missing) -> None:
    path = europarl / missing
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    with pytest.raises(DataError, match=rf"{missing}' is missing: .* from https://www.mllp.upv.es"):
        parts_of(europarl_st.CORPUS, europarl)


def test_parallel_files_of_unequal_length_are_refused(europarl) -> None:
    path = europarl / "en/es/dev/segments.es"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))
    with pytest.raises(DataError, match=r"segments.es' ends after 9 lines"):
        list(parts_of(europarl_st.CORPUS, europarl)["dev.en"].sentences())


# MuST-C and mTEDx


def ted_texts(split_number: int, spoken: str, targets: dict[int, tuple[str, ...]]) -> dict[str, dict[str, str]]:
    """``targets``: the translations of each segment of a talk."""
    return {
        f"ted_{split_number}{talk}_{500 * place + 10:08}_{500 * place + 410:08}": {
            language: ted_text(language, europarl_number(split_number, talk, place)) for language in (spoken, *into)
        }
        for talk in range(2)
        for place, into in sorted(targets.items())
    }


def test_each_pair_of_must_c_is_a_part_with_its_texts_as_they_are(tmp_path) -> None:
    make_must_c(tmp_path)
    parts = parts_of(must_c.CORPUS, tmp_path)
    splits = ("train", "dev", "tst-COMMON", "tst-HE")
    assert list(parts) == [f"{split}.{pair}" for split in splits for pair in ("en-de", "en-fr")]
    assert texts_of(parts["tst-COMMON.en-de"]) == ted_texts(2, "en", dict.fromkeys(range(5), ("de",)))
    assert texts_of(parts["dev.en-fr"]) == ted_texts(1, "en", dict.fromkeys(range(1, 5), ("fr",)))
    assert any(text["de"].endswith("(Applause)") for text in texts_of(parts["train.en-de"]).values())
    [first, *_] = parts["dev.en-fr"].sentences()
    assert first.recording.path == tmp_path / "en-fr/data/dev/wav/ted_10.wav"
    assert (first.recording.start, first.recording.duration) == (0.51, 0.4)


def test_a_segment_of_mtedx_is_one_entry_with_all_translations_and_the_transcript(tmp_path) -> None:
    make_mtedx(tmp_path)
    parts = parts_of(mtedx.CORPUS, tmp_path)
    assert list(parts) == [f"{split}.{name}" for split in ("train", "valid", "test") for name in ("es", "es-es")]
    both = ("en", "fr")
    into = {0: ("fr",), 1: both, 2: ("en",), 3: both, 4: both}
    assert texts_of(parts["valid.es"]) == ted_texts(1, "es", into)
    assert texts_of(parts["test.es-es"]) == ted_texts(2, "es", dict.fromkeys(range(5), ()))
    assert all(one.recording.path.is_file() for part in parts.values() for one in part.sentences())


def test_a_talk_of_mtedx_that_one_pair_lacks_is_taken_from_another(tmp_path) -> None:
    make_mtedx(tmp_path)
    (tmp_path / "es-en/data/test/wav/ted_20.flac").unlink()
    [first, *_] = parts_of(mtedx.CORPUS, tmp_path)["test.es"].sentences()
    assert first.recording.path == tmp_path / "es-fr/data/test/wav/ted_20.flac"


def test_mtedx_in_one_language_is_its_transcripts(tmp_path) -> None:
    make_mtedx(tmp_path)
    assert list(parts_of(mtedx.CORPUS, tmp_path, ("es",))) == ["train.es-es", "valid.es-es", "test.es-es"]


@pytest.mark.parametrize("missing", ["txt/dev.yaml", "txt/dev.fr", "wav"])
def test_a_missing_file_of_a_talk_is_named(tmp_path, missing) -> None:
    make_must_c(tmp_path)
    path = tmp_path / "en-fr/data/dev" / missing
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    with pytest.raises(DataError, match=rf"en-fr/data/dev/{missing}' is missing: a part of en-fr; get it from"):
        parts_of(must_c.CORPUS, tmp_path)


def test_a_list_of_segments_that_is_damaged_or_too_short_is_refused(tmp_path) -> None:
    make_must_c(tmp_path)
    path = tmp_path / "en-de/data/dev/txt/dev.yaml"
    part = parts_of(must_c.CORPUS, tmp_path)["dev.en-de"]
    lines = path.read_text().splitlines(keepends=True)
    for content, message in (
        ("".join(lines[:-1]), r"dev.en' has 10 lines, but '.*dev.yaml' has 9 segments"),
        ("- {duration: ", r"dev.yaml' is no list of segments"),
        ("", r"dev.yaml' is no list of segments"),
    ):
        path.write_text(content)
        with pytest.raises(DataError, match=message):
            list(part.sentences())


@pytest.mark.parametrize("corpus", [must_c.CORPUS, mtedx.CORPUS, europarl_st.CORPUS, covost2.CORPUS, fleurs.CORPUS])
def test_a_folder_without_the_corpus_and_an_archive_are_refused_in_one_sentence(tmp_path, corpus) -> None:
    extra_sources = {"common-voice": tmp_path}
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"'.*empty' (does not hold|holds no) ") as error:
        parts_of(corpus, tmp_path / "empty", extra_sources=extra_sources)
    assert "\n" not in str(error.value)
    (tmp_path / "corpus.tgz").write_bytes(b"")
    with pytest.raises(DataError, match=r"corpus.tgz' is a file; unpack it and give the folder"):
        parts_of(corpus, tmp_path / "corpus.tgz", extra_sources=extra_sources)
    with pytest.raises(DataError, match=r"nowhere' is missing: the folder that holds"):
        parts_of(corpus, tmp_path / "nowhere", extra_sources=extra_sources)


# Segments


def join(*readings: list[tuple[Segment, dict[str, str]]]) -> list[Sentence]:
    return list(joined(readings, "es", lambda talk: Path(f"{talk}.wav")))


def test_segments_are_one_if_times_and_transcript_agree() -> None:
    early, late = Segment("a", 0, 1.5), Segment("a", 1.5, 2)
    sentences = join(
        [(late, {"es": "dos", "en": "two"}), (early, {"es": "uno", "en": "one"})],
        [(early, {"es": "uno", "fr": "un"}), (Segment("a", 1.5000001, 2), {"es": "doce", "fr": "douze"})],
    )
    assert [(one.id, one.texts) for one in sentences] == [
        ("a_00000000_00001500", {"es": "uno", "en": "one", "fr": "un"}),
        ("a_00001500_00002000", {"es": "doce", "fr": "douze"}),
        ("a_00001500_00002000-2", {"es": "dos", "en": "two"}),
    ]


def test_empty_translations_are_left_out_where_there_is_another_and_kept_where_there_is_none() -> None:
    segments = [Segment("a", start, start + 1) for start in range(2)]
    sentences = join(
        [(segment, {"es": "uno", "en": ""}) for segment in segments], [(segments[0], {"es": "uno", "fr": "un"})]
    )
    assert [one.texts for one in sentences] == [{"es": "uno", "fr": "un"}, {"es": "uno", "en": ""}]


# To batches


def fleurs_source(folder: Path) -> tuple[Path, dict[str, Path]]:
    make_fleurs(folder / "fleurs")
    return folder / "fleurs", {}


def covost_source(folder: Path) -> tuple[Path, dict[str, Path]]:
    make_covost2(folder / "covost", folder / "cv")
    return folder / "covost", {"common-voice": folder / "cv"}


def europarl_source(folder: Path) -> tuple[Path, dict[str, Path]]:
    return make_europarl_st(folder / "europarl"), {}


def must_c_source(folder: Path) -> tuple[Path, dict[str, Path]]:
    make_must_c(folder / "must_c")
    return folder / "must_c", {}


def mtedx_source(folder: Path) -> tuple[Path, dict[str, Path]]:
    make_mtedx(folder / "mtedx")
    return folder / "mtedx", {}


FLEURS_TEST_RECORDINGS = sum(speakers("en", n) for n in range(NUM_SENTENCES) if split_of(fleurs_id(n)) == "test")

# The part, its split, its recordings and the examples they make: one for each translation.
TO_BATCHES = {
    "fleurs": (fleurs.CORPUS, fleurs_source, "test.en", FLEURS_TEST_RECORDINGS, 2 * FLEURS_TEST_RECORDINGS),
    "covost2": (covost2.CORPUS, covost_source, "train.en", 4, 8),
    "europarl_st": (europarl_st.CORPUS, europarl_source, "dev.en", 12, 12 + 10),
    "must_c": (must_c.CORPUS, must_c_source, "tst-HE.en-fr", 8, 8),
    "mtedx": (mtedx.CORPUS, mtedx_source, "valid.es", 10, 8 + 8),
}


@pytest.mark.parametrize("audio", ["keep", "tar"])
@pytest.mark.parametrize("name", TO_BATCHES)
def test_a_prepared_corpus_is_loaded_whole(tmp_path, tokenizer, name, audio) -> None:
    corpus, make, part_name, recordings, examples = TO_BATCHES[name]
    source, extra_sources = make(tmp_path)
    selection = Selection(splits=(part_name.split(".")[0],), extra_sources=extra_sources)
    out = tmp_path / "out"
    summary = prepare_corpus(corpus, source, out, selection=selection, audio=audio, num_jobs=1, show_progress=False)
    [part] = [part for part in summary.parts if part.name == part_name]
    assert (part.sentences, dict(part.skipped)) == (recordings, {})
    expected = {
        (part.spoken, language, one.texts[part.spoken], text)
        for part in corpus.read(source, selection)
        for one in part.sentences()
        for language, text in one.texts.items()
        if part.name == part_name and language != part.spoken
    }
    batches = load(out / "input_cfg" / f"{part_name}.yaml", tokenizer)
    assert sum(len(batch["audio"]["examples"]) for batch in batches) == examples
    found = [e for batch in batches for e in batch["audio"]["examples"]]
    assert {(e["source_lang"], e["target_lang"], e["source_text"], e["target_text"]) for e in found} == expected
    assert all((batch["audio"]["audio_lens"] > 1000).all() for batch in batches)


def load(input_cfg: Path, tokenizer: AutoTokenizer) -> list[dict]:
    config = {
        "input_cfg": yaml.safe_load(input_cfg.read_text()),
        "prompt_format": "emmett_t5",
        "audio_locator_tag": LOCATOR,
        "batch_size": 4,
        "shuffle": False,
        "seed": 0,
        "shard_seed": 0,
        "force_finite": True,
        "sample_rate": 16000,
    }
    return list(get_multimodal_dataloader(config, 0, 1, SpeechTextDataset(tokenizer), tokenizer))


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> AutoTokenizer:
    """A tokenizer with the locator and the language tags, without words."""
    special = ["<pad>", "</s>", "<unk>", LOCATOR, *(f"<{code}>" for code in ("de", "en", "es", "fr", "zh"))]
    backend = Tokenizer(models.WordLevel({word: n for n, word in enumerate(special)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokens = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    fast = PreTrainedTokenizerFast(tokenizer_object=backend, **tokens, additional_special_tokens=special[3:])
    folder = tmp_path_factory.mktemp("tokenizer")
    fast.save_pretrained(folder)
    return AutoTokenizer(str(folder))


# Times that are none


def causes_of(corpus: Corpus, source: Path, part: str, tmp_path: Path) -> dict[str, int]:
    """What is skipped of the only split that is prepared."""
    options = {"selection": Selection(("en", "de"), (part,)), "num_jobs": 1, "show_progress": False}
    (prepared,) = [p for p in prepare_corpus(corpus, source, tmp_path / "out", **options).parts if p.spoken == "en"]
    return dict(prepared.skipped)


def test_segments_of_must_c_whose_times_are_none_are_counted(tmp_path) -> None:
    make_must_c(tmp_path / "source")
    path = tmp_path / "source/en-de/data/dev/txt/dev.yaml"
    lines = path.read_text().splitlines()
    values = [("offset", value) for value in (".nan", "-0.5", "true", "soon")]
    values += [("duration", value) for value in (".inf", "-0.4", "null")]
    for number, (key, value) in enumerate(values):
        lines[number] = re.sub(rf"{key}: [0-9.]+", f"{key}: {value}", lines[number])
    path.write_text("\n".join(lines))
    expected = {"segment without its times": 5, "segment with impossible times": 2}
    assert causes_of(must_c.CORPUS, tmp_path / "source", "dev", tmp_path) == expected


def test_segments_of_europarl_whose_times_are_none_are_counted(europarl, tmp_path) -> None:
    path = europarl / "en/de/dev/segments.lst"
    lines = [line.split() for line in path.read_text().splitlines()]
    times = [("nan", "1"), ("-0.5", "1"), ("inf", "inf"), ("0.5", "nan"), ("2.0", "1.0"), ("9", "9.5")]
    changed = [[line[0], *new] for line, new in zip(lines, times, strict=False)]
    write_lines(path, map(" ".join, [*changed, *lines[6:]]))
    expected = {"segment without its times": 3, "segment with impossible times": 2, "truncated recording": 1}
    assert causes_of(europarl_st.CORPUS, europarl, "dev", tmp_path) == expected
