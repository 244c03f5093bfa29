"""What Prometheus reads of a server, in a registry of its own."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
_SIZES = (1, 2, 4, 8, 16, 32, 64, 128)


class Metrics:
    """The counters of a server."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        self.requests = Counter(
            "nemo_emmett_requests", "Requests by address and HTTP status.", ["path", "status"], registry=registry
        )
        self.seconds = Histogram(
            "nemo_emmett_request_seconds",
            "Seconds from a request to its response.",
            ["path"],
            buckets=_SECONDS,
            registry=registry,
        )
        self.in_flight = Gauge("nemo_emmett_requests_in_flight", "Requests that are answered now.", registry=registry)
        self.batch_size = Histogram(
            "nemo_emmett_batch_inputs", "Inputs of a batch.", ["modality"], buckets=_SIZES, registry=registry
        )
        self.batch_seconds = Histogram(
            "nemo_emmett_batch_seconds",
            "Seconds that the model takes for a batch.",
            ["modality"],
            buckets=_SECONDS,
            registry=registry,
        )
        self.audio_seconds = Counter(
            "nemo_emmett_audio_seconds", "Seconds of translated recordings.", registry=registry
        )
        self.characters = Counter("nemo_emmett_text_characters", "Characters of translated texts.", registry=registry)

    def batch(self, modality: str, inputs: int, seconds: float) -> None:
        """Count a batch."""
        self.batch_size.labels(modality).observe(inputs)
        self.batch_seconds.labels(modality).observe(seconds)

    def watch_queue(self, num_waiting: Callable[[], int]) -> None:
        """Report the length of a queue."""
        gauge = Gauge("nemo_emmett_inputs_waiting", "Inputs that are not in a batch yet.", registry=self.registry)
        gauge.set_function(num_waiting)

    def text(self) -> bytes:
        """In Prometheus' text format."""
        return generate_latest(self.registry)
