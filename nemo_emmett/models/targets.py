"""Sections that name a class under ``_target_``: the class is found, and its arguments are checked by its signature.

Hydra and the classes themselves would refuse the same, but with tracebacks of many lines, and some after hours.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from dataclasses import is_dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import MappingProxyType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from hydra.errors import InstantiationException
from hydra.utils import get_object
from nemo.core.classes.common import UnsafeTargetError
from omegaconf.errors import OmegaConfBaseException

from nemo_emmett.config import check_keys, check_target, nearest
from nemo_emmett.errors import ConfigError, EmmettError, Help, ModelError
from nemo_emmett.typed_config import Number, Switch, Text, Whole, parse_value

_TYPES = {bool: Switch, int: Whole, float: Number, str: Text}

BUILD_FAULTS = (
    *(ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError),
    *(InstantiationException, OmegaConfBaseException),
)
"""Exceptions of classes, Hydra and NeMo for wrong arguments."""


def first_line(error: BaseException) -> str:
    """The first line of an exception's message, or its class."""
    return (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")


def class_of(section: Mapping[str, Any], place: str, base: type = object) -> Callable[..., Any]:
    """The class, or function, that a section's ``_target_`` names.

    Raises:
        ConfigError: if it is missing, not on NeMo's allow-list, does not exist, is of a package that is not installed,
            or is a class but none of ``base``.
    """
    target = section.get("_target_")
    if target is None:
        raise ConfigError(f"{place}._target_ is missing: give the path of a class.")
    check_target(target, f"{place}._target_")
    if find_spec(package := target.partition(".")[0]) is None:
        raise ConfigError(
            f"{place}._target_: '{target}' needs the package '{package}', which is not installed; install it.",
            page=Help.MISSING_PACKAGE,
        )
    try:
        found = get_object(target)
    except Exception as error:  # whatever importing a module raises
        module, _, name = target.rpartition(".")
        try:
            suggestion = nearest(name, [known for known in dir(import_module(module)) if not known.startswith("_")])
        except ImportError:
            suggestion = None
        hint = f"did you mean '{module}.{suggestion}'?" if suggestion else "give the path of a class."
        raise ConfigError(f"{place}._target_: there is no '{target}'; {hint}") from error
    while hasattr(found, "__wrapped__"):  # NeMo's @experimental and @deprecated
        found = found.__wrapped__
    if not callable(found) or (isinstance(found, type) and not issubclass(found, base)):
        raise ConfigError(f"{place}._target_: '{target}' is no {base.__name__}; give the path of such a class.")
    return found


def parse_arguments(
    function: Callable[..., Any],
    section: Mapping[str, Any],
    place: str,
    given: Collection[str] = (),
    types: Mapping[str, Any] = MappingProxyType({}),
    numbers_by_default: bool = False,
) -> dict[str, Any]:
    """A section's values as keyword arguments of a class or function; keys of Hydra's (``_target_``) stay as they are.

    Args:
        function: that takes the arguments.
        section: its arguments by name.
        place: the section's place in the recipe.
        given: parameters that are no keys of the section, since the caller gives them.
        types: types of parameters, by name, that are narrower than those of the signature.
        numbers_by_default: a parameter without annotation takes numbers only if its default is one; if its default is
            a boolean, it takes booleans only in any case.

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
    for key in (key for key in section if key in parameters or key in types):
        annotation, default = parameters.get(key, (Any, None))
        if key in types:
            annotation = types[key] if default is inspect.Parameter.empty else types[key] | None
        elif annotation is inspect.Parameter.empty and isinstance(default, bool):
            annotation = Switch | None
        elif annotation is inspect.Parameter.empty and isinstance(default, (int, float)) and numbers_by_default:
            annotation = Number | None
        value = parse_value(_of_recipe(annotation) or Any, section[key], f"{place}.{key}")
        parsed[key] = section[key] if isinstance(section[key], int) else value  # a whole number may have to stay one
    return parsed


def build(section: Mapping[str, Any], place: str, make: Callable[[Mapping[str, Any]], Any]) -> Any:
    """``make(section)``, with faults as one sentence.

    Raises:
        ConfigError: naming the argument at fault, if it is one that can be left out, or else the section.
    """
    try:
        return make(section)
    except BUILD_FAULTS as error:
        fault = error
    target = section.get("_target_")
    if isinstance(fault, UnsafeTargetError):
        raise ConfigError(f"{place}._target_: NeMo does not build '{target}'; give the path of another class.")
    arguments = [key for key in section if not key.startswith("_")]
    culprits = []
    for key in arguments:
        with suppress(*BUILD_FAULTS):
            make({other: value for other, value in section.items() if other != key})
            culprits.append(key)
    cause = fault.__cause__ if isinstance(fault, InstantiationException) and fault.__cause__ else fault
    if isinstance(cause, EmmettError):
        raise cause from fault
    value = repr(section[culprits[0]]) if len(culprits) == 1 else str({key: section[key] for key in arguments})
    place = f"{place}.{culprits[0]}" if len(culprits) == 1 else place
    raise ConfigError(f"{place}: {target} cannot be built with {value} ({first_line(cause)}); correct it.") from fault


def _parameters(function: Callable[..., Any]) -> tuple[dict[str, tuple[Any, Any]], bool]:
    """Annotation and default of each parameter, and whether there may be others. Where a class passes ``**kwargs`` to
    its base, the base's are its own."""
    calls = [function]
    if isinstance(function, type):
        calls = [kind.__init__ for kind in function.__mro__ if "__init__" in vars(kind)]
    found: dict[str, tuple[Any, Any]] = {}
    for call in calls:
        try:
            hints = get_type_hints(function if is_dataclass(function) else call, include_extras=True)
        except (NameError, TypeError):  # a name that is imported for type checkers only
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


def check_local_path(source: str, key: str) -> None:
    """Check that a path on this machine exists; names of other forms may be those of a hub."""
    looks_local = source.startswith((".", "/", "~")) or source.endswith(".nemo") or source.count("/") > 1
    if looks_local and not Path(source).expanduser().exists():
        raise ModelError(
            f"{key}: '{source}' does not exist; give a folder or file that does, or the name of a model.",
            page=Help.NO_MODEL,
        )
