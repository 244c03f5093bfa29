"""Control tokens in a user's text, such as ``</s>``, ``<|im_end|>`` or ``<de>``, are encoded as text.

A tokenizer encodes such a string as the control token, wherever it occurs: a target text would end in its middle, a
source text could close the user's turn and open the assistant's. Only in :class:`~nemo_emmett.prompts.markup.Markup`,
which prompt formats write, control tokens are control tokens.

transformers' ``split_special_tokens`` is not enough. It leaves tokens that are not marked as special (Qwen's
``<think>``), and where control tokens are in the vocabulary of a Unigram model (T5, mBART), the model finds them there.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, Any

from nemo.collections.common.tokenizers import AutoTokenizer
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizer, PreTrainedTokenizerFast

from nemo_emmett.errors import DataError
from nemo_emmett.prompts.languages import is_backbone_language
from nemo_emmett.prompts.markup import Markup, Prompt

if TYPE_CHECKING:
    from nemo.collections.common.prompts import PromptFormatter

_MARKER = re.compile(r"<.+>|\[.+\]", re.DOTALL)
_LANGUAGE_TAG = re.compile(r"<2?([\w-]+)>")

_NOT_IN_TEMPLATES = ("<think>", "</think>", "[S2S]")
"""Tokens that formats write but no template contains: reasoning, UL2's mode."""

_HTML = ("<br>", "<hr>", "<li>", "<th>", "<tr>", "<tt>")
"""Language codes that are HTML as well, which Gemma has as tokens of its text."""


class ControlTokens:
    """The control tokens of a tokenizer, and the encoding of prompts whose users' texts hold some.

    These are the tokens that are marked as special, and of the others those that a chat template or prompt format
    writes and the tags of languages. Other tokens that were added to a vocabulary (words, runs of blanks) are text.

    Args:
        tokenizer: a Hugging Face tokenizer.
    """

    def __init__(self, tokenizer: PreTrainedTokenizer | PreTrainedTokenizerFast) -> None:
        self._tokenizer = tokenizer
        self.size = len(tokenizer)
        added = {token.content: token.special for token in tokenizer.added_tokens_decoder.values()}
        # At the top of the module this import would begin the registration of our formats, which import this module.
        from nemo.collections.common.prompts import PromptFormatter

        formats = PromptFormatter._REGISTERED_FORMATTERS.values()
        written = [template for prompt in formats for template in templates_of(prompt)]
        written = "\0".join([*written, *_NOT_IN_TEMPLATES, str(tokenizer.chat_template or "")])
        self.ids: dict[str, int] = {
            token: number
            for token, number in tokenizer.get_vocab().items()
            if added.get(token) or _is_marker_of_control(token, written)
        }
        self._unknown = self.ids.get(tokenizer.unk_token, -1)
        self._known = frozenset(self.ids.values()) - {self._unknown}
        self._pattern = any_of(self.ids)
        self._other_added = added.keys() - self.ids.keys()
        self._ids_of_markup: dict[str, list[int]] = {}

    def are_meant(self, prompt: Prompt, ids: Sequence[int]) -> bool:
        """Whether all control tokens among the ids of a prompt come from its markup."""
        if not self._are_of_markup(prompt, ids):
            return False
        # Characters that the vocabulary does not have get the same id as a text that spells the unknown token.
        return self._unknown not in ids or not any(
            self._tokenizer.unk_token in part for part in prompt.parts if not isinstance(part, Markup)
        )

    def encode(self, prompt: Prompt) -> list[int]:
        """The ids of a prompt, in which control tokens are found in its markup alone.

        Raises:
            DataError: if the tokenizer finds them elsewhere all the same, as one of SentencePiece may.
        """
        if isinstance(self._tokenizer, PreTrainedTokenizer):
            ids = self._tokenizer.convert_tokens_to_ids(self._tokens(prompt))
        else:
            backend, spelling = self._respelled
            respelled = [
                self._pattern.sub(lambda match: spelling[match[0]], part) if isinstance(part, Markup) else part
                for part in prompt.parts
            ]
            ids = backend.encode("".join(respelled), add_special_tokens=False).ids
        if not self._are_of_markup(prompt, ids):
            raise DataError(
                f"the text '{prompt}' holds a control token, which its tokenizer cannot spell; leave it out."
            )
        return ids

    def _are_of_markup(self, prompt: Prompt, ids: Sequence[int]) -> bool:
        meant = [number for part in prompt.parts if isinstance(part, Markup) for number in self._written_by(part)]
        return meant == ([] if self._known.isdisjoint(ids) else [number for number in ids if number in self._known])

    def _tokens(self, prompt: Prompt) -> list[str]:
        """The same of a tokenizer written in Python, whose option leaves no token whole that was added to it."""
        tokens: list[str] = []
        for part in prompt.parts:
            is_markup = isinstance(part, Markup)
            for text in [part] if is_markup else re.split(f"({any_of(self._other_added).pattern})", part):
                is_whole = is_markup or text in self._other_added
                tokens += self._tokenizer.tokenize(text, split_special_tokens=not is_whole)
        return tokens

    def _written_by(self, markup: Markup) -> list[int]:
        if markup not in self._ids_of_markup:
            ids = self._tokenizer.convert_tokens_to_ids(self._tokenizer.tokenize(str(markup)))
            self._ids_of_markup[markup] = [number for number in ids if number in self._known]
        return self._ids_of_markup[markup]

    @cached_property
    def _respelled(self) -> tuple[Tokenizer, dict[str, str]]:
        """The same tokenizer with other spellings of its control tokens, drawn at random so that no text can hold one;
        and the spellings. It takes some seconds to make for a large vocabulary, and few runs ever need it."""
        drawn = secrets.token_hex(8)
        spelling = {token: f"\ufdd0{drawn}x{number:x}\ufdd1" for token, number in self.ids.items()}
        state = json.loads(self._tokenizer.backend_tokenizer.to_str())
        state |= dict.fromkeys(("truncation", "padding", "post_processor", "decoder"))
        for token in state["added_tokens"]:
            token["content"] = spelling.get(token["content"], token["content"])
        model = state["model"]
        if isinstance(model["vocab"], Mapping):
            model["vocab"] = {spelling.get(token, token): number for token, number in model["vocab"].items()}
        else:
            model["vocab"] = [[spelling.get(token, token), score] for token, score in model["vocab"]]
        if "merges" in model:
            model["merges"] = [
                pair for pair in model["merges"] if not spelling.keys() & {"".join(pair), pair[0], pair[1]}
            ]
        if model.get("unk_token") is not None:
            model["unk_token"] = spelling.get(model["unk_token"], model["unk_token"])
        backend = Tokenizer.from_str(json.dumps(state))
        assert all(backend.token_to_id(spelling[token]) == number for token, number in self.ids.items())
        return backend, spelling


def any_of(tokens: Collection[str]) -> re.Pattern:
    """A pattern that matches any of the tokens, of those that begin alike the longest."""
    return re.compile("|".join(map(re.escape, sorted(tokens, key=len, reverse=True))) or "(?!)")


def templates_of(prompt: type[PromptFormatter]) -> Iterator[str]:
    """The texts of a prompt format around messages."""
    yield prompt.INFERENCE_PREFIX or ""
    yield from (turn["template"] for turn in prompt.TEMPLATE.values())


def _is_marker_of_control(token: str, written: str) -> bool:
    """Whether a token that is not marked as special is a control token all the same."""
    if token[:1] not in ("<", "[") or not _MARKER.fullmatch(token):
        return False
    tag = _LANGUAGE_TAG.fullmatch(token)
    is_language = tag is not None and is_backbone_language(tag[1]) and token not in _HTML
    return is_language or token.startswith("<|") or token in written


def control_tokens_of(tokenizer: Any, refresh: bool = False) -> ControlTokens | None:
    """The control tokens of a NeMo tokenizer, found once; None where its encoding is not that of a Hugging Face one.

    Args:
        tokenizer: of NeMo.
        refresh: find them again if tokens were added since; to look takes milliseconds for a large vocabulary.
    """
    if type(tokenizer) is not AutoTokenizer or tokenizer.include_special_tokens:
        return None
    if refresh and _found_once(tokenizer.tokenizer).size != len(tokenizer.tokenizer):
        _found_once.cache_clear()
    return _found_once(tokenizer.tokenizer)


_found_once = lru_cache(maxsize=4)(ControlTokens)
