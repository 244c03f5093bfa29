"""Records and examples, in the order in which data flows; each format decides alone which records are usable.

- ``registry``: opens a source with its reader; our data types, registered with NeMo.
- ``random_access``: opens a source for reading by number.
- ``base``, ``json_records``, ``tsv``, ``tar_audio``: shared by formats: records by number, lines of JSON, columns of
  TSV, audio in tar files.
- ``nemo_manifest``, ``nemo_tarred``, ``lhotse_manifest``, ``shar``, ``speech_tsv``, ``parallel_text``: one format each.
- ``examples``: what a record yields for the dataset that will collate it.
"""
