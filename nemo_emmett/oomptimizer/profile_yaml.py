"""YAML in the layout of a profile."""

from __future__ import annotations

import re
from typing import Any

import yaml

from nemo_emmett.files import shown

_BYTES = re.compile(r"^( *(?:- )?)(\w*(?:peak|reserved|budget|memory)): (\d+)$", re.MULTILINE)
"""Lines with a key whose value is in bytes."""


class _Dumper(yaml.SafeDumper):
    """Writes lists without mappings on one line, and whole numbers without a fraction."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


class Line(dict):
    """A mapping that is written on one line."""


def _write_list(dumper: yaml.SafeDumper, items: list) -> yaml.Node:
    on_one_line = not any(isinstance(item, dict) for item in items)
    return dumper.represent_sequence("tag:yaml.org,2002:seq", items, flow_style=on_one_line)


def _write_number(dumper: yaml.SafeDumper, value: float) -> yaml.Node:
    if value.is_integer() and abs(value) < 1e15:
        return dumper.represent_int(int(value))
    return yaml.SafeDumper.represent_float(dumper, value)


_Dumper.add_representer(list, _write_list)
_Dumper.add_representer(tuple, lambda dumper, items: _write_list(dumper, list(items)))
_Dumper.add_representer(float, _write_number)
_Dumper.add_representer(
    Line, lambda dumper, entries: dumper.represent_mapping("tag:yaml.org,2002:map", entries.items(), flow_style=True)
)


def as_yaml(content: dict[str, Any]) -> str:
    """Nested dicts, lists and scalars as YAML; a comment repeats sizes in bytes in a readable unit.

    Example:
        >>> print(as_yaml({"bins": [[4.0, 2.5], [8.0, 9.0]], "peak": 3221225472}), end="")
        bins: [[4, 2.5], [8, 9]]
        peak: 3221225472  # 3.0 GiB
    """
    # So wide that lists are not wrapped.
    text = yaml.dump(content, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=1_000_000)
    return _BYTES.sub(lambda line: f"{line.group()}  # {shown(int(line.group(3)))}", text)
