"""Sections that name a class under ``_target_``: the class is found, and its arguments are checked by its signature.

Hydra and the classes themselves would refuse the same, but with tracebacks of many lines, and some after hours.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Mapping
from importlib import import_module
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from hydra.errors import InstantiationException
from hydra.utils import get_object
from omegaconf.errors import OmegaConfBaseException

from nemo_emmett.config import check_keys, check_target, nearest
from nemo_emmett.errors import ConfigError
from nemo_emmett.typed_config import Number, Switch, Text, Whole, parse_value

# Third parties annotate numbers as `int` that may be fractions, such as peft's lora_alpha.
_TYPES = {bool: Switch, int: Whole | Number, float: Number, str: Text}

BUILD_FAULTS = (
    *(ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError),
    *(InstantiationException, OmegaConfBaseException),
)
"""What classes, Hydra and NeMo raise where arguments are wrong."""


def first_line(error: BaseException) -> str:
    """The first line of an exception's message, or its class."""
    return (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")


def class_of(section: Mapping[str, Any], place: str) -> Callable[..., Any]:
    """What a section's ``_target_`` names.

    Raises:
        ConfigError: if it is missing, not on NeMo's allow-list, or does not exist.
    """
    target = section.get("_target_")
    if target is None:
        raise ConfigError(f"{place}._target_ is missing: give the path of a class.")
    check_target(target, f"{place}._target_")
    try:
        return get_object(target)
    except Exception as error:  # whatever importing a module raises
        module, _, name = target.rpartition(".")
        try:
            suggestion = nearest(name, [known for known in dir(import_module(module)) if not known.startswith("_")])
        except ImportError:
            suggestion = None
        hint = f"did you mean '{module}.{suggestion}'?" if suggestion else "give the path of a class."
        raise ConfigError(f"{place}._target_: there is no '{target}'; {hint}") from error


def parse_arguments(
    function: Callable[..., Any],
    section: Mapping[str, Any],
    place: str,
    given: Collection[str] = (),
    typed_by_default: Collection[type] = (bool,),
) -> dict[str, Any]:
    """A section's values as keyword arguments of a class or function; keys of Hydra's (``_target_``) stay as they are.

    Args:
        function: what is called.
        section: its arguments by name.
        place: the section's place in the recipe.
        given: parameters that are no keys of the section, since the caller gives them.
        typed_by_default: parameters without annotation have the type of their default, if that is one of these.

    Raises:
        ConfigError: for an argument that is unknown, missing, or of another type.
    """
    parameters, takes_more = _parameters(function)
    parameters = {name: parameter for name, parameter in parameters.items() if name not in given}
    for key in check_keys(section, parameters, place):
        if not takes_more:
            raise ConfigError(f"{place}.{key}: there is no such key; use {', '.join(parameters)}.")
    for key, (_, default) in parameters.items():
        if default is inspect.Parameter.empty and key not in section:
            raise ConfigError(f"{place}.{key} is missing: {function.__name__} needs it.")
    parsed = dict(section)
    for key, (annotation, default) in parameters.items():
        if key not in section:
            continue
        if annotation is inspect.Parameter.empty and type(default) in typed_by_default:
            annotation = (float if type(default) is int else type(default)) | None
        parsed[key] = parse_value(_of_recipe(annotation) or Any, section[key], f"{place}.{key}")
    return parsed


def _parameters(function: Callable[..., Any]) -> tuple[dict[str, tuple[Any, Any]], bool]:
    """Annotation and default of each parameter, and whether there may be others. Where a class passes ``**kwargs`` to
    its base, the base's are its own."""
    calls = [function]
    if isinstance(function, type):
        calls = [kind.__init__ for kind in function.__mro__ if "__init__" in vars(kind)]
    found: dict[str, tuple[Any, Any]] = {}
    for call in calls:
        try:
            hints = get_type_hints(call, include_extras=True)
        except (NameError, TypeError):  # a name that is there for type checkers alone
            hints = {}
        parameters = inspect.signature(call).parameters.values()
        for parameter in parameters:
            if parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY) and parameter.name != "self":
                annotation = hints.get(parameter.name, parameter.empty)
                found.setdefault(parameter.name, (annotation, parameter.default))
        if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
            return found, False
    return found, True


def _of_recipe(annotation: Any) -> Any:
    """The part of an annotation that values of a recipe can have; None if there is none, such as of a tensor."""
    if annotation in _TYPES or annotation in (Any, type(None), dict, list):
        return _TYPES.get(annotation, annotation)
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin in (Annotated, Literal):
        return annotation
    converted = [_of_recipe(argument) for argument in arguments]
    if origin in (Union, UnionType):
        possible = [kind for kind in converted if kind is not None]
        return Union[tuple(possible)] if set(possible) - {type(None)} else None  # noqa: UP007
    if origin in (list, tuple, dict) and None not in converted:
        return origin[tuple(converted)]
    return None
