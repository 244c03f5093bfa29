"""The report: one HTML page that holds its table, curves, translations and recordings, and asks the network nothing."""

from __future__ import annotations

import base64
import difflib
import io
import os
import random
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import soundfile
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from nemo_emmett.errors import DataError
from nemo_emmett.evaluation.charts import charts
from nemo_emmett.evaluation.curves import Curve
from nemo_emmett.evaluation.results import Evaluation, Score, Translation, write_text
from nemo_emmett.evaluation.scoring import columns
from nemo_emmett.evaluation.table import (
    MODALITY_NAMES,
    direction_title,
    result_table,
    skipped_lines,
    throughput_lines,
)

TEMPLATE = "report.html.j2"
MAX_RECORDING_SECONDS = 30.0
"""Longer recordings are not put on the page: every browser that opens it has to load them all."""


@dataclass(frozen=True)
class Example:
    """One translation as the page shows it."""

    direction: str
    modality: str  # as a reader calls it
    source: str | None
    reference: str | None
    words: list[tuple[str, bool]]  # of the hypothesis; true where the reference does not have it
    is_exact: bool
    audio: str | None  # a data: URI
    seconds: float | None


def write_report(
    evaluation: Evaluation,
    path: str | os.PathLike[str],
    *,
    curves: Mapping[str, Curve] | None = None,
    examples: int = 10,
    baseline: Evaluation | None = None,
) -> None:
    """Write the page.

    Args:
        evaluation: what the page is about.
        path: the HTML file; it appears whole or not at all.
        curves: those of the training (:func:`~nemo_emmett.evaluation.read_curves`), by tag.
        examples: how many translations to show; drawn at random, speech with its recording before text.
        baseline: an earlier evaluation whose BLEU stands beside this one's.

    Raises:
        DataError: if the baseline cannot be compared, or if the recording of an example cannot be read.
    """
    table = result_table(evaluation, baseline)
    environment = Environment(
        loader=PackageLoader("nemo_emmett.evaluation", ""),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page = environment.get_template(TEMPLATE).render(
        evaluation=evaluation,
        baseline=baseline,
        name=model_name(evaluation),
        table=table,
        modality_names=MODALITY_NAMES,
        throughput=throughput_lines(evaluation),
        skipped=skipped_lines(evaluation),
        test_sets=_test_sets(evaluation),
        # Our own SVG, its texts escaped where it is drawn.
        charts=[(chart, Markup(chart.svg)) for chart in charts(curves or {})],
        examples=[_example(translation) for translation in choose_examples(evaluation.translations, examples)],
    )
    write_text(path, page)


def model_name(evaluation: Evaluation) -> str:
    """A short name for the model: the last two parts of its folder."""
    return "/".join(Path(evaluation.model).parts[-2:])


def choose_examples(translations: Sequence[Translation], number: int) -> list[Translation]:
    """Draw translations at random, the same ones each time, spread over the directions.

    Speech whose recording is at hand and short comes first; text fills up what is missing. Sentences that an example
    already has in another direction are passed over as long as there are others.
    """
    with_audio = [translation for translation in translations if _is_playable(translation)]
    text = [translation for translation in translations if translation.modality == "text"]
    chosen = _spread(with_audio, number)
    return chosen + _spread(text, number - len(chosen))


def _is_playable(translation: Translation) -> bool:
    if translation.audio_path is None or (translation.duration or 0.0) > MAX_RECORDING_SECONDS:
        return False
    return Path(translation.audio_path).is_file()


def _spread(translations: Sequence[Translation], number: int) -> list[Translation]:
    """Up to ``number`` translations, the directions taking turns; translations between languages before others."""
    draw = random.Random(0)
    by_direction: dict[tuple, list[Translation]] = defaultdict(list)
    for translation in translations:
        by_direction[translation.source_lang, translation.target_lang].append(translation)
    directions = sorted(by_direction, key=str)
    draw.shuffle(directions)
    directions.sort(key=lambda direction: direction[0] == direction[1])
    for direction in directions:
        draw.shuffle(by_direction[direction])

    chosen: list[Translation] = []
    seen: set[tuple] = set()
    while len(chosen) < number and any(by_direction.values()):
        for direction in directions:
            if by_direction[direction] and len(chosen) < number:
                fresh = [one for one in by_direction[direction] if _sentence(one) not in seen]
                translation = (fresh or by_direction[direction])[0]
                by_direction[direction].remove(translation)
                seen.add(_sentence(translation))
                chosen.append(translation)
    return chosen


def _sentence(translation: Translation) -> tuple[str | None, str | None]:
    return translation.source_lang, translation.source_text


def _example(translation: Translation) -> Example:
    return Example(
        direction=direction_title(translation.source_lang, translation.target_lang),
        modality=MODALITY_NAMES.get(translation.modality, translation.modality),
        source=translation.source_text,
        reference=translation.reference,
        words=compare_words(translation.hypothesis, translation.reference or ""),
        is_exact=translation.hypothesis == translation.reference,
        audio=_audio_uri(translation.audio_path) if _is_playable(translation) else None,
        seconds=translation.duration,
    )


def compare_words(hypothesis: str, reference: str) -> list[tuple[str, bool]]:
    """The words of a hypothesis, spaces kept, each with whether it departs from the reference.

    Example:
        >>> compare_words("the red cat", "the black cat")
        [('the ', False), ('red ', True), ('cat', False)]
    """
    words = re.findall(r"\S+\s*|\s+", hypothesis)
    matcher = difflib.SequenceMatcher(None, [word.strip() for word in words], reference.split(), autojunk=False)
    kept = {block.a + offset for block in matcher.get_matching_blocks() for offset in range(block.size)}
    return [(word, position not in kept) for position, word in enumerate(words)]


def _audio_uri(path: str) -> str:
    """A recording as a ``data:`` URI in FLAC, which all browsers play and which halves a WAV file without loss."""
    try:
        samples, sampling_rate = soundfile.read(path, dtype="int16")
    except (OSError, RuntimeError) as error:
        raise DataError(f"The recording {path} of the test set cannot be read for the report: {error}.") from error
    flac = io.BytesIO()
    soundfile.write(flac, samples, sampling_rate, format="FLAC", subtype="PCM_16")
    return "data:audio/flac;base64," + base64.b64encode(flac.getvalue()).decode("ascii")


def _test_sets(evaluation: Evaluation) -> list[str]:
    """Each test set in words: ``flores (text, 12 directions, 1,200 sentences)``."""
    grouped: dict[tuple[str, str], list[Score]] = defaultdict(list)
    for column in columns(evaluation.scores):
        for score in column.scores:
            grouped[score.test_set, score.modality].append(score)
    described = []
    for (test_set, modality), scores in grouped.items():
        directions = "1 direction" if len(scores) == 1 else f"{len(scores)} directions"
        sentences = sum(score.sentences for score in scores)
        described.append(
            f"{test_set} ({MODALITY_NAMES.get(modality, modality)}, {directions}, {sentences:,} sentences)"
        )
    return described
