"""Translation prompts and the languages they name.

- :mod:`nemo_emmett.prompts.languages`: which language codes there are, and their English names.
- :mod:`nemo_emmett.prompts.translation`: registers our prompt formats with NeMo.
- :mod:`nemo_emmett.prompts.t5`: the ``emmett_t5`` format, ``<de> text`` for T5-like encoder-decoders.
"""
