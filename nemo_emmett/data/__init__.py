"""From files to batches of one modality each.

In the order in which data flows:

- ``io``: files, indexes of lines and tar members, audio, skipped records.
- ``config``: a dataset's section of a recipe, parsed once into a tree of frozen dataclasses.
- ``readers``: records and examples, one module for each format.
- ``lengths``: what each record yields and how long it is, in an index.
- ``blending``: sampling weights from sizes.
- ``bucketing``: optimal bins and their padding.
- ``sampling``: shuffling, mixing, buckets; NeMo's samplers behind the same interface.
- ``worker_batches``, ``scheduled_batches``: what a worker sends with a batch, of streamed data and of a schedule.
- ``loader_state``: the position of training in its data.
- ``dataset``, ``dataloader``, ``datamodule``: examples to a batch, and what trainings call; ``agreement`` of the ranks
  on each batch.
- ``checks``: mistakes that depend on files, the tokenizer or the model.
- ``stock``: our keys in trainings of NeMo's own models.

Importing this package imports neither torch nor NeMo; using one of its names does.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
