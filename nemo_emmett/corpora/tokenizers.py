"""Tokenizers for models that are trained from scratch: SentencePiece for a CTC encoder, Hugging Face ones for a T5 and
for a decoder-only language model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain, cycle, permutations
from pathlib import Path

from nemo_emmett.corpora.sentence_files import json_record
from nemo_emmett.errors import DataError
from nemo_emmett.prompts.instruction import translation_instruction
from nemo_emmett.prompts.language_codes import normalized


def manifest_texts(manifests: Iterable[str | Path]) -> Iterator[str]:
    """The ``text`` of every line of NeMo manifests.

    Raises:
        DataError: if a manifest does not exist, is not UTF-8, or a line of it is not a record with a text.
    """
    for manifest in manifests:
        for number, line in _lines(manifest):
            record = json_record(line, manifest, number)
            text = record.get("text") if isinstance(record, Mapping) else None
            if not isinstance(text, str):
                raise DataError(f"'{manifest}', line {number}: there is no 'text'; add it, or leave the line out.")
            yield text


def file_texts(paths: Iterable[str | Path]) -> Iterator[str]:
    """Every line of text files, stripped.

    Raises:
        DataError: if a file does not exist or is not UTF-8.
    """
    for path in paths:
        for _, line in _lines(path):
            yield line.strip()


def train_sentencepiece(texts: Iterable[str], folder: str | Path, vocab_size: int) -> Path:
    """Train a SentencePiece model in the layout that NeMo's ASR models take as ``tokenizer.dir``.

    Args:
        texts: sentences.
        folder: receives ``tokenizer.model`` and ``vocab.txt``.
        vocab_size: the largest number of pieces; a small text gives fewer.

    Returns:
        The folder.
    """
    import sentencepiece

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=vocab_size,
        hard_vocab_limit=False,
        character_coverage=1.0,
        num_threads=1,  # the result depends on the number of threads
        minloglevel=2,
    )
    model = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    (folder / "vocab.txt").write_text("".join(model.id_to_piece(i) + "\n" for i in range(model.vocab_size())))
    return folder


def train_t5_tokenizer(texts: Iterable[str], folder: str | Path, vocab_size: int, languages: Sequence[str]) -> Path:
    """Train a subword tokenizer with T5's special tokens and one tag per language (``<de>``).

    Args:
        texts: sentences.
        folder: receives the tokenizer in Hugging Face's layout.
        vocab_size: the largest number of tokens, including special ones.
        languages: language codes; the tag of each is one token.

    Returns:
        The folder.
    """
    tags = [f"<{normalized(lang)}>" for lang in languages]
    # T5's order: <pad> is 0 and starts the decoder, </s> is 1.
    special = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    return _train_bpe(texts, folder, vocab_size, special, tags)


def train_llama_tokenizer(texts: Iterable[str], folder: str | Path, vocab_size: int, languages: Sequence[str]) -> Path:
    """Train a subword tokenizer with Llama's special tokens, for the prompt format ``emmett_llama2``.

    The brackets of an instruction are one token each, and so are its words, since each text is counted with an
    instruction in front of it, as in a prompt.

    Args:
        texts: sentences.
        folder: receives the tokenizer in Hugging Face's layout.
        vocab_size: the largest number of tokens, including special ones.
        languages: language codes that instructions name.

    Returns:
        The folder.
    """
    instructions = cycle(translation_instruction(target, source) for source, target in permutations(languages, 2))
    prompts = chain.from_iterable(zip(instructions, texts))  # noqa: B905, the instructions have no end
    # Llama's order: <unk>, <s>, </s>.
    special = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    return _train_bpe(prompts, folder, vocab_size, special, ["[INST]", "[/INST]"])


def _train_bpe(
    texts: Iterable[str], folder: str | Path, vocab_size: int, special: Mapping[str, str], more_special: Sequence[str]
) -> Path:
    """Train a BPE with marks of word beginnings; the first ids are ``special``, in its order, then ``more_special``."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[*special.values(), *more_special], show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, additional_special_tokens=list(more_special), **special)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    fast.save_pretrained(folder)
    return folder


def _lines(path: str | Path) -> Iterator[tuple[int, str]]:
    """The lines of a file that are not empty, with their numbers from 1."""
    if not Path(path).is_file():
        raise DataError(f"'{path}' does not exist; `nemo-emmett prepare` writes a corpus, or correct the path.")
    with open(path, "rb") as lines:
        for number, content in enumerate(lines, start=1):
            try:
                line = content.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise DataError(
                    f"'{path}', line {number}: not UTF-8 ({error.reason}); convert it with iconv."
                ) from error
            if line.strip():
                yield number, line
