"""Texts and recordings to translations, for ``nemo-emmett translate``.

- ``requests``: what is to be translated, from arguments, lines, TSV, NeMo manifests, files and folders of audio. Cheap
  to import, so that the command can check what it is given before it loads a model.
- ``results``: translations as lines or JSON, in a file or on standard output.
- ``run``: a model on the requests, in their order, and on the parts of long recordings.
"""
