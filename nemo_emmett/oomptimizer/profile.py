"""The profile: how many examples of each bucket make a batch, in a YAML file that can be read and pasted.

Its ``train_ds`` is what a NeMo recipe would hold, either for one dataset ::

    train_ds:
      bucket_duration_bins: [4.0, 8.0, 16.0]
      bucket_batch_size: [32, 14, 6]

or, as with NeMo's ``multi_config``, for several groups ::

    train_ds:
      audio:
        bucket_duration_bins: [4.0, 8.0, 16.0]
        bucket_batch_size: [32, 14, 6]
      text:
        bucket_duration_bins: [[16, 12], [16, 24], [48, 40]]
        bucket_batch_size: [96, 80, 24]
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml

from nemo_emmett.errors import ConfigError

ONLY_GROUP = ""
"""Name of the group of a ``train_ds`` that is not a ``multi_config``."""

Bin = float | tuple[float, float]
"""Upper bound of a bucket: of the input's length (seconds or tokens), or of input and output lengths."""


@dataclass(frozen=True)
class Buckets:
    """Bins in rising order, and the batch size (examples) of each."""

    bucket_duration_bins: tuple[Bin, ...]
    bucket_batch_size: tuple[int, ...]


@dataclass(frozen=True)
class Profile:
    """Buckets by the name of their dataset group; ``ONLY_GROUP`` where there are no groups."""

    groups: dict[str, Buckets]

    @classmethod
    def read(cls, path: str | Path) -> Profile:
        """Read a profile.

        Raises:
            ConfigError: if the file is missing, is no YAML, or holds bins and batch sizes that cannot be used.
        """
        try:
            content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise ConfigError(f"{path}: the profile cannot be read: {error.strerror}.") from error
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise ConfigError(f"{path}: the profile is corrupt: {' '.join(str(error).split())}.") from error
        train_ds = content.get("train_ds") if isinstance(content, dict) else None
        if not isinstance(train_ds, dict) or not train_ds:
            raise ConfigError(f"{path}: the profile is corrupt: it has no mapping `train_ds`.")
        if "bucket_batch_size" in train_ds or "bucket_duration_bins" in train_ds:
            return cls({ONLY_GROUP: _buckets(train_ds, f"{path}: train_ds")})
        return cls({name: _buckets(group, f"{path}: train_ds.{name}") for name, group in train_ds.items()})


def as_bins(bins: Any, where: str) -> tuple[Bin, ...]:
    """Check a list of bins, one- or two-dimensional, from a recipe or a profile.

    Raises:
        ConfigError: if it is no such list, mixes both kinds, or does not rise.
    """
    if not isinstance(bins, (list, tuple)) or not bins:
        raise ConfigError(f"{where}.bucket_duration_bins: a list of bins is needed, not {bins!r}.")
    if all(_is_number(item) for item in bins):
        checked: tuple[Bin, ...] = tuple(float(item) for item in bins)
    elif all(isinstance(item, (list, tuple)) and len(item) == 2 and all(map(_is_number, item)) for item in bins):
        checked = tuple((float(item[0]), float(item[1])) for item in bins)
    else:
        raise ConfigError(
            f"{where}.bucket_duration_bins: bins are all numbers or all pairs [input, output], not {list(bins)}."
        )
    for index, (lower, upper) in enumerate(pairwise(checked)):
        if not lower < upper:  # type: ignore[operator]
            raise ConfigError(
                f"{where}.bucket_duration_bins: bins must rise, but number {index + 2} "
                f"({shown(upper)}) does not lie above the one before it ({shown(lower)})."
            )
    return checked


def shown(bins: Bin | Iterable[Bin]) -> str:
    """Bins as one writes them in YAML."""
    if isinstance(bins, (int, float)):
        return f"{bins:g}"
    return f"[{', '.join(shown(item) for item in bins)}]"


def _buckets(group: Any, where: str) -> Buckets:
    if not isinstance(group, dict):
        raise ConfigError(f"{where}: a mapping with bucket_duration_bins and bucket_batch_size is needed.")
    for key in ("bucket_duration_bins", "bucket_batch_size"):
        if key not in group:
            raise ConfigError(f"{where}.{key}: is missing from the profile.")
    bins, sizes = as_bins(group["bucket_duration_bins"], where), group["bucket_batch_size"]
    if not isinstance(sizes, list) or not all(type(size) is int and size > 0 for size in sizes):
        raise ConfigError(f"{where}.bucket_batch_size: a list of positive whole numbers is needed, not {sizes!r}.")
    if len(bins) != len(sizes):
        raise ConfigError(f"{where}: there are {len(bins)} bins, but {len(sizes)} batch sizes; each bin needs one.")
    return Buckets(bins, tuple(sizes))


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
