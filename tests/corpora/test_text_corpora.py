"""Text corpora in their publishers' layouts, prepared, loaded and counted."""

from __future__ import annotations

import gzip
import json
import tarfile
import zipfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner

from nemo_emmett.cli import main
from nemo_emmett.corpora import CorpusSummary, Selection, find_corpus, prepare_corpus
from nemo_emmett.corpora.readers.flores import flores_sentences
from nemo_emmett.corpora.readers.languages import iso_code
from nemo_emmett.errors import ConfigError, DataError
from tests.corpora import layouts
from tests.corpora.loading import load_part, make_tokenizer

LANGUAGES = ("en", "de", "fr", "cs", "zh", "zh-Hant", "ja")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"), LANGUAGES)


@pytest.fixture
def count(tmp_path, tokenizer):
    """Prepare a corpus; say how many examples each part has in each direction when it is loaded."""

    def prepare(name: str, source: Path, **selection) -> dict[str, Counter]:
        out = tmp_path / "out"
        options = {"selection": Selection(**selection), "num_jobs": 1, "show_progress": False}
        summary = prepare_corpus(find_corpus(name), source, out, **options)
        counts = {}
        for part in summary.parts:
            examples = [example for example, _ in load_part(out, part.name, tokenizer)]
            counts[part.name] = Counter(f"{e['source_lang']}-{e['target_lang']}" for e in examples)
            assert set(counts[part.name].values()) == {part.sentences}
        return counts

    return prepare


def prepare_selection(name: str, source: Path, out: Path, languages: tuple[str, ...]) -> CorpusSummary:
    selection = Selection(languages=languages)
    return prepare_corpus(find_corpus(name), source, out, selection=selection, num_jobs=1, show_progress=False)


def texts_of(tmp_path: Path, part: str, language: str) -> list[str]:
    return (tmp_path / "out" / "text" / f"{part}.{language}").read_text().splitlines()


FLORES_LAYOUTS = {
    "FLORES-200, its archive": layouts.flores200,
    "FLORES+, unpacked release": layouts.flores_plus_release,
    "FLORES+, JSON lines of the hub": lambda folder: layouts.flores_plus_hub(folder, "jsonl"),
    "FLORES+, parquet of the hub": lambda folder: layouts.flores_plus_hub(folder, "parquet"),
}


class TestFlores:
    @pytest.mark.parametrize("layout", FLORES_LAYOUTS)
    def test_every_release_has_the_same_sentences_under_the_same_ids(self, layout: str, tmp_path: Path) -> None:
        source = FLORES_LAYOUTS[layout](tmp_path / "flores")
        sentences = flores_sentences(source, "devtest", ["de", "zh-Hant"])
        assert sentences == {
            "de": {"devtest-0": "ein rotes Haus devtest", "devtest-1": "zwei blaue Autos devtest"},
            "zh-Hant": {"devtest-0": "壹 devtest", "devtest-1": "貳 devtest"},
        }

    def test_is_loaded_in_every_direction(self, count, tmp_path: Path) -> None:
        counts = count("flores", layouts.flores_plus_hub(tmp_path / "flores", "jsonl"), languages=("en", "de", "zh"))
        directions = ("de-en", "de-zh", "en-de", "en-zh", "zh-de", "zh-en")
        assert counts == {"dev": dict.fromkeys(directions, 3), "devtest": dict.fromkeys(directions, 2)}
        assert texts_of(tmp_path, "dev", "ids") == ["dev-0", "dev-1", "dev-2"]
        assert texts_of(tmp_path, "dev", "de")[2] == "drei grüne Bäume dev"

    def test_an_unpacked_archive_and_the_folder_in_it_are_the_same(self, tmp_path: Path) -> None:
        with tarfile.open(layouts.flores200(tmp_path)) as archive:
            archive.extractall(tmp_path / "unpacked", filter="data")
        outside = flores_sentences(tmp_path / "unpacked", "dev")
        assert outside == flores_sentences(tmp_path / "unpacked" / "flores200_dataset", "dev")
        assert set(outside) == {"en", "de", "zh", "zh-Hant"}

    def test_languages_of_unequal_length_are_refused(self, tmp_path: Path) -> None:
        source = layouts.flores_plus_release(tmp_path / "source")
        path = source / "floresp-v2.0-rc.3/dev/dev.deu_Latn"
        path.write_text("".join(path.read_text().splitlines(keepends=True)[:2]))
        with pytest.raises(DataError, match=r"dev\.deu_Latn' and .*dev\.cmn_Hans' are not parallel: 'dev-2'"):
            prepare_corpus(find_corpus("flores"), source, tmp_path / "out", num_jobs=1, show_progress=False)


class TestMulti30k:
    @pytest.mark.parametrize("is_packed", [True, False], ids=["the repository", "unpacked files"])
    def test_splits_have_the_languages_that_they_were_translated_to(self, is_packed, count, tmp_path: Path) -> None:
        source = layouts.multi30k(tmp_path / "source", is_packed)
        counts = count("multi30k", source, languages=("cs", "de", "en"))
        directions = ("cs-de", "cs-en", "de-cs", "de-en", "en-cs", "en-de")
        assert counts["train"] == dict.fromkeys(directions, 3)
        assert counts["val"] == dict.fromkeys(directions, 2)
        assert counts["test_2017_flickr"] == {"de-en": 1, "en-de": 1}
        assert texts_of(tmp_path, "train", "cs") == ["jeden dům", "dvě auta", "tři stromy"]

    def test_a_file_cut_short_is_named(self, tmp_path: Path) -> None:
        layouts.multi30k(tmp_path / "source")
        path = tmp_path / "source/data/task1/raw/train.de.gz"
        path.write_bytes(path.read_bytes()[:-12])
        with pytest.raises(DataError, match=r"train\.de\.gz' cannot be read .*again"):
            prepare_corpus(find_corpus("multi30k"), tmp_path / "source", tmp_path / "out", num_jobs=1)

    def test_files_of_unequal_length_are_refused(self, tmp_path: Path) -> None:
        layouts.multi30k(tmp_path / "source")
        path = tmp_path / "source/data/task1/raw/train.de.gz"
        path.write_bytes(gzip.compress(b"ein rotes Haus\n"))
        with pytest.raises(DataError, match=r"train\.de\.gz' ends after 1 lines"):
            prepare_corpus(find_corpus("multi30k"), tmp_path / "source", tmp_path / "out", num_jobs=1)


class TestArchives:
    def test_a_zip_with_a_password_is_to_be_unpacked(self, tmp_path: Path) -> None:
        path = tmp_path / "floresp.zip"
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("dev/dev.eng_Latn", "one\n")
        content = bytearray(path.read_bytes())
        for signature, flags in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
            content[content.index(signature) + flags] |= 1  # the bit that says: encrypted
        path.write_bytes(content)
        with pytest.raises(
            DataError, match=r"floresp\.zip' cannot be read .*password.*; unpack it and give the folder"
        ):
            prepare_corpus(find_corpus("flores"), path, tmp_path / "out", num_jobs=1, show_progress=False)


class TestOpus:
    def test_a_zip_in_moses_form(self, count, tmp_path: Path) -> None:
        counts = count("opus", layouts.opus_moses(tmp_path / "source"))
        assert counts == {"train.Books.de-en": {"de-en": 5, "en-de": 5}}
        assert texts_of(tmp_path, "train.Books.de-en", "de") == layouts.SENTENCES["de"]

    def test_a_folder_of_several_corpora_and_pairs(self, count, tmp_path: Path) -> None:
        layouts.opus_moses(tmp_path / "source" / "Books", "Books")
        layouts.opus_moses(tmp_path / "source", "TED2020", "en", "fr", is_zip=False)
        layouts.opus_moses(tmp_path / "source", "TED2020", "en", "zh", is_zip=False)
        counts = count("opus", tmp_path / "source", languages=("de", "en", "fr"))
        assert counts == {
            "train.Books.de-en": {"de-en": 5, "en-de": 5},
            "train.TED2020.en-fr": {"en-fr": 5, "fr-en": 5},
        }

    def test_a_language_that_is_in_no_pair_is_said(self, tmp_path: Path) -> None:
        source, out = layouts.opus_moses(tmp_path / "source"), tmp_path / "out"
        arguments = ["prepare", "opus", str(source), str(out), "--languages=de,en,es,fr", "--jobs=1"]
        for state in ("written", "there already"):
            result = CliRunner().invoke(main, arguments)
            assert result.exit_code == 0, result.output
            assert result.output.splitlines()[-2:] == [
                f"train.Books.de-en: 5 sentences in de, en ({state})",
                "asked for and not there: es, fr",
            ]

    def test_a_pair_of_which_one_language_is_missing_is_refused(self, tmp_path: Path) -> None:
        source = layouts.opus_moses(tmp_path / "source")
        with pytest.raises(ConfigError, match=r"no pair of en, fr is there, but de-en"):
            prepare_selection("opus", source, tmp_path / "out", ("en", "fr"))

    def test_tmx_with_markup_and_entities(self, count, tmp_path: Path) -> None:
        counts = count("opus", layouts.opus_tmx(tmp_path / "ECB"))
        assert counts == {"train.ECB.de-en": {"de-en": 5, "en-de": 5}}
        assert texts_of(tmp_path, "train.ECB.de-en", "de")[0] == "ein rotes Haus & mehr"
        assert texts_of(tmp_path, "train.ECB.de-en", "en")[0] == "one red house and more"

    def test_a_side_that_is_not_there_is_named(self, tmp_path: Path) -> None:
        layouts.opus_moses(tmp_path / "source", is_zip=False)
        (tmp_path / "source/Books.de-en.en").unlink()
        with pytest.raises(DataError, match=r"Books\.de-en\.en' is missing"):
            prepare_corpus(find_corpus("opus"), tmp_path / "source", tmp_path / "out", num_jobs=1)

    def test_half_a_download_among_others_is_not_passed_over(self, tmp_path: Path) -> None:
        layouts.opus_moses(tmp_path / "source" / "Books", "Books")
        path = layouts.opus_moses(tmp_path / "source" / "TED2020", "TED2020")
        path.write_bytes(path.read_bytes()[:200])
        with pytest.raises(DataError, match=r"TED2020/de-en\.txt\.zip' cannot be read"):
            prepare_corpus(find_corpus("opus"), tmp_path / "source", tmp_path / "out", num_jobs=1)

    def test_two_varieties_that_share_a_code_are_no_pair(self, tmp_path: Path) -> None:
        (tmp_path / "source").mkdir()
        for side in ("pt", "pt_BR"):
            (tmp_path / f"source/News.pt-pt_BR.{side}").write_text("um\n")
        with pytest.raises(DataError, match=r"Both sides of .*News\.pt-pt_BR\.pt' are 'pt'"):
            prepare_corpus(find_corpus("opus"), tmp_path / "source", tmp_path / "out", num_jobs=1)

    def test_the_same_text_twice_is_refused(self, tmp_path: Path) -> None:
        layouts.opus_moses(tmp_path / "source", is_zip=False)
        layouts.opus_moses(tmp_path / "source")
        with pytest.raises(DataError, match="are the same text"):
            prepare_corpus(find_corpus("opus"), tmp_path / "source", tmp_path / "out", num_jobs=1)


class TestTatoeba:
    @pytest.mark.parametrize("is_detailed", [False, True], ids=["sentences", "sentences_detailed"])
    def test_the_whole_export_makes_the_pairs_asked_for(self, is_detailed, count, tmp_path: Path) -> None:
        source = layouts.tatoeba_whole(tmp_path / "source", is_detailed)
        counts = count("tatoeba", source, languages=("de", "en"))
        assert counts == {"train.de-en": {"de-en": 2, "en-de": 2}}
        assert texts_of(tmp_path, "train.de-en", "en") == ["Hello!", "Good day!"]
        assert texts_of(tmp_path, "train.de-en", "ids") == ["1-2", "1-3"]

    def test_a_language_named_twice_makes_no_pair_with_itself(self, count, tmp_path: Path) -> None:
        counts = count("tatoeba", layouts.tatoeba_whole(tmp_path / "source"), languages=("de", "en", "de"))
        assert counts == {"train.de-en": {"de-en": 2, "en-de": 2}}

    def test_the_whole_export_needs_languages(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match="languages: the whole export of Tatoeba has some 400"):
            prepare_corpus(find_corpus("tatoeba"), layouts.tatoeba_whole(tmp_path / "source"), tmp_path / "out")

    def test_a_language_without_an_export_is_said(self, tmp_path: Path) -> None:
        source = layouts.tatoeba_by_language(tmp_path / "source")
        summary = prepare_selection("tatoeba", source, tmp_path / "out", ("de", "en", "es", "zh-Hant"))
        assert [part.name for part in summary.parts] == ["train.de-en"]
        assert summary.missing == ("es", "zh-Hant")

    def test_exports_by_language(self, count, tmp_path: Path) -> None:
        counts = count("tatoeba", layouts.tatoeba_by_language(tmp_path / "source"))
        assert counts == {"train.de-en": {"de-en": 2, "en-de": 2}, "train.en-fr": {"en-fr": 1, "fr-en": 1}}
        parts = json.loads((tmp_path / "out/corpus.json").read_text())["parts"]
        assert [part["skipped"] for part in parts] == [{"empty text": 1}, {}]  # 99 is not in this week's sentences


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        ("opus", layouts.opus_moses),
        ("tatoeba", layouts.tatoeba_by_language),
        ("tatoeba", layouts.tatoeba_whole),
    ],
)
def test_what_is_no_language_is_refused(name: str, layout: Callable[[Path], Path], tmp_path: Path) -> None:
    source = layout(tmp_path / "source")
    with pytest.raises(ConfigError, match=r"languages: 'Deu' is not a known language; did you mean 'de"):
        prepare_selection(name, source, tmp_path / "out", ("de", "en", "Deu"))
    assert not (tmp_path / "out").exists()


MISSING = {
    "flores": "There is no FLORES in",
    "multi30k": "There is no Multi30k in",
    "opus": "There is no text of OPUS in",
    "tatoeba": "There are no links of Tatoeba in",
}


@pytest.mark.parametrize("name", MISSING)
class TestMissingSources:
    def test_an_empty_folder(self, name: str, tmp_path: Path) -> None:
        (tmp_path / "source").mkdir()
        result = CliRunner().invoke(main, ["prepare", name, str(tmp_path / "source"), str(tmp_path / "out")])
        assert result.exit_code == 2
        assert MISSING[name] in result.output
        assert not (tmp_path / "out").exists()

    def test_no_folder(self, name: str, tmp_path: Path) -> None:
        result = CliRunner().invoke(main, ["prepare", name, str(tmp_path / "source"), str(tmp_path / "out")])
        assert result.exit_code == 2
        assert f"{tmp_path / 'source'}' does not exist" in result.output


def test_a_language_that_is_not_there_is_named_with_those_that_are(tmp_path: Path) -> None:
    source = layouts.multi30k(tmp_path / "source")
    result = CliRunner().invoke(main, ["prepare", "multi30k", str(source), str(tmp_path / "out"), "--languages=en,es"])
    assert result.exit_code == 2
    assert "'es' is not among the languages that are there: en, de, fr, cs" in result.output


def test_a_links_table_without_its_sentences_says_which_to_download(tmp_path: Path) -> None:
    source = layouts.tatoeba_by_language(tmp_path / "source")
    (source / "fra_sentences.tsv.bz2").unlink()
    with pytest.raises(DataError, match=r"download fra_sentences\.tsv\.bz2 too"):
        prepare_corpus(find_corpus("tatoeba"), source, tmp_path / "out")


@pytest.mark.parametrize(
    ("code", "expected"),
    {
        "deu_Latn": "de",
        "de_DE": "de",
        "deu": "de",
        "zho_Hans": "zh",
        "cmn_hans_cn": "zh",
        "zho_Hant": "zh-Hant",
        "zh_TW": "zh-Hant",
        "arb_Arab": "ar",
        "arz_Arab": "arz",
        "ckb_iq": "ckb",
        "arb_Latn": "ar-Latn",
        "es_419": "es",
        "nob": "nb",
        "ekk_Latn": "et",
        "fil_ph": "tl",
        "yue_hant_hk": "yue",
    }.items(),
)
def test_publishers_codes(code: str, expected: str) -> None:
    assert iso_code(code) == expected


def test_no_two_languages_of_flores_share_a_code() -> None:
    from transformers.models.nllb.tokenization_nllb import FAIRSEQ_LANGUAGE_CODES

    shared = [code for code, times in Counter(map(iso_code, FAIRSEQ_LANGUAGE_CODES)).items() if times > 1]
    assert not shared
