"""Opens every Hydra program on the machine to nemo_emmett: Hydra imports this module when it starts.

It adds ``pkg://nemo_emmett.conf`` to the search path of configs and registers post-import hooks for NeMo
(``plugin.register``), so that any NeMo recipe can name our classes and config groups. Neither NeMo nor torch is
imported.
"""

from hydra.core.config_search_path import ConfigSearchPath
from hydra.plugins.search_path_plugin import SearchPathPlugin

from nemo_emmett import plugin

plugin.register()


class NemoEmmettSearchPath(SearchPathPlugin):
    """Lets recipes use the config groups of nemo_emmett, such as ``emmett_callbacks``."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        """Append our configs after the recipe's own, so that a recipe's files win over ours of the same name."""
        search_path.append(provider="nemo_emmett", path="pkg://nemo_emmett.conf")
