"""Lists of sources in files of their own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from nemo_emmett.data.config.section import plain
from nemo_emmett.data.io.files import open_bytes
from nemo_emmett.errors import DataError


def load_entries(path: str | Path, place: str) -> Any:
    """The content of an ``input_cfg`` file.

    Raises:
        DataError: if it cannot be read, or is not YAML.
    """
    try:
        with open_bytes(str(path)) as file:
            entries = yaml.load(file, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    except OSError as error:
        raise DataError(f"{place}: the file '{path}' cannot be read ({error.strerror or error}).") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise DataError(f"{place}: the file '{path}' is not YAML: {' '.join(str(error).split())}.") from error
    return plain(entries, place) if isinstance(entries, list) else entries
