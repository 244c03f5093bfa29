"""What ``packing: true`` needs of a group, and what cannot be combined with it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from nemo_emmett.data.config.sources import Source
from nemo_emmett.errors import ConfigError

_NEEDED = {"row_tokens": "the most positions of a row", "batch_size": "the rows of a batch"}

_OTHER_RULES = (
    *("bucket_batch_size", "bucket_duration_bins", "use_bucketing", "batch_tokens", "quadratic_duration"),
    *("quadratic_factor", "batch_ratio", "concatenate_samples"),
)
"""Keys that put batches together in another way."""


def refuse_above_groups(keys: Mapping[str, Any], place: str) -> None:
    """Refuse the keys of packing next to ``multi_config``, where they would have no effect.

    Raises:
        ConfigError: for the first one.
    """
    for key in ("packing", "row_tokens"):
        if keys.get(key):
            raise ConfigError(f"{place}.{key}: is a key of a group, whose rows it describes; set it in each group.")


def check_packed_alike(groups: Sequence[tuple[str, bool, Sequence[Source]]]) -> None:
    """Check the groups of ``sampler_fusion: zip``, whose batches of a modality are joined to one.

    Args:
        groups: of each its place in the recipe, whether it is packed, and its sources.

    Raises:
        ConfigError: if of those of speech, or of text, some are packed and some are not.
    """
    for is_text in (False, True):
        of_kind = [(place, packed) for place, packed, sources in groups if any(s.is_text == is_text for s in sources)]
        loose = [place for place, packed in of_kind if not packed]
        if loose and len(loose) < len(of_kind):
            raise ConfigError(
                f"{loose[0]}.packing: groups of {'text' if is_text else 'speech'} are joined in a step of zip, and "
                "another one is packed; set packing in all of them, or in none."
            )


def check_packing(keys: Mapping[str, Any], sources: Sequence[Source], place: str) -> None:
    """Check the keys of a group, and its sources.

    Args:
        keys: of the group, with what it inherits.
        sources: all of them.
        place: of the group in the recipe.

    Raises:
        ConfigError: for a key that is missing or has no meaning, or sources that cannot share rows.
    """
    if not keys.get("packing"):
        if keys.get("row_tokens") is not None:
            raise ConfigError(f"{place}.row_tokens: has a meaning with packing: true alone; set it, or leave this out.")
        return
    for key, what in _NEEDED.items():
        if keys.get(key) is None:
            raise ConfigError(f"{place}.packing: needs {key}, {what}; add it.")
    for key in _OTHER_RULES:
        if keys.get(key):
            raise ConfigError(
                f"{place}.{key}: cannot be combined with packing, which fills rows of row_tokens with examples of any "
                "length; leave one out."
            )
    if keys.get("pretokenize") is False:
        raise ConfigError(f"{place}.pretokenize: packing needs tokens before batches are made; leave the key out.")
    speech = [source for source in sources if not source.is_text]
    if speech and len(speech) < len(sources):
        raise ConfigError(
            f"{place}.packing: rows hold speech or text, and this group has both; make two groups of it "
            "(multi_config: true, sampler_fusion: zip)."
        )
    for source in sources:
        if "conversation" in source.type:
            raise ConfigError(
                f"{source.place}.type: {source.type} cannot be packed, since its recordings are not in the length "
                f"index one by one; leave out {place}.packing."
            )
