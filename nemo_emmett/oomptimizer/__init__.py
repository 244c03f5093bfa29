"""Batch sizes that fit the memory, bucket by bucket. The callback is :class:`nemo_emmett.callbacks.OOMptimizer`.

Before training, from the recipe to a profile:

- ``options``, ``memory``: the callback's arguments; memory of devices, and amounts of memory.
- ``buckets``: a recipe's groups of data, their buckets, and the longest example of each.
- ``adapters``: synthetic batches for each family of models.
- ``steps``, ``snapshot``, ``fake``: training steps on them, without side effects, on a device or on fake tensors.
- ``meter``, ``cuda_meter``: the memory of a step.
- ``search``, ``zip_search``, ``cost_model``, ``calibration``: from few steps to batch sizes.
- ``profile``, ``profile_yaml``, ``fingerprint``, ``profile_store``: the result in a file, for which run, and back into
  the recipe. :class:`Profile` is exported here.

During training:

- ``guard``, ``recovery``, ``coordinated_exit``: measures steps, redoes those that run out of memory, or ends all ranks.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
