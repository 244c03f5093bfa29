"""EMMeTT for a stock NeMo: text translation and speech translation in one training of one model.

- ``nemo_emmett.models``: the models (``SALMT5``), and ``load`` for a saved one.
- ``nemo_emmett.data``: files to batches (``MultimodalDataModule``, ``get_multimodal_dataloader``).
- ``nemo_emmett.callbacks``: Lightning callbacks (``OOMptimizer``, ``RandomState``).
- ``nemo_emmett.evaluation``: translate a test set, score it, report it.
- ``nemo_emmett.corpora``: corpora to manifests.
- ``nemo_emmett.plugin``: what installing the package makes Lightning, Hydra and NeMo see.

Importing the package imports neither torch nor NeMo: these modules load when they are first used. It registers
post-import hooks, which add our data types, prompt formats and dataloader to NeMo as soon as NeMo is imported.
"""

import lazy_loader

from nemo_emmett import plugin

__version__ = "0.2.0.dev0"

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__, submodules=["callbacks", "corpora", "data", "evaluation", "models", "modules", "oomptimizer", "prompts"]
)
__all__ += ["__version__", "plugin"]

plugin.register()
