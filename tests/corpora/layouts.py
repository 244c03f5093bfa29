"""Miniatures of text corpora, each laid out as its publisher distributes it."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import tarfile
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path

FLORES_CODES = {"en": "eng_Latn", "de": "deu_Latn", "zh": "zho_Hans", "zh-Hant": "zho_Hant"}

SENTENCES = {
    "en": ["one red house", "two blue cars", "three green trees", "four old doors", "five new keys"],
    "de": ["ein rotes Haus", "zwei blaue Autos", "drei grüne Bäume", "vier alte Türen", "fünf neue Schlüssel"],
    "fr": ["une maison rouge", "deux voitures", "trois arbres verts", "quatre portes", "cinq clés"],
    "cs": ["jeden dům", "dvě auta", "tři stromy", "čtyři dveře", "pět klíčů"],
    "zh": ["一", "二", "三", "四", "五"],
    "zh-Hant": ["壹", "貳", "參", "肆", "伍"],
}


def flores_texts(split: str, languages: Sequence[str] = tuple(FLORES_CODES)) -> dict[str, list[str]]:
    """Sentences that name their split: three in dev, two in devtest."""
    count = {"dev": 3, "devtest": 2}[split]
    return {language: [f"{text} {split}" for text in SENTENCES[language][:count]] for language in languages}


def flores200(folder: Path) -> Path:
    """``flores200_dataset.tar.gz``, as NLLB's server has it."""
    files = {"./flores200_dataset/README": "FLORES-200\n", "./flores200_dataset/metadata_dev.tsv": "URL\tdomain\n"}
    for split in ("dev", "devtest"):
        for language, texts in flores_texts(split).items():
            files[f"./flores200_dataset/{split}/{FLORES_CODES[language]}.{split}"] = _lines(texts)
    return _tar(folder / "flores200_dataset.tar.gz", files, "w:gz")


def flores_plus_release(folder: Path) -> Path:
    """What ``floresp-v2.0-rc.3.zip`` of OLDI's releases unpacks to."""
    root = folder / "floresp-v2.0-rc.3"
    for split in ("dev", "devtest"):
        for language, texts in flores_texts(split).items():
            code = FLORES_CODES[language].replace("zho", "cmn")
            _write(root / split / f"{split}.{code}", _lines(texts))
    return folder


def flores_plus_hub(folder: Path, form: str) -> Path:
    """A clone of ``openlanguagedata/flores_plus``, whose records need not be in the order of their ids."""
    for split in ("dev", "devtest"):
        for language, texts in flores_texts(split).items():
            code = FLORES_CODES[language].replace("zho", "cmn")
            records = [_flores_record(number, code, text) for number, text in enumerate(texts)]
            path = folder / split / f"{code}.{form}"
            path.parent.mkdir(parents=True, exist_ok=True)
            if form == "jsonl":
                path.write_text(_lines(json.dumps(record, ensure_ascii=False) for record in records[::-1]))
            else:
                import pyarrow
                from pyarrow import parquet

                parquet.write_table(pyarrow.Table.from_pylist(records[::-1]), path)
    _write(folder / "README.md", "---\nlicense: cc-by-sa-4.0\n---\n")
    return folder


def _flores_record(number: int, code: str, text: str) -> dict:
    language, script = code.split("_")
    return {
        "id": number,
        "iso_639_3": language,
        "iso_15924": script,
        "glottocode": "stan1295",
        "text": text,
        "url": "https://en.wikinews.org/wiki/Houses",
        "domain": "wikinews",
        "topic": "houses",
        "has_image": "no",
        "has_hyperlink": "yes",
        "last_updated": "1.0",
    }


def multi30k(folder: Path, is_packed: bool = True) -> Path:
    """``github.com/multi30k/dataset``: three sentences to train on, two in val, one in a test set without Czech.

    Packed it is the repository, which has names of images and tokenised captions as well.
    """
    splits = {
        "train": ("en", "de", "fr", "cs"),
        "val": ("en", "de", "fr", "cs"),
        "test_2017_flickr": ("en", "de", "fr"),
    }
    for split, count in (("train", 3), ("val", 2), ("test_2017_flickr", 1)):
        if is_packed:
            _write(folder / "data/task1/image_splits" / f"{split}.txt", _lines(f"{n}.jpg" for n in range(count)))
        for language in splits[split]:
            name = f"{split}.{language}"
            content = _lines(SENTENCES[language][:count])
            if is_packed:
                _write_bytes(folder / "data/task1/raw" / f"{name}.gz", gzip.compress(content.encode()))
                _write(folder / "data/task1/tok" / f"{split}.lc.norm.tok.{language}", content.lower())
            else:
                _write(folder / name, content)
    return folder


def opus_moses(folder: Path, corpus: str = "Books", one: str = "de", other: str = "en", is_zip: bool = True) -> Path:
    """A zip of OPUS in Moses form, or what it unpacks to."""
    stem = f"{corpus}.{one}-{other}"
    files = {
        f"{stem}.{one}": _lines(SENTENCES[one]),
        f"{stem}.{other}": _lines(SENTENCES[other]),
        f"{stem}.ids": _lines(f"{one}/a.xml.gz\t{other}/a.xml.gz\t{n}\t{n}" for n in range(1, 6)),
        "README": f"Corpus Name: {corpus}\n",
        "LICENSE": "see the corpus's page\n",
    }
    if not is_zip:
        for name, content in files.items():
            _write(folder / name, content)
        return folder
    path = folder / f"{one}-{other}.txt.zip"
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path


def opus_tmx(folder: Path, one: str = "de", other: str = "en") -> Path:
    """A gzipped TMX of OPUS, as its Uplug writes it."""
    units = "".join(
        f'    <tu>\n      <tuv xml:lang="{one}"><seg>{first} &amp; mehr</seg></tuv>\n'
        f'      <tuv xml:lang="{other}"><seg>{second} <hi>and</hi> more</seg></tuv>\n    </tu>\n'
        for first, second in zip(SENTENCES[one], SENTENCES[other], strict=True)
    )
    header = (
        f'<header creationdate="Tue Jan 29 12:49:40 2013" srclang="{one}" adminlang="{one}" o-tmf="unknown" '
        'segtype="sentence" creationtool="Uplug" creationtoolversion="unknown" datatype="PlainText" />'
    )
    text = (
        f'<?xml version="1.0" encoding="UTF-8" ?>\n<tmx version="1.4">\n{header}\n  <body>\n{units}  </body>\n</tmx>\n'
    )
    return _write_bytes(folder / f"{one}-{other}.tmx.gz", gzip.compress(text.encode()))


TATOEBA = {
    1: ("deu", "Guten Tag!"),
    2: ("eng", "Hello!"),
    3: ("eng", "Good day!"),
    4: ("fra", "Bonjour !"),
    5: ("jpn", "こんにちは。"),
    6: ("\\N", "?"),
}
TATOEBA_LINKS = [(1, 2), (1, 3), (2, 1), (3, 1), (2, 4), (4, 2), (2, 5), (5, 2), (2, 6)]


def tatoeba_whole(folder: Path, is_detailed: bool = False) -> Path:
    """The whole export: two .tar.bz2."""
    name = "sentences_detailed" if is_detailed else "sentences"
    more = "\tanna\t2010-01-01 00:00:00\t2010-01-01 00:00:00" if is_detailed else ""
    sentences = _lines(f"{number}\t{code}\t{text}{more}" for number, (code, text) in TATOEBA.items())
    _tar(folder / f"{name}.tar.bz2", {f"{name}.csv": sentences}, "w:bz2")
    _tar(folder / "links.tar.bz2", {"links.csv": _lines(f"{one}\t{other}" for one, other in TATOEBA_LINKS)}, "w:bz2")
    return folder


def tatoeba_by_language(folder: Path) -> Path:
    """Exports by language; the links of German and English are of a later week, and have one more sentence."""
    for code in ("deu", "eng", "fra"):
        lines = _lines(f"{number}\t{its}\t{text}" for number, (its, text) in TATOEBA.items() if its == code)
        _write_bytes(folder / f"{code}_sentences.tsv.bz2", bz2.compress(lines.encode()))
    for one, other, later in (("deu", "eng", ["1\t99"]), ("eng", "fra", [])):
        links = [f"{a}\t{b}" for a, b in TATOEBA_LINKS if (TATOEBA[a][0], TATOEBA[b][0]) == (one, other)]
        _write_bytes(folder / f"{one}-{other}_links.tsv.bz2", bz2.compress(_lines([*links, *later]).encode()))
    return folder


def _lines(texts) -> str:
    return "".join(f"{text}\n" for text in texts)


def _write(path: Path, content: str) -> Path:
    return _write_bytes(path, content.encode())


def _write_bytes(path: Path, content: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def _tar(path: Path, files: Mapping[str, str], mode: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode) as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content.encode())
            archive.addfile(member, io.BytesIO(content.encode()))
    return path
