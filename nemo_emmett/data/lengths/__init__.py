"""The lengths of examples, as arrays."""
