"""Cuts in a form that can be compared with those of NeMo's readers."""

from __future__ import annotations

from lhotse.cut import Cut

ORIGIN = ("manifest_origin", "manifest_place")


def comparable(cut: Cut) -> dict:
    """A cut as a dict, without what only our readers attach."""
    data = cut.to_dict()
    data["custom"] = {k: v for k, v in data["custom"].items() if k not in (*ORIGIN, "tar_origin")}
    return data
