"""A prompt format as a Hugging Face chat template, for tools that know no prompt formats of NeMo, such as vLLM.

A message's content is a string, in which the audio locator marks a recording, or a list of parts of the types ``text``
and ``audio`` (``input_audio``, ``audio_url``), which are joined by a space as ours are.

The ids of a template's text are those that the format encodes, with two exceptions. Control tokens that a user spells
are control tokens there, while our formats encode them as text. And in a conversation of several turns an earlier
answer may begin with other tokens for the same text, since a format encodes it apart from what is in front of it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from itertools import product
from typing import Any

from jinja2 import Environment
from nemo.collections.common.prompts import PromptFormatter
from nemo.collections.common.prompts.formatter import BOS_SLOT, EOS_SLOT
from nemo.collections.common.prompts.nemotron_nano_v3 import NemotronNanoV3PromptFormatter

from nemo_emmett.errors import ConfigError
from nemo_emmett.prompts.control_tokens import control_tokens_of
from nemo_emmett.prompts.instruction import translation_turns

_TEMPLATE = """\
[% if control_tokens %]
{#- Control tokens: [[ control_tokens | join(" ") ]] -#}
[% endif %]
{%- set turns = {
[% for role, (before, after) in turns.items() %]
    [[ role | literal ]]: [ [[- before | literal ]], [[ after | literal -]] ],
[% endfor %]
} -%}
{{- [[ beginning | literal ]] -}}
[% if empty_system is not none %]
{%- if messages[0].role != "system" -%}{{- [[ empty_system | literal ]] -}}{%- endif -%}
[% endif %]
{%- for message in messages -%}
    {%- if message.role not in turns -%}
        {{- raise_exception("role: '" ~ message.role ~ "' is unknown; use [[ turns | sort | join(", ") ]].") -}}
    {%- endif -%}
[% if system_is_in_user %]
    {%- set is_begun = message.role == "user" and loop.previtem is defined and loop.previtem.role == "system" -%}
    {%- if not is_begun -%}{{- turns[message.role][0] -}}{%- endif -%}
[% else %]
    {{- turns[message.role][0] -}}
[% endif %]
    {%- if message.content is string -%}
        {{- message.content -}}
    {%- else -%}
        {%- for part in message.content -%}
            {%- if not loop.first -%}{{- " " -}}{%- endif -%}
            {%- if part.type == "text" -%}{{- part.text -}}
            {%- elif part.type in ["audio", "input_audio", "audio_url"] -%}{{- [[ locator | literal ]] -}}
            {%- else -%}{{- raise_exception("type: '" ~ part.type ~ "' is unknown; use text or audio.") -}}{%- endif -%}
        {%- endfor -%}
    {%- endif -%}
    {{- turns[message.role][1] -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- [[ opening | literal ]] -}}{%- endif -%}
"""


_DELIMITERS = {
    "block": {"start": "[%", "end": "%]"},
    "variable": {"start": "[[", "end": "]]"},
    "comment": {"start": "[#", "end": "#]"},
}
"""Of the text above; those of Jinja are of the template that it makes."""

Conversation = tuple[list[dict[str, Any]], list[int]]
"""Messages in Hugging Face's form, and their ids by a prompt format."""


def is_chat(formatter: PromptFormatter) -> bool:
    """Whether a prompt format is made of messages alone, as those of encoder-decoders are not."""
    slots = {role: set(formatter.get_slots(role)) for role in formatter.TEMPLATE}
    others = set().union(*slots.values()) - {"message", "system"}
    return not others and "message" in slots.get("user", ()) and "message" in slots[formatter.OUTPUT_ROLE]


def chat_template(formatter: PromptFormatter, locator: str) -> str | None:
    """The chat template of a prompt format (:func:`is_chat`), by which its tokenizer gives the ids of the format.

    Args:
        formatter: made with the tokenizer.
        locator: the audio locator.

    Returns:
        Jinja, the content of ``chat_template.jinja``; None where no text of a turn has the ids that the format gives,
        or the tokenizer does not fit the format.
    """
    try:
        requests, talk = list(_requests(formatter, locator)), _talk(formatter, locator)
    except (ConfigError, TypeError):  # the tokenizer lacks BOS or EOS; of our formats, or of NeMo's
        return None
    found = None
    # Tokenizers of SentencePiece put a space in front of all that they encode, but not after a special token.
    for spaces in product(("", " "), repeat=2):
        template = _render(formatter, locator, *spaces)
        if all(_ids_by_template(formatter, template, messages) == ids for messages, ids in requests):
            if _ids_by_template(formatter, template, talk[0]) == talk[1]:
                return template
            found = found or template
    return found


def _render(formatter: PromptFormatter, locator: str, after_bos: str, before_answer: str) -> str:
    tokenizer, output = formatter.tokenizer.tokenizer, formatter.OUTPUT_ROLE
    templates = {
        role: turn["template"]
        .replace(BOS_SLOT, f"{tokenizer.bos_token}{after_bos}")
        .replace(EOS_SLOT, str(tokenizer.eos_token))
        for role, turn in formatter.TEMPLATE.items()
    }
    beginning = f"{tokenizer.bos_token}{after_bos}" if formatter.INSERT_BOS else ""
    if "preamble" in templates:
        beginning += templates.pop("preamble") + after_bos
    turns = {role: text.split("|message|") for role, text in templates.items() if role != "system_and_user"}
    if turns[output][0] == "":
        turns[output][0] = before_answer
    if "system_and_user" in templates:
        before, between = templates["system_and_user"].split("|system|")
        turns["system"] = [before, between.partition("|message|")[0]]
    opening, empty_system = formatter.INFERENCE_PREFIX or "", None
    if isinstance(formatter, NemotronNanoV3PromptFormatter):  # has no template for these
        opening, empty_system = opening + getattr(formatter, "NO_THOUGHT", "<think>\n"), "".join(turns["system"])
    delimiters = {f"{kind}_{end}_string": text for kind, ends in _DELIMITERS.items() for end, text in ends.items()}
    environment = Environment(trim_blocks=True, autoescape=False, **delimiters)
    environment.filters["literal"] = lambda text: json.dumps(text, ensure_ascii=False)
    return environment.from_string(_TEMPLATE).render(
        control_tokens=_named_control_tokens(formatter),
        turns=turns,
        beginning=beginning,
        empty_system=empty_system,
        system_is_in_user="system_and_user" in templates,
        locator=locator,
        opening=opening,
    )


def _named_control_tokens(formatter: PromptFormatter) -> list[str]:
    """Tokens that are control tokens because the language model's own template, which is replaced, writes them."""
    tokenizer, control = formatter.tokenizer.tokenizer, control_tokens_of(formatter.tokenizer, refresh=True)
    special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    own = str(tokenizer.chat_template or "")
    named = {token for token in (control.ids if control else ()) if token in own and token not in special}
    return sorted(token for token in named if "#}" not in token)  # which would end the comment


def _requests(formatter: PromptFormatter, locator: str) -> Iterator[Conversation]:
    """Text and speech to translate, and plain chat."""
    for message in ("one red house", "Ärger, 3 ½ °C!\n\nx", locator):
        yield _conversation(formatter, translation_turns(formatter, message, "de", "en"))
    for message in ("What is this?", f"{locator} What is this?"):
        yield _conversation(formatter, [{"role": "user", "slots": {"message": message}}])


def _talk(formatter: PromptFormatter, locator: str) -> Conversation:
    talk = [("user", f"What is this? {locator}"), (formatter.OUTPUT_ROLE, "It is a red house."), ("user", "Is it?")]
    return _conversation(formatter, [{"role": role, "slots": {"message": text}} for role, text in talk])


def _conversation(formatter: PromptFormatter, turns: Sequence[Mapping]) -> Conversation:
    messages = [{"role": turn["role"], "content": str(turn["slots"]["message"])} for turn in turns]
    return messages, formatter.encode_dialog([dict(turn) for turn in turns])["context_ids"].tolist()


def _ids_by_template(formatter: PromptFormatter, template: str, messages: list[dict[str, Any]]) -> list[int]:
    tokenizer = formatter.tokenizer.tokenizer
    text = tokenizer.apply_chat_template(messages, chat_template=template, add_generation_prompt=True, tokenize=False)
    return tokenizer(text, add_special_tokens=False)["input_ids"]
