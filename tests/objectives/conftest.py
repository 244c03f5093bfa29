"""What tests of objectives share."""

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def folder(tmp_path_factory) -> Path:
    """Where tiny backbones are kept, each written when it is first asked for (tests/models/backbones.py)."""
    return tmp_path_factory.mktemp("backbones")
