"""EMMeTT for a stock NeMo: text translation and speech translation in one training of one model.

Rooms, from those that users call down to those that everything uses (docs/architecture.md):

- ``cli``, ``runner``, ``training``, ``doctor``: commands, recipes from the command line, and the training of a recipe;
  ``recipe_checks``, ``checkpoints``, ``run_folders``, ``run_summary``, ``exporting``, ``training_record``: its checks,
  what it resumes from, its folders, its summaries, its exported model and what that says of its training.
- ``init``: a recipe for own data.
- ``plugin``: registration with Lightning, Hydra and NeMo when the package is installed.
- ``callbacks``: Lightning callbacks (``OOMptimizer``, ``ResumableData``, ``RandomState``, ``TrainingClock``).
- ``optimizers``: AdamW with float32 copies of weights of few bits.
- ``strategies``: hybrid sharding, which Lightning does not have (``HybridShardedStrategy``).
- ``planning``: bins, batch sizes and blend before a training.
- ``evaluation``: translate test sets, score and report. ``translation``: translate texts and recordings.
- ``serving``: a model behind HTTP.
- ``corpora``: public corpora to manifests, text and shards.
- ``models``: the models (``SALMT5``, ``SALMGPT``, ``BestowGPT``), and ``load`` for a saved one.
- ``data``: files to batches (``MultimodalDataModule``, ``get_multimodal_dataloader``).
- ``oomptimizer``: batch sizes that fit the memory.
- ``objectives``: what a model is trained on besides the cross-entropy of its answers.
- ``modules``, ``prompts``, ``schedulers``: parts of models; translation prompts and languages; learning-rate schedules.
- ``errors``, ``config``, ``typed_config``, ``early_checks``, ``files``, ``processes``, ``audio_file``,
  ``audio_chunks``, ``run_log``: what all rooms use.

Importing the package imports neither torch nor NeMo: these modules load when they are first used. It registers
post-import hooks, which add our data types, prompt formats and dataloader to NeMo as soon as NeMo is imported.
"""

import lazy_loader

from nemo_emmett import plugin

__version__ = "0.2.0.dev0"

_ROOMS = (
    *("callbacks", "corpora", "data", "evaluation", "models", "modules", "objectives", "oomptimizer", "prompts"),
    *("optimizers", "schedulers", "strategies"),
)
__getattr__, __dir__, __all__ = lazy_loader.attach(__name__, submodules=_ROOMS)
__all__ += ["__version__", "plugin"]

plugin.register()
