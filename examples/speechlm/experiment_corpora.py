"""The corpora of the experiment's parts, in the layout of the captions corpus, so that the captions' recipes read them.

Usage:
    python examples/speechlm/experiment_corpora.py scarce --captions data/captions --source multi30k --out data/scarce
    python examples/speechlm/experiment_corpora.py mboshi --source mboshi --out data/mboshi
    python examples/speechlm/experiment_corpora.py leaks --out data/mboshi

``scarce`` divides the captions: ``{out}/start`` is what encoder and language model are pretrained on, all recordings
and the pairs of sentences that are not spoken; ``{out}/250``, ``500``, ... ``all`` are what the models are trained on,
each with all pairs of sentences as text and with the first recordings of one random order; some recordings are moved
to the development set. ``mboshi`` writes text files, and recordings as WAV. Either leaves out of all training data what
equals a sentence of the test or development set in any language, and writes a summary last. ``leaks`` fails if a test
or development sentence is in the training data of a corpus, or of the corpora in its subfolders; else it writes
``{out}/leaks.json``.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import soundfile
from experiment_runs import LEAKS

from nemo_emmett.corpora.leaks import HeldOut
from nemo_emmett.corpora.leaks_command import print_leaks
from nemo_emmett.corpora.sentence_files import PlacedSentence
from nemo_emmett.errors import DataError

SIZES = ("250", "500", "1000", "2000", "all")
"""Recordings that translation is trained on; the names of the folders."""

DEV = 300
"""Recordings that are taken from the training data to choose checkpoints by, with those of the development set: by
100 captions alone the choice is mostly chance."""

SUMMARY = "corpus.json"
"""Written last: what the corpus holds, and how many sentences were left out."""

Texts = Mapping[str, str]


def main() -> None:
    """Write one of the corpora, or search one for leaks."""
    parser = argparse.ArgumentParser(description="The corpora of the experiment's parts.")
    parser.add_argument("task", choices=("scarce", "mboshi", "leaks"))
    parser.add_argument("--captions", type=Path, help="the captions corpus, as nemo-emmett prepare captions writes it")
    parser.add_argument("--source", type=Path, help="folder of Multi30k, or of the Mboshi manifests")
    parser.add_argument("--out", type=Path, required=True, help="the corpus' folder")
    options = parser.parse_args()
    needed = {"scarce": ("captions", "source"), "mboshi": ("source",), "leaks": ()}[options.task]
    for name in needed:
        if getattr(options, name) is None:
            parser.error(f"--{name} is needed for {options.task}")
    try:
        if options.task == "leaks":
            search_leaks(options.out)
        elif options.task == "mboshi":
            print(json.dumps(write_mboshi(options.source, options.out)))
        else:
            print(json.dumps(write_scarce(options.captions, options.source, options.out)))
    except (DataError, OSError) as error:
        raise SystemExit(f"Error: {error}") from None


def write_scarce(captions: Path, source: Path, out: Path, dev: int = DEV, seed: int = 0) -> dict[str, Any]:
    """Divide the captions corpus; returns the summary.

    Args:
        captions: the corpus; its recordings name their lines of ``source``.
        source: Multi30k's raw text: all its training pairs are the text, its whole validation set is held out.
        out: the folder to write to.
        dev: recordings that are moved from the training data to the development set of speech.
        seed: of the order in which recordings are taken.

    Raises:
        DataError: if the recordings are not of this source, or no pair of sentences is left that is not spoken.
    """
    pairs = {line: texts for line, texts in enumerate(_pairs(source, "train"), start=1) if all(texts.values())}
    records = _records(captions / "speech" / "train.en.jsonl")
    if any(pairs.get(one["line"], {}).get("en") != one["text"] for one in records):
        raise DataError(f"'{captions}' was not made from the captions in '{source}'; give the folder it was made from.")
    validation = _held_out(_pairs(source, "val"))
    records = [one for one in records if validation.match(pairs[one["line"]]) is None]
    random.Random(seed).shuffle(records)
    moved = records[:dev]
    of_dev = _held_out(pairs[one["line"]] for one in moved)
    kept = {
        line: texts for line, texts in pairs.items() if validation.match(texts) is None and of_dev.match(texts) is None
    }
    records = [one for one in records if one["line"] in kept]
    spoken = _held_out(kept[one["line"]] for one in records)
    unspoken = [texts for texts in kept.values() if spoken.match(texts) is None]
    if not unspoken:
        raise DataError(
            f"'{captions}' has a recording of every pair of sentences in '{source}', so that none is left to pretrain "
            "the language model on; prepare the corpus with fewer captions."
        )

    _write_corpus(out / "start", captions, unspoken, records, moved)
    counts = {size: len(records) if size == "all" else min(int(size), len(records)) for size in SIZES}
    for size, count in counts.items():
        _write_corpus(out / size, captions, list(kept.values()), records[:count], moved)
    summary = {
        "pairs": len(pairs),
        "left_out": len(pairs) - len(kept) - len(moved),
        "dev_recordings": len(moved),
        "text": len(kept),
        "start_text": len(unspoken),
        "recordings": counts,
    }
    (out / SUMMARY).write_text(json.dumps(summary, indent=1) + "\n")
    return summary


def write_mboshi(source: Path, out: Path) -> dict[str, Any]:
    """Write the Mboshi recordings, as WAV, and their texts, Mboshi to French; returns the summary."""
    splits = {split: _records(source / f"{split}.jsonl") for split in ("train", "dev", "test")}
    texts = {split: [_mboshi_texts(one) for one in records] for split, records in splits.items()}
    held_out = {split: _held_out(texts[split]) for split in ("dev", "test")}
    left_out = {}
    for split, others in {"train": ("dev", "test"), "dev": ("test",), "test": ()}.items():
        kept = [
            record
            for record, pair in zip(splits[split], texts[split], strict=True)
            if all(held_out[other].match(pair) is None for other in others)
        ]
        left_out[split] = len(splits[split]) - len(kept)
        _write_records(out / "speech" / f"{split}.mdw.jsonl", [_decoded(one, out / "audio") for one in kept])
        _write_texts(out / "text", split, [_mboshi_texts(one) for one in kept])
        splits[split] = kept
    summary = {"recordings": {split: len(records) for split, records in splits.items()}, "left_out": left_out}
    (out / SUMMARY).write_text(json.dumps(summary, indent=1) + "\n")
    return summary


def search_leaks(corpus: Path) -> None:
    """Fail if a sentence of a corpus' test or development set is in its training data; else write that there is none.

    Args:
        corpus: its folder, or one with corpora.
    """
    folders = [corpus] if (corpus / "text").is_dir() else sorted(path.parent for path in corpus.glob("*/text"))
    if not folders:
        raise DataError(f"'{corpus}' holds no corpus: there is no folder 'text' in it, nor in one of its folders.")
    training, held_out = (
        sorted(
            file
            for folder in folders
            for split in splits
            for file in (*(folder / "text").glob(f"{split}.*"), *(folder / "speech").glob(f"{split}.*"))
        )
        for splits in (("train",), ("dev", "test"))
    )
    if print_leaks(training, held_out, near=False):
        raise SystemExit(f"'{corpus}': test sentences are in the training data.")
    searched = {"training_files": len(training), "held_out_files": len(held_out), "leaks": 0}
    (corpus / LEAKS).write_text(json.dumps(searched, indent=1) + "\n")


def _write_corpus(
    out: Path, captions: Path, text: Sequence[Texts], recordings: Sequence[Mapping], dev: Sequence[Mapping]
) -> None:
    """A corpus with other training data than the captions', more development data of speech, and the same test set."""
    _write_texts(out / "text", "train", text)
    _write_records(out / "speech" / "train.en.jsonl", recordings)
    for split, more in {"dev": dev, "test": ()}.items():
        for language in ("en", "fr"):
            name = f"{split}.{language}"
            (out / "text" / name).write_bytes((captions / "text" / name).read_bytes())
        of_split = _records(captions / "speech" / f"{split}.en.jsonl")
        _write_records(out / "speech" / f"{split}.en.jsonl", [*of_split, *more])


def _pairs(source: Path, split: str) -> list[dict[str, str]]:
    """The captions of a split in English and French, with single spaces as in the corpus."""
    columns = {
        # Not splitlines(), which divides at other characters too.
        language: (source / f"{split}.{language}").read_bytes().decode().removesuffix("\n").split("\n")
        for language in ("en", "fr")
    }
    lines = zip(*columns.values(), strict=True)
    return [dict(zip(columns, (" ".join(text.split()) for text in texts), strict=True)) for texts in lines]


def _held_out(sentences: Iterable[Texts]) -> HeldOut:
    return HeldOut((PlacedSentence(one, Path("held out"), n) for n, one in enumerate(sentences, start=1)), near=False)


def _decoded(record: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """A record of the same recording as WAV: decoding Opus at each step takes a fifth of a training's time."""
    path = folder / f"{Path(record['audio_filepath']).stem}.wav"
    samples, rate = soundfile.read(record["audio_filepath"], dtype="int16")
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, samples, rate, subtype="PCM_16")
    return {**record, "audio_filepath": str(path.resolve())}


def _mboshi_texts(record: Mapping) -> dict[str, str]:
    return {
        "mdw": " ".join(record["text"].split()),
        "fr": " ".join(record["translations"]["fr"].split()),
    }


def _records(manifest: Path) -> list[dict[str, Any]]:
    """The records of a manifest, with absolute paths, and with no other translation than the French."""
    records = []
    with manifest.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                record = json.loads(line)
                audio = str((manifest.parent / record["audio_filepath"]).resolve())
                records.append(record | {"audio_filepath": audio, "translations": {"fr": record["translations"]["fr"]}})
            except (ValueError, KeyError, TypeError) as error:
                raise DataError(
                    f"'{manifest}', line {number}: not a recording with a French translation ({error!r}); prepare the "
                    "corpus again."
                ) from error
    return records


def _write_records(manifest: Path, records: Iterable[Mapping]) -> None:
    manifest.parent.mkdir(parents=True, exist_ok=True)
    manifest.write_text("".join(json.dumps(one, ensure_ascii=False) + "\n" for one in records), encoding="utf-8")


def _write_texts(folder: Path, split: str, sentences: Sequence[Texts]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for language in sentences[0]:
        (folder / f"{split}.{language}").write_text("".join(f"{one[language]}\n" for one in sentences), "utf-8")


if __name__ == "__main__":
    main()
