"""``emmett_llama3``, ``emmett_qwen``, ...: instructions to translate in NeMo's chat formats.

A NeMo chat format defines how turns are written; the turns of our examples are defined here for all formats: the user's
is the instruction and the message (the text, or the audio locator), the assistant's the answer.

Two things differ from NeMo. What opens the assistant's turn (``<|im_start|>assistant``) belongs to the context in
training as it does in generation, so that the answer is the translation and nothing else, and a batch made for training
can be translated as it is. And every answer ends in a token, EOS where the format itself ends in none.
"""

from __future__ import annotations

import re
from functools import cached_property
from itertools import groupby
from typing import ClassVar

import torch
from lhotse.cut import Cut
from nemo.collections.common.data.lhotse.text_adapters import NeMoMultimodalConversation, SourceTargetTextExample
from nemo.collections.common.data.prompt_fn import registered_prompt_format_fn
from nemo.collections.common.prompts import PromptFormatter
from nemo.collections.common.prompts.formatter import BOS_SLOT, EOS_SLOT
from nemo.collections.common.prompts.nemotron_nano_v3 import NANO_EOT, NemotronNanoV3PromptFormatter
from nemo.collections.common.prompts.qwen import QWEN_EOT, Qwen3PromptFormatter

from nemo_emmett.errors import ConfigError, DataError
from nemo_emmett.prompts.answers import SUFFIX, DirectAnswer, TwoStepChat
from nemo_emmett.prompts.encoding import encode_texts
from nemo_emmett.prompts.instruction import translation_instruction
from nemo_emmett.prompts.markup import Markup, Prompt, UserTextPrompt, joined
from nemo_emmett.prompts.request import Request, message_of, request_of, target_language

CHAT_FORMATS = ("gemma", "llama2", "llama3", "mistral", "nemotron-h", "phi2_chat", "phi2_qa", "qwen")
"""NeMo's chat formats that are taken as they are, with ``emmett_`` in front of their names; those of models that reason
before they answer are written out below."""


class TranslationChat(DirectAnswer, UserTextPrompt):
    """Mixin that adds turns of our examples to a NeMo chat format, with the same instruction for text and speech."""

    def turns_of(self, request: Request) -> list[dict]:
        """NeMo's turns of a request; its custom fields ``context`` and ``system_prompt`` are used verbatim.

        Raises:
            DataError: if the target language is not known, or the format has no place for a system prompt.
        """
        instruction = request.custom.get("context")
        if not instruction:
            instruction = translation_instruction(target_language(request), request.source_lang)
        message = joined([str(instruction), request.message])
        turns = [{"role": "user", "slots": {"message": message}}]
        if system := request.custom.get("system_prompt"):
            system = Prompt([str(system)])
            if "system" in self.TEMPLATE:
                turns.insert(0, {"role": "system", "slots": {"message": system}})
            elif "system_and_user" in self.TEMPLATE:
                turns = [{"role": "system_and_user", "slots": {"system": system, "message": message}}]
            else:
                raise DataError(
                    f"example {request.example_id}: it has a system_prompt, for which prompt_format {self.NAME} has no "
                    "place; take it out of the source's tags, or put it in their `context`."
                )
        if request.answer is not None:
            turns.append({"role": self.OUTPUT_ROLE, "slots": {"message": self.answer_of(request)}})
        return turns

    def encode_turn(self, prompt_template: str, expected_slots: dict, slot_values: dict) -> list[int]:
        """NeMo's, with control tokens in the template only, not in the slots' values. The opening of the assistant's
        turn is tokenised apart from the answer, as it is in generation."""
        opening = self.INFERENCE_PREFIX or ""
        opens = bool(opening) and prompt_template.startswith(opening)
        template = prompt_template.removeprefix(opening) if opens else prompt_template
        # Split at its slots: literals alternate with names of slots.
        parts = re.split(rf"\|({'|'.join(expected_slots)})\|", template) if expected_slots else [template]
        filled = [
            self.as_prompt(slot_values[part]) if number % 2 else Markup(part) for number, part in enumerate(parts)
        ]
        return [*(self._opening_ids if opens else ()), *self._apply_tokenizer(Prompt(filled))]

    def encode_dialog(self, turns: list[dict], **options: object) -> dict[str, torch.Tensor]:
        """NeMo's, with the opening of the last assistant's turn in the context."""
        encoded = self._encode_turns(turns, **options)
        if "answer_ids" not in encoded:
            return encoded
        start = len(encoded["context_ids"]) + self._opening_tokens
        mask = encoded["mask"].clone()
        mask[start - self._opening_tokens : start] = False
        ids = encoded["input_ids"]
        return encoded | {"context_ids": ids[:start], "answer_ids": ids[start:], "mask": mask}

    @cached_property
    def _opening_ids(self) -> list[int]:
        """The ids of the opening of the assistant's turn, the same in every example."""
        return self._apply_tokenizer(self.INFERENCE_PREFIX)

    @cached_property
    def _opening_tokens(self) -> int:
        """The number of tokens that open an assistant's turn and are part of the context in generation."""
        user, assistant = ({"role": role, "slots": {"message": "a"}} for role in ("user", self.OUTPUT_ROLE))
        prompt = self._encode_turns([dict(user)])["context_ids"]
        answered = self._encode_turns([dict(user), assistant])
        return min(len(prompt), len(answered["input_ids"])) - len(answered["context_ids"])

    def _encode_turns(self, turns: list[dict], **options: object) -> dict[str, torch.Tensor]:
        """The NeMo format's."""
        return super().encode_dialog(turns, **options)

    def _apply_tokenizer(self, text: str, lang: str | None = None) -> list[int]:
        """NeMo's, which replaces the slots of BOS and EOS by ids, through :func:`encode_texts`. Text that is no
        :class:`Prompt` is a template's."""
        parts = list(text.parts) if isinstance(text, Prompt) else [Markup(text)]
        bos = eos = ()
        if isinstance(parts[0], Markup) and parts[0].startswith(BOS_SLOT):
            bos, parts[0] = (self._special("bos"),), Markup(parts[0].removeprefix(BOS_SLOT))
        if isinstance(parts[-1], Markup) and parts[-1].endswith(EOS_SLOT):
            eos, parts[-1] = (self._special("eos"),), Markup(parts[-1].removesuffix(EOS_SLOT))
        (ids,) = encode_texts(self.tokenizer, [Prompt(parts)])
        return [*bos, *ids, *eos]

    def _special(self, name: str) -> int:
        number = getattr(self.tokenizer, name)
        if number is None:
            raise ConfigError(
                f"prompt_format {self.NAME}: it needs the tokenizer's {name.upper()} token, which this tokenizer does "
                "not have; use the prompt format of the tokenizer's own family."
            )
        return number


@registered_prompt_format_fn(Cut, TranslationChat)
@registered_prompt_format_fn(SourceTargetTextExample, TranslationChat)
def chat_prompt(example: Cut | SourceTargetTextExample, prompt: TranslationChat) -> dict[str, torch.Tensor]:
    """Prompt for one example."""
    return prompt.encode_dialog(prompt.turns_of(request_of(example)))


@registered_prompt_format_fn(NeMoMultimodalConversation, TranslationChat)
def conversation_prompt(
    conversation: NeMoMultimodalConversation, prompt: TranslationChat, **options: object
) -> dict[str, torch.Tensor]:
    """NeMo's, since a conversation has its instructions; audio locators in it are those of its recordings only."""
    turns = [
        {"role": role, "slots": {"message": joined(map(message_of, of_role))}}
        for role, of_role in groupby(conversation.turns, key=lambda turn: turn.role)
    ]
    return prompt.encode_dialog(turns, **options)


class EmmettNemotronNanoV3PromptFormatter(TranslationChat, NemotronNanoV3PromptFormatter):
    """NeMo's ``nemotron-nano-v3`` without reasoning: every answer begins with an empty thought. NeMo's format finds
    thoughts in messages; here they are text like any other."""

    NAME = "emmett_nemotron-nano-v3"
    NO_THOUGHT = "<think></think>"
    TEMPLATE: ClassVar[dict] = NemotronNanoV3PromptFormatter.TEMPLATE | {
        "assistant": {
            "template": f"{NemotronNanoV3PromptFormatter.INFERENCE_PREFIX}{NO_THOUGHT}|message|{NANO_EOT}\n",
            "slots": NemotronNanoV3PromptFormatter.TEMPLATE["assistant"]["slots"],
        }
    }

    def _encode_turns(self, turns: list[dict], enable_thinking: bool = False) -> dict[str, torch.Tensor]:
        """By the template only, after a system's turn; in generation the model reasons if ``enable_thinking``."""
        if turns[0]["role"] != "system":
            turns = [{"role": "system", "slots": {"message": ""}}, *turns]
        encoded = PromptFormatter.encode_dialog(self, turns)
        if turns[-1]["role"] == self.OUTPUT_ROLE:
            last = len(encoded["context_ids"])
            return encoded | {"mask": torch.arange(len(encoded["mask"])) >= last}
        thought = "<think>\n" if enable_thinking else self.NO_THOUGHT
        ids = encoded["input_ids"][: -len(self._opening_ids)].tolist()
        ids = torch.tensor([*ids, *self._apply_tokenizer(f"{self.INFERENCE_PREFIX}{thought}")])
        return {"input_ids": ids, "context_ids": ids}


class EmmettQwen3PromptFormatter(TranslationChat, Qwen3PromptFormatter):
    """NeMo's ``qwen3`` without reasoning: every answer begins with an empty thought.

    NeMo writes ``/no_think`` into the user's turn, at a random end of it, so that an example may have another length
    when a run is resumed. Here nothing is written there.
    """

    NAME = "emmett_qwen3"
    INFERENCE_PREFIX = Qwen3PromptFormatter.INFERENCE_PREFIX + Qwen3PromptFormatter.NO_THINK_PREFIX
    TEMPLATE: ClassVar[dict] = Qwen3PromptFormatter.TEMPLATE | {
        "assistant": {
            "template": f"{INFERENCE_PREFIX}|message|{QWEN_EOT}\n",
            "slots": Qwen3PromptFormatter.TEMPLATE["assistant"]["slots"],
        }
    }

    def _encode_turns(self, turns: list[dict], **_: object) -> dict[str, torch.Tensor]:
        """By the template only, like other formats."""
        return PromptFormatter.encode_dialog(self, turns)


for _name in CHAT_FORMATS:
    _format = PromptFormatter.resolve(_name)
    _ends_in_message = _format.get_template(_format.OUTPUT_ROLE).endswith("|message|")
    _own = {"NAME": f"emmett_{_name}", "INSERT_EOS": _format.INSERT_EOS or _ends_in_message}
    type(f"Emmett{_format.__name__}", (TranslationChat, _format), _own)  # NeMo registers it by its NAME

for _name in (*CHAT_FORMATS, "nemotron-nano-v3", "qwen3"):
    _format = PromptFormatter.resolve(f"emmett_{_name}")
    type(f"{_format.__name__}TwoStep", (TwoStepChat, _format), {"NAME": f"{_format.NAME}{SUFFIX}"})
