"""Files of a dataset.

- ``files``: opening local, compressed and remote files.
- ``rows``: the cells of a row of a TSV file.
- ``sidecar``: cache files next to the data.
- ``index``, ``line_index``, ``tar_index``: offsets of lines and tar members, in sidecars.
- ``audio``, ``channels``: recordings as their headers describe them, and their channels.
- ``commands``: refuses the commands that a manifest or recipe could make lhotse run.
- ``skipped_records``: counts of skipped records by source and cause.
"""
