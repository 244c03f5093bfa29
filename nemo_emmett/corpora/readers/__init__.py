"""Readers: one module for each corpus, which knows its publisher's files and exports ``CORPUS``."""
