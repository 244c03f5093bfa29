"""Training steps without side effects: whatever they change is restored, bit for bit.

What a step may change is found by following attributes from the model, its wrapper, the optimizers and the precision
plugin: through modules, optimizers and plain containers to tensors and random generators. Their contents are saved
before and restored after; objects stay the same objects. Values are saved on the host, so that the device's memory is
free for the steps. Objects of other classes are not restored, only the attributes that refer to them.
"""

from __future__ import annotations

import random
import sys
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.profilers import PassThroughProfiler
from torch import Tensor
from torch.nn import Module, Parameter
from torch.optim import Optimizer

from nemo_emmett.modules.random_state import random_state, restore_random_state
from nemo_emmett.modules.tensors import local_part

_FOLLOWED = (Module, Optimizer, torch.amp.GradScaler)
"""Classes whose attributes are saved; a model may refer to anything else, open files included."""


@contextmanager
def without_side_effects(trainer: Trainer, module: LightningModule) -> Iterator[None]:
    """Restore everything that training steps inside change, also after an error.

    These are parameters that are trained, buffers (also those that grow with the input), gradients, training modes and
    other attributes of modules, states of optimizers, of the gradient scaler and of metrics, and random states. Inside,
    parameters have no gradients at first, the module logs nothing, no step is one that a logger reports (NeMo's models
    decode the batch and compute metrics in those), and no callback, logger or profiler is called.

    Args:
        trainer: during ``fit``.
        module: that it trains.
    """
    before = Snapshot([trainer.strategy.model, module, *trainer.optimizers, trainer.precision_plugin])
    gradients = [(parameter, parameter.grad) for parameter in module.parameters()]
    random_states = random_state()
    # Our models may keep the gradients of speech and text apart in some steps, which takes more memory.
    conflicts = [part.gradient_conflict for part in module.modules() if getattr(part, "gradient_conflict", None)]
    try:
        for conflict in conflicts:
            conflict.always = True
        for parameter, _ in gradients:
            parameter.grad = None
        for part in module.modules():
            if isinstance(part, LightningModule):  # restored with its other attributes
                part.log = part.log_dict = lambda *_, **__: None
            if hasattr(part, "all_objectives_active"):  # those of our models that begin or end later, too
                part.all_objectives_active = True
            if hasattr(part, "is_measured"):  # speech encoders with a cache
                part.is_measured = True
        with replaced(
            trainer,
            callbacks=[],
            loggers=[DummyLogger() for _ in trainer.loggers],  # as many as before: a model may index them
            profiler=PassThroughProfiler(),
            log_every_n_steps=sys.maxsize,  # to NeMo's models an interval of batch indices, or of the global step
        ):
            yield
    finally:
        for conflict in conflicts:
            conflict.always = False
            conflict.clear()
        before.restore()
        for parameter, gradient in gradients:
            parameter.grad = gradient
        restore_random_state(random_states)


@contextmanager
def replaced(owner: Any, **attributes: Any) -> Iterator[None]:
    """Inside, an object has other attributes."""
    before = {name: getattr(owner, name) for name in attributes}
    try:
        for name, value in attributes.items():
            setattr(owner, name, value)
        yield
    finally:
        for name, value in before.items():
            setattr(owner, name, value)


class Snapshot:
    """The state of some objects: attributes, contents of containers, values of tensors, random generators.

    Args:
        roots: objects whose attributes are followed.
    """

    def __init__(self, roots: Iterable[Any]) -> None:
        self._containers: list[tuple[Any, list]] = []
        self._tensors: list[tuple[Tensor, Tensor]] = []
        self._generators: list[tuple[Any, Any]] = []
        seen: set[int] = set()
        waiting: list[Any] = [vars(root) for root in roots]
        while waiting:
            item = waiting.pop()
            if id(item) not in seen:
                seen.add(id(item))
                waiting += self._save(item)

    def restore(self) -> None:
        """Set all objects to their saved state."""
        for container, contents in self._containers:
            _refill(container, contents)
        with torch.no_grad():
            for tensor, value in self._tensors:
                local_part(tensor).copy_(value)
        for generator, state in self._generators:
            if isinstance(generator, random.Random):
                generator.setstate(state)
            elif isinstance(generator, np.random.Generator):
                generator.bit_generator.state = state
            else:
                generator.set_state(state)

    def _save(self, item: Any) -> Iterable[Any]:
        """Save the state of an object; returns the objects that it refers to."""
        if isinstance(item, Tensor):
            if _can_change(item):
                self._tensors.append((item, local_part(item).detach().to("cpu", copy=True)))
        elif isinstance(item, (dict, list, set, deque)):
            contents = _contents(item)
            self._containers.append((item, contents))
            return contents
        elif isinstance(item, (tuple, frozenset)):
            return item
        elif isinstance(item, _FOLLOWED):
            return [vars(item)]
        elif (state := _state_of(item)) is not None:
            self._generators.append((item, state))
        return ()


def _contents(container: Any) -> list:
    """The items of a container; of a dict, keys and values alternately."""
    if isinstance(container, dict):
        return [part for item in container.items() for part in item]
    return list(container)


def _refill(container: Any, contents: list) -> None:
    now = _contents(container)
    if len(now) == len(contents) and all(a is b for a, b in zip(now, contents, strict=True)):
        return  # some containers raise on changes
    container.clear()
    if isinstance(container, dict):
        container.update(zip(contents[::2], contents[1::2], strict=True))
    elif isinstance(container, set):
        container.update(contents)
    else:
        container.extend(contents)


def _can_change(tensor: Tensor) -> bool:
    """Whether a step may write to a tensor; expanded tensors and those of inference mode cannot be written to."""
    frozen = isinstance(tensor, Parameter) and not tensor.requires_grad
    if frozen or tensor.is_meta or tensor.is_inference():
        return False
    strides = tensor.stride() if tensor.layout is torch.strided else tensor.shape
    return not any(size > 1 and stride == 0 for size, stride in zip(tensor.shape, strides, strict=True))


def _state_of(generator: Any) -> Any:
    """The state of a random generator; None for anything else."""
    if isinstance(generator, random.Random):
        return generator.getstate()
    if isinstance(generator, np.random.Generator):
        return generator.bit_generator.state
    return generator.get_state() if isinstance(generator, (np.random.RandomState, torch.Generator)) else None
