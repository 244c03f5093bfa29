"""A model on the requests: in windows that are translated together, written in their order."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from math import inf
from pathlib import Path
from typing import Any

from tqdm import tqdm

from nemo_emmett.audio_chunks import join_translations
from nemo_emmett.errors import ConfigError, DataError
from nemo_emmett.models.inputs import Input, Segment, is_recording, split_recording
from nemo_emmett.translation.requests import Request

_PARTS_AT_ONCE = 8
"""Parts of a long recording that are translated together, unless a batch size is given."""


@dataclass(frozen=True)
class Chunk:
    """The translation of a part of a long recording; seconds in its file."""

    start: float
    end: float
    translation: str


@dataclass(frozen=True)
class Result:
    """The translation of a request, or why there is none."""

    request: Request
    translation: str | None
    fault: str = ""
    chunks: tuple[Chunk, ...] = ()  # of a recording that was cut


def translate_requests(
    model: Any,
    requests: Iterable[Request],
    window: int,
    options: Mapping[str, Any],
    *,
    languages_vary: bool = False,
    chunk_seconds: float = inf,
) -> Iterator[list[Result]]:
    """Translate requests, those of a window together, and each long recording part by part, with a bar.

    Args:
        model: has ``translate``, as :class:`~nemo_emmett.models.generation.Generation`.
        requests: read as they are needed.
        window: requests that are read, sorted by length and translated before their results are given.
        options: of ``translate``.
        languages_vary: records name their target languages, so that one that the model does not have is a fault of the
            record, not an error.
        chunk_seconds: longest recording that is not cut.

    Yields:
        The results of each window, in the order of the requests.

    Raises:
        ConfigError: if the model does not have the language.
    """
    faults = (DataError, ConfigError) if languages_vary else (DataError,)
    tolerant = partial(_tolerant, translate=partial(_translate, model, options), faults=faults)
    requests = iter(requests)
    while taken := list(islice(requests, window)):
        found: dict[int, Result] = {}
        for number, request in enumerate(taken):
            if request.fault:
                found[number] = Result(request, None, request.fault)
            elif isinstance(request.input, str) and not request.input.strip():
                found[number] = Result(request, "")  # an empty line between paragraphs
            elif len(parts := _parts(request, chunk_seconds)) > 1:
                found[number] = _translate_parts(request, parts, options.get("batch_size") or _PARTS_AT_ONCE, tolerant)
        numbers = [number for number in range(len(taken)) if number not in found]
        results = tolerant([taken[number] for number in numbers])
        found |= dict(zip(numbers, results, strict=True))
        yield [found[number] for number in range(len(taken))]


def _translate(model: Any, options: Mapping[str, Any], requests: Sequence[Request]) -> list[str]:
    inputs = [request.input for request in requests]
    sources, targets = ([getattr(one, f"{side}_lang") for one in requests] for side in ("source", "target"))
    return model.translate(inputs, sources, targets, **options)


def _parts(request: Request, chunk_seconds: float) -> list[Input]:
    """The parts of a long recording; one that cannot be read is left whole, for the model to say why."""
    if not is_recording(request.input) or chunk_seconds == inf:
        return [request.input]
    try:
        return split_recording(request.input, chunk_seconds)
    except DataError:
        return [request.input]


def _translate_parts(
    request: Request, parts: Sequence[Segment], together: int, translate: Callable[[list[Request]], list[Result]]
) -> Result:
    """The result of a long recording, a few parts at a time; a fault in one of them is the recording's."""
    chunks: list[Chunk] = []
    seconds = sum(part.duration for part in parts)
    with tqdm(total=round(seconds), desc=Path(request.shown).name, unit="s", leave=False, disable=None) as bar:
        for first in range(0, len(parts), together):
            some = parts[first : first + together]
            results = translate([replace(request, input=part) for part in some])
            for part, result in zip(some, results, strict=True):
                end = part.start + part.duration
                if result.fault:
                    return Result(request, None, f"{result.fault} (in the part from {part.start:.2f} s to {end:.2f} s)")
                chunks.append(Chunk(part.start, end, result.translation))
                bar.update(part.duration)
    text = join_translations([chunk.translation for chunk in chunks], request.target_lang)
    return Result(request, text, chunks=tuple(chunks))


def _tolerant(
    requests: Sequence[Request],
    translate: Callable[[Sequence[Request]], list[str]],
    faults: tuple[type[Exception], ...],
) -> list[Result]:
    """The results of requests; where one of them is at fault, the others are translated in halves without it."""
    if not requests:
        return []
    try:
        translations = translate(requests)
    except faults as error:
        if len(requests) == 1:
            return [Result(requests[0], None, str(error).rstrip("."))]
        middle = len(requests) // 2
        return _tolerant(requests[:middle], translate, faults) + _tolerant(requests[middle:], translate, faults)
    return [Result(request, text) for request, text in zip(requests, translations, strict=True)]
