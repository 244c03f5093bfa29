"""Translation prompts and the languages they name.

- :mod:`nemo_emmett.prompts.language_codes`: the one form of a language's code, by which languages are compared.
- :mod:`nemo_emmett.prompts.languages`: language codes, their English names, and their codes in each family of models.
- :mod:`nemo_emmett.prompts.markup`: strings whose parts were written by a user or by a prompt format.
- :mod:`nemo_emmett.prompts.control_tokens`: control tokens, which are text in what users write.
- :mod:`nemo_emmett.prompts.encoding`: texts to ids.
- :mod:`nemo_emmett.prompts.request`: the fields of an example that formats need.
- :mod:`nemo_emmett.prompts.answers`: the translation alone, or after the transcript.
- :mod:`nemo_emmett.prompts.instruction`: the instruction to translate, and the turns of a dialog with it.
- :mod:`nemo_emmett.prompts.seq2seq`: the base of the formats of encoder-decoders.
- :mod:`nemo_emmett.prompts.t5`: ``emmett_t5``, ``<de> text`` for T5-like encoder-decoders, and ``emmett_ul2``.
- :mod:`nemo_emmett.prompts.language_tokens`: ``emmett_m2m100``, ``emmett_nllb``, ``emmett_mbart50``, ``emmett_mbart``.
- :mod:`nemo_emmett.prompts.chat`: ``emmett_llama3`` and the like, an instruction in NeMo's chat formats.
- :mod:`nemo_emmett.prompts.chat_template`: a chat format as a template of Hugging Face.
- :mod:`nemo_emmett.prompts.translation`: registers our formats with NeMo.
- :mod:`nemo_emmett.prompts.families`: the format of a backbone, and the tokens that end its answers.
- :mod:`nemo_emmett.prompts.transcripts`: the transcripts of speech, prompted as text.
- :mod:`nemo_emmett.prompts.formatting`: ``format_many``, examples prompted together.
"""
