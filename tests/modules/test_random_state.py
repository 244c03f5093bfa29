"""The states of the global random generators."""

from __future__ import annotations

import random

import numpy as np
import torch

from nemo_emmett.modules.random_state import random_state, restore_random_state


def test_states_are_restored_exactly() -> None:
    def draws() -> tuple:
        return random.random(), np.random.randn(3).tolist(), torch.rand(3).tolist()

    np.random.randn()  # leaves a second Gaussian in NumPy's cache
    state = random_state()
    first = draws()
    assert draws() != first
    restore_random_state(state)
    assert draws() == first
