"""A model on the requests: in windows that are translated together, written in their order."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any

from nemo_emmett.errors import ConfigError, DataError
from nemo_emmett.translation.requests import Request


@dataclass(frozen=True)
class Result:
    """The translation of a request, or why there is none."""

    request: Request
    translation: str | None
    fault: str = ""


def translate_requests(
    model: Any,
    requests: Iterable[Request],
    window: int,
    options: Mapping[str, Any],
    *,
    languages_vary: bool = False,
) -> Iterator[list[Result]]:
    """Translate requests, those of a window together.

    Args:
        model: has ``translate``, as :class:`~nemo_emmett.models.generation.Generation`.
        requests: read as they are needed.
        window: requests that are read, sorted by length and translated before their results are given.
        options: of ``translate``.
        languages_vary: records name their target languages, so that one that the model does not have is a fault of the
            record, not an error.

    Yields:
        The results of each window, in the order of the requests.

    Raises:
        ConfigError: if the model does not have the language.
    """
    requests = iter(requests)
    while taken := list(islice(requests, window)):
        found: dict[int, Result] = {}
        for number, request in enumerate(taken):
            if request.fault:
                found[number] = Result(request, None, request.fault)
            elif isinstance(request.input, str) and not request.input.strip():
                found[number] = Result(request, "")  # an empty line between paragraphs
        numbers = [number for number in range(len(taken)) if number not in found]
        faults = (DataError, ConfigError) if languages_vary else (DataError,)
        results = _tolerant([taken[number] for number in numbers], partial(_translate, model, options), faults)
        found |= dict(zip(numbers, results, strict=True))
        yield [found[number] for number in range(len(taken))]


def _translate(model: Any, options: Mapping[str, Any], requests: Sequence[Request]) -> list[str]:
    inputs = [request.input for request in requests]
    sources, targets = ([getattr(one, f"{side}_lang") for one in requests] for side in ("source", "target"))
    return model.translate(inputs, sources, targets, **options)


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
