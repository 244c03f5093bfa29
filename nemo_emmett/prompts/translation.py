"""Registration of our prompt formats with NeMo."""

from __future__ import annotations


def register_prompt_formats() -> None:
    """Make ``prompt_format: emmett_t5`` and the others known to NeMo, which registers a class as it is defined."""
    import nemo_emmett.prompts.chat
    import nemo_emmett.prompts.language_tokens
    import nemo_emmett.prompts.t5  # noqa: F401
