"""The prompt format of a family of backbones, and the tokens that end its answers."""

from __future__ import annotations

import re
from typing import Any

from nemo.collections.common.prompts import PromptFormatter
from nemo.collections.common.prompts.formatter import EOS_SLOT
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from nemo_emmett.config import nearest
from nemo_emmett.errors import ConfigError
from nemo_emmett.prompts.answers import SENTINEL, TwoStepT5
from nemo_emmett.prompts.chat import TranslationChat
from nemo_emmett.prompts.control_tokens import any_of, control_tokens_of, templates_of
from nemo_emmett.prompts.encoding import token_id
from nemo_emmett.prompts.instruction import translation_turns
from nemo_emmett.prompts.language_tokens import LanguageTokenPrompt
from nemo_emmett.prompts.languages import is_backbone_language, is_known_language, known_languages
from nemo_emmett.prompts.markup import UserTextPrompt
from nemo_emmett.prompts.seq2seq import Seq2SeqPrompt
from nemo_emmett.prompts.translation import register_prompt_formats

_OF_MODEL_TYPE = {
    **dict.fromkeys(("t5", "mt5", "umt5"), "emmett_t5"),
    "m2m_100": "emmett_m2m100",
    "mbart": "emmett_mbart",
    "llama": "emmett_llama2",
    "mistral": "emmett_mistral",
    "qwen2": "emmett_qwen",
    "qwen3": "emmett_qwen3",
    **dict.fromkeys(("gemma", "gemma2", "gemma3_text"), "emmett_gemma"),
}
"""transformers' name of an architecture -> our format."""

_OF_TOKEN = {
    "m2m_100": ("eng_Latn", "emmett_nllb"),
    "mbart": ("pl_PL", "emmett_mbart50"),  # one of the languages that mBART of 25 does not have
    "llama": ("<|start_header_id|>", "emmett_llama3"),
}
"""Where an architecture serves two families: a token that only one of them has, and that one's format."""


def default_prompt_format(tokenizer: Any, config: PreTrainedConfig) -> str:
    """The prompt format that a backbone was made for.

    Args:
        tokenizer: NeMo's tokenizer of the backbone.
        config: its transformers config.

    Raises:
        ConfigError: if no format is known for the family.

    Example:
        >>> default_prompt_format(tokenizer, AutoConfig.from_pretrained("facebook/nllb-200-distilled-600M"))
        'emmett_nllb'
    """
    known = _OF_MODEL_TYPE.get(config.model_type)
    if known is None:
        raise ConfigError(
            f"model.prompt_format is missing, and none is known for models of the kind '{config.model_type}'; "
            f"choose one of {', '.join(_our_formats())}."
        )
    token, its_format = _OF_TOKEN.get(config.model_type, (None, None))
    if token is not None and token_id(tokenizer, token) is not None:
        return its_format
    # UL2 is a T5 that differs from T5 1.1 in its activation (arXiv 2205.05131, section 4.1).
    if getattr(config, "feed_forward_proj", None) == "gated-silu":
        return "emmett_ul2"
    return known


def check_prompt_format(name: str, tokenizer: Any, config: PreTrainedConfig) -> None:
    """Refuse a prompt format that a backbone cannot be trained with.

    Args:
        name: of the recipe, under ``model.prompt_format``.
        tokenizer: NeMo's tokenizer of the backbone.
        config: its transformers config.

    Raises:
        ConfigError: if the format is unknown, is one of encoder-decoders and the backbone is decoder-only, or writes
            tokens that the tokenizer does not have.
    """
    prompt = prompt_formatter(name, tokenizer, "model.prompt_format")
    problem = None
    if isinstance(prompt, Seq2SeqPrompt) and not config.is_encoder_decoder:
        problem = "it is a format of encoder-decoders"
    elif isinstance(prompt, TwoStepT5) and token_id(tokenizer, SENTINEL) is None:
        problem = f"its tokenizer has no token '{SENTINEL}', which separates transcript and translation"
    elif isinstance(prompt, LanguageTokenPrompt) and not any(map(prompt.has_language, known_languages())):
        problem = "its tokenizer has none of the tokens of languages"
    elif isinstance(prompt, TranslationChat):
        try:
            prompt.encode_dialog(translation_turns(prompt, "a", "de"))
        except (ConfigError, TypeError):  # of our formats, or of NeMo's that they are made from
            problem = "its tokenizer has no BOS or EOS token"
        end = _end_of_turn(prompt)
        if end and token_id(tokenizer, end) is None:
            problem = f"its tokenizer has no token '{end}', which ends an answer"
    if problem:
        family = _OF_MODEL_TYPE.get(config.model_type)
        remedy = "leave the key out for the format of its family" if family else "choose another"
        raise ConfigError(f"model.prompt_format: '{name}' does not fit this language model: {problem}; {remedy}.")


def prompt_formatter(name: str, tokenizer: Any, place: str = "prompt_format") -> PromptFormatter:
    """A prompt format made with a tokenizer.

    Args:
        name: of the format.
        tokenizer: of NeMo.
        place: of the name in a recipe, for the message.

    Raises:
        ConfigError: if neither NeMo nor we have a format of that name.
    """
    register_prompt_formats()
    formats = PromptFormatter._REGISTERED_FORMATTERS
    if name not in formats:
        suggestion = nearest(name, formats)
        hint = f"did you mean '{suggestion}'?" if suggestion else f"choose one of {', '.join(_our_formats())}."
        raise ConfigError(f"{place}: '{name}' is not a prompt format; {hint}")
    return PromptFormatter.resolve(name)(tokenizer)


def forbidden_text(name: str | None, tokenizer: Any) -> re.Pattern | None:
    """The special tokens that no user's text may hold, where a prompt format or tokenizer cannot encode them as text.

    Our formats can, with the tokenizers of Hugging Face. NeMo's encode a whole turn at once, so that a text with
    ``<|im_end|>`` in it would end the turn.

    Args:
        name: of a prompt format; None: there is none.
        tokenizer: of NeMo.

    Returns:
        A pattern that matches any of them; None where any text will do.
    """
    register_prompt_formats()
    prompt = PromptFormatter._REGISTERED_FORMATTERS.get(name)
    if prompt is None or (issubclass(prompt, UserTextPrompt) and control_tokens_of(tokenizer, refresh=True)):
        return None
    inner = getattr(tokenizer, "tokenizer", None)
    if isinstance(inner, PreTrainedTokenizerBase):
        special = [token.content for token in inner.added_tokens_decoder.values() if token.special]
    else:
        special = list(getattr(tokenizer, "special_token_to_id", ()))
    return any_of(special)


def may_be_read(token: str, name: str, tokenizer: Any) -> bool:
    """Whether a token can occur in a model's input: any token of text, and the special tokens of its prompts.

    Some tokenizers have other special tokens, for which their models have no embedding: Gemma 3's for images.

    Args:
        token: of the tokenizer's vocabulary.
        name: of the model's prompt format.
        tokenizer: NeMo's around one of Hugging Face.
    """
    inner = tokenizer.tokenizer
    if token not in {added.content for added in inner.added_tokens_decoder.values() if added.special}:
        return True
    if token in (inner.bos_token, inner.eos_token, inner.pad_token, inner.unk_token):
        return True
    language = token.strip("<>_")  # <de>, __de__, deu_Latn, de_DE
    if is_backbone_language(language) or is_backbone_language(language.partition("_")[0]):
        return True
    if token == f"<{language}>" and is_known_language(language):  # T5's tag of any language; not <end_of_image>
        return True
    prompt = prompt_formatter(name, tokenizer)
    if token == SENTINEL and isinstance(prompt, TwoStepT5):
        return True
    return any(token in template for template in templates_of(type(prompt)))


def stop_ids(formatter: PromptFormatter, tokenizer: Any) -> list[int]:
    """The ids that end an answer: EOS, and the token with which the format ends the assistant's turn, if it has one.

    Llama 3's turns end in ``<|eot_id|>``, Qwen's in ``<|im_end|>``, Gemma's in ``<end_of_turn>``, whatever the
    tokenizer's EOS is. Whitespace after such a token is not generated.
    """
    closing = token_id(tokenizer, _end_of_turn(formatter))
    return list(dict.fromkeys(number for number in (tokenizer.eos_id, closing) if number is not None))


def _end_of_turn(formatter: PromptFormatter) -> str:
    after_message = formatter.get_template(formatter.OUTPUT_ROLE).rsplit("|message|", 1)[-1]
    return after_message.replace(EOS_SLOT, "").strip()


def _our_formats() -> list[str]:
    register_prompt_formats()
    return sorted(name for name in PromptFormatter._REGISTERED_FORMATTERS if name.startswith("emmett_"))
