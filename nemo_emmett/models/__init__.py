"""The models, each readable alone, and their parts.

- :class:`SALMT5` (``salm_t5``): encoder-decoder; speech and prompt enter the text encoder together.
- :class:`SALMGPT` (``salm_gpt``): decoder-only; speech among the prompt's tokens. NeMo's SALM made multimodal.
- :class:`BestowGPT` (``bestow_gpt``): decoder-only; speech through cross-attention in front of the LLM.
- :func:`load`: a model from the folder that ``save_pretrained`` wrote.

Modules, in the order in which a model is built, trained and used:

- ``config`` (keys of the ``model`` section), ``nemo_keys`` (those of NeMo's other models), ``targets`` (sections that
  name a class), ``optimization`` (optimizer and schedule), ``learning_rates`` (by part), ``lora_modality`` (LoRA that
  acts on speech alone), ``gradient_conflict`` (gradients of speech and text compared).
- ``base``: the base class; ``building`` (tokenizer, language model, LoRA), ``perception`` (speech encoder),
  ``transformer_blocks`` (compilation, activation checkpointing), ``initial_weights``, ``sharding`` (FSDP2),
  ``tensor_parallel``.
- ``training_step`` (losses of modalities and objectives), ``teachers`` (of objectives).
- ``causal`` (common parts of decoder-only models), ``packed_inputs`` (several examples in a row), ``head``
  (losses in the output layer), ``microbatches``, ``dummy_batch``, ``step_log``, ``validation``, ``oomptimizer_schema``.
- ``generation``, ``greedy`` (its search on a CPU), ``inputs`` (texts and recordings to translate), ``export``,
  ``artifacts`` (what others read of its folder), ``exported`` (what its folder says, without torch),
  ``exported_files`` (its files: whole, and without code), ``card`` (its README), ``public_names`` (no paths in it),
  ``checkpoint``, ``load``.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
