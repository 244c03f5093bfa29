"""Any model with NeMo's ``oomptimizer_schema``."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from nemo_emmett.errors import ConfigError
from nemo_emmett.oomptimizer.adapters.base import Adapter, Extent
from nemo_emmett.oomptimizer.adapters.fakes import CTCLossShapes, fake_values
from nemo_emmett.oomptimizer.adapters.schema import Schema
from nemo_emmett.oomptimizer.buckets import Shape


class SchemaAdapter(Adapter):
    """A model with nothing but a schema: its batches can be made, but not split, since its loss is not known.

    Raises:
        ConfigError: if the schema is invalid.
    """

    can_split = False

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        self.schema = self._schema()

    def _schema(self) -> Schema:
        return Schema(self.model)

    def synthetic_batch(self, shape: Shape, size: int, device: torch.device) -> Any:
        """See :meth:`Adapter.synthetic_batch`."""
        return self.schema.batch(shape, size, device)

    def join(self, batches: Sequence[Any]) -> Any:
        """See :meth:`Adapter.join`."""
        return self.schema.join(batches)

    def extents(self, batch: Any) -> list[Extent]:
        """See :meth:`Adapter.extents`."""
        return [self.schema.extent(batch)]

    def split_batch(self, batch: Any, count: int) -> list[Any]:
        """Raises: ``can_split`` is false."""
        raise self._cannot_split()

    def loss_weight(self, microbatch: Any, whole: Any) -> float:
        """Raises: ``can_split`` is false."""
        raise self._cannot_split()

    def _cannot_split(self) -> ConfigError:
        return ConfigError(
            f"OOMptimizer: how the loss of {type(self.model).__name__} weighs its examples is not known, so a step of "
            "it cannot be redone in microbatches; register an adapter "
            "(nemo_emmett.oomptimizer.adapters.register_adapter)."
        )

    @contextmanager
    def planning(self) -> Iterator[None]:
        """See :meth:`Adapter.planning`."""
        with fake_values(), CTCLossShapes():
            yield
