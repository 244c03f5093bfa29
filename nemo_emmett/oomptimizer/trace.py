"""Steps that leave no trace: whatever a training step changes is put back as it was, bit for bit.

What a step may change is found by following attributes from the model, its wrapper, the optimizers and the precision
plugin: through modules, optimizers and plain containers to tensors and random generators. Their contents are noted
before and put back after; objects stay the same objects. Values are kept on the host, so that the device has its
memory for the steps. Objects of other classes are left as they are: only the attribute that holds them is put back.
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
"""Classes whose attributes are noted; beyond them a model may hold anything, open files included."""


@contextmanager
def no_trace(trainer: Trainer, module: LightningModule) -> Iterator[None]:
    """Put everything back, at the end or after an error, that training steps inside change.

    These are parameters that are trained, buffers (also those that grow with the input), gradients, training modes and
    other attributes of modules, states of optimizers, of the gradient scaler and of metrics, and random states. Inside,
    parameters have no gradients at first, the module logs nothing, no step is one that a logger reports (NeMo's models
    decode the batch and compute metrics in those), and no callback, logger or profiler is called.

    Args:
        trainer: in the midst of ``fit``.
        module: that it trains.
    """
    before = Snapshot([trainer.strategy.model, module, *trainer.optimizers, trainer.precision_plugin])
    gradients = [(parameter, parameter.grad) for parameter in module.parameters()]
    random_states = random_state()
    try:
        for parameter, _ in gradients:
            parameter.grad = None
        with _unheard(trainer, module):
            yield
    finally:
        before.put_back()
        for parameter, gradient in gradients:
            parameter.grad = gradient
        restore_random_state(random_states)


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
            thing = waiting.pop()
            if id(thing) not in seen:
                seen.add(id(thing))
                waiting += self._note(thing)

    def put_back(self) -> None:
        """Give all objects their state again."""
        for container, contents in self._containers:
            _refill(container, contents)
        with torch.no_grad():
            for tensor, value in self._tensors:
                local_part(tensor).copy_(value)
        for generator, state in self._generators:
            _set_state(generator, state)

    def _note(self, thing: Any) -> Iterable[Any]:
        """Note the state of a thing, and say what else it leads to."""
        if isinstance(thing, Tensor):
            if _can_change(thing):
                self._tensors.append((thing, local_part(thing).detach().to("cpu", copy=True)))
        elif isinstance(thing, (dict, list, set, deque)):
            contents = _contents(thing)
            self._containers.append((thing, contents))
            return contents
        elif isinstance(thing, (tuple, frozenset)):
            return thing
        elif isinstance(thing, _FOLLOWED):
            return [vars(thing)]
        elif (state := _state_of(thing)) is not None:
            self._generators.append((thing, state))
        return ()


def _contents(container: Any) -> list:
    """What a container holds; of a dict, keys and values in turn."""
    if isinstance(container, dict):
        return [part for item in container.items() for part in item]
    return list(container)


def _refill(container: Any, contents: list) -> None:
    now = _contents(container)
    if len(now) == len(contents) and all(a is b for a, b in zip(now, contents, strict=True)):
        return  # some containers refuse to be changed
    container.clear()
    if isinstance(container, dict):
        container.update(zip(contents[::2], contents[1::2], strict=True))
    elif isinstance(container, set):
        container.update(contents)
    else:
        container.extend(contents)


def _can_change(tensor: Tensor) -> bool:
    """Whether a step may write to a tensor; neither into expanded ones nor into those of inference mode one can."""
    frozen = isinstance(tensor, Parameter) and not tensor.requires_grad
    return not (frozen or tensor.is_meta or tensor.is_inference() or _is_expanded(tensor))


def _is_expanded(tensor: Tensor) -> bool:
    if tensor.layout is not torch.strided:
        return False
    return any(size > 1 and stride == 0 for size, stride in zip(tensor.shape, tensor.stride(), strict=True))


def _state_of(generator: Any) -> Any:
    """The state of a random generator; None for anything else."""
    if isinstance(generator, random.Random):
        return generator.getstate()
    if isinstance(generator, np.random.RandomState):
        return generator.get_state()
    if isinstance(generator, np.random.Generator):
        return generator.bit_generator.state
    if isinstance(generator, torch.Generator):
        return generator.get_state()
    return None


def _set_state(generator: Any, state: Any) -> None:
    if isinstance(generator, random.Random):
        generator.setstate(state)
    elif isinstance(generator, np.random.Generator):
        generator.bit_generator.state = state
    else:
        generator.set_state(state)


@contextmanager
def _unheard(trainer: Trainer, module: LightningModule) -> Iterator[None]:
    """Nobody hears of what happens inside; a module's ``log`` is put back with its other attributes."""
    for part in module.modules():
        if isinstance(part, LightningModule):
            part.log = part.log_dict = _nothing
    heard = trainer.callbacks, trainer.loggers, trainer.profiler
    interval = trainer.log_every_n_steps
    # Models may well ask for their logger, so there are as many as before.
    trainer.callbacks, trainer.loggers = [], [DummyLogger() for _ in trainer.loggers]
    trainer.profiler = PassThroughProfiler()
    # NeMo's models go by this interval, of the batch index or of the trainer's global step.
    trainer.log_every_n_steps = sys.maxsize
    try:
        yield
    finally:
        trainer.callbacks, trainer.loggers, trainer.profiler = heard
        trainer.log_every_n_steps = interval


def _nothing(*_: Any, **__: Any) -> None:
    """Stands in for ``log``."""
