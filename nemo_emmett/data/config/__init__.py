"""A dataset's section of a recipe, parsed once into a tree of frozen dataclasses.

- ``section``: a section as plain dicts and lists.
- ``entries``: lists of sources in files.
- ``schema``: the keys with their types and ranges, and the keys of each source type.
- ``sources``: sources, and groups of them, with what they inherit.
- ``packing_keys``: what goes with rows of several examples.
- ``dataset_config``: a dataset and the groups that have a sampler each; :func:`parse_dataset`.
- ``nemo_config``: the tree as NeMo's own code takes it.
"""
