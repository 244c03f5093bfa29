"""Translate a text or a recording with an exported model.

Usage:
    python examples/speechlm/translate.py --model MODEL --to de "ten twenty in the morning" recording.wav

MODEL is a folder that train.py exported. The same as ``nemo-emmett translate``.
"""

from nemo_emmett.cli import main

if __name__ == "__main__":
    import sys

    main(["translate", *sys.argv[1:]])
