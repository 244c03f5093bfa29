"""Sampling weights and shares of sources.

- ``counting``: examples and hours of a source.
- ``source_stats``: these counts in a sidecar beside the files.
- ``weights``: weights from sizes and temperatures.
"""
