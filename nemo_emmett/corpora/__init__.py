"""Corpora prepared for training: a publisher's files become NeMo manifests, line-aligned text and shards.

The modules in the order of the data's flow:

- ``commands``: the commands ``nemo-emmett prepare CORPUS``. ``registry``: :func:`find_corpus`, by name.
- ``readers``: a module for each public corpus, from its publisher's files to ``corpus``: parts and their sentences.
- ``filtering``: which training sentences to leave out. ``normalisation``: which sentences are equal, how long they are.
- ``preparing``: :func:`prepare_corpus`, from parts to files. ``audio_files``: the recordings among them.
  ``output_folder``: the folder with these files, finished or not.
- ``phrasebook``: numbers, dates, clock times and prices in four languages, written and spoken by this package.
  ``captions``: captions in several languages, spoken. ``extras``: the libraries that these need.
- ``leaks``, ``leaks_command``: test sentences in training data, read by ``sentence_files``.
- ``tokenizers``: tokenizers for models that are trained from scratch.

Example:
    >>> from nemo_emmett.corpora import find_corpus, prepare_corpus
    >>> prepare_corpus(find_corpus("multi30k"), "multi30k-dataset", "data/multi30k")  # doctest: +SKIP
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
