"""Records and examples, one module for each format.

- ``json_records``, ``speech_sources``, ``tar_audio``: NeMo's and lhotse's manifests, plain and tarred.
- ``parallel_text``: lines of text and their translations.
- ``random_access``: the records of any source by number.
- ``examples``: what a record yields for the dataset that will collate it.
- ``registry``: our data types and readers, registered with NeMo.
"""
