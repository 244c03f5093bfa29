"""Readers, from a publisher's files to parts: one module for each corpus, which exports ``CORPUS``.

- Text: ``flores``, ``multi30k``, ``opus``, ``tatoeba``, from ``files`` in folders and archives.
- Speech: ``covost2``, ``europarl_st``, ``fleurs``, ``mtedx`` and ``must_c`` (both in the layout of ``ted``), whose
  language ``pairs`` are joined to recordings.
- ``languages``: the publishers' codes of languages.
"""
