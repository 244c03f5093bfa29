"""What a request may ask of the server, and how many may at once. Cheap to import, for the command's defaults."""

from __future__ import annotations

from dataclasses import dataclass

from nemo_emmett.models.inputs import BATCH_TOKENS


@dataclass(frozen=True)
class Limits:
    """The limits of a server; every one is an option of ``nemo-emmett serve``."""

    upload_bytes: int = 25 * 2**20  # largest body of a request, in bytes; OpenAI's limit
    audio_seconds: float = 600.0  # longest recording, in seconds
    chunk_seconds: float | None = None  # longer recordings are translated in chunks of this length; None: the model's
    text_characters: int = 5000  # longest text
    texts: int = 128  # most texts of a request
    requests: int = 64  # most requests in flight
    timeout: float = 120.0  # longest time that a request may take, in seconds
    batch_wait_ms: float = 5.0  # how long the first request of a batch waits for others, in milliseconds
    batch_tokens: int = BATCH_TOKENS  # most positions of the language model's input in a batch
