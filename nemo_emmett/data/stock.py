"""Keys of ours in a recipe of NeMo's whose data our dataloader does not read: refused, since they would do nothing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nemo.collections.common.data.fallback import FallbackDataset
from omegaconf import DictConfig, OmegaConf

from nemo_emmett.data.config.schema import AUTO, SAMPLINGS
from nemo_emmett.data.config.section import keys_within, place_of
from nemo_emmett.data.dataloader import MultimodalDataLoader
from nemo_emmett.errors import ConfigError

_USE_EMMETT = "use_emmett"

_LOADERS = {"train_ds": "_train_dl", "validation_ds": "_validation_dl", "test_ds": "_test_dl"}
"""The datasets of NeMo's ``ModelPT``, and the attributes in which it keeps their loaders."""

_OURS = {
    _USE_EMMETT: lambda value: value is True,
    "allow_commands": lambda value: value is not None,
    "bucket_duration_bins": lambda value: value == AUTO,
    "max_bad_records": lambda value: value is not None,
    "num_sub_buckets": lambda value: value is not None,
    "sampler_fusion": lambda value: value == "mux",
    "sampling": lambda value: value in SAMPLINGS,
    "weights": lambda value: value == AUTO,
}
"""Settings that can only be meant for our dataloader; whatever else a recipe holds is not ours to judge."""


def check_nemo_dataset(section: DictConfig, dataset: Any) -> None:
    """Look for keys of ours in a dataset that NeMo's own lhotse dataloader is about to read.

    Args:
        section: of the dataset, without ``use_emmett: true`` of its own.
        dataset: what collates the batches.

    Raises:
        ConfigError: naming the key.
    """
    from nemo.collections.speechlm2.data.salm_dataset import SALMDataset

    while isinstance(dataset, FallbackDataset):
        dataset = dataset.dataset
    is_salm = isinstance(dataset, SALMDataset)
    place = place_of(section, "data" if is_salm else "model")
    _check_keys(section, place)
    for entry, key, value in keys_within(_unresolved(section), place):
        if is_salm and (key, value) == ("type", "parallel_text"):
            raise ConfigError(
                f"{entry}.type: parallel_text cannot be read by NeMo's dataloader for NeMo's SALM, which drops such "
                f"examples; set ++{place}.{_USE_EMMETT}=true."
            )


def check_nemo_model(model: Any) -> None:
    """Look for keys of ours in the datasets of a NeMo model that has built its loaders without us.

    Args:
        model: a ``ModelPT`` (NeMo's ASR models), whose older dataloader does not go through NeMo's lhotse factory.

    Raises:
        ConfigError: naming the key.
    """
    for name, attribute in _LOADERS.items():
        section, loaders = model.cfg.get(name), getattr(model, attribute, None)
        loaders = loaders if isinstance(loaders, (list, tuple)) else [loaders]
        if section is None or all(loader is None or isinstance(loader, MultimodalDataLoader) for loader in loaders):
            continue
        place = f"model.{name}"
        if section.get(_USE_EMMETT):
            remedy = "" if section.get("use_lhotse") else f"set ++{place}.use_lhotse=true, or "
            raise ConfigError(
                f"{place}.{_USE_EMMETT}: has no effect, since {type(model).__name__} reads this dataset by NeMo's "
                f"older dataloader; {remedy}remove the key."
            )
        _check_keys(section, place)


def _check_keys(section: DictConfig, dataset: str) -> None:
    for place, key, value in keys_within(_unresolved(section), dataset):
        if key not in _OURS or not _OURS[key](value):
            continue
        if key == _USE_EMMETT:
            raise ConfigError(f"{place}.{key}: has no effect there; set ++{dataset}.{key}=true.")
        raise ConfigError(
            f"{place}.{key}: {value} has no effect, since NeMo's own dataloader reads this dataset; set "
            f"++{dataset}.{_USE_EMMETT}=true, or remove the key."
        )
    parent = _unresolved(section._get_parent()) if isinstance(section, DictConfig) else None
    if _asks_for_us(parent) and not any(map(_asks_for_us, parent.values())):
        raise ConfigError(
            f"{dataset.rpartition('.')[0]}.{_USE_EMMETT}: has no effect there, since each dataset names its own "
            f"dataloader; set ++{dataset}.{_USE_EMMETT}=true."
        )


def _asks_for_us(section: Any) -> bool:
    return isinstance(section, Mapping) and section.get(_USE_EMMETT) is True


def _unresolved(node: Any) -> Any:
    """Without the values that refer to others, which may not be there."""
    is_config = OmegaConf.is_config(node)
    return OmegaConf.to_container(node, resolve=False, throw_on_missing=False) if is_config else node
