"""The small evaluation of ``samples`` as fixtures."""

from __future__ import annotations

from pathlib import Path

import pytest

from nemo_emmett.evaluation.results import Evaluation

from .samples import LANGUAGES, SENTENCES, build_evaluation, build_translations, tone


@pytest.fixture
def recordings(tmp_path) -> Path:
    """A folder with one tone per source language and sentence."""
    for index, language in enumerate(LANGUAGES):
        for number in range(SENTENCES):
            tone(tmp_path / f"{language}{number}.wav", hertz=200 + 100 * index + 10 * number)
    return tmp_path


@pytest.fixture
def evaluation(recordings) -> Evaluation:
    return build_evaluation(build_translations(recordings, "text") + build_translations(recordings, "audio"))
