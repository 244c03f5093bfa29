"""All that installing the package makes others see.

- **Lightning** calls :func:`requested_callbacks` at every ``Trainer()`` on the machine (entry point group
  ``lightning.pytorch.callbacks_factory``).
- **Hydra** imports ``hydra_plugins/nemo_emmett_plugin.py`` when it starts, which calls :func:`register`.
- **NeMo** knows no plugins. :func:`register` leaves word with Python's import system, so that as soon as somebody
  imports NeMo, its allow-list is opened to our classes, its dataloader factory to ours, and our data types and prompt
  formats are among its own.
- **Recipes** name models, dataloaders and callbacks by short names or class paths: :func:`find`.

Nothing here imports torch or NeMo; what does is imported when it is asked for.
"""

from __future__ import annotations

import functools
import inspect
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from types import ModuleType
from typing import Any

import wrapt

from nemo_emmett.config import check_target, nearest
from nemo_emmett.errors import ConfigError

CALLBACKS_VARIABLE = "NEMO_EMMETT_CALLBACKS"
"""Environment variable: short names of callbacks, separated by commas, that every Lightning ``Trainer`` gets."""

KINDS = ("models", "dataloaders", "callbacks")
"""What has short names; each is an entry point group ``nemo_emmett.<kind>`` that any package may add to."""

TARGET_PREFIX = "nemo_emmett."
"""What NeMo's allow-list must hold for our classes to be named by ``_target_``."""

DATA_TYPES = ("parallel_text",)
"""Types of sources that recipes may name in an ``input_cfg`` beside NeMo's own."""

USE_EMMETT = "use_emmett"
"""Key of a dataset's config that asks NeMo's dataloader factory for our dataloader."""

_logger = logging.getLogger(__name__)


# Short names


def find(kind: str, name: str) -> Any:
    """The object behind a short name of an entry point, or behind a dotted path.

    Args:
        kind: one of ``KINDS``.
        name: ``salm_t5``, or ``package.module.Class``.

    Raises:
        ConfigError: if there is no such name, with the nearest one and all known ones; or if it cannot be imported.

    Example:
        >>> find("models", "salm_t5").__name__
        'SALMT5'
    """
    if "." in name:
        return _find_by_path(kind, name)
    known = entry_points(kind)
    if name not in known:
        raise ConfigError(f"{kind}: there is no '{name}'{_suggestion(name, known)}; known are {_listed(known)}.")
    try:
        return known[name].load()
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"{kind}: '{name}' ({known[name].value}) cannot be imported: {error}.") from error


def find_model(target: str) -> Any:
    """The model class that a recipe's ``model._target_`` names, judged by its name before anything is imported.

    Raises:
        ConfigError: if it is not allowed, cannot be imported, or is no model.
    """
    from lightning.pytorch import LightningModule

    installed = {point.value.replace(":", ".") for point in entry_points("models").values()}
    if "." in target and target not in installed:
        check_target(target, "model._target_")
    found = find("models", target)
    if not (isinstance(found, type) and issubclass(found, LightningModule)):
        raise ConfigError(f"model._target_: '{target}' is not a model; name a class such as nemo_emmett.models.SALMT5.")
    return found


def entry_points(kind: str) -> dict[str, Any]:
    """The entry points of a kind by short name, from every installed package (not loaded)."""
    # Here, because it costs a tenth of a second where nobody asks for it.
    from importlib.metadata import entry_points as installed_entry_points

    return {point.name: point for point in installed_entry_points(group=f"nemo_emmett.{kind}")}


def requested_callbacks() -> list[Any]:
    """The callbacks that the environment variable ``NEMO_EMMETT_CALLBACKS`` asks for; none where it is unset.

    Raises:
        ConfigError: if it names a callback that does not exist.

    Example:
        ``NEMO_EMMETT_CALLBACKS=random_state,oomptimizer NEMO_EMMETT_PROFILE=profile.yaml python any_training.py``
    """
    names = [name.strip() for name in os.environ.get(CALLBACKS_VARIABLE, "").split(",")]
    try:
        return [find("callbacks", name)() for name in names if name]
    except ConfigError as error:
        raise ConfigError(f"Environment variable {CALLBACKS_VARIABLE}: {error}") from error


def _find_by_path(kind: str, path: str) -> Any:
    module_name, _, attribute = path.rpartition(".")
    try:
        module = import_module(module_name)
    except ModuleNotFoundError as error:
        # A missing dependency inside an existing module is another matter: its own message tells it best.
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise
        raise ConfigError(
            f"{kind}: '{path}' cannot be imported, since there is no module '{error.name}'; "
            f"short names are {_listed(entry_points(kind))}."
        ) from error
    try:
        return getattr(module, attribute)
    except AttributeError as error:
        raise ConfigError(
            f"{kind}: there is no '{attribute}' in module '{module_name}'{_suggestion(attribute, dir(module))}."
        ) from error


def _suggestion(name: str, known: Any) -> str:
    suggestion = nearest(name, known)
    return "" if suggestion is None else f"; did you mean '{suggestion}'?"


def _listed(names: Any) -> str:
    return ", ".join(f"'{name}'" for name in sorted(names)) or "none (is nemo_emmett installed?)"


# Registration with NeMo


@dataclass
class Registration:
    """One thing that NeMo is told about us once somebody imports it.

    Args:
        what: its name, for people.
        trigger: the NeMo module whose import sets it off, complete by then.
        action: what is then called, with that module.
        state: ``new``, ``waiting`` for the trigger, ``done`` or ``failed``.
        error: why it failed.
    """

    what: str
    trigger: str
    action: Callable[[ModuleType], None]
    state: str = "new"
    error: str = ""

    def wait(self) -> None:
        """Run as soon as the trigger has been imported, which may be now."""
        if self.state == "new":
            self.state = "waiting"
            wrapt.register_post_import_hook(self.run, self.trigger)

    def run(self, module: ModuleType) -> None:
        """Register now. A failure is logged, not raised: it must not take the user's import of NeMo down with it."""
        try:
            self.action(module)
            self.state = "done"
        except Exception as error:
            self.state, self.error = "failed", f"{type(error).__name__}: {error}"
            _logger.exception("nemo_emmett could not register its %s with NeMo: recipes cannot use them.", self.what)


def register() -> tuple[Registration, ...]:
    """See to it that NeMo knows us as soon as it is imported; at once, if it already is.

    Importing ``nemo_emmett`` does this, and so does starting Hydra where it is installed. A second call does nothing.

    Returns:
        the registrations and how they stand.
    """
    for registration in REGISTRATIONS:
        registration.wait()
    return REGISTRATIONS


def open_allow_list(common: ModuleType) -> None:
    """Admit ``_target_: nemo_emmett...`` to ``nemo.core.classes.common``'s allow-list."""
    if TARGET_PREFIX not in common.ALLOWED_TARGET_PREFIXES:
        common.ALLOWED_TARGET_PREFIXES.append(TARGET_PREFIX)


def open_dataloader_factory(dataloader: ModuleType) -> None:
    """Give configs with ``use_emmett: true`` our dataloader, wherever NeMo builds one.

    This is the one seam in NeMo's dataloading. Its public factory ``get_lhotse_dataloader_from_config``, which every
    recipe, ``DataModule`` and ASR model has imported by name, looks these two functions up in its module
    ``nemo.collections.common.data.lhotse.dataloader`` at each call. The originals stay reachable as ``__wrapped__``.
    """
    for name in ("get_lhotse_dataloader_from_single_config", "get_lhotse_dataloader_from_multi_config"):
        original = getattr(dataloader, name)
        if not getattr(original, "opened_by_nemo_emmett", False):
            setattr(dataloader, name, _with_our_dataloader(original))


def _with_our_dataloader(original: Callable) -> Callable:
    parameters = inspect.signature(original)

    @functools.wraps(original)
    def build(*args: Any, **kwargs: Any) -> Any:
        config, *others = parameters.bind(*args, **kwargs).arguments.items()
        # `in` first: a DictConfig in struct mode raises on reading a key that it lacks.
        if USE_EMMETT not in config[1] or not config[1][USE_EMMETT]:
            from nemo_emmett.data.stock import check_nemo_dataset

            check_nemo_dataset(config[1], dict(others)["dataset"])
            return original(*args, **kwargs)
        from nemo_emmett.data import get_multimodal_dataloader

        return get_multimodal_dataloader(config[1], **dict(others))

    build.opened_by_nemo_emmett = True
    return build


def check_models_of_nemo(modules: ModuleType) -> None:
    """Have NeMo's ASR models refuse keys of ours that do nothing: their older dataloader does not ask the factory.

    Lightning calls ``setup`` of a model before it trains, when its loaders are there.
    """
    original = modules.ModelPT.setup
    if getattr(original, "opened_by_nemo_emmett", False):
        return

    @functools.wraps(original)
    def setup(self: Any, stage: str | None = None) -> None:
        original(self, stage)
        from nemo_emmett.data.stock import check_nemo_model

        check_nemo_model(self)

    setup.opened_by_nemo_emmett = True
    modules.ModelPT.setup = setup


def register_data_types(cutset: ModuleType) -> None:
    """Add our data types to those that NeMo's ``input_cfg`` knows.

    Their readers are imported when a recipe first names one: this runs while NeMo is being imported, perhaps by those
    very readers.
    """

    def read(config: Any, name: str) -> Any:
        from nemo_emmett.data.readers.registry import register_data_types

        register_data_types()
        return cutset.get_parser_fn(name)(config)

    for name in DATA_TYPES:
        cutset.data_type_parser(name)(functools.partial(read, name=name))


def register_prompt_formats(_: ModuleType) -> None:
    """Add our prompt formats to those that NeMo's ``prompt_format`` knows."""
    from nemo_emmett.prompts.translation import register_prompt_formats

    register_prompt_formats()


REGISTRATIONS = (
    Registration("classes (allow-list)", "nemo.core.classes.common", open_allow_list),
    Registration("dataloader", "nemo.collections.common.data.lhotse.dataloader", open_dataloader_factory),
    Registration("checks of datasets", "nemo.core.classes.modelPT", check_models_of_nemo),
    Registration("data types", "nemo.collections.common.data.lhotse.cutset", register_data_types),
    Registration("prompt formats", "nemo.collections.common.prompts", register_prompt_formats),
)
