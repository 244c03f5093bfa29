"""Which voice says what: drawn for each recording from the seed, whatever the order of the work."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from nemo_emmett.config import nearest
from nemo_emmett.corpora.phrasebook.extras import require
from nemo_emmett.errors import ConfigError

_ACCENTS = {"en": ("en-us", "en"), "de": ("de",), "es": ("es", "es-419"), "fr": ("fr",)}
"""eSpeak NG's voice files; its "en" is British and "es" European."""


@dataclass(frozen=True)
class Voice:
    """How a recording is spoken."""

    name: str  # accent+variant, as eSpeak NG writes it: "en-us+f2"
    speed: int  # words a minute
    pitch: int  # 0 to 99


class VoiceRange(Protocol):
    """What voices are drawn from; configurations of spoken corpora have these fields."""

    accents: bool
    variants: Sequence[str]
    speed: Sequence[int]
    pitch: Sequence[int]
    seed: int


def draw_voice(item: object, language: str, rendition: int, config: VoiceRange) -> Voice:
    """The voice of one recording: a function of the seed and the recording's identity alone.

    Args:
        item: what is said; its ``str`` is its identity.
        language: that it is said in.
        rendition: a number for each recording of the item in that language.
        config: what to draw from.
    """
    digest = hashlib.sha256(f"{config.seed}/{item}/{language}/{rendition}".encode()).digest()
    accent, variant, speed, pitch = (int.from_bytes(digest[i : i + 8], "big") for i in range(0, 32, 8))
    accents = _ACCENTS[language] if config.accents else _ACCENTS[language][:1]
    return Voice(
        name=f"{accents[accent % len(accents)]}+{config.variants[variant % len(config.variants)]}",
        speed=_within(config.speed, speed),
        pitch=_within(config.pitch, pitch),
    )


def check_variants(kind: str, variants: Iterable[str]) -> None:
    """Refuse voice variants that eSpeak NG does not have: it would fall back on another in silence.

    Args:
        kind: of the corpus, for the message: "phrasebook".
        variants: their names.

    Raises:
        ConfigError: naming the variant and the nearest known one.
    """
    folder = Path(require("espeakng_loader").get_data_path()) / "voices" / "!v"
    known = sorted(path.name for path in folder.iterdir())
    for variant in variants:
        if variant not in known:
            suggestion = nearest(variant, known)
            hint = f"did you mean '{suggestion}'?" if suggestion else "f1 to f5 and m1 to m8 are among those it has"
            raise ConfigError(f"{kind}.variants: eSpeak NG has no voice variant '{variant}'; {hint}")


def _within(interval: tuple[int, int], number: int) -> int:
    low, high = interval
    return low + number % (high - low + 1)
