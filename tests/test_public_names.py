"""Every public name can be imported: the packages load lazily, so a stub may name what is not there."""

from __future__ import annotations

import importlib
import pkgutil
from types import ModuleType

import pytest

import nemo_emmett


def packages() -> list[str]:
    found = pkgutil.walk_packages(nemo_emmett.__path__, "nemo_emmett.")
    return ["nemo_emmett", *(module.name for module in found if module.ispkg)]


@pytest.mark.parametrize("name", packages())
def test_each_public_name_of_a_package_is_there(name: str) -> None:
    package: ModuleType = importlib.import_module(name)
    for public in getattr(package, "__all__", []):
        assert getattr(package, public) is not None
