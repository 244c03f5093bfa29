"""The length index: what each record yields and how long it is, from one reading of the data without its audio.

- ``counting``: examples, seconds and tokens of what a reader yields.
- ``measures``: the lengths of examples, as arrays.
- ``identity``: what an index depends on, apart from the content of the files.
- ``notes``: records that were read and skipped, kept in an index.
- ``measuring``: a range of records, read and measured.
- ``index``: the file of a source's lengths, read by blocks.
- ``writing``: that file, put together from parts and from an older one.
- ``building``: which ranges must be measured, and by which process and rank.
- ``packing``: examples that share a row of the language model's input.
- ``selection``: NeMo's filters on lengths, its buckets and its rule for batches, on arrays.
"""
