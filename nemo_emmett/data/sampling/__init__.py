"""Sampling of our own: stationary, resumable, and the same on all ranks.

From a source's records to the batches of every rank, each module one step:

- :mod:`order`: at which position of a source's endless order stands which record;
- :mod:`draws`: which source gives the next example, so that each holds its share in any stretch;
- :mod:`leaves`: the examples of a source, by number, tokenised and filtered by NeMo's own chain (:mod:`chain`);
- :mod:`buckets`: examples of like length until there is a batch for every rank;
- :mod:`sampler`: all of these for one worker process, several groups fused, with its state.
"""
