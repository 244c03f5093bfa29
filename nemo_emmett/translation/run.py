"""A model on the requests: in windows that are translated together, written in their order."""

from __future__ import annotations

from collections import defaultdict
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
        groups: dict[tuple[str | None, str | None], list[int]] = defaultdict(list)
        for number, request in enumerate(taken):
            if request.fault:
                found[number] = Result(request, None, request.fault)
            elif isinstance(request.input, str) and not request.input.strip():
                found[number] = Result(request, "")  # an empty line between paragraphs
            else:
                groups[request.source_lang, request.target_lang].append(number)
        for (source, target), numbers in groups.items():
            of_group = [taken[number] for number in numbers]
            translate = partial(model.translate, source_lang=source, target_lang=target, **options)
            try:
                results = _tolerant(of_group, translate)
            except ConfigError as error:
                if not languages_vary:
                    raise
                results = [Result(request, None, str(error).rstrip(".")) for request in of_group]
            found |= dict(zip(numbers, results, strict=True))
        yield [found[number] for number in range(len(taken))]


def _tolerant(requests: Sequence[Request], translate: Callable[[list], list[str]]) -> list[Result]:
    """The results of requests; where one of them is at fault, the others are translated in halves without it."""
    try:
        translations = translate([request.input for request in requests])
    except DataError as error:
        if len(requests) == 1:
            return [Result(requests[0], None, str(error).rstrip("."))]
        middle = len(requests) // 2
        return _tolerant(requests[:middle], translate) + _tolerant(requests[middle:], translate)
    return [Result(request, text) for request, text in zip(requests, translations, strict=True)]
