"""Values of a recipe are taken, or refused, by the types and ranges that are declared for them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import pytest

from nemo_emmett.errors import ConfigError
from nemo_emmett.typed_config import (
    Count,
    Number,
    Positive,
    PositiveWhole,
    Share,
    Switch,
    Text,
    describe,
    parse_section,
    parse_value,
)


@pytest.mark.parametrize(
    ("annotation", "value", "taken"),
    [
        (PositiveWhole, 1, 1),
        (PositiveWhole, "4", 4),  # as ${oc.env:...} gives it
        (PositiveWhole | None, None, None),
        (Count, 0, 0),
        (Positive, 2, 2.0),
        (Share, 1, 1.0),
        (Switch, False, False),
        (list[PositiveWhole] | Literal["auto"], "auto", "auto"),
        (list[list[Positive]], [[1, 2.5]], [[1.0, 2.5]]),
    ],
)
def test_takes(annotation: Any, value: Any, taken: Any) -> None:
    parsed = parse_value(annotation, value, "here")
    assert parsed == taken
    assert type(parsed) is type(taken)


@pytest.mark.parametrize(
    ("annotation", "value", "message"),
    [
        (PositiveWhole | None, 0, "here: 0 cannot be used; give a whole number from 1, or null."),
        (PositiveWhole, True, "here: True cannot be used; give a whole number from 1."),
        (PositiveWhole, 4.5, "here: 4.5 cannot be used; give a whole number from 1."),
        (Positive, float("nan"), "here: nan cannot be used; give a number above 0."),
        (Number, float("inf"), "here: inf cannot be used; give a number."),
        (Number, False, "here: False cannot be used; give a number."),
        (Share, 1.5, "here: 1.5 cannot be used; give a number from 0 to 1."),
        (Switch, "false", "here: 'false' cannot be used; give true or false."),
        (Switch, 0, "here: 0 cannot be used; give true or false."),
        (Text, 5, "here: 5 cannot be used; give a text."),
        (list[Positive], "abc", "here: 'abc' cannot be used; give a list, each item a number above 0."),
        (list[Positive], [1, -2], "here.1: -2 cannot be used; give a number above 0."),
        (list[list[Positive]] | None, [[1], [2, "x"]], "here.1.1: 'x' cannot be used; give a number above 0."),
        (dict[str, Positive], {"a": 1, "b": 0}, "here.b: 0 cannot be used; give a number above 0."),
    ],
)
def test_refuses_naming_the_innermost_item(annotation: Any, value: Any, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        parse_value(annotation, value, "here")
    assert str(error.value) == message


def test_a_section_becomes_a_dataclass() -> None:
    @dataclass(frozen=True)
    class Section:
        place: str
        size: PositiveWhole = 8
        weight: Positive | None = None

    # Local names cannot be resolved from text, so the annotations are given as objects.
    Section.__annotations__ = {"place": str, "size": PositiveWhole, "weight": Positive | None}
    assert parse_section(Section, {"size": 2, "other": 1}, "data", place="data") == Section("data", 2, None)
    with pytest.raises(ConfigError, match=r"^data\.weight: 0 cannot be used"):
        parse_section(Section, {"weight": 0}, "data", place="data")


def test_describes_what_is_accepted() -> None:
    assert (
        describe(list[PositiveWhole] | Literal["auto"] | None)
        == "a list, each item a whole number from 1, or 'auto', or null"
    )
