"""Registration with Lightning, Hydra and NeMo, and the short names of recipes.

- **Lightning** calls :func:`requested_callbacks` at every ``Trainer()`` on the machine (entry point group
  ``lightning.pytorch.callbacks_factory``).
- **Hydra** imports ``hydra_plugins/nemo_emmett_plugin.py`` when it starts, which calls :func:`register`.
- **NeMo** has no plugins. :func:`register` registers post-import hooks: when NeMo is imported, they add our classes to
  its allow-list, our dataloader to its factory, and our data types and prompt formats to its own.
- **Recipes** name models, dataloaders and callbacks by short names or class paths: :func:`find`.

Nothing here imports torch or NeMo before it is needed.
"""

from __future__ import annotations

import functools
import inspect
import logging
import os
import sys
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
"""Kinds of objects with short names; each is an entry point group ``nemo_emmett.<kind>``, open to any package."""

TARGET_PREFIX = "nemo_emmett."
"""Prefix in NeMo's allow-list that lets ``_target_`` name our classes."""

OPTIMIZERS_OF_OTHERS = {
    "torchao.optim.": ("Adam4bit", "Adam8bit", "AdamFp8", "AdamW4bit", "AdamW8bit", "AdamWFp8"),
    "bitsandbytes.optim.": ("Adam8bit", "AdamW8bit", "Lion8bit", "PagedAdam8bit", "PagedAdamW8bit", "PagedLion8bit"),
}
"""Optimizers of few bits that ``model.optimizer._target_`` may name where their packages are installed."""

OWN_CLASSES = ("nemo_emmett.optimizers.MasterWeightAdamW", "nemo_emmett.strategies.HybridShardedStrategy")
"""What ``_target_`` may name of ours that NeMo does not admit by its base class."""

DATA_TYPES = ("parallel_text", "speech_tsv")
"""Types of sources in an ``input_cfg`` in addition to NeMo's own."""

USE_EMMETT = "use_emmett"
"""Key of a dataset's config with which NeMo's dataloader factory builds our dataloader."""

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
    """The model class of a recipe's ``model._target_``; its name is checked before anything is imported.

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
    # Imported here, because it takes a tenth of a second.
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
        # A missing dependency of an existing module keeps its own message.
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

_PROMPTS = "nemo_emmett.prompts."


@dataclass
class Registration:
    """A change to NeMo that is made when it is imported."""

    what: str  # its name, for messages
    trigger: str  # the NeMo module after whose import it is made
    action: Callable[[ModuleType], None]  # makes it; called with that module
    state: str = "new"  # "new", "waiting" for the trigger, "done" or "failed"
    error: str = ""  # why it failed

    def wait(self) -> None:
        """Run after the import of the trigger, or now if that is imported already."""
        if self.state == "new":
            self.state = "waiting"
            wrapt.register_post_import_hook(self.run, self.trigger)
        elif self.state == "waiting" and self.trigger in sys.modules:
            self.run(sys.modules[self.trigger])

    def run(self, module: ModuleType) -> None:
        """Run the action. A failure is logged, not raised, since it would make the user's import of NeMo fail."""
        try:
            self.action(module)
            self.state = "done"
        except Exception as error:
            if isinstance(error, ImportError) and _is_importing_prompts():
                return  # a module that the action needs has imported NeMo, and is not complete; the next call of wait
            self.state, self.error = "failed", f"{type(error).__name__}: {error}"
            _logger.exception("nemo_emmett could not register its %s with NeMo: recipes cannot use them.", self.what)


def _is_importing_prompts() -> bool:
    """Whether a module of ``nemo_emmett.prompts`` is being imported."""
    specs = [
        getattr(module, "__spec__", None) for name, module in list(sys.modules.items()) if name.startswith(_PROMPTS)
    ]
    return any(getattr(spec, "_initializing", False) for spec in specs)


def register() -> tuple[Registration, ...]:
    """Register with NeMo when it is imported, or now if it is imported already.

    Importing ``nemo_emmett`` calls this, and so does Hydra when it starts. A second call does what could not be done
    yet.

    Returns:
        the registrations, with their states.
    """
    for registration in REGISTRATIONS:
        registration.wait()
    return REGISTRATIONS


def open_allow_list(common: ModuleType) -> None:
    """Admit ``_target_: nemo_emmett...``, our optimizer and strategy, and optimizers of few bits to the allow-list of
    ``nemo.core.classes.common``."""
    for prefix in (TARGET_PREFIX, *OPTIMIZERS_OF_OTHERS):
        if prefix not in common.ALLOWED_TARGET_PREFIXES:
            common.ALLOWED_TARGET_PREFIXES.append(prefix)
    # Of a prefix NeMo admits modules, its own classes, and these by name.
    common.ALLOWED_EXACT_CLASS_TARGETS.update(
        prefix + name for prefix, names in OPTIMIZERS_OF_OTHERS.items() for name in names
    )
    common.ALLOWED_EXACT_CLASS_TARGETS.update(OWN_CLASSES)


def open_dataloader_factory(dataloader: ModuleType) -> None:
    """Make NeMo build our dataloader for configs with ``use_emmett: true``.

    NeMo's public factory ``get_lhotse_dataloader_from_config`` is imported by name in many places, so wrapping it would
    miss some. It looks up the two functions wrapped here in its module at each call. The originals are ``__wrapped__``.
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
    """Make NeMo's ASR models refuse our keys where they have no effect: their older dataloader bypasses the factory.

    Lightning calls a model's ``setup`` before it trains, after its loaders are built.
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
    """Add our data types to those of NeMo's ``input_cfg``.

    Their readers are imported when a recipe first names one, because this may run while those readers import NeMo.
    """

    def read(config: Any, name: str) -> Any:
        from nemo_emmett.data.readers.registry import register_data_types

        register_data_types()
        return cutset.get_parser_fn(name)(config)

    for name in DATA_TYPES:
        cutset.data_type_parser(name)(functools.partial(read, name=name))


def register_prompt_formats(_: ModuleType) -> None:
    """Add our prompt formats to those of NeMo's ``prompt_format``."""
    from nemo_emmett.prompts.translation import register_prompt_formats

    register_prompt_formats()


REGISTRATIONS = (
    Registration("classes (allow-list)", "nemo.core.classes.common", open_allow_list),
    Registration("dataloader", "nemo.collections.common.data.lhotse.dataloader", open_dataloader_factory),
    Registration("checks of datasets", "nemo.core.classes.modelPT", check_models_of_nemo),
    Registration("data types", "nemo.collections.common.data.lhotse.cutset", register_data_types),
    Registration("prompt formats", "nemo.collections.common.prompts", register_prompt_formats),
)
