"""What installing the package costs programs that do not use it: neither torch nor NeMo is imported."""

from __future__ import annotations

import subprocess
import sys
import textwrap

import pytest

HEAVY = ("torch", "nemo", "lightning", "lhotse", "transformers")


def modules_after(code: str) -> set[str]:
    """Top-level modules that a fresh interpreter holds after running ``code``."""
    code = textwrap.dedent(code) + "\nimport sys\nprint('MODULES', *{name.partition('.')[0] for name in sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.splitlines()[-1].split()[1:])


@pytest.mark.parametrize(
    "code",
    [
        "import nemo_emmett; assert nemo_emmett.__version__",
        "import nemo_emmett.data, nemo_emmett.models, nemo_emmett.evaluation, nemo_emmett.oomptimizer",
        "from nemo_emmett import cli, runner",
        """
        from importlib.metadata import entry_points
        (point,) = entry_points(group="lightning.pytorch.callbacks_factory", name="nemo_emmett")
        assert point.load()() == []
        """,
        """
        from hydra.core.plugins import Plugins
        from hydra.plugins.search_path_plugin import SearchPathPlugin
        assert "NemoEmmettSearchPath" in {cls.__name__ for cls in Plugins.instance().discover(SearchPathPlugin)}
        """,
        """
        from hydra import compose, initialize_config_module
        with initialize_config_module("nemo_emmett.conf", version_base=None):
            cfg = compose(overrides=["+emmett_callbacks=random_state"])
        assert cfg.trainer.callbacks[0]._target_ == "nemo_emmett.callbacks.RandomState"
        """,
    ],
    ids=["package", "lazy subpackages", "cli", "callback factory", "hydra plugins", "hydra compose"],
)
def test_leaves_heavy_libraries_alone(code: str) -> None:
    assert not modules_after(code) & set(HEAVY)


def test_the_check_sees_what_is_imported() -> None:
    assert "lightning" not in modules_after("import nemo_emmett")
    assert "yaml" in modules_after("import nemo_emmett, yaml")
