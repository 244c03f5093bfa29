"""The states of this process's global random generators: Python's, NumPy's and torch's on every device."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
from torch._subclasses.fake_tensor import unset_fake_temporarily


# A state's values are needed, also while OOMptimizer plans with fake tensors, which have none.
@unset_fake_temporarily()
def random_state() -> dict[str, Any]:
    """The states of this process's global random generators, as what ``torch.load(weights_only=True)`` accepts."""
    generator, keys, position, has_gauss, cached_gaussian = np.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": (generator, torch.from_numpy(keys.astype(np.int64)), position, has_gauss, cached_gaussian),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


@unset_fake_temporarily()
def restore_random_state(state: dict[str, Any]) -> None:
    """Set the global random generators to what :func:`random_state` returned.

    The states of CUDA devices that this process does not have are left out.
    """
    random.setstate(state["python"])
    generator, keys, position, has_gauss, cached_gaussian = state["numpy"]
    np.random.set_state((generator, keys.numpy().astype(np.uint32), position, has_gauss, cached_gaussian))
    torch.set_rng_state(state["torch"].cpu())
    if torch.cuda.is_available():
        for device, device_state in enumerate(state["cuda"][: torch.cuda.device_count()]):
            torch.cuda.set_rng_state(device_state.cpu(), device)
