"""Sampling weights and shares of sources.

- ``counting``: examples, seconds and tokens of what a reader yields.
- ``source_stats``: the sizes of sources, in sidecars next to the files.
- ``weights``: weights from sizes and temperatures.
"""
