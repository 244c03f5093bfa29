"""The metrics of an evaluation: sacreBLEU's by name, each with its signature; COMET is in ``comet``.

A score is what ``sacrebleu`` computes on the command line from the same two files, with the tokeniser that it
recommends for the target language.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from sacrebleu.tokenizers import tokenizer_spm

from nemo_emmett.config import nearest
from nemo_emmett.errors import ConfigError
from nemo_emmett.modules.metrics import SPM, TOKENIZER, sacrebleu_metric, tokenizer_of

METRICS = ("BLEU", "chrF++", "chrF", "TER", "spBLEU", "COMET")
"""What can be asked for, by the names that tables print."""

DEFAULT_METRICS = ("BLEU", "chrF++")


def check_metrics(names: Sequence[str], where: str = "metrics") -> tuple[str, ...]:
    """The metrics asked for, BLEU first, on which all tables and comparisons are based.

    Raises:
        ConfigError: if a name is unknown, or spBLEU's SentencePiece model is not at hand.
    """
    if isinstance(names, str) or not all(isinstance(name, str) for name in names):
        raise ConfigError(f"{where}: {names!r} is no list of metrics; name some of {', '.join(METRICS)}.")
    known = {name.lower(): name for name in METRICS}
    for name in names:
        if name.lower() not in known:
            meant = nearest(name, METRICS)
            hint = f"did you mean {meant}?" if meant else f"name some of {', '.join(METRICS)}."
            raise ConfigError(f"{where}: there is no metric {name!r}; {hint}")
    chosen = dict.fromkeys(["BLEU", *(known[name.lower()] for name in names)])
    # sacrebleu would fetch the model of spBLEU from the network, on every rank and after the translating.
    path = Path(tokenizer_spm.SACREBLEU_DIR, "models", Path(tokenizer_spm.SPM_MODELS[SPM]["url"]).name)
    if "spBLEU" in chosen and not path.is_file():
        raise ConfigError(
            f"{where}: spBLEU needs the SentencePiece model of FLORES-200 as '{path}', which is not there; run "
            f"`sacrebleu --tokenize {SPM}` once where there is a network, or leave spBLEU out."
        )
    return tuple(chosen)


def is_sacrebleus(name: str) -> bool:
    """Whether sacrebleu computes a metric."""
    return name != "COMET"


def error_rate(hypotheses: Sequence[str], references: Sequence[str], language: str | None) -> tuple[str, float]:
    """The word error rate of transcripts: edits over all words of the references, in percent. Upper and lower case and
    punctuation count, as in NeMo, whose function it is.

    Args:
        hypotheses: N transcripts.
        references: what was said.
        language: of both; Chinese and Japanese, which are written without spaces, are compared by characters.

    Returns:
        ``WER`` or ``CER``, and the rate.

    Example:
        >>> error_rate(["a red house"], ["a blue house"], "en")
        ('WER', 33.33333333333333)
    """
    from nemo.collections.asr.metrics.wer import word_error_rate  # slow to import, and rarely needed

    by_characters = re.split("[-_]", language or "")[0] in ("zh", "zho", "cmn", "yue", "ja", "jpn")
    rate = word_error_rate(list(hypotheses), list(references), use_cer=by_characters)
    return "CER" if by_characters else "WER", 100 * rate


def signatures(names: Iterable[str], target_langs: Iterable[str]) -> dict[str, str]:
    """sacreBLEU's signature of each of its metrics; ``BLEU (zh)`` is that of a language with its own tokeniser."""
    languages = sorted(set(target_langs))
    found: dict[str, str] = {}
    for name in filter(is_sacrebleus, names):
        for language in languages:
            has_own = name == "BLEU" and tokenizer_of(language) != TOKENIZER
            title = f"{name} ({language})" if has_own else name
            if title not in found:
                metric = sacrebleu_metric(name, language)
                metric.num_refs = 1  # as after scoring
                found[title] = str(metric.get_signature())
    return found
