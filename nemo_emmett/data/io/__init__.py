"""Files of a dataset.

- ``files``: opening local, compressed and remote files.
- ``line_index``, ``tar_index``: offsets of lines and tar members.
- ``sidecar``: cache files next to the data.
- ``audio``, ``channels``: recordings as their headers describe them, and their channels.
- ``commands``: refuses the commands that a manifest or recipe could make lhotse run.
- ``skipped_records``: counts of skipped records by source and cause.
"""
