"""``nemo-emmett init``: a recipe for a user's own data, language model and speech encoder.

In the order in which it runs:

- ``command``: the command's options; ``questions`` asks for what is missing.
- ``data_files``: what kind of data a file holds, by its name and its first records.
- ``choices``: all that was chosen. NeMo is not imported until then.
- ``measuring``: what the data holds, its weights, bins and batch sizes, by its length indexes.
- ``writing``: the recipe (``recipe.yaml.j2``), and the model built of it on fake tensors.
- ``summary``: what is printed of the data.

Importing this package imports neither torch nor NeMo.
"""
