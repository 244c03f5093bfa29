"""A dataset's section of a recipe.

- ``schema``: the keys and their defaults.
- ``sources``: the sources of a dataset, with what they inherit.
- ``validation``: the mistakes that a section alone can reveal.
"""
