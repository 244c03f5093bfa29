"""The shortest prompts and answers of a prompt format, which determine the speech that a bin in tokens allows.

They are made from examples of one word, by the functions that prompt the training's examples.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cache, cached_property
from itertools import chain, islice
from typing import Any

from lhotse import MonoCut, SupervisionSegment
from nemo.collections.common.data.lhotse.text_adapters import SourceTargetTextExample, TextExample
from nemo.collections.common.data.prompt_fn import apply_prompt_format_fn
from nemo.collections.common.prompts import PromptFormatter
from torch._subclasses.fake_tensor import unset_fake_temporarily

from nemo_emmett.errors import ConfigError, DataError
from nemo_emmett.oomptimizer.buckets import Contents, Task
from nemo_emmett.prompts.instruction import translation_instruction
from nemo_emmett.prompts.languages import known_languages, language_name

_WORDS = ("a", "I", "1", ".")
"""Texts of the fewest tokens: one, with most tokenizers."""

_LANGUAGES_TRIED = 8
"""Languages that are tried if a recipe names none, those with the shortest names: each prompt takes a millisecond."""


@dataclass(frozen=True)
class PromptTokens:
    """Tokens of an example without its speech.

    Args:
        context: before the answer; a recording's locator is one of them.
        answer: of the answer, with what the prompt format writes around it.
    """

    context: int
    answer: int

    @property
    def total(self) -> int:
        """Of the whole example."""
        return self.context + self.answer


class ShortestPrompts:
    """The shortest examples that a prompt format makes with a group's recipe; each is computed once.

    Args:
        formatter: the training's prompt format.
        locator: the audio locator tag.
    """

    def __init__(self, formatter: PromptFormatter, locator: str) -> None:
        self._formatter, self._locator = formatter, locator
        # While a training is planned, FakeTensorMode would make each of the prompts' tensors a fake one.
        self.of_cuts, self.of_conversations, self.of_texts = (
            cache(unset_fake_temporarily()(of)) for of in (self._of_cuts, self._of_conversations, self._of_texts)
        )

    def _of_cuts(self, contents: Contents) -> PromptTokens:
        """Of recordings with a text, to which the loader adds the instruction."""
        return self._shortest(contents, self._cut) or self._of_conversations(contents)

    def _of_texts(self, contents: Contents) -> PromptTokens:
        """Of pairs of texts."""
        return self._shortest(contents, self._pair) or PromptTokens(1, 1)

    def _of_conversations(self, contents: Contents) -> PromptTokens:
        """Of conversations: those with their own prompt may be a recording and its answer."""
        if contents.conversations:
            return self._dialog(self._locator, None)
        asked = (self._asked(task) for tasks in self._possible(contents) for task in islice(tasks, _LANGUAGES_TRIED))
        return min(asked, key=lambda prompt: prompt.total)

    def _shortest(self, contents: Contents, make: Callable[[Task, str], Any]) -> PromptTokens | None:
        found = (islice(self._made(tasks, make), _LANGUAGES_TRIED) for tasks in self._possible(contents))
        return min(chain.from_iterable(found), key=lambda prompt: prompt.total, default=None)

    def _made(self, tasks: Iterable[Task], make: Callable[[Task, str], Any]) -> Iterator[PromptTokens]:
        """Tokens of examples of one word in each of the tasks that the format supports."""
        words: Sequence[str] = _WORDS
        for task in tasks:
            # Not every format supports every language and every kind of example.
            with suppress(ConfigError, DataError, ValueError):
                of_words = {
                    word: self._tokens(apply_prompt_format_fn(make(task, word), self._formatter)) for word in words
                }
                words = [min(of_words, key=lambda word: of_words[word].total)]  # the same in every language
                yield of_words[words[0]]

    def _possible(self, contents: Contents) -> Iterator[list[Task]]:
        """For each task of a recipe, the tasks with the shortest instructions that its records may complete it to.

        An instruction is shortest for transcription, or else without a source language.
        """
        for task in contents.tasks:
            source = task.source_lang
            if task.context is not None:
                yield [task]
                continue
            targets = [task.target_lang] if task.target_lang else [*filter(None, [source]), *self._short_languages]
            if source is None:
                yield [replace(task, source_lang=target, target_lang=target) for target in targets]
            yield [replace(task, target_lang=target) for target in targets]

    @cached_property
    def _short_languages(self) -> list[str]:
        """All languages, first those whose English names take the fewest tokens."""
        encode = self._formatter.tokenizer.text_to_ids
        lengths = {code: len(encode(f"to {language_name(code)}:")) for code in sorted(known_languages())}
        return sorted(lengths, key=lengths.__getitem__)

    def _cut(self, task: Task, word: str) -> MonoCut:
        said = SupervisionSegment("0", "0", 0.0, 1.0, text=word, language=task.target_lang)
        custom = {**_custom(task), "audio_locator_tag": self._locator}
        return MonoCut("0", 0.0, 1.0, 0, supervisions=[said], custom=custom)

    def _pair(self, task: Task, word: str) -> SourceTargetTextExample:
        source, target = TextExample(word, task.source_lang), TextExample(word, task.target_lang)
        return SourceTargetTextExample(source, target, custom=_custom(task))

    def _asked(self, task: Task) -> PromptTokens:
        instruction = task.context or translation_instruction(task.target_lang, task.source_lang)
        return self._dialog(f"{instruction} {self._locator}", task.system_prompt)

    def _dialog(self, message: str, system_prompt: str | None) -> PromptTokens:
        system = [{"role": "system", "slots": {"message": system_prompt}}] if system_prompt else []
        user = {"role": "user", "slots": {"message": message}}
        dialogs = [[*system, user, {"role": "assistant", "slots": {"message": word}}] for word in _WORDS]
        return min(
            (self._tokens(self._formatter.encode_dialog(turns)) for turns in dialogs), key=lambda prompt: prompt.total
        )

    @staticmethod
    def _tokens(encoded: dict) -> PromptTokens:
        return PromptTokens(len(encoded["context_ids"]), len(encoded["answer_ids"]))


def _custom(task: Task) -> dict[str, str]:
    return {name: value for name, value in vars(task).items() if value is not None}
