"""Registration of our prompt formats with NeMo."""

from __future__ import annotations


def register_prompt_formats() -> None:
    """Register ``emmett_t5`` and the others with NeMo, which registers a class when it is defined."""
    import nemo_emmett.prompts.chat
    import nemo_emmett.prompts.language_tokens
    import nemo_emmett.prompts.t5  # noqa: F401
