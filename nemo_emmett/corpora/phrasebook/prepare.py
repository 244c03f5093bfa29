"""Prepare a phrasebook: its content from a configuration, which ``speaking`` writes and speaks."""

from __future__ import annotations

from pathlib import Path

from nemo_emmett.corpora.phrasebook.config import PhrasebookConfig
from nemo_emmett.corpora.phrasebook.espeak import check_variants, draw_voice
from nemo_emmett.corpora.phrasebook.items import candidate_items, share_out, split_phrases
from nemo_emmett.corpora.phrasebook.speaking import Contents, Spoken, SpokenSummary, prepare_spoken
from nemo_emmett.corpora.phrasebook.verbalization import write_item


def prepare_phrasebook(
    out: Path | str, config: PhrasebookConfig | None = None, *, num_jobs: int | None = None, show_progress: bool = True
) -> SpokenSummary:
    """Write and speak the phrasebook into ``out``. The same configuration gives the same bytes.

    A finished phrasebook of the same configuration is left as it is; an unfinished one is completed.

    Args:
        out: the folder to write to; created if it does not exist.
        config: its content.
        num_jobs: processes to speak with; by default one for each core. Does not change the result.
        show_progress: show a bar while the recordings are made.

    Raises:
        ConfigError: if the configuration asks for more items than there are or for an unknown voice, or ``num_jobs``
            is below 1.
        DataError: if ``out`` holds anything else.
        EmmettError: if a library is missing or an utterance cannot be spoken.
    """
    config = config or PhrasebookConfig()
    return prepare_spoken(
        Path(out),
        "phrasebook",
        "phrasebook",
        config.as_dict(),
        lambda: _contents(config),
        writers=("num2words", "babel"),
        num_jobs=num_jobs,
        show_progress=show_progress,
    )


def _contents(config: PhrasebookConfig) -> Contents:
    check_variants("phrasebook", config.variants)
    # Held-out splits first, so that they do not depend on the size of the training split.
    sizes = {"test": config.test_items, "dev": config.dev_items, "train": config.train_items}
    splits = split_phrases(
        {item_type: list(candidate_items(item_type, config)) for item_type in config.types},
        {split: share_out(size, config.types) for split, size in sizes.items()},
        lambda item: {language: write_item(item, language) for language in config.languages},
        config.seed,
    )
    recordings = []
    for split, phrases in splits.items():
        spoken, renditions = (config.spoken_train_items, config.renditions) if split == "train" else (None, 1)
        for language in config.languages:
            for phrase in phrases[:spoken]:
                item = str(phrase.item)
                file_name = item.lower().replace(":", "-").replace(".", "-")  # price-eur-12-50
                for rendition in range(renditions):
                    voice = draw_voice(item, language, rendition, config)
                    name = f"{file_name}-{rendition}"
                    recordings.append(Spoken(split, language, name, phrase.texts, voice, {"item": item}))
    texts = {split: [phrase.texts for phrase in phrases] for split, phrases in splits.items()}
    return Contents(config.languages, texts, config.languages, recordings)
