"""Texts and tokens to ids: those of NeMo's tokenizers, computed faster."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from nemo.collections.common.tokenizers import AutoTokenizer
from transformers import PreTrainedTokenizerFast

from nemo_emmett.errors import DataError
from nemo_emmett.prompts.control_tokens import control_tokens_of
from nemo_emmett.prompts.markup import Prompt

_WORTH_A_BATCH = 8
"""Fewer texts are encoded one by one: waking the threads for one pair of sentences halves the speed."""


def encode_texts(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """``tokenizer.text_to_ids`` of each text; in a prompt, control tokens are recognised in its markup only.

    Args:
        tokenizer: a NeMo tokenizer.
        texts: any number of texts, special tokens written out; or of
            :class:`~nemo_emmett.prompts.markup.Prompt`, in which ``</s>`` and the like of users are encoded as text.
    """
    backend = _fast_backend(tokenizer)
    if backend is None:
        encoded = [tokenizer.text_to_ids(text) for text in texts]
    else:  # without offsets and strings of the tokens, which `text_to_ids` would look up one by one
        # A call of the Hugging Face tokenizer leaves these as it needed them.
        if backend.truncation is not None:
            backend.no_truncation()
        if backend.padding is not None:
            backend.no_padding()
        try:
            if len(texts) < _WORTH_A_BATCH:
                encoded = [backend.encode(text, add_special_tokens=False).ids for text in texts]
            else:
                encoded = [encoding.ids for encoding in backend.encode_batch_fast(texts, add_special_tokens=False)]
        except BaseException as error:  # PanicException of Rust is no Exception, and has no name to import
            if type(error).__name__ != "PanicException":
                raise
            reason = str(error).splitlines()[0]
            which = repr(str(texts[0])[:80]) if len(texts) == 1 else f"one of {len(texts)} texts"
            raise DataError(f"the tokenizer cannot encode {which} ({reason}); leave the text out.") from error
    if (control := control_tokens_of(tokenizer)) is None:
        return encoded
    return [
        ids if not isinstance(text, Prompt) or control.are_meant(text, ids) else control.encode(text)
        for text, ids in zip(texts, encoded, strict=True)
    ]


def token_id(tokenizer: Any, token: str) -> int | None:
    """The id of a token; None if the tokenizer does not have it.

    Its id must lead back to it: unknown tokens get the id of ``<unk>``, and M2M100's tokenizer counts languages from
    the end of its vocabulary file, where another token may have been added.
    """
    number = tokenizer.token_to_id(token) if token else None
    return number if number is not None and tokenizer.ids_to_tokens([number]) == [token] else None


def _fast_backend(tokenizer: Any) -> Any | None:
    """The ``tokenizers.Tokenizer`` behind a NeMo tokenizer, if nothing in between changes its result."""
    if type(tokenizer) is not AutoTokenizer or tokenizer.include_special_tokens:
        return None
    fast, base = tokenizer.tokenizer, PreTrainedTokenizerFast
    if not isinstance(fast, base) or fast.split_special_tokens:
        return None
    is_changed = (type(fast).tokenize, type(fast)._encode_plus) != (base.tokenize, base._encode_plus)
    return None if is_changed else fast.backend_tokenizer
