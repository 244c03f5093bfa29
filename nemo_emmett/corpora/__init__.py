"""Corpora prepared for training: files as NeMo manifests and line-aligned text.

``phrasebook``: numbers, dates, clock times and prices in four languages, written and spoken by this package.
"""
