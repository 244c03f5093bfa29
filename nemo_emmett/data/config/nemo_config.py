"""What NeMo's own code is given of a dataset: structured configs in which every source is read by us, and back."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

from nemo.collections.common.data.lhotse.dataloader import make_structured_with_schema_warnings
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from nemo_emmett.data.config.dataset_config import GroupConfig, Noise
from nemo_emmett.data.config.section import config_of, escaped, plain
from nemo_emmett.data.config.sources import (
    CLASSIC_KEYS,
    INHERITED_IN_NEMO,
    SOURCE_TYPE,
    Source,
    SourceGroup,
    parse_source,
)
from nemo_emmett.errors import ConfigError

_READ_BY_US = CLASSIC_KEYS | {"input_cfg", "noise_path", "channel_selector"}

WITHOUT_BATCHES = {
    "max_open_streams": None,
    "noise_path": None,
    "rir_enabled": False,
    "use_bucketing": False,
    "bucket_duration_bins": None,
    "bucket_batch_size": None,
    "batch_duration": None,
    "batch_tokens": None,
    "batch_size": 1,
}
"""Overrides of a config of which only the chain of maps and filters is wanted, without augmentation."""


def sampler_config(group: GroupConfig, **overrides: Any) -> DictConfig:
    """NeMo's config of the sampler of a group.

    Args:
        group: whose sources are wrapped, so that we read them.
        overrides: other values of its keys; ``sources`` to read only some of them.

    Raises:
        ConfigError: naming the key that NeMo refuses.
    """
    members = overrides.pop("sources", group.root.members)
    keys = {key: value for key, value in group.keys.items() if key not in _READ_BY_US}
    noise = None if group.noise is None else _noise_read_by_us(group.noise)
    keys = {"noise_path": noise, **keys, "input_cfg": wrap_sources(members), **overrides}
    if group.root.has_pairs and isinstance(temperatures := keys.get("reweight_temperature"), list):
        # NeMo wants one for each level, and a pair is one: exact, whatever the value is.
        keys["reweight_temperature"] = [*temperatures, *[1.0] * (_levels(group.root) - len(temperatures))]
    try:
        return make_structured_with_schema_warnings(config_of(keys))
    except OmegaConfBaseException as error:
        reason = str(error).splitlines()[0].rstrip(".")
        raise ConfigError(f"{group.place}.{error.full_key}: {reason}; correct it.") from error


def _levels(group: SourceGroup) -> int:
    """How many levels of ``input_cfg`` NeMo finds in a group."""
    return 1 + max(
        _levels(member) if isinstance(member, SourceGroup) else int(bool(member.members)) for member in group.members
    )


def wrap_sources(members: Iterable[SourceGroup | Source], **settings: Any) -> list[dict[str, Any]]:
    """The ``input_cfg`` of groups and sources, with every source of the type ``emmett_source``, which wraps it."""
    return [
        {**member.keys, "type": "group", "input_cfg": wrap_sources(member.members, **settings)}
        if isinstance(member, SourceGroup)
        else wrap(member.keys, member.place, **settings)
        for member in members
    ]


def wrap(keys: Mapping[str, Any], place: str, **settings: Any) -> dict[str, Any]:
    """A source as one of the type ``emmett_source``."""
    outer = {key: keys[key] for key in ("weight", *INHERITED_IN_NEMO) if key in keys}
    return {"type": SOURCE_TYPE, "source": dict(keys), "place": place, **outer, **settings}


def unwrap(config: DictConfig) -> Source:
    """The source inside an ``emmett_source``, with the keys that NeMo has passed down to it."""
    keys = plain(config)
    inherited = {key: keys[key] for key in INHERITED_IN_NEMO if key in keys}
    return parse_source({**inherited, **keys["source"]}, keys["place"], allow_commands=True)  # checked with its dataset


def with_keys_of_dataset(source: Source, structured: DictConfig) -> Source:
    """A source with the keys of its dataset that hold for the sources which do not set them."""
    return source.with_keys(**{key: structured[key] for key in INHERITED_IN_NEMO if key not in source.keys})


def _noise_read_by_us(noise: Noise) -> dict[str, Any]:
    """``noise_path`` as NeMo takes it.

    NeMo writes it as ``key=value`` and reads that as YAML, in which many a path means something else; JSON is safe.
    """
    text = json.dumps(escaped(wrap_sources(noise.members, examples="as_read")), ensure_ascii=False)
    return {**noise.keys, "input_cfg": text.replace("$", "\\u0024")}
