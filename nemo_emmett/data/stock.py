"""Keys of ours in a recipe of NeMo's whose data our dataloader does not read: refused, since they would do nothing."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from nemo.collections.common.data.fallback import FallbackDataset
from omegaconf import DictConfig, OmegaConf

from nemo_emmett.data.config.schema import AUTO_BINS, SAMPLINGS
from nemo_emmett.data.dataloader import MultimodalDataLoader
from nemo_emmett.errors import ConfigError

_USE_EMMETT = "use_emmett"

_LOADERS = {"train_ds": "_train_dl", "validation_ds": "_validation_dl", "test_ds": "_test_dl"}
"""The datasets of NeMo's ``ModelPT``, and the attributes in which it keeps their loaders."""

_OURS = {
    _USE_EMMETT: lambda value: value is True,
    "allow_commands": lambda value: value is not None,
    "bucket_duration_bins": lambda value: value == AUTO_BINS,
    "max_bad_records": lambda value: value is not None,
    "num_sub_buckets": lambda value: value is not None,
    "sampler_fusion": lambda value: value == "mux",
    "sampling": lambda value: value in SAMPLINGS,
    "weights": lambda value: value == "auto",
}
"""Settings that can only be meant for our dataloader; whatever else a recipe holds is not ours to judge."""


def check_nemo_dataset(config: Mapping | DictConfig, dataset: Any) -> None:
    """Look for keys of ours in a dataset that NeMo's own lhotse dataloader is about to read.

    Args:
        config: of the dataset, without ``use_emmett: true`` of its own.
        dataset: what collates the batches.

    Raises:
        ConfigError: naming the key.
    """
    from nemo.collections.speechlm2.data.salm_dataset import SALMDataset

    while isinstance(dataset, FallbackDataset):
        dataset = dataset.dataset
    is_salm = isinstance(dataset, SALMDataset)
    where = _place_of(config, "data" if is_salm else "model")
    _check_keys(config, where)
    if is_salm and (place := next(_entries(config, where, "type", "parallel_text"), None)) is not None:
        raise ConfigError(
            f"{place}.type: parallel_text cannot be read by NeMo's dataloader for NeMo's SALM, which drops such "
            f"examples; set ++{where}.{_USE_EMMETT}=true."
        )


def check_nemo_model(model: Any) -> None:
    """Look for keys of ours in the datasets of a NeMo model that has built its loaders without us.

    Args:
        model: a ``ModelPT`` (NeMo's ASR models), whose older dataloader does not go through NeMo's lhotse factory.

    Raises:
        ConfigError: naming the key.
    """
    for name, attribute in _LOADERS.items():
        config, loaders = model.cfg.get(name), getattr(model, attribute, None)
        loaders = loaders if isinstance(loaders, (list, tuple)) else [loaders]
        if config is None or all(loader is None or isinstance(loader, MultimodalDataLoader) for loader in loaders):
            continue
        where = f"model.{name}"
        if config.get(_USE_EMMETT):
            remedy = "" if config.get("use_lhotse") else f"set ++{where}.use_lhotse=true, or "
            raise ConfigError(
                f"{where}.{_USE_EMMETT}: has no effect, since {type(model).__name__} reads this dataset by NeMo's "
                f"older dataloader; {remedy}remove the key."
            )
        _check_keys(config, where)


def _check_keys(config: Mapping | DictConfig, where: str) -> None:
    for key, is_ours in _OURS.items():
        for place, value in _values(config, where, key):
            if not is_ours(value):
                continue
            if key == _USE_EMMETT:
                raise ConfigError(f"{place}.{key}: has no effect there; set ++{where}.{key}=true.")
            raise ConfigError(
                f"{place}.{key}: {value} has no effect, since NeMo's own dataloader reads this dataset; set "
                f"++{where}.{_USE_EMMETT}=true, or remove the key."
            )
    section = _plain(config._get_parent()) if isinstance(config, DictConfig) else None
    if _asks_for_us(section) and not any(map(_asks_for_us, section.values())):
        raise ConfigError(
            f"{where.rpartition('.')[0]}.{_USE_EMMETT}: has no effect there, since each dataset names its own "
            f"dataloader; set ++{where}.{_USE_EMMETT}=true."
        )


def _place_of(config: Any, section: str) -> str:
    """Where a dataset's config stands in the recipe, as far as it knows; ASR models keep a copy of their section."""
    key = str(config._get_full_key(None)) if isinstance(config, DictConfig) else ""
    return f"{section}.{key or 'train_ds'}" if "." not in key else key


def _asks_for_us(config: Any) -> bool:
    return isinstance(config, Mapping) and config.get(_USE_EMMETT) is True


def _plain(node: Any) -> Any:
    """Without the values that refer to others, which may not be there."""
    is_config = OmegaConf.is_config(node)
    return OmegaConf.to_container(node, resolve=False, throw_on_missing=False) if is_config else node


def _values(node: Any, where: str, key: str) -> Iterator[tuple[str, Any]]:
    """The places and values of a key in a dataset, its groups and its sources; but for ``tags``."""
    node = _plain(node)
    entries = node.items() if isinstance(node, Mapping) else enumerate(node) if isinstance(node, list) else ()
    for name, value in entries:
        if name == key:
            yield where, value
        elif name != "tags":
            yield from _values(value, f"{where}[{name}]" if isinstance(name, int) else f"{where}.{name}", key)


def _entries(node: Any, where: str, key: str, wanted: Any) -> Iterator[str]:
    return (place for place, value in _values(node, where, key) if value == wanted)
