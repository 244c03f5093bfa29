"""Selects a channel of a recording."""

from __future__ import annotations

from lhotse.cut import Cut, MixedCut
from lhotse.utils import fastcopy

from nemo_emmett.data.io.skipped_records import InvalidRecord

AVERAGE = "average"
"""Selector of the average over all channels, the default of our datasets."""


def is_chosen(selector: int | str | None) -> bool:
    """Whether the selector is for one channel, not for the average of all."""
    return selector is not None and selector != AVERAGE


def select_channel(cut: Cut, selector: int | str | None) -> Cut:
    """A cut with the channel that NeMo's ``channel_selector`` names.

    Args:
        cut: of a recording with one channel or several.
        selector: number of the channel, from 0, or the field of the record that holds it; ``average`` and None leave
            all channels.

    Raises:
        InvalidRecord: if there is no such channel or field.
    """
    if (channel := channel_of(cut, selector)) is None:
        return cut
    if channel >= cut.num_channels:
        raise InvalidRecord(f"no channel {channel}")
    if cut.num_channels == 1:
        return cut
    selected = cut.with_channels(channel)
    if not selected.supervisions:  # lhotse drops texts of other channels, and texts are of channel 0 by default
        selected.supervisions = [fastcopy(supervision, channel=channel) for supervision in cut.supervisions]
    return selected


def channel_of(cut: Cut, selector: int | str | None) -> int | None:
    """The channel that a cut's metadata and ``channel_selector`` name; None: all.

    Raises:
        InvalidRecord: if they name none.
    """
    if not is_chosen(selector):
        return None
    channel = selector
    if isinstance(selector, str):
        custom = (cut._first_non_padding_cut if isinstance(cut, MixedCut) else cut).custom or {}
        if (channel := custom.get(selector)) is None:
            raise InvalidRecord(f"no field '{selector}' to select a channel by")
    if not isinstance(channel, int) or isinstance(channel, bool) or channel < 0:
        raise InvalidRecord("invalid channel")
    return channel
