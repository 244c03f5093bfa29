"""Model recipes and config groups, plain Hydra YAML; a package, so that ``pkg://nemo_emmett.conf`` finds them."""
