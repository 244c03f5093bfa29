"""Samplers: which examples come next.

- ``plan``: a dataset's sources, opened, as groups with shares and buckets.
- ``shuffle``: the order of a source's records, a function of position and seed.
- ``source_iterator``: the examples of one source from a position on.
- ``transforms``, ``tolerance``: NeMo's maps and filters as functions of lists, which skip examples on which they raise.
- ``example_reader``: the examples at given addresses (source, entry of its length index, pass), transformed.
- ``proportional_mixing``: which source comes next, by shares.
- ``buckets``, ``sampler``: examples wait in buckets until a step is full.
- ``nemo_sampler``, ``shard_batches``: NeMo's samplers over our sources; batches shared out to ranks.
"""
