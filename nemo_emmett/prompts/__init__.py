"""Translation prompts and the languages they name.

- :mod:`nemo_emmett.prompts.languages`: which language codes there are, their English names, and what each family of
  models calls them.
- :mod:`nemo_emmett.prompts.translation`: registers our prompt formats with NeMo; the instruction in plain words.
- :mod:`nemo_emmett.prompts.request`: what a format asks of an example.
- :mod:`nemo_emmett.prompts.families`: which format a backbone was made for, and the tokens that end its answers.
- :mod:`nemo_emmett.prompts.t5`: ``emmett_t5``, ``<de> text`` for T5-like encoder-decoders, and ``emmett_ul2``.
- :mod:`nemo_emmett.prompts.language_tokens`: ``emmett_m2m100``, ``emmett_nllb``, ``emmett_mbart50``, ``emmett_mbart``.
- :mod:`nemo_emmett.prompts.chat`: ``emmett_llama3`` and the like, an instruction in NeMo's chat formats.
- :mod:`nemo_emmett.prompts.formatting`: ``format_many``, examples prompted together.
- :mod:`nemo_emmett.prompts.seq2seq`, :mod:`nemo_emmett.prompts.encoding`: what the formats share.
- :mod:`nemo_emmett.prompts.markup`: strings that know which of their parts a user wrote.
- :mod:`nemo_emmett.prompts.control_tokens`: control tokens, which are text in what users write.
"""
