"""Composes recipes from the command line with Hydra; a user's mistake becomes one sentence.

NeMo's ``hydra_runner`` imports NeMo, which takes ten seconds. This module imports Hydra alone, so a misspelt key is
reported at once.
"""

from __future__ import annotations

import functools
import inspect
import os
import re
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from nemo_emmett.config import item_of, load_yaml, nearest
from nemo_emmett.errors import EXIT_INTERRUPTED, EXIT_USER_ERROR, ConfigError, EmmettError, Help, with_help

if TYPE_CHECKING:
    from omegaconf import DictConfig, ListConfig

CONFIG_PACKAGE = "pkg://nemo_emmett.conf"
"""The package's recipes and config groups; Hydra searches them after the folder of the recipe."""

_QUIET_HYDRA = ("hydra.run.dir=.", "hydra.output_subdir=null", "hydra/job_logging=stdout")
"""Overrides for no dated output folders, copies of the config or log files: a run writes where its recipe says."""

_RESOLVED = re.compile(r"(ext|cfg)://|\$\{[^{}]*:")
"""A reference to a Python object in a logging config, or a call of an OmegaConf resolver."""

_HARMLESS = ("ext://sys.stdout", "ext://sys.stderr", "colorlog.ColoredFormatter")
"""Objects that Hydra's own logging configs refer to."""


def recipe_runner(
    config_name: str, config_path: str | None = None
) -> Callable[[Callable[[DictConfig], Any]], Callable[..., Any]]:
    """Make a function of a config the main function of a script, as NeMo's ``hydra_runner`` does.

    ``--config-name`` picks another recipe, ``--config-path`` another folder, ``key=value`` overrides any key. A user's
    mistake (an :class:`EmmettError`, an unknown key or recipe, a mandatory value that is missing) ends the program with
    exit code 2 and one sentence (another code where the error has its own, see :mod:`nemo_emmett.errors`); any other
    exception keeps its traceback.

    Args:
        config_name: the recipe that is run if the command line names none.
        config_path: folder of the script's recipes, relative to the file of the function. The recipes and config groups
            of nemo_emmett are searched after it.

    Example:
        >>> @recipe_runner("salm_t5")
        ... def main(cfg): ...
        >>> if __name__ == "__main__":
        ...     main()  # doctest: +SKIP
    """

    def decorate(task: Callable[[DictConfig], Any]) -> Callable[..., Any]:
        @functools.wraps(task)
        def main(cfg: DictConfig | None = None) -> Any:
            if cfg is not None:
                return task(cfg)
            with mistakes_as_sentences():
                _run(task, config_name, config_path and str(Path(inspect.getfile(task)).resolve().parent / config_path))
            return None

        return main

    return decorate


def compose_recipe(config: str, overrides: Sequence[str] = ()) -> DictConfig:
    """Read a recipe as a script with :func:`recipe_runner` would, Hydra's defaults lists and overrides included.

    Args:
        config: path of a YAML file, or the name of a recipe of nemo_emmett (``salm_t5``).
        overrides: ``key=value``, as on the command line of ``train.py``.

    Raises:
        ConfigError: if there is no such recipe, an override is refused, or a mandatory value is missing.

    Example:
        >>> compose_recipe("salm_t5", ["trainer.max_steps=7"]).trainer.max_steps
        7
    """
    cfg = compose_incomplete(config, overrides)
    _refuse_missing_values(cfg)
    return cfg


def compose_data(config: str, overrides: Sequence[str] = ()) -> DictConfig | ListConfig:
    """Read a recipe, the config of a dataset, or a list of sources (an ``input_cfg``); mandatory values may be missing.

    Args:
        config: as for :func:`compose_recipe`.
        overrides: ``key=value``; a list takes none.

    Raises:
        ConfigError: if the file cannot be read, or an override is refused.
    """
    from omegaconf import ListConfig

    if Path(config).is_file() and isinstance(content := load_yaml(config), ListConfig):
        if overrides:
            raise ConfigError(f"{overrides[0]}: '{config}' is a list of sources, which has no keys to override.")
        return content
    return compose_incomplete(config, overrides)


def compose_incomplete(config: str, overrides: Sequence[str] = ()) -> DictConfig:
    """Read a recipe as :func:`compose_recipe` does; mandatory values (``???``) may be missing.

    Raises:
        ConfigError: if there is no such recipe, or an override is refused.
    """
    from hydra import compose, initialize_config_dir, initialize_config_module

    path = Path(config)
    is_file = path.suffix in (".yaml", ".yml") or os.sep in str(config)
    if is_file and not path.suffix and not path.exists():
        path = path.with_suffix(".yaml")  # a recipe's name in its folder, as Hydra takes it
    if is_file and not path.is_file():
        raise ConfigError(f"The recipe '{config}' cannot be read: there is no such file.")
    if is_file:
        _refuse_code_in_recipe(path)
        initialized = initialize_config_dir(str(path.resolve().parent), version_base=None)
    else:
        initialized = initialize_config_module(CONFIG_PACKAGE.removeprefix("pkg://"), version_base=None)
    try:
        with initialized:
            return compose(path.name if is_file else config, list(overrides))
    except Exception as error:
        if (sentence := _composition_mistake(error, [path.resolve().parent] if is_file else [])) is None:
            raise
        raise ConfigError(sentence) from error


@contextmanager
def mistakes_as_sentences() -> Iterator[None]:
    """Turn an :class:`EmmettError` into one sentence on stderr and its exit code, and Ctrl-C into exit code 130."""
    try:
        yield
    except EmmettError as error:
        exit_with_sentence(error)
    except KeyboardInterrupt:
        print("Interrupted.", file=sys.stderr)  # noqa: T201
        sys.exit(EXIT_INTERRUPTED)


def exit_with_sentence(error: EmmettError | str) -> NoReturn:
    """Print an error's sentence on stderr, without a traceback, and exit with its code."""
    print(with_help(f"Error: {error}", getattr(error, "page", None)), file=sys.stderr)  # noqa: T201
    sys.exit(getattr(error, "exit_code", EXIT_USER_ERROR))


def _run(task: Callable[[DictConfig], Any], config_name: str, config_path: str | None) -> None:
    """Compose the config and run the task; what Hydra refuses becomes a :class:`ConfigError`."""
    # Private functions of Hydra, which has no public ones for this; NeMo's hydra_runner is built on the same two.
    from hydra import version
    from hydra._internal.utils import _run_hydra, get_args_parser

    started = False

    @functools.wraps(task)
    def start(cfg: DictConfig) -> Any:
        nonlocal started
        started = True
        # Inside the task, because Hydra adds its own output to exceptions that leave it.
        with mistakes_as_sentences():
            _refuse_missing_values(cfg)
            return task(cfg)

    parser = get_args_parser()
    arguments = parser.parse_intermixed_args()
    arguments.overrides += _QUIET_HYDRA
    version.setbase(None)
    named = (Path(sys.argv[0]).parent / arguments.config_path) if arguments.config_path else config_path
    folders = [Path(folder) for folder in (named, arguments.config_dir) if folder]
    for folder in folders:
        _refuse_code_in_recipe(folder / f"{(arguments.config_name or config_name).removesuffix('.yaml')}.yaml")
    # With the variable Hydra raises errors instead of printing its own version of them.
    with _environment("HYDRA_FULL_ERROR", "1"), _hydra_runs_nothing():
        try:
            _run_hydra(
                args=arguments,
                args_parser=parser,
                task_function=start,
                config_path=config_path or CONFIG_PACKAGE,
                config_name=config_name,
            )
        except Exception as error:
            if started or (sentence := _composition_mistake(error, folders)) is None:
                raise
            raise ConfigError(sentence) from error


def _refuse_code_in_recipe(path: Path) -> None:
    """Refuse a recipe that has Hydra import packages when it is read, as ``pkg://`` in ``hydra.searchpath`` does.

    A file that cannot be read is left to Hydra, which reports it.
    """
    import yaml

    try:
        recipe = yaml.safe_load(path.read_text(encoding="utf-8"))
        places = recipe["hydra"]["searchpath"]
    except (OSError, UnicodeDecodeError, yaml.YAMLError, KeyError, TypeError):
        return
    for place in places if isinstance(places, list) else [places]:
        if str(place).startswith("pkg://") and place != CONFIG_PACKAGE:
            raise ConfigError(
                f"hydra.searchpath: '{place}' would import a package, which runs it; give the configs as a folder "
                f"(file://...), or as --config-dir. It is in '{path}'."
            )


@contextmanager
def _hydra_runs_nothing() -> Iterator[None]:
    """Refuse what a recipe would have Hydra call before its task: callbacks, and factories of log handlers."""
    from hydra._internal.config_loader_impl import ConfigLoaderImpl

    load = ConfigLoaderImpl.load_configuration

    @functools.wraps(load)
    def load_and_check(*args: Any, **kwargs: Any) -> DictConfig:
        cfg = load(*args, **kwargs)
        from omegaconf import OmegaConf

        for key in ("callbacks", "job_logging", "hydra_logging"):
            called = OmegaConf.select(cfg, f"hydra.{key}")
            if called and (place := _called(OmegaConf.to_container(called), f"hydra.{key}")):
                raise ConfigError(f"{place}: a recipe cannot have Hydra call something; remove it.")
        return cfg

    ConfigLoaderImpl.load_configuration = load_and_check
    try:
        yield
    finally:
        ConfigLoaderImpl.load_configuration = load


def _called(value: Any, path: str) -> str | None:
    """The place of what would be called, or None; logging's own handlers and formatters are harmless."""
    if isinstance(value, list):
        value = dict(enumerate(value))
    if not isinstance(value, dict):
        return path if isinstance(value, str) and _RESOLVED.match(value) and value not in _HARMLESS else None
    for key, child in value.items():
        if child in _HARMLESS:
            continue
        if key in ("_target_", "()") or (key == "class" and not str(child).startswith("logging.")):
            return f"{path}.{key}"
        if (place := _called(child, f"{path}.{key}")) is not None:
            return place
    return None


def _refuse_missing_values(cfg: DictConfig) -> None:
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    # Unresolved: a value that refers to a missing one is not itself missing.
    if missing := sorted(_missing_keys(OmegaConf.to_container(cfg))):
        raise ConfigError(
            f"{', '.join(missing)}: the recipe leaves this to you; give {missing[0]}=... on the command line.",
            page=Help.MISSING_VALUE,
        )
    try:
        OmegaConf.missing_keys(cfg)  # this resolves every interpolation
    except OmegaConfBaseException as error:
        reason = str(error).splitlines()[0].rstrip(".")
        raise ConfigError(f"{_place(error.full_key)}: {reason}; correct what it refers to.") from error


def _missing_keys(value: Any, path: str = "") -> Iterator[str]:
    """Paths of the mandatory values that are missing, as written on the command line."""
    if value == "???":
        yield path
    elif isinstance(value, dict):
        for key, child in value.items():
            yield from _missing_keys(child, f"{path}.{key}".lstrip("."))
    elif isinstance(value, list):
        for index, child in enumerate(value):
            yield from _missing_keys(child, item_of(path, index))


def _composition_mistake(error: Exception, folders: Sequence[Path]) -> str | None:
    """The user's mistake because of which composing in the recipe's ``folders`` failed; None for any other error."""
    from hydra.errors import HydraException, MissingConfigException, OverrideParseException
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    if isinstance(error, MissingConfigException):
        return _missing_config(error, folders)
    if isinstance(error, OverrideParseException):
        hint = f"; write {readable} instead" if (readable := _readable_override(error.override)) else ""
        return f"{error.override}: cannot be read as key=value: {error.message.splitlines()[0]}{hint}."
    if isinstance(error.__cause__, OmegaConfBaseException):
        return _refused_override(error.__cause__)
    if ambiguous := re.match(r"Ambiguous value for argument '([^=]+)=(.*)'\n", str(error)):
        key, value = ambiguous.groups()
        text, several = shlex.quote(f'{key}="{value}"'), shlex.quote(f"{key}=[{value}]")
        return f"{key}={value}: has a comma; write {text} for a text or {several} for a list."
    if isinstance(error, (HydraException, OmegaConfBaseException, YAMLError)):
        return _one_line(str(error))
    return None


def _readable_override(override: str) -> str | None:
    """A readable form, quoted for the shell, of an override that Hydra cannot read; None if there is none.

    Items of lists are written ``.0``, and a text with ``=``, brackets and the like in it is quoted, such as the name of
    a checkpoint in ``'path="step=7-last.ckpt"'``.
    """
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import OverrideParseException

    key, _, value = override.partition("=")
    key = _place(key)
    candidates = [f"{key}={value}"] if value.startswith(("[", "{")) else [f"{key}={value}", f'{key}="{value}"']
    for candidate in candidates:
        try:
            OverridesParser.create().parse_overrides([candidate])
        except OverrideParseException:
            continue
        return shlex.quote(candidate)
    return None


def _place(full_key: str) -> str:
    """A key as written on the command line, from OmegaConf's name of it (``input_cfg[0].type``)."""
    return re.sub(r"\[(\d+)\]", r".\1", full_key)


def _missing_config(error: Any, folders: Sequence[Path]) -> str:
    """The sentence for Hydra's ``MissingConfigException``: of the recipe itself, or of an option of a config group."""
    if error.missing_cfg_file is None:
        return _one_line(str(error))
    group, _, option = error.missing_cfg_file.rpartition("/")
    options = error.options
    if not options:
        places = [folder / group for folder in (files("nemo_emmett.conf"), *folders)]
        names = {file.name for place in places if place.is_dir() for file in place.iterdir()}
        options = sorted(name.removesuffix(".yaml") for name in names if name.endswith(".yaml"))
    if suggestion := nearest(option, options):
        hint = f"did you mean '{suggestion}'?"
    else:
        elsewhere = "" if group else "; name any other by the path of its file (a script: by --config-path)"
        hint = f"there are {', '.join(options) or 'none'}{elsewhere}."
    return f"{f'{group}: ' if group else ''}there is no recipe '{option}'; {hint}"


def _refused_override(error: Any) -> str:
    """The sentence for OmegaConf's error: an unknown key, or a value of the wrong type."""
    from omegaconf import DictConfig
    from omegaconf.errors import ConfigAttributeError, ConfigIndexError, ConfigKeyError

    if isinstance(error, ConfigIndexError):
        return f"{_place(error.full_key)}: the recipe's list has no such item; give the whole list."
    if not isinstance(error, (ConfigAttributeError, ConfigKeyError)):
        return _one_line(str(error))
    parent = error.parent_node
    known = sorted(map(str, parent.keys())) if isinstance(parent, DictConfig) else []
    suggestion = nearest(str(error.key), known)
    place = _place(error.full_key)
    hint = f"did you mean '{suggestion}'?" if suggestion else f"to add it, write +{place}=..."
    return f"{place}: there is no such key in the recipe; {hint}"


def _one_line(message: str) -> str:
    return " ".join(message.split())


@contextmanager
def _environment(name: str, value: str) -> Iterator[None]:
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before
