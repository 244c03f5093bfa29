"""Sections of a recipe become dataclasses, by the types and ranges that their fields declare (with pydantic).

What OmegaConf would convert, or a library would reject later, is refused with one sentence that names the key, the
value and what is accepted. Numbers may be given as text, as ``${oc.env:...}`` gives them; ``'false'`` is no boolean.
"""

from __future__ import annotations

import reprlib
import types
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import annotated_types
from pydantic import BeforeValidator, ConfigDict, Strict, TypeAdapter, ValidationError

from nemo_emmett.errors import ConfigError, Help

T = TypeVar("T")


def _no_boolean(value: Any) -> Any:
    """Python counts True as 1."""
    if isinstance(value, bool):
        raise ValueError
    return value


def is_number(value: object) -> bool:
    """Whether a value is a number, which a boolean is not."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


Switch = Annotated[bool, Strict()]
"""true or false."""

Whole = Annotated[int, BeforeValidator(_no_boolean)]
"""A whole number."""

Number = Annotated[float, BeforeValidator(_no_boolean), annotated_types.Predicate(lambda x: abs(x) < float("inf"))]
"""A finite number."""

Limit = Annotated[float, BeforeValidator(_no_boolean), annotated_types.Predicate(lambda x: x == x)]
"""A number, which may be infinite."""

Text = Annotated[str, Strict()]
"""A text that is not made of a number."""


def _no_empty_text(value: Any) -> Any:
    """pathlib takes an empty text for the current folder."""
    if isinstance(value, str) and not value.strip():
        raise ValueError
    return value


FilePath = Annotated[Path, BeforeValidator(_no_empty_text)]
"""The path of a file or folder."""

NonEmpty = Annotated[Text, annotated_types.MinLen(1)]
"""A text that is not empty."""

Count = Annotated[Whole, annotated_types.Ge(0)]
"""0, 1, 2, ..."""

PositiveWhole = Annotated[Whole, annotated_types.Ge(1)]
"""1, 2, 3, ..."""

Positive = Annotated[Number, annotated_types.Gt(0)]
"""A number above 0."""

NonNegative = Annotated[Number, annotated_types.Ge(0)]
"""A number from 0."""

Share = Annotated[Number, annotated_types.Ge(0), annotated_types.Le(1)]
"""A number from 0 to 1."""


def parse_value(annotation: Any, value: Any, place: str) -> Any:
    """A value as the type that is declared for it.

    Args:
        annotation: a type, such as ``Positive | None`` or ``list[Whole]``.
        value: plain mappings, lists and scalars.
        place: the value's place in the recipe, for the message.

    Raises:
        ConfigError: naming the place, the value and what is accepted.

    Example:
        >>> parse_value(PositiveWhole | None, 0, "data.train_ds.batch_size")
        Traceback (most recent call last):
        nemo_emmett.errors.ConfigError: data.train_ds.batch_size: 0 cannot be used; give a whole number from 1, or null.
    """
    try:
        return _adapter(annotation).validate_python(value)
    except ValidationError:
        place, value, annotation = _place_of_fault(annotation, value, place)
        sentence = f"{place}: {reprlib.repr(value)} cannot be used; give {describe(annotation)}."
        raise ConfigError(sentence, page=Help.VALUE) from None


def parse_section(cls: type[T], section: Mapping[str, Any], place: str, /, **given: Any) -> T:
    """A section of a recipe as a dataclass. Keys that are no fields are left to :func:`~nemo_emmett.config.check_keys`.

    Args:
        cls: a dataclass whose fields declare types; defaults hold for keys that are absent.
        section: plain mappings, lists and scalars.
        place: the section's place in the recipe, for messages; empty at its top.
        given: fields that are no keys of the section, such as the place itself; they are taken as they are.

    Raises:
        ConfigError: naming the first key, in the order of the fields, whose value is not of the declared type.
    """
    hints = get_type_hints(cls, include_extras=True)
    values = {
        name: parse_value(hint, section[name], f"{place}.{name}".removeprefix("."))
        for name, hint in hints.items()
        if name in section and name not in given and name in cls.__dataclass_fields__
    }
    return cls(**values, **given)


def parse_fields(instance: Any, place: str) -> None:
    """Parse the fields of a frozen dataclass by their declared types, in its ``__post_init__``.

    Raises:
        ConfigError: as :func:`parse_section`.
    """
    for name, hint in get_type_hints(type(instance), include_extras=True).items():
        object.__setattr__(instance, name, parse_value(hint, getattr(instance, name), f"{place}.{name}"))


@cache
def _adapter(annotation: Any) -> TypeAdapter:
    return TypeAdapter(annotation, config=ConfigDict(arbitrary_types_allowed=True))


def _place_of_fault(annotation: Any, value: Any, place: str) -> tuple[str, Any, Any]:
    """The innermost item at fault, with its place and its type; the value itself unless it is a list or mapping."""
    kinds = get_args(annotation) if get_origin(annotation) in (Union, types.UnionType) else (annotation,)
    if isinstance(value, Mapping):
        containers = [kind for kind in kinds if get_origin(kind) in (dict, Mapping)]
        items = list(value.items())
    elif isinstance(value, Sequence) and not isinstance(value, str):
        containers = [kind for kind in kinds if get_origin(kind) in (list, tuple, Sequence)]
        items = list(enumerate(value))
    else:
        return place, value, annotation
    if len(containers) == 1:
        item_type = get_args(containers[0])[1 if isinstance(value, Mapping) else 0]
        for key, item in items:
            try:
                _adapter(item_type).validate_python(item)
            except ValidationError:
                return _place_of_fault(item_type, item, f"{place}.{key}")
    return place, value, annotation


def describe(annotation: Any) -> str:
    """What a type accepts, in words.

    Example:
        >>> describe(list[PositiveWhole] | Literal["auto"] | None)
        "a list, each item a whole number from 1, or 'auto', or null"
    """
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin in (Union, types.UnionType):
        return ", or ".join(describe(argument) for argument in arguments)
    if origin is Literal:
        return " or ".join(repr(argument) for argument in arguments)
    if origin is Annotated:
        what, comma, items = describe(arguments[0]).partition(", each")
        return what + _range(arguments[1:]) + comma + items
    if origin in (list, tuple, Sequence):
        return f"a list, each item {describe(arguments[0])}"
    if origin in (dict, Mapping):
        return f"a mapping, each value {describe(arguments[1])}"
    names = {bool: "true or false", int: "a whole number", float: "a number", str: "a text", list: "a list"}
    return {**names, dict: "a mapping", Path: "a path", type(None): "null", Any: "a value"}.get(
        annotation, str(annotation)
    )


def _range(constraints: Sequence[Any]) -> str:
    words = {
        "ge": " from {}",
        "gt": " above {}",
        "le": " to {}",
        "lt": " to below {}",
        "max_length": " ({} items)",
    }
    said = [text.format(getattr(one, key)) for key, text in words.items() for one in constraints if _has(one, key)]
    not_empty = any(_has(one, "min_length") and one.min_length == 1 for one in constraints)
    return "".join([*said, *([" that is not empty"] if not_empty else [])])


def _has(constraint: Any, bound: str) -> bool:
    return getattr(constraint, bound, None) is not None
