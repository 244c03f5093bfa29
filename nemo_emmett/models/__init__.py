"""The models, each readable alone, and their parts.

- :class:`SALMT5` (``salm_t5``): encoder-decoder; speech and prompt enter the text encoder together.
- :class:`SALMGPT` (``salm_gpt``): decoder-only; speech among the prompt's tokens. NeMo's SALM made multimodal.
- :class:`BestowGPT` (``bestow_gpt``): decoder-only; speech through cross-attention in front of the LLM.
- :func:`load`: a model from the folder that ``save_pretrained`` wrote.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
