"""BLEU in one configuration, shared by validation during training and by evaluation, so that both mean one number.

Case-sensitive sacreBLEU with the ``13a`` tokeniser and one reference per sentence (Post, 2018, "A Call for Clarity in
Reporting BLEU Scores").
"""

from __future__ import annotations

from collections.abc import Sequence

from sacrebleu.metrics import BLEU

from nemo_emmett.errors import DataError

TOKENIZER = "13a"
"""sacreBLEU's default tokeniser: that of WMT, for languages that put spaces between words."""


def corpus_bleu(hypotheses: Sequence[str], references: Sequence[str]) -> float:
    """The BLEU of a whole corpus, from 0 to 100, as ``sacrebleu`` computes it on the command line.

    Args:
        hypotheses: N translations.
        references: N references in the same order.

    Raises:
        DataError: if there is no sentence, or if there are not as many references as hypotheses.

    Example:
        >>> round(corpus_bleu(["the cat sat on the mat"], ["the cat sat on the mat"]), 1)
        100.0
    """
    check_parallel(hypotheses, references)
    return BLEU(tokenize=TOKENIZER).corpus_score(list(hypotheses), [list(references)]).score


def signature() -> str:
    """sacreBLEU's signature of :func:`corpus_bleu`: to be quoted wherever one of its scores stands."""
    return str(BLEU(tokenize=TOKENIZER, references=[[""]]).get_signature())


def check_parallel(hypotheses: Sequence[str], references: Sequence[str]) -> None:
    """Refuse what no corpus metric can score: nothing at all, or lists of unequal length.

    Raises:
        DataError: in either case.
    """
    if not hypotheses and not references:
        raise DataError("There is no translation to score: the test set gave no sentence; check its input_cfg.")
    if len(hypotheses) != len(references):
        raise DataError(
            f"{len(hypotheses)} translations cannot be scored against {len(references)} references: "
            "give one reference for each translation, in the same order."
        )
