"""Speech corpora in miniature, each in the layout that its publisher's archives unpack to.

FLEURS: google/fleurs 2.0.0. FLORES: flores200_dataset (2022). CoVoST 2 on cv-corpus-4-2019-12-10. Europarl-ST v1.1.
MuST-C v1.0. mTEDx: SLR100. Sentences are pseudo-words, the same number the same sentence in any language.
"""

from __future__ import annotations

import io
import random
import tarfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import soundfile

FLEURS_CODES = {"en": "en_us", "de": "de_de", "es": "es_419", "fr": "fr_fr"}
FLORES_CODES = {"en": "eng_Latn", "de": "deu_Latn", "es": "spa_Latn", "fr": "fra_Latn"}
NUM_SENTENCES = 30
FLORES_DEV = 14
"""Of the sentences, by their numbers, the first are in dev, the others in devtest."""


def sentence(language: str, number: int) -> str:
    """Six words that no other sentence has: ``Gopal rimek, ...``."""
    rng = random.Random(f"{language} {number}")
    words = ["".join(rng.choice("bdfgklmnprstvz") + rng.choice("aeiou") for _ in range(3)) for _ in range(6)]
    return f"{' '.join(words[:2])}, {' '.join(words[2:])}.".capitalize()


def fleurs_id(number: int) -> int:
    """FLEURS' id of a sentence, in an order of its own; ids below 13 are train, below 17 dev, then test."""
    return number * 7 % NUM_SENTENCES + 1


def split_of(identity: int) -> str:
    return "train" if identity < 13 else "dev" if identity < 17 else "test"


def make_fleurs(
    folder: Path,
    languages: Sequence[str] = ("en", "de", "es"),
    *,
    shuffled: int | None = None,
    spoken_as: Mapping[tuple[str, int], str] | None = None,
    not_read: Iterable[tuple[str, int]] = (),
) -> dict[str, int]:
    """Write FLEURS; returns which sentence each wav file is of.

    Args:
        folder: receives ``data``.
        languages: those in it.
        shuffled: seed of the order of rows; None: as they come.
        spoken_as: text of a language's sentence that is not that of FLORES.
        not_read: languages and numbers of sentences that nobody has read.
    """
    numbers: dict[str, int] = {}
    for language in languages:
        rows: dict[str, list[str]] = {"train": [], "dev": [], "test": []}
        sounds: dict[str, dict[str, bytes]] = {split: {} for split in rows}
        for number in range(NUM_SENTENCES):
            if (language, number) in not_read:
                continue
            identity = fleurs_id(number)
            text = (spoken_as or {}).get((language, number), sentence(language, number))
            for speaker in range(speakers(language, number)):
                file = f"{random.Random(f'{language} {number} {speaker}').randrange(10**18, 10**19)}.wav"
                samples = tone(0.2 + 0.01 * number, 150 + 10 * number + speaker)
                row = _fleurs_row(identity, file, text, len(samples))
                rows[split_of(identity)].append(row)
                sounds[split_of(identity)][file] = wav(samples)
                numbers[file] = number
        for split, lines in rows.items():
            if shuffled is not None:
                random.Random(f"{shuffled} {language}").shuffle(lines)
            where = folder / "data" / FLEURS_CODES[language]
            write_lines(where / f"{split}.tsv", lines)
            write_tar(where / "audio" / f"{split}.tar.gz", {f"{split}/{file}": d for file, d in sounds[split].items()})
    return numbers


def speakers(language: str, number: int) -> int:
    """One to three, another number in each language."""
    return (number + len(FLEURS_CODES[language]) + ord(language[0])) % 3 + 1


def _fleurs_row(identity: int, file: str, text: str, num_samples: int) -> str:
    words = text.lower().replace(",", "").replace(".", "")
    letters = " ".join(words.replace(" ", "|")) + " |"
    return "\t".join([str(identity), file, text, words, letters, str(num_samples), "FEMALE"])


def make_flores(folder: Path, languages: Sequence[str] = ("en", "de", "es", "fr"), order: int | None = None) -> Path:
    """Write FLORES-200, its lines in the order of the sentences or, the same in each language, in another one."""
    numbers = list(range(NUM_SENTENCES))
    if order is not None:
        random.Random(order).shuffle(numbers)
    for language in languages:
        code = FLORES_CODES[language]
        texts = [sentence(language, number) for number in numbers]
        write_lines(folder / "flores200_dataset" / "dev" / f"{code}.dev", texts[:FLORES_DEV])
        write_lines(folder / "flores200_dataset" / "devtest" / f"{code}.devtest", texts[FLORES_DEV:])
    return folder


def make_covost2(
    folder: Path,
    common_voice: Path,
    pairs: Sequence[str] = ("en_de", "en_zh-CN", "fr_en"),
    clips: int = 8,
    archives: bool = False,
    shuffled: int | None = None,
) -> None:
    """Write CoVoST's TSV files and the release of Common Voice they belong to.

    Clip 0 is CoVoST's addition to the training split, 1 to 3 train, 4 and 5 dev, the others test.
    """
    for pair in pairs:
        spoken, target = pair.split("_")
        rows = [
            f"common_voice_{spoken}_{number}.mp3\t{sentence(target, number)}\t{covost_column(number)}"
            for number in range(clips)
        ]
        random.Random(f"{shuffled} {pair}").shuffle(rows)
        content = "".join(f"{row}\n" for row in ["path\ttranslation\tsplit", *rows])
        name = f"covost_v2.{pair}.tsv"
        if archives:
            write_tar(folder / f"{name}.tar.gz", {name: content.encode()})
        else:
            write_text(folder / name, content)
        _make_common_voice(common_voice / spoken, spoken, clips)


def covost_column(number: int) -> str:
    return ["train_covost", "train", "train", "train", "dev", "dev"][number] if number < 6 else "test"


def _make_common_voice(folder: Path, language: str, clips: int) -> None:
    header = "client_id\tpath\tsentence\tup_votes\tdown_votes\tage\tgender\taccent"
    rows = [
        f"speaker{number}\tcommon_voice_{language}_{number}.mp3\t{covost_transcript(language, number)}\t2\t0\t\t\t"
        for number in reversed(range(clips + 3))  # more than CoVoST has translated
    ]
    write_lines(folder / "validated.tsv", [header, *rows])
    (folder / "clips").mkdir(parents=True, exist_ok=True)
    for number in range(clips):
        path = folder / "clips" / f"common_voice_{language}_{number}.mp3"
        soundfile.write(path, tone(0.5 + 0.1 * number, 200 + 10 * number, 32000), 32000, format="MP3")


def covost_transcript(language: str, number: int) -> str:
    """Common Voice has unbalanced quotes."""
    return ('"' if number == 2 else "") + sentence(language, number)


def make_europarl_st(folder: Path, pairs: Sequence[str] = ("en-de", "en-es", "de-en")) -> Path:
    """Write v1.1: two speeches of six segments each a language; en-es lacks the second segment of each."""
    root = folder / "v1.1"
    for pair in pairs:
        spoken, target = pair.split("-")
        for split_number, split in enumerate(("train", "train-noisy", "dev", "test")):
            segments, texts, translations = [], [], []
            for speech in range(2):
                name = f"{spoken}.20080924.{split_number}.3-{speech:03}"
                write_sound(root / spoken / "audios" / f"{name}.m4a", tone(3.0, 200 + 50 * speech))
                for place in range(6):
                    if pair == "en-es" and place == 1:
                        continue
                    number = europarl_number(split_number, speech, place)
                    segments.append(f"{name} {place * 0.5:.2f} {place * 0.5 + 0.4:.2f}")
                    texts.append(sentence(spoken, number))
                    translations.append(sentence(target, number))
            where = root / spoken / target / split
            write_lines(where / "segments.lst", segments)
            write_lines(where / f"segments.{spoken}", texts)
            write_lines(where / f"segments.{target}", translations)
            write_lines(where / "speeches.lst", dict.fromkeys(segment.split()[0] for segment in segments))
    return root


def europarl_number(split_number: int, speech: int, place: int) -> int:
    return 100 * split_number + 10 * speech + place


def make_ted(
    folder: Path, pairs: Sequence[str], splits: Sequence[str], ending: str, left_out: Mapping[str, Sequence[int]]
) -> None:
    """Write talks in the layout of MuST-C and mTEDx: two talks of five segments each a split.

    Args:
        folder: receives ``en-de/data/...``.
        pairs: in it.
        splits: of each pair.
        ending: of the recordings.
        left_out: segments that a pair does not have, so that the same line is another segment in another pair.
    """
    for pair in pairs:
        spoken, target = pair.split("-")
        for split_number, split in enumerate(splits):
            where = folder / pair / "data" / split
            segments, numbers = [], []
            for talk in range(2):
                name = f"ted_{split_number}{talk}"
                write_sound(where / "wav" / f"{name}{ending}", tone(3.0, 200 + 50 * talk))
                for place in range(5):
                    if place not in left_out.get(pair, ()):
                        numbers.append(europarl_number(split_number, talk, place))
                        segments.append(
                            f"- {{duration: 0.400000, offset: {place * 0.5 + 0.01:.6f}, rW: 9, uW: 0, "
                            f"speaker_id: spk.{talk}, wav: {name}.wav}}"
                        )
            write_lines(where / "txt" / f"{split}.yaml", segments)
            for language in {spoken, target}:
                write_lines(where / "txt" / f"{split}.{language}", [ted_text(language, n) for n in numbers])


def ted_text(language: str, number: int) -> str:
    """Every third segment ends in applause."""
    return sentence(language, number) + (" (Applause)" if number % 3 == 0 else "")


def make_must_c(folder: Path) -> None:
    make_ted(folder, ("en-de", "en-fr"), ("train", "dev", "tst-COMMON", "tst-HE"), ".wav", {"en-fr": [0]})


def make_mtedx(folder: Path) -> None:
    """es-en lacks the first segment of each talk, es-fr the third; es-es has them all."""
    make_ted(folder, ("es-es", "es-en", "es-fr"), ("train", "valid", "test"), ".flac", {"es-en": [0], "es-fr": [2]})


def tone(seconds: float, hertz: float, rate: int = 16000) -> np.ndarray:
    return 0.1 * np.sin(2 * np.pi * hertz * np.arange(round(seconds * rate)) / rate)


def wav(samples: np.ndarray) -> bytes:
    stream = io.BytesIO()
    soundfile.write(stream, samples, 16000, format="WAV")
    return stream.getvalue()


def write_sound(path: Path, samples: np.ndarray) -> None:
    """FLAC where the name says so, else WAV: what plays .m4a recognises a file by its content, and AAC needs FFmpeg."""
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, samples, 16000, format="FLAC" if path.suffix == ".flac" else "WAV")


def write_lines(path: Path, lines: Iterable[str]) -> None:
    write_text(path, "".join(f"{line}\n" for line in lines))


def write_text(path: Path, content: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content, encoding="utf-8")


def write_tar(path: Path, members: Mapping[str, bytes]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w:gz") as tar:
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
