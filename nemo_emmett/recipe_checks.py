"""Checks of the keys other than model and data: ``trainer``, ``exp_manager`` and those at the top of a recipe.

Types come from the signatures of Lightning's ``Trainer`` and of NeMo's ``ExpManagerConfig``, narrower ranges from the
tables below. What a library raises for a value while it builds something becomes one sentence with the key.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import is_dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import annotated_types
import hydra
from hydra.errors import HydraException
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import Timer
from lightning.pytorch.strategies import DDPStrategy, Strategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from nemo.core.classes.common import safe_instantiate
from nemo.utils.exceptions import NeMoBaseException
from nemo.utils.exp_manager import ExpManagerConfig, NotFoundError, exp_manager
from nemo.utils.trainer_utils import resolve_trainer_cfg
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from torch.nn.parallel import DistributedDataParallel

from nemo_emmett.checkpoints import checkpoint_fault, with_resume_point
from nemo_emmett.config import OWN_PREFIX, check_keys, check_target, item_of
from nemo_emmett.errors import ConfigError, EmmettError, Help
from nemo_emmett.typed_config import (
    Count,
    NonEmpty,
    NonNegative,
    Number,
    Positive,
    PositiveWhole,
    Share,
    Switch,
    Text,
    Whole,
    parse_value,
)

T = TypeVar("T")

_FromMinusOne = Annotated[Whole, annotated_types.Ge(-1)]

TOP_LEVEL_TYPES: dict[str, Any] = {
    "seed": Annotated[Count, annotated_types.Lt(2**32)] | None,
    "num_threads": Annotated[PositiveWhole, annotated_types.Le(1024)] | None,
    "export_dir": NonEmpty | None,
}
"""Keys at the top of a recipe."""

TRAINER_TYPES: dict[str, Any] = {
    "accumulate_grad_batches": PositiveWhole,
    "callbacks": list[dict[str, Any]] | None,
    "check_val_every_n_epoch": PositiveWhole | None,
    "default_root_dir": NonEmpty | None,
    "devices": list[Count] | Text | Annotated[_FromMinusOne, annotated_types.Le(1024)],
    "fast_dev_run": Switch | Count,
    "gradient_clip_val": NonNegative | None,
    **{f"limit_{stage}_batches": Count | Share | None for stage in ("train", "val", "test", "predict")},
    "log_every_n_steps": Count | None,
    "max_epochs": _FromMinusOne | None,
    "max_steps": _FromMinusOne,
    "max_time": Text | dict[str, NonNegative] | None,
    "min_epochs": Count | None,
    "min_steps": Count | None,
    "num_nodes": PositiveWhole,
    "num_sanity_val_steps": _FromMinusOne | None,
    "overfit_batches": Count | Share,
    "precision": Whole | Text | None,  # NeMo has more of them than Lightning
    "reload_dataloaders_every_n_epochs": Count,
    "strategy": Text | dict[str, Any],
    "val_check_interval": PositiveWhole | Annotated[Number, annotated_types.Gt(0), annotated_types.Le(1)] | None,
}
"""Arguments of the trainer whose range is narrower than their annotation, or that are built of a section."""

ARGUMENT_TYPES: dict[str, Any] = {
    "buffer_size": PositiveWhole | None,
    "decay": Share | None,
    "every_n_epochs": Count | None,
    "every_n_steps": PositiveWhole,
    "every_n_train_steps": Count | None,
    "mode": Literal["min", "max"],
    "model_parallel_size": PositiveWhole | None,
    "monitor": NonEmpty,
    "patience": Count,
    "report_time_interval": Positive,
    "save_last_n_optim_states": _FromMinusOne | None,
    "save_top_k": _FromMinusOne,
    "seconds_to_sleep": NonNegative,
    "stop_every_n_epochs": PositiveWhole,
}
"""Keys of NeMo's experiment manager, and arguments of Lightning's and NeMo's callbacks, whose range is narrower than
their annotation."""

_PASSES_ARGUMENTS_TO = {DDPStrategy: DistributedDataParallel}
"""Classes that pass the arguments which they do not name to another."""

_LIBRARY_ERRORS = (
    AssertionError,
    AttributeError,
    HydraException,
    ImportError,
    LookupError,
    MisconfigurationException,
    NeMoBaseException,
    OmegaConfBaseException,
    OverflowError,
    RuntimeError,
    TypeError,
    ValueError,
)
"""What Hydra, Lightning, NeMo and torch raise for a value that they cannot use."""


def check_run_keys(cfg: DictConfig) -> None:
    """Check the keys of a recipe other than those of its model and data.

    Raises:
        ConfigError: for a misspelt key, or a value of the wrong type or range.
    """
    for key in ("model", "trainer", "data", *(["exp_manager"] if cfg.get("exp_manager") is not None else [])):
        if not isinstance(cfg[key], DictConfig):
            raise ConfigError(f"{key}: {cfg[key]!r} is not a section; write the keys of '{key}' below it.")
    for key, annotation in TOP_LEVEL_TYPES.items():
        parse_value(annotation, cfg.get(key), key)
    parse_value(Text | None, cfg.model.get("_target_"), "model._target_")
    trainer = trainer_arguments(cfg.trainer)
    _check_fused_optimizer(cfg, trainer)
    if cfg.get("exp_manager") is None:
        return
    _check_by_dataclass(ExpManagerConfig, OmegaConf.to_container(cfg.exp_manager, resolve=True), "exp_manager")
    _check_experiment(cfg.exp_manager)
    makes_checkpoints = cfg.exp_manager.get("create_checkpoint_callback") is not False
    if makes_checkpoints and trainer.get("enable_checkpointing") is not False and not trainer.get("fast_dev_run"):
        raise ConfigError(
            "trainer.enable_checkpointing: must be false where exp_manager writes the checkpoints; set it so, or set "
            "exp_manager.create_checkpoint_callback: false."
        )


def _check_fused_optimizer(cfg: DictConfig, trainer: Mapping[str, Any]) -> None:
    """Refuse what Lightning refuses in the first step: it cannot clip gradients that the optimizer itself unscales."""
    is_scaled = str(trainer.get("precision")) in ("16", "16-mixed")
    if is_scaled and trainer.get("gradient_clip_val") and (cfg.model.get("optimizer") or {}).get("fused"):
        raise ConfigError(
            "model.optimizer.fused: true is not possible with trainer.precision: 16-mixed and gradient_clip_val; write "
            "false, or trainer.precision: bf16-mixed."
        )


def trainer_arguments(section: DictConfig) -> dict[str, Any]:
    """The arguments of Lightning's ``Trainer`` in a recipe, by their declared types.

    Raises:
        ConfigError: for a key that the trainer does not have, or a value of the wrong type or range.
    """
    hints = get_type_hints(Trainer.__init__)
    for unknown in check_keys(section, inspect.signature(Trainer).parameters, "trainer"):
        raise ConfigError(f"trainer.{unknown}: there is no such key; remove it.", page=Help.UNKNOWN_KEY)
    types = {key: TRAINER_TYPES.get(key, declared(hints.get(key, Any))) for key in section}
    values = OmegaConf.to_container(section, resolve=True)
    return {key: parse_value(types[key], value, f"trainer.{key}") for key, value in values.items()}


_ONLY_OF_SEVERAL_PROCESSES = {"_target_", "find_unused_parameters", "gradient_as_bucket_view", "static_graph"}
"""Keys of DDP that change nothing in the training of one process."""


def build_trainer(section: DictConfig) -> Trainer:
    """The ``Trainer`` of a recipe, with its strategy and callbacks.

    One process trains without DDP where the recipe's strategy asks for no more than that ranks average gradients: then
    PyTorch has no process group, no gradient buckets, and no warning that no parameter is unused.

    Raises:
        EmmettError: for a value that cannot be used.
    """

    def build(strategy: Any = "auto", callbacks: list | None = None, **others: Any) -> Trainer:
        keys = strategy if isinstance(strategy, dict) else {}
        if keys:
            strategy = instantiate(strategy, "trainer.strategy", Strategy)
        places = [item_of("trainer.callbacks", number) for number in range(len(callbacks or ()))]
        callbacks = [instantiate(*one, Callback) for one in zip(callbacks or (), places, strict=True)]
        others = resolve_trainer_cfg(OmegaConf.create(others))
        trainer = Trainer(strategy=strategy, callbacks=callbacks, **others)
        # How many processes there are, Lightning finds out by devices, nodes, torchrun and SLURM.
        if type(strategy) is DDPStrategy and trainer.world_size == 1 and keys.keys() <= _ONLY_OF_SEVERAL_PROCESSES:
            trainer = Trainer(strategy="auto", callbacks=callbacks, **others)
        return trainer

    return _call(build, trainer_arguments(section), "trainer")


def set_up_experiment(trainer: Trainer, section: DictConfig) -> None:
    """Run NeMo's experiment manager; it resumes from the newest complete checkpoint.

    Raises:
        ConfigError: for a value that NeMo cannot use.
    """
    try:
        exp_manager(trainer, with_resume_point(section, trainer))
    except NotFoundError as error:
        raise ConfigError(
            f"exp_manager.resume_if_exists: {first_sentence(error)}; set exp_manager.resume_ignore_no_checkpoint: true "
            "to start from the beginning."
        ) from error
    except _LIBRARY_ERRORS as error:
        # NeMo names a logger by its own name, the key is create_wandb_logger.
        named = [key for key in map(str, section) if re.sub("^create_|_logger$", "", key) in str(error).lower()]
        place = ".".join(["exp_manager", *sorted(named, key=len)[-1:]])
        raise ConfigError(f"{place}: {first_sentence(error)}; correct or remove it.") from error


@contextmanager
def mistakes_in_fit(cfg: DictConfig) -> Iterator[None]:
    """Turn what Lightning raises in a training because of a value of the recipe into one sentence.

    Raises:
        ConfigError: naming the key.
    """
    try:
        yield
    except EmmettError:
        raise
    except (MisconfigurationException, RuntimeError, ValueError) as error:
        is_known = isinstance(error, MisconfigurationException) or "val_check_interval" in str(error)
        if "Early stopping conditioned on metric" in str(error):
            raise ConfigError(f"monitor (of early stopping): {first_sentence(error)}.") from error
        checkpoints = (cfg.get("exp_manager") or {}).get("checkpoint_callback_params") or {}
        values = {f"trainer.{key}": value for key, value in cfg.trainer.items()}
        values |= {f"exp_manager.checkpoint_callback_params.{key}": value for key, value in checkpoints.items()}
        named = sorted((place for place in values if place.rpartition(".")[2] in str(error)), key=len)
        if not (named and is_known):
            raise
        raise ConfigError(f"{named[-1]}: {values[named[-1]]!r} cannot be used: {first_sentence(error)}.") from error
    except Exception as error:
        if not type(error).__module__.startswith("wandb."):
            raise
        raise ConfigError(
            f"exp_manager.create_wandb_logger: {first_sentence(error)}; or set the environment variable "
            "WANDB_MODE=offline."
        ) from error


def instantiate(section: Mapping[str, Any], place: str, kind: type[T]) -> T:
    """Build the object of a section with ``_target_``.

    Args:
        section: plain mappings, lists and scalars.
        place: its place in the recipe, for messages.
        kind: the class that ``_target_`` must be of.

    Raises:
        EmmettError: for a class that is not allowed or does not exist, or an argument that it cannot use.
    """
    target = section.get("_target_")
    if not isinstance(target, str):
        raise ConfigError(f"{place}._target_: {target!r} is not the path of a class; name a {kind.__name__}.")
    check_target(target, f"{place}._target_")
    try:
        cls = hydra.utils.get_object(target)
    except _LIBRARY_ERRORS as error:
        raise ConfigError(f"{place}._target_: '{target}' cannot be found: {first_sentence(error)}.") from error
    if not (isinstance(cls, type) and issubclass(cls, kind)):
        raise ConfigError(f"{place}._target_: '{target}' is not a {kind.__name__}; name a class that is one.")
    arguments = {key: value for key, value in section.items() if key != "_target_"}
    types = _argument_types(cls, arguments, place)
    is_ours = cls.__module__.startswith(OWN_PREFIX)
    if not is_ours:
        _check_types(types, arguments, place)
    built = _call(lambda **changed: safe_instantiate({"_target_": target, **changed}), arguments, place)
    if is_ours:  # which check their arguments themselves, and whose sentences say more
        _check_types(types, arguments, place)
    return built


def declared(annotation: Any) -> Any:
    """A library's annotation as a type for :func:`~nemo_emmett.typed_config.parse_value`. Classes whose objects no
    recipe can hold are left out of unions; alone they become ``Any``.

    Example:
        >>> declared(Union[bool, Callback, None])
        typing.Optional[typing.Annotated[bool, Strict(strict=True)]]
    """
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin in (Union, UnionType):
        plain = [kind for kind in map(declared, arguments) if kind is not Any]
        return Union[tuple(plain)] if plain and Any not in arguments else Any  # noqa: UP007
    if origin in (list, tuple):
        return list[declared(arguments[0])]
    if origin is dict:
        return dict[str, declared(arguments[1])]
    if origin is Literal or annotation is NoneType:
        return annotation
    return {bool: Switch, int: Whole, float: Number, str: Text, Path: Text, dict: dict[str, Any]}.get(annotation, Any)


def first_sentence(error: BaseException) -> str:
    """What an error says, on one line and without its full stop; of an error that Hydra wraps, the cause."""
    while isinstance(error, HydraException) and error.__cause__ is not None:
        error = error.__cause__
    said = " ".join(str(error).split()).rstrip(".") or type(error).__name__
    return f"there is no {said}" if isinstance(error, KeyError) else said


def _check_experiment(section: DictConfig) -> None:
    """Check what NeMo's experiment manager would pass on unseen: a checkpoint, a time limit, TensorBoard's options."""
    checkpoint = section.get("resume_from_checkpoint")
    if checkpoint and "://" not in checkpoint and not Path(checkpoint).exists():
        raise ConfigError(f"exp_manager.resume_from_checkpoint: there is no checkpoint '{checkpoint}'.")
    if checkpoint and Path(checkpoint).is_dir() and (fault := checkpoint_fault(checkpoint)):
        raise ConfigError(f"exp_manager.resume_from_checkpoint: '{checkpoint}' is no checkpoint: {fault}.")
    if (limit := section.get("max_time_per_run")) is not None:
        try:
            Timer(limit)
        except MisconfigurationException as error:
            raise ConfigError(f"exp_manager.max_time_per_run: {first_sentence(error)}.") from error
    if options := section.get("summary_writer_kwargs"):
        from torch.utils.tensorboard import SummaryWriter  # a second to import

        place = "exp_manager.summary_writer_kwargs"
        for unknown in check_keys(options, inspect.signature(SummaryWriter).parameters, place):
            raise ConfigError(f"{place}.{unknown}: SummaryWriter has no such argument; remove it.")


def _check_by_dataclass(cls: type, section: Any, place: str) -> None:
    """Check a section, and the sections in it, by the fields of NeMo's dataclasses."""
    if not isinstance(section, dict):
        raise ConfigError(f"{place}: {section!r} cannot be used; give a mapping, or remove the key.")
    hints = get_type_hints(cls)
    for unknown in check_keys(section, hints, place):
        raise ConfigError(f"{place}.{unknown}: there is no such key; remove it.", page=Help.UNKNOWN_KEY)
    for key, value in section.items():
        nested = [kind for kind in (hints[key], *get_args(hints[key])) if is_dataclass(kind)]
        if nested:
            _check_by_dataclass(nested[0], value, f"{place}.{key}")
        else:
            parse_value(ARGUMENT_TYPES.get(key, declared(hints[key])), value, f"{place}.{key}")


def _argument_types(cls: type, arguments: Mapping[str, Any], place: str) -> dict[str, Any]:
    """The declared types of a class's arguments; one that it does not have is refused."""
    types: dict[str, Any] = {}
    for one in filter(None, (cls, _PASSES_ARGUMENTS_TO.get(cls))):
        parameters = inspect.signature(one).parameters.values()
        try:
            hints = get_type_hints(one.__init__)
        except NameError:  # annotations that hold for type checkers alone
            hints = {}
        # Where a library has no annotation, the default shows a boolean.
        defaults = {p.name: Switch if isinstance(p.default, bool) else Any for p in parameters}
        types |= {p.name: declared(hints.get(p.name, Any)) for p in parameters if p.kind is not p.VAR_KEYWORD}
        types |= {name: kind for name, kind in defaults.items() if types.get(name) is Any}
    takes_any = cls not in _PASSES_ARGUMENTS_TO and any(p.kind is p.VAR_KEYWORD for p in parameters)
    for unknown in check_keys(arguments, types, place):
        if not takes_any:
            raise ConfigError(f"{place}.{unknown}: {cls.__name__} has no such argument; remove it.")
    return types | (ARGUMENT_TYPES if cls.__module__.startswith(("lightning.", "nemo.")) else {})


def _check_types(types: Mapping[str, Any], arguments: Mapping[str, Any], place: str) -> None:
    """Check arguments by their declared types; sections with a ``_target_`` become objects later."""
    for key, value in arguments.items():
        if not (isinstance(value, Mapping) and "_target_" in value):
            parse_value(types.get(key, Any), value, f"{place}.{key}")


def _call(build: Callable[..., T], arguments: Mapping[str, Any], place: str) -> T:
    """Build something of its arguments; the argument at fault is the one without which it can be built."""
    try:
        return build(**arguments)
    except EmmettError:
        raise
    except _LIBRARY_ERRORS as error:
        cause: BaseException | None = error
        while isinstance(cause, HydraException):
            cause = cause.__cause__
        if isinstance(cause, EmmettError):
            raise cause from error
        for key in arguments:
            try:
                build(**{name: value for name, value in arguments.items() if name != key})
            except _LIBRARY_ERRORS:
                continue
            sentence = f"{place}.{key}: {arguments[key]!r} cannot be used: {first_sentence(error)}."
            raise ConfigError(sentence) from error
        raise ConfigError(f"{place}: {first_sentence(error)}; correct or remove what it was given.") from error
