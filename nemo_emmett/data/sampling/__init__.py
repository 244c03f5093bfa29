"""Samplers: which examples come next.

- ``plan``: a dataset's sources, opened, as groups with shares and buckets.
- ``transforms``, ``tolerance``: NeMo's maps and filters as functions of lists, which skip examples on which they raise.
- ``source_order``, ``mixing_sequence``, ``global_batches``, ``schedule``: the order of a source, the mixing of sources,
  the global batches of a group and of a dataset, from length indexes; ``group_scheduler``: which group gives the next
  step.
- ``example_reader``: the examples at given addresses (source, entry of its length index, pass), transformed.
- ``shuffle``, ``source_iterator``: the order of records, and the examples of a source that is streamed.
- ``proportional_mixing``, ``buckets``, ``sampler``: streamed sources are mixed by shares, and their examples wait in
  buckets until a step is full.
- ``nemo_sampler``, ``shard_batches``: NeMo's samplers over our sources; batches shared out to ranks.
"""
