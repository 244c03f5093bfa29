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

A group without buckets has one batch size for all of its examples, up to its longest ::

    train_ds:
      max_duration: 20.0
      batch_size: 16

That alone is a profile, and can be written by hand. One that was measured also has the ``settings`` that it was made
with, the ``fingerprint`` of the run, and the ``measures`` of each bucket; guard adds ``events``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, TypeVar

import annotated_types
import yaml
from pydantic import Strict

from nemo_emmett.config import check_keys
from nemo_emmett.errors import ConfigError
from nemo_emmett.files import write_text
from nemo_emmett.oomptimizer.profile_yaml import Line, as_yaml
from nemo_emmett.typed_config import Count, Number, PositiveWhole, is_number, parse_section, parse_value

ONLY_GROUP = ""
"""Name of the group of a ``train_ds`` that is not a ``multi_config``."""

LIMIT_KEYS = ("max_duration", "max_tokens")
"""Keys that bound the examples of a group without buckets: in seconds, or in tokens."""

ROW_TOKENS = "row_tokens"
"""The key that bounds the rows of a group whose examples are packed; its ``batch_size`` counts rows."""

RowTokens = PositiveWhole | Annotated[list[PositiveWhole], annotated_types.Len(2, 2)]
"""Its value: most positions of a row, or of a row of the encoder's and one of the decoder's."""

SECTIONS = ("train_ds", "settings", "fingerprint", "epoch_seconds", "measures", "events")
"""Keys of a profile."""

HEADER = """\
# Batch sizes for each bucket, by nemo_emmett's OOMptimizer. Paste `train_ds` into a recipe, or let the callback
# nemo_emmett.callbacks.OOMptimizer read this file (profile: ...). Sizes are in bytes, times in seconds. To measure
# again, delete the file.
"""

Bin = float | tuple[float, float]
"""Upper bound of a bucket: of the input's length (seconds or tokens), or of input and output lengths."""

BatchSize = Annotated[int, Strict(), annotated_types.Ge(1)]
"""Examples; not a number in a text, since data loaders read the recipe's value as it is."""

_T = TypeVar("_T")


@dataclass(frozen=True)
class Buckets:
    """Bins in ascending order, and the batch size (examples) of each.

    Args:
        bucket_duration_bins: the bins; of a group without buckets one, the length of its longest example.
        bucket_batch_size: examples.
        limit_key: of a group without buckets, the key of ``LIMIT_KEYS`` that bounds its examples, or ``ROW_TOKENS``;
            else None.
    """

    bucket_duration_bins: tuple[Bin, ...]
    bucket_batch_size: tuple[int, ...]
    limit_key: str | None = None

    def as_config(self) -> dict[str, Any]:
        """The keys of the group's config in a recipe."""
        if self.limit_key is not None:
            (longest,), (size,) = self.bucket_duration_bins, self.bucket_batch_size
            if self.limit_key == ROW_TOKENS:
                sizes = [int(one) for one in longest] if isinstance(longest, tuple) else int(longest)
                return {"packing": True, ROW_TOKENS: sizes, "batch_size": size}
            return {self.limit_key: int(longest) if self.limit_key == "max_tokens" else longest, "batch_size": size}
        bins = [list(item) if isinstance(item, tuple) else item for item in self.bucket_duration_bins]
        return {"bucket_duration_bins": bins, "bucket_batch_size": list(self.bucket_batch_size)}


@dataclass(frozen=True)
class MemoryLine:
    """The peak of a step of n examples of a bucket: ``max(floor, intercept + slope * n)`` bytes.

    Args:
        floor: bytes that the optimizer's step takes, whatever the batch.
        intercept: bytes of a step without examples.
        slope: bytes per example.
    """

    floor: Number
    intercept: Number
    slope: Number

    def peak(self, examples: int) -> float:
        """Peak in bytes of a step with so many examples."""
        return max(self.floor, self.intercept + self.slope * examples)


@dataclass(frozen=True)
class TimeLine:
    """The time of a step of n examples of a bucket: ``overhead + per_example * n`` seconds."""

    overhead: Number
    per_example: Number

    def seconds(self, examples: int) -> float:
        """Seconds that a step with so many examples takes."""
        return self.overhead + self.per_example * examples


@dataclass(frozen=True)
class Measure:
    """What was found of a bucket.

    Args:
        bin: the bucket's bin.
        batch_size: examples, as measured; guard may have lowered it since.
        predicted_peak: bytes by its line for this batch size.
        confirmed_peak: bytes that a step of this batch size took; None if none was run.
        reserved: bytes that the allocator held then; None if there is none.
        seconds: of a step of this batch size; None if time was not measured.
        memory: its line.
        time: its line; None if time was not measured.
    """

    bin: Bin
    batch_size: PositiveWhole
    predicted_peak: Count
    confirmed_peak: Count | None = None
    reserved: Count | None = None
    seconds: Number | None = None
    memory: MemoryLine | None = None
    time: TimeLine | None = None


@dataclass(frozen=True)
class Event:
    """A bucket's batch size was lowered during training.

    Args:
        when: date and time, ISO 8601 with the time zone.
        step: of the optimizer.
        bucket: ``str(bucket)``, such as ``audio: bucket 3 [16, 12]``.
        cause: ``out of memory in backward``, ``above the watermark``, ...
        before: the batch size until then (``from`` in the file).
        after: the batch size since then (``to`` in the file).
    """

    when: str
    step: Count
    bucket: str
    cause: str
    before: Count
    after: Count


@dataclass(frozen=True)
class Profile:
    """Buckets by the name of their dataset group; ``ONLY_GROUP`` if there are no groups.

    Args:
        groups: bins and batch sizes; what training uses.
        settings: that the profile was made with: mode, budget in bytes, ...
        fingerprint: of the run that it was measured on (:mod:`~nemo_emmett.oomptimizer.fingerprint`); empty if written
            by hand.
        measures: by group, for each of its buckets in the order of the bins.
        epoch_seconds: predicted time of an epoch on one device; None if lengths or times are not known.
        events: of guard, oldest first.
    """

    groups: dict[str, Buckets]
    settings: dict[str, Any] = field(default_factory=dict)
    fingerprint: dict[str, Any] = field(default_factory=dict)
    measures: dict[str, tuple[Measure, ...]] = field(default_factory=dict)
    epoch_seconds: float | None = None
    events: tuple[Event, ...] = ()

    @classmethod
    def read(cls, path: str | Path) -> Profile:
        """Read a profile.

        Raises:
            ConfigError: if the file is missing, is not YAML, or holds a value that cannot be used.
        """
        try:
            content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise ConfigError(f"{path}: the profile cannot be read: {error.strerror}.") from error
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise ConfigError(f"{path}: the profile is corrupt: {' '.join(str(error).split())}.") from error
        groups = _groups(content, path)
        check_keys(content, SECTIONS, f"{path}: profile")
        return cls(
            groups=groups,
            settings=parse_value(dict | None, content.get("settings"), f"{path}: settings") or {},
            fingerprint=parse_value(dict | None, content.get("fingerprint"), f"{path}: fingerprint") or {},
            measures=_measures(content.get("measures"), groups, f"{path}: measures"),
            epoch_seconds=parse_value(Number | None, content.get("epoch_seconds"), f"{path}: epoch_seconds"),
            events=tuple(
                _event(entry, f"{path}: events.{index}")
                for index, entry in enumerate(parse_value(list | None, content.get("events"), f"{path}: events") or ())
            ),
        )

    def write(self, path: str | Path) -> None:
        """Write the file atomically: if the process is killed meanwhile, the old file stays.

        Missing folders are made. No collective is involved: one rank may write while others fail.

        Raises:
            ConfigError: if the file cannot be written.
        """
        # `train_ds` comes first, to be found and pasted.
        measures = {name: [_measure_content(m) for m in of_group] for name, of_group in self.measures.items()}
        sections = [HEADER, self.block()]
        sections += [
            as_yaml({name: content})
            for name, content in (
                ("settings", self.settings),
                ("fingerprint", self.fingerprint),
                ("epoch_seconds", self.epoch_seconds),
                ("measures", measures.get(ONLY_GROUP, measures)),
                ("events", [_event_content(event) for event in self.events]),
            )
            if content not in (None, {}, [])
        ]
        try:
            write_text(path, "\n".join(sections))
        except OSError as error:
            raise ConfigError(f"{path}: the file cannot be written: {error.strerror}; name another place.") from error

    def block(self) -> str:
        """``train_ds`` with bins and batch sizes, YAML for a recipe; ends in a line break."""
        groups = {name: buckets.as_config() for name, buckets in self.groups.items()}
        return as_yaml({"train_ds": groups.get(ONLY_GROUP, groups)})

    def with_batch_sizes(self, sizes: Mapping[str, Sequence[int]], *events: Event) -> Profile:
        """A copy with other batch sizes for some groups, and with more events; measures stay the same."""
        groups = dict(self.groups)
        for name, of_group in sizes.items():
            if len(of_group) != len(groups[name].bucket_duration_bins):
                raise ValueError(f"{name!r} has {len(groups[name].bucket_duration_bins)} bins, not {len(of_group)}")
            groups[name] = replace(groups[name], bucket_batch_size=tuple(int(size) for size in of_group))
        return replace(self, groups=groups, events=(*self.events, *events))


def as_bins(bins: Any, place: str) -> tuple[Bin, ...]:
    """Check a list of bins, one- or two-dimensional, from a recipe or a profile.

    Raises:
        ConfigError: if it is no such list, mixes both kinds, or is not ascending.
    """
    if not isinstance(bins, (list, tuple)) or not bins:
        raise ConfigError(f"{place}.bucket_duration_bins: a list of bins is needed, not {bins!r}.")
    if all(is_number(item) for item in bins):
        checked: tuple[Bin, ...] = tuple(float(item) for item in bins)
    elif all(isinstance(item, (list, tuple)) and len(item) == 2 and all(map(is_number, item)) for item in bins):
        checked = tuple((float(item[0]), float(item[1])) for item in bins)
    else:
        raise ConfigError(
            f"{place}.bucket_duration_bins: bins are all numbers or all pairs [input, output], not {list(bins)}."
        )
    for index, (lower, upper) in enumerate(pairwise(checked)):
        if not lower < upper:  # type: ignore[operator]
            raise ConfigError(
                f"{place}.bucket_duration_bins: bins must rise, but number {index + 2} "
                f"({shown(upper)}) does not lie above the one before it ({shown(lower)})."
            )
    return checked


def shown(bins: Bin | Iterable[Bin]) -> str:
    """Bins as they are written in YAML."""
    if isinstance(bins, (int, float)):
        return f"{bins:g}"
    return f"[{', '.join(shown(item) for item in bins)}]"


# The content of the file


def _groups(content: Any, path: str | Path) -> dict[str, Buckets]:
    train_ds = content.get("train_ds") if isinstance(content, dict) else None
    if not isinstance(train_ds, dict) or not train_ds:
        raise ConfigError(f"{path}: the profile is corrupt: it has no mapping `train_ds`.")
    if not {"bucket_batch_size", "bucket_duration_bins", "batch_size", ROW_TOKENS, *LIMIT_KEYS}.isdisjoint(train_ds):
        return {ONLY_GROUP: _buckets(train_ds, f"{path}: train_ds")}
    return {str(name): _buckets(group, f"{path}: train_ds.{name}") for name, group in train_ds.items()}


def _buckets(group: Any, place: str) -> Buckets:
    if not isinstance(group, dict):
        raise ConfigError(f"{place}: a mapping with bucket_duration_bins and bucket_batch_size is needed.")
    if ROW_TOKENS in group:
        row_tokens = parse_value(RowTokens, group[ROW_TOKENS], f"{place}.{ROW_TOKENS}")
        size = parse_value(BatchSize, group.get("batch_size"), f"{place}.batch_size")
        row = tuple(map(float, row_tokens)) if isinstance(row_tokens, list) else float(row_tokens)
        return Buckets((row,), (size,), ROW_TOKENS)
    if "batch_size" in group and "bucket_batch_size" not in group:
        keys = [key for key in LIMIT_KEYS if key in group]
        if len(keys) != 1 or not is_number(group[keys[0]]) or group[keys[0]] <= 0:
            raise ConfigError(
                f"{place}.batch_size: is for examples of any length up to a bound; give one positive number as "
                f"{' or '.join(LIMIT_KEYS)}."
            )
        size = parse_value(BatchSize, group["batch_size"], f"{place}.batch_size")
        return Buckets((float(group[keys[0]]),), (size,), keys[0])
    for key in ("bucket_duration_bins", "bucket_batch_size"):
        if key not in group:
            raise ConfigError(f"{place}.{key}: is missing from the profile.")
    bins = as_bins(group["bucket_duration_bins"], place)
    sizes = parse_value(list[BatchSize], group["bucket_batch_size"], f"{place}.bucket_batch_size")
    if len(bins) != len(sizes):
        raise ConfigError(f"{place}: there are {len(bins)} bins, but {len(sizes)} batch sizes; each bin needs one.")
    return Buckets(bins, tuple(sizes))


def _measure_content(measure: Measure) -> dict[str, Any]:
    content = asdict(measure)
    if measure.seconds is not None:
        content["seconds"] = float(f"{measure.seconds:.6g}")
    if measure.memory is not None:
        content["memory"] = Line({name: round(value) for name, value in content["memory"].items()})
    if measure.time is not None:
        content["time"] = Line({name: float(f"{value:.6g}") for name, value in content["time"].items()})
    return content


def _event_content(event: Event) -> dict[str, Any]:
    content = asdict(event)
    return Line({**content, "from": content.pop("before"), "to": content.pop("after")})


def _measures(content: Any, groups: Mapping[str, Buckets], place: str) -> dict[str, tuple[Measure, ...]]:
    if content is None:
        return {}
    by_group = {ONLY_GROUP: content} if ONLY_GROUP in groups else content
    if not isinstance(by_group, dict) or by_group.keys() != groups.keys():
        raise ConfigError(f"{place}: measures of each group of train_ds are needed; remove what was added by hand.")
    measures = {}
    for name, entries in by_group.items():
        of_group = f"{place}.{name}".rstrip(".")
        entries = parse_value(list, entries, of_group)
        measures[name] = tuple(_measure(entry, f"{of_group}.{index}") for index, entry in enumerate(entries))
        if tuple(m.bin for m in measures[name]) != groups[name].bucket_duration_bins:
            raise ConfigError(
                f"{of_group}: the measures are of other bins than those of train_ds; remove the measures, "
                "or delete the file to measure again."
            )
    return measures


def _measure(entry: Any, place: str) -> Measure:
    entry = parse_value(dict, entry, place)
    (bin_,) = as_bins([entry.get("bin")], f"{place}.bin")
    memory, time = (
        None if entry.get(key) is None else _record(kind, entry[key], f"{place}.{key}")
        for key, kind in (("memory", MemoryLine), ("time", TimeLine))
    )
    return _record(Measure, entry, place, bin=bin_, memory=memory, time=time)


def _event(entry: Any, place: str) -> Event:
    entry = parse_value(dict, entry, place)
    texts = {name: str(entry.get(name)) for name in ("when", "bucket", "cause")}
    before, after = (parse_value(Count, entry.get(key), f"{place}.{key}") for key in ("from", "to"))
    return _record(Event, entry, place, before=before, after=after, **texts)


def _record(cls: type[_T], entry: Any, place: str, **given: Any) -> _T:
    """A mapping as a dataclass of numbers; those that are absent are None, as in a file edited by hand."""
    absent = dict.fromkeys(cls.__dataclass_fields__)
    return parse_section(cls, absent | parse_value(dict, entry, place), place, **given)
