"""What a prepared corpus holds, whatever its publisher: files, shards, counts; and that it can be cut off anywhere."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile
import soxr
from click.testing import CliRunner

from nemo_emmett.cli import main
from nemo_emmett.corpora import Part, Recording, Selection, Sentence, find_corpus, prepare_corpus
from nemo_emmett.corpora.filtering import FilterConfig
from nemo_emmett.corpora.output_folder import Staging
from nemo_emmett.corpora.registry import CORPORA
from nemo_emmett.errors import ConfigError, DataError
from tests.corpora import toy_corpus
from tests.corpora.loading import load_part, make_tokenizer
from tests.corpora.toy_corpus import CORPUS, RATE, SECONDS, samples_of

AUDIO = ("keep", "flac", "tar", "shar")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"), ("en", "de"))


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return toy_corpus.make_source(tmp_path / "source")


def prepare(source: Path, out: Path, corpus=CORPUS, **options):
    return prepare_corpus(corpus, source, out, **{"num_jobs": 1, "shard_size": 2, "show_progress": False, **options})


def prepare_speech(sentences: list[Sentence], out: Path, **options):
    """A corpus of one part, of speech in English."""
    part = Part("test", ("en", "de"), lambda: sentences, spoken="en")
    corpus = replace(CORPUS, read=lambda source, selection: [part])
    return prepare(out.parent / "nowhere", out, corpus, **options)


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def manifest(out: Path, part: str) -> list[dict]:
    return [json.loads(line) for line in (out / "speech" / f"{part}.jsonl").read_text().splitlines()]


class TestFiles:
    def test_text_is_aligned_by_lines_and_has_its_ids_next_to_it(self, source: Path, tmp_path: Path) -> None:
        prepare(source, out := tmp_path / "out")
        assert (out / "text/dev.en").read_bytes() == b"one line\nnumber 0\nnumber 1\n"
        assert (out / "text/dev.de").read_bytes() == b"eine Zeile\nZahl 0\nZahl 1\n"
        assert (out / "text/dev.ids").read_bytes() == b"lines\ns/0\ns/1\n"

    def test_corpus_json_says_what_there_is_and_what_was_skipped(self, source: Path, tmp_path: Path) -> None:
        summary = prepare(source, out := tmp_path / "out")
        content = json.loads((out / "corpus.json").read_text())
        assert {key: content[key] for key in ("name", "release", "licence", "url")} == {
            "name": "toy",
            "release": "1",
            "licence": "CC0-1.0",
            "url": "https://example.org",
        }
        counts = [(p["name"], p["spoken"], p["sentences"], p["hours"], p["skipped"]) for p in content["parts"]]
        assert counts == [
            ("train", None, 6, 0, {"empty text": 1}),
            ("dev", None, 3, 0, {"empty text": 1}),
            ("train.en", "en", 6, round(6 * SECONDS / 3600, 4), {}),
            ("test.en", "en", 2, round(2 * SECONDS / 3600, 4), {}),
        ]
        assert [part.sentences for part in summary.parts] == [6, 3, 6, 2]
        assert sorted(path.name for path in out.iterdir()) == ["audio", "corpus.json", "input_cfg", "speech", "text"]

    def test_kept_recordings_are_pointed_at_where_they_lie(self, source: Path, tmp_path: Path) -> None:
        prepare(source, out := tmp_path / "out")
        first, *_, last = manifest(out, "train.en")
        assert first == {
            "id": "s/0",
            "audio_filepath": str(source / "0.wav"),
            "duration": SECONDS,
            "sampling_rate": RATE,
            "text": "number 0",
            "lang": "en",
            "translations": {"de": "Zahl 0"},
        }
        assert (last["audio_filepath"], last["offset"]) == (str(source / "talk.wav"), pytest.approx(2 * SECONDS))
        assert manifest(out, "test.en")[0]["audio_filepath"] == "../audio/test.en/test/test/6.wav"

    @pytest.mark.parametrize("audio", AUDIO)
    def test_recordings_load_with_their_samples_and_translations(
        self, audio: str, source: Path, tmp_path: Path, tokenizer
    ) -> None:
        prepare(source, out := tmp_path / "out", audio=audio)
        loaded = {}
        for part in ("train.en", "test.en"):
            for example, samples in load_part(out, part, tokenizer):
                loaded[example["target_text"]] = (example, samples)
        assert sorted(loaded) == [f"Zahl {number}" for number in range(8)]
        for number in range(8):
            example, samples = loaded[f"Zahl {number}"]
            assert (example["source_lang"], example["target_lang"]) == ("en", "de")
            assert example["source_text"] == f"number {number}"
            np.testing.assert_allclose(samples, samples_of(number), atol=1e-6)

    def test_other_rates_and_channels_become_16_khz_mono(self, tmp_path: Path) -> None:
        left, right = samples_of(0, 1.0, 44_100), samples_of(3, 1.0, 44_100)
        soundfile.write(tmp_path / "a.wav", np.stack([left, right], axis=1), 44_100, subtype="PCM_16")
        sentence = Sentence("a", {"en": "a", "de": "b"}, Recording(tmp_path / "a.wav", start=0.5, duration=0.25))
        prepare_speech([sentence], out := tmp_path / "out", audio="flac")
        samples, rate = soundfile.read(out / "audio/test.en/a.flac")
        expected = soxr.resample(((left + right) / 2)[22_050 : 22_050 + 11_025].astype(np.float32), 44_100, RATE)
        assert rate == RATE
        np.testing.assert_allclose(samples, expected, atol=1 / 32768)
        assert manifest(out, "test.en")[0]["duration"] == 0.25

    def test_a_stretch_from_the_beginning_of_a_longer_file_ends_where_it_should(
        self, source: Path, tmp_path: Path, tokenizer
    ) -> None:
        recording = Recording(source / "talk.wav", start=0.0, duration=SECONDS)
        prepare_speech([Sentence("a", {"en": "a", "de": "b"}, recording)], out := tmp_path / "out")
        ((_, samples),) = load_part(out, "test.en", tokenizer)
        np.testing.assert_allclose(samples, samples_of(3), atol=1e-6)

    def test_speech_that_nobody_translated_asks_for_a_transcript(self, source: Path, tmp_path, tokenizer) -> None:
        sentence = Sentence("a", {"en": "number 0"}, Recording(source / "0.wav"))
        prepare_speech([sentence], out := tmp_path / "out")
        ((example, _),) = load_part(out, "test.en", tokenizer)
        assert (example["source_lang"], example["target_lang"], example["target_text"]) == ("en", "en", "number 0")


class TestSkipped:
    def test_recordings_that_cannot_be_used_are_counted_by_cause(self, source: Path, tmp_path: Path) -> None:
        (source / "noise.wav").write_bytes(b"no audio")
        recordings = {
            "good": Recording(source / "0.wav"),
            "gone": Recording(source / "9.wav"),
            "noise": Recording(source / "noise.wav"),
            "short": Recording(source / "0.wav", duration=SECONDS + 0.2),
            "nearly": Recording(source / "0.wav", duration=SECONDS + 0.05),
            "behind": Recording(source / "0.wav", start=SECONDS),
            "none": None,
            "not in the tar": Recording(source / "test.tar.gz", member="test/8.wav"),
        }
        sentences = [Sentence(name, {"en": "a", "de": "b"}, recording) for name, recording in recordings.items()]
        summary = prepare_speech([*sentences, sentences[0]], out := tmp_path / "out")
        assert summary.parts[0].skipped == {
            "empty recording": 1,
            "id occurs twice": 1,
            "missing recording": 3,
            "truncated recording": 1,
            "unreadable recording": 1,
        }
        assert [entry["id"] for entry in manifest(out, "test.en")] == ["good", "nearly"]

    @pytest.mark.parametrize("audio", ["keep", "flac", "tar", "shar"])
    def test_times_that_are_none_and_values_that_are_no_numbers_are_counted(
        self, audio: str, source: Path, tmp_path: Path
    ) -> None:
        nan, infinity = float("nan"), float("inf")
        recordings = [
            *(Recording(source / "talk.wav", start=start, duration=0.2) for start in (nan, -0.5, infinity, True, "0")),
            *(Recording(source / "talk.wav", duration=duration) for duration in (nan, -0.2, infinity, True, "1")),
            Recording(source / "talk.wav", start=9.0, duration=0.2),
        ]
        for name, value in (("nan", nan), ("loud", 1e29)):
            soundfile.write(source / f"{name}.wav", np.array([0.1, value] * 4000), 16000, subtype="FLOAT")
            recordings.append(Recording(source / f"{name}.wav"))
        recordings.append(Recording(source / "0.wav"))
        sentences = [Sentence(str(n), {"en": "a", "de": "b"}, recording) for n, recording in enumerate(recordings)]
        (part,) = prepare_speech(sentences, tmp_path / "out", audio=audio).parts
        assert part.skipped == {
            "invalid start": 5,
            "invalid duration": 5,
            "truncated recording": 1,
            "audio holds values that are not numbers": 1,
            "audio far above full scale": 1,
        }
        assert part.sentences == 1

    def test_a_part_of_which_nothing_is_left_is_an_error(self, tmp_path: Path) -> None:
        sentence = Sentence("a", {"en": "a", "de": "b"}, Recording(tmp_path / "gone.wav"))
        with pytest.raises(DataError, match=r"Nothing of 'test\.en' can be used \(missing recording: 1\)"):
            prepare_speech([sentence], tmp_path / "out")

    def test_an_archive_cut_short_is_an_error(self, source: Path, tmp_path: Path) -> None:
        archive = source / "test.tar.gz"
        archive.write_bytes(archive.read_bytes()[:200])
        with pytest.raises(DataError, match=r"test\.tar\.gz' cannot be unpacked .* download it again"):
            prepare(source, tmp_path / "out")

    @pytest.mark.parametrize("member", ["test/../../../evil.wav", "/{tmp_path}/evil.wav"])
    def test_nothing_is_unpacked_to_outside_of_the_corpus(self, member: str, tmp_path: Path) -> None:
        member = member.format(tmp_path=tmp_path)
        with tarfile.open(tmp_path / "test.tar", "w") as archive:
            archive.addfile(tarfile.TarInfo(member))
        sentence = Sentence("a", {"en": "a", "de": "b"}, Recording(tmp_path / "test.tar", member=member))
        with pytest.raises(DataError, match=r"test\.tar': '.*evil\.wav' would be unpacked to outside"):
            prepare_speech([sentence], tmp_path / "one/two/out")
        assert not list(tmp_path.rglob("evil.wav"))

    def test_an_mp3_cut_short_is_no_recording_though_its_header_declares_all_of_it(self, tmp_path: Path) -> None:
        path = tmp_path / "a.mp3"
        soundfile.write(path, samples_of(0, 4.0), RATE, format="MP3")
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        assert soundfile.info(path).duration == pytest.approx(4.0, abs=0.1)
        with pytest.raises(DataError, match=r"truncated recording: 1"):
            prepare_speech([Sentence("a", {"en": "a", "de": "b"}, Recording(path))], tmp_path / "out", audio="flac")

    def test_ids_too_long_for_a_file_name_have_files_of_their_own(self, source: Path, tmp_path: Path) -> None:
        ids = ["ü" * 100, "ü" * 100 + "x", "../" * 100]
        sentences = [Sentence(name, {"en": "a", "de": "b"}, Recording(source / "0.wav")) for name in ids]
        prepare_speech(sentences, out := tmp_path / "out", audio="flac")
        paths = {(out / "speech" / entry["audio_filepath"]).resolve() for entry in manifest(out, "test.en")}
        assert paths == {path.resolve() for path in (out / "audio/test.en").iterdir()}
        assert len(paths) == 3


class TestFilters:
    def test_only_training_splits_are_filtered(self, source: Path, tmp_path: Path) -> None:
        mixed = [Sentence("1", {"en": "one", "de": "eins"}), Sentence("2", {"en": "two words", "de": "zwei"})]
        parts = [Part(split, ("en", "de"), lambda: mixed) for split in ("train", "dev")]
        corpus = replace(CORPUS, read=lambda source, selection: parts)
        summary = prepare(source, tmp_path / "out", corpus, filters=FilterConfig(max_words=1))
        assert [part.sentences for part in summary.parts] == [1, 2]
        assert summary.parts[0].skipped == {"more than 1 words": 1}

    def test_duplicates_go_from_text_and_stay_in_speech(self, source: Path, tmp_path: Path) -> None:
        text = [Sentence(str(number), {"en": "a", "de": "b"}) for number in range(3)]
        speech = [replace(sentence, recording=Recording(source / f"{sentence.id}.wav")) for sentence in text]
        parts = [Part("train", ("en", "de"), lambda: text), Part("train", ("en", "de"), lambda: speech, spoken="en")]
        corpus = replace(CORPUS, read=lambda source, selection: parts)
        summary = prepare(source, tmp_path / "out", corpus, filters=FilterConfig(deduplicate=True))
        assert [part.sentences for part in summary.parts] == [1, 3]

    def test_a_corpus_without_a_training_split_refuses_it(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match="Toy has none among test"):
            prepare_speech([], tmp_path / "out", filters=FilterConfig(deduplicate=True))


class TestAgain:
    @pytest.mark.parametrize("audio", ["keep", "tar"])
    def test_jobs_do_not_change_a_byte(self, audio: str, source: Path, tmp_path: Path) -> None:
        out = tmp_path / "out"
        prepare(source, out, audio=audio, num_jobs=1)
        one = tree(out)
        shutil.rmtree(out)
        prepare(source, out, audio=audio, num_jobs=2)
        assert tree(out) == one

    def test_the_second_run_does_nothing(self, source: Path, tmp_path: Path) -> None:
        first = prepare(source, out := tmp_path / "out", audio="flac")
        times = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
        shutil.rmtree(source)
        second = prepare(source, out, audio="flac")
        assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == times
        assert (first.made_now, second.made_now) == (True, False)
        assert first.parts == second.parts

    @pytest.mark.parametrize(("audio", "step"), [("tar", 2), ("keep", 5), ("flac", 7), ("shar", 9)])
    def test_cut_off_at_any_write_it_goes_on_to_the_same_bytes(
        self, audio: str, step: int, source: Path, tmp_path: Path, monkeypatch
    ) -> None:
        out = tmp_path / "out"
        prepare(source, out, audio=audio)
        whole = tree(out)
        shutil.rmtree(out)
        replace_file, cuts = os.replace, 0
        while not (out / "corpus.json").exists():
            shutil.rmtree(out, ignore_errors=True)
            writes_left = cuts

            def fail_when_none_is_left(*names) -> None:
                nonlocal writes_left
                if writes_left == 0:
                    raise KeyboardInterrupt
                writes_left -= 1
                replace_file(*names)

            monkeypatch.setattr(os, "replace", fail_when_none_is_left)
            with suppress(KeyboardInterrupt):
                prepare(source, out, audio=audio)
                break
            monkeypatch.setattr(os, "replace", replace_file)
            prepare(source, out, audio=audio)
            assert tree(out) == whole
            (out / "corpus.json").unlink()
            cuts += step
        assert cuts > 20

    @pytest.mark.parametrize("write", [1, 9, 22])
    def test_killed_it_goes_on_to_the_same_bytes(self, write: int, source: Path, tmp_path: Path) -> None:
        out = tmp_path / "out"
        prepare(source, out, audio="tar")
        whole = tree(out)
        shutil.rmtree(out)
        code = f"""
            import itertools, os, signal
            from pathlib import Path
            from nemo_emmett.corpora import prepare_corpus
            from tests.corpora.toy_corpus import CORPUS
            replace, writes = os.replace, itertools.count(1)
            def kill_at_a_write(*names):
                if next(writes) == {write}:
                    os.kill(os.getpid(), signal.SIGKILL)
                replace(*names)
            os.replace = kill_at_a_write
            prepare_corpus(CORPUS, {str(source)!r}, {str(out)!r}, audio="tar", num_jobs=1, shard_size=2)
        """
        lines = [line[12:] for line in code.splitlines()]
        root = Path(__file__).parents[2]
        killed = subprocess.run([sys.executable, "-c", "\n".join(lines)], cwd=root, capture_output=True, check=False)
        assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
        assert tree(out) != whole
        prepare(source, out, audio="tar")
        assert tree(out) == whole

    def test_what_is_done_is_not_done_again(self, source: Path, tmp_path: Path, monkeypatch) -> None:
        out = tmp_path / "out"
        broken = replace(
            CORPUS, read=lambda *args: [*toy_corpus.read(*args)[:3], Part("test", ("en", "de"), lambda: 1 / 0, "en")]
        )
        with pytest.raises(ZeroDivisionError):
            prepare(source, out, broken)
        before = (out / "text/train.en").stat()
        prepare(source, out)
        after = (out / "text/train.en").stat()
        assert (before.st_ino, before.st_mtime_ns) == (after.st_ino, after.st_mtime_ns)


class TestRefused:
    def test_a_folder_that_holds_the_corpus_with_other_options(self, source: Path, tmp_path: Path) -> None:
        prepare(source, out := tmp_path / "out")
        with pytest.raises(DataError, match=r"differs in audio \(keep there, flac asked\); give another folder"):
            prepare(source, out, audio="flac")

    def test_an_unfinished_folder_with_other_options(self, source: Path, tmp_path: Path) -> None:
        prepare(source, out := tmp_path / "out")
        os.replace(out / "corpus.json", out / "corpus.started.json")
        with pytest.raises(DataError, match=r"differs in languages \(None there, \['en'\] asked\)"):
            prepare(source, out, selection=Selection(languages=("en",)))

    def test_a_folder_that_holds_something_else(self, source: Path, tmp_path: Path) -> None:
        (tmp_path / "out").mkdir()
        (tmp_path / "out/thesis.tex").touch()
        with pytest.raises(DataError, match="is not empty and holds no corpus"):
            prepare(source, tmp_path / "out")

    def test_values_that_cannot_work(self, source: Path, tmp_path: Path) -> None:
        for options, message in (
            ({"audio": "mp3"}, "audio: 'mp3' is not one of keep, flac, tar, shar"),
            ({"shard_size": 0}, "shard_size: 0 must be 1 or more"),
            ({"num_jobs": 0}, "num_jobs: 0 must be 1 or more"),
        ):
            with pytest.raises(ConfigError, match=message):
                prepare(source, tmp_path / "out", **options)
        assert not (tmp_path / "out").exists()

    def test_a_folder_that_another_process_writes_to(self, source: Path, tmp_path: Path) -> None:
        out = tmp_path / "out"
        with Staging(out / ".unfinished").locked(), pytest.raises(DataError, match="Another process is writing to"):
            prepare(source, out)
        prepare(source, out)
        assert not (out / ".unfinished").exists()

    def test_a_folder_in_the_source(self, source: Path) -> None:
        with pytest.raises(DataError, match="is inside the source"):
            prepare(source, source / "out")
        assert not (source / "out").exists()

    def test_to_go_on_when_the_source_has_changed(self, source: Path, tmp_path: Path) -> None:
        out = tmp_path / "out"
        begun = replace(CORPUS, read=lambda *args: [Part("train", ("en",), lambda: 1 / 0)])
        with pytest.raises(ZeroDivisionError):
            prepare(source, out, begun)
        with pytest.raises(DataError, match=r"'train' was en and is en, de; delete the folder"):
            prepare(source, out)

    @pytest.mark.parametrize(("content", "message"), [("{", "is damaged"), ("[]", "another program's")])
    def test_a_corpus_json_that_is_none(self, content: str, message: str, source: Path, tmp_path: Path) -> None:
        (tmp_path / "out").mkdir()
        (tmp_path / "out/corpus.json").write_text(content)
        with pytest.raises(DataError, match=message):
            prepare(source, tmp_path / "out")

    def test_a_full_disk_is_reported_and_finished_work_is_kept(self, source: Path, tmp_path: Path, monkeypatch) -> None:
        prepare(source, out := tmp_path / "out")
        whole = tree(out)
        shutil.rmtree(out)

        def fail(*args) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "a.wav")

        with monkeypatch.context() as patched:
            patched.setattr(shutil, "copyfileobj", fail)  # while the last part's archive is unpacked
            with pytest.raises(DataError, match=r"'a\.wav' cannot be used \(No space left on device\)"):
                prepare(source, out)
        prepare(source, out)
        assert tree(out) == whole

    def test_parts_whose_files_would_have_one_name(self, tmp_path: Path) -> None:
        text = Part("train.en", ("en", "de"), lambda: [Sentence("1", {"en": "one", "de": "eins"})])
        speech = Part("train", ("en", "de"), list, spoken="en")
        corpus = replace(CORPUS, read=lambda source, selection: [text, speech])
        with pytest.raises(AssertionError, match="parts of toy share a name"):
            prepare(tmp_path / "nowhere", tmp_path / "out", corpus)


class TestRegistry:
    def test_every_corpus_has_a_command_that_says_what_it_needs(self) -> None:
        listed = CliRunner().invoke(main, ["prepare", "--help"]).output
        for name in CORPORA:
            corpus = find_corpus(name)
            command = name.replace("_", "-")
            shown = " ".join(CliRunner().invoke(main, ["prepare", command, "--help"]).output.split())
            assert corpus.name == name
            assert command in listed
            assert " ".join(corpus.files.split())[:40] in shown
            assert all(f"--{further}" in shown for further in corpus.extra_sources)

    def test_the_help_imports_no_reader(self) -> None:
        code = (
            "import sys\nfrom click.testing import CliRunner\nfrom nemo_emmett.cli import main\n"
            "assert CliRunner().invoke(main, ['prepare', '--help']).exit_code == 0\n"
            "print([m for m in sys.modules if m.startswith('nemo_emmett.corpora.readers.') or m in ('numpy', 'rich')])"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert done.stdout.strip() == "[]"

    def test_a_misspelt_name_gets_the_nearest(self) -> None:
        with pytest.raises(ConfigError, match="did you mean 'tatoeba'"):
            find_corpus("tatoaba")

    @pytest.mark.parametrize(
        ("name", "hint"),
        [("flors", "did you mean 'flores'"), ("phrasbook", "did you mean 'phrasebook'"), ("xyz", "there are flores, ")],
    )
    def test_a_misspelt_command_gets_the_nearest(self, name: str, hint: str) -> None:
        result = CliRunner().invoke(main, ["prepare", name, "source", "out"])
        assert result.exit_code == 2
        assert f"'{name}' is no corpus that can be prepared; {hint}" in result.output
