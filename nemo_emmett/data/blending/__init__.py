"""Sampling weights and shares of sources.

- ``source_stats``: the sizes of sources, in sidecars next to the files.
- ``weights``: weights from sizes and temperatures.
"""
