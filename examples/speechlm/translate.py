"""Translate texts and recordings with an exported model.

Usage:
    python examples/speechlm/translate.py --model MODEL --to de "ten twenty in the morning" recording.wav
    python examples/speechlm/translate.py --model MODEL --to de --output translations.jsonl folder/of/recordings
    python examples/speechlm/translate.py --model MODEL --to de < sentences.en > sentences.de

MODEL is a folder that train.py exported. The same as ``nemo-emmett translate``.
"""

from nemo_emmett.cli import main

if __name__ == "__main__":
    import sys

    main(["translate", *sys.argv[1:]])
