"""Batch sizes, bins and blends before a training.

- :func:`oomptimize`: find a recipe's batch sizes on this machine's device.
- :func:`plan`: find them for a memory budget, and optionally the bins with the shortest epoch.
- :func:`print_index`, :func:`print_blend`, :func:`bins_of_dataset` and :func:`print_bins`: what the commands ``index``,
  ``blend`` and ``bins`` show.

Modules, in the order in which a command uses them:

- ``needed``, ``known_by_model``, ``recipe``, ``architecture``: the parts of a recipe that planning reads.
- ``commands``, ``planner``, ``fake_training``, ``sharded``: the two functions above, and the search without a device.
- ``lengths``, ``bins_and_sizes``, ``checkpointing``, ``timing``: lengths of the data, bins and a share of activation
  checkpointing with the shortest epoch, predicted times.
- ``report``, ``picture``: tables and drawings of the results.
- ``blend_report``, ``bins_report``, ``index_report``: the commands ``blend``, ``bins`` and ``index``.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
