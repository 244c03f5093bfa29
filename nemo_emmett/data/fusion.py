"""Which group of sources gives the next batch, where each group has a sampler of its own."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from lhotse.dataset import RoundRobinSampler, ZipSampler
from lhotse.dataset.sampling.base import CutSampler

from nemo_emmett.config import nearest
from nemo_emmett.errors import ConfigError

FUSIONS = ("zip", "round_robin", "randomized_round_robin", "mux")


class StationaryRoundRobinSampler(RoundRobinSampler):
    """Takes the next batch from a group drawn at random, yet so that each group keeps its share in any stretch.

    A group's credit grows by its weight at each step and falls by one when it is drawn. Groups are drawn with
    probabilities proportional to their credit, as far as it is positive. So no credit falls to -1 or reaches the number
    of groups G, and over any n steps a group gives n times its weight give or take G batches, where independent draws
    are off by about the square root of n. Each worker process draws a sequence of its own; all ranks draw the same.

    Args:
        samplers: one for each group.
        weights: the groups' shares of the batches; they need not sum to one.
        seed: of the draws.
    """

    def __init__(self, *samplers: CutSampler, weights: list[float], seed: int) -> None:
        total = sum(weights)
        super().__init__(*samplers, randomize=[weight / total for weight in weights], seed=seed)
        self._credit = np.zeros(len(samplers))

    def __iter__(self) -> StationaryRoundRobinSampler:
        resuming = self._just_restored_state
        super().__iter__()
        worker = torch.utils.data.get_worker_info()
        self.rng = np.random.default_rng([self.seed, self.epoch, worker.id if worker else 0])
        if not resuming:
            self._credit = np.zeros(len(self.samplers))
            self._set_next_idx()
        return self

    def _set_next_idx(self) -> None:
        alive = self._nondepleted_samplers_indices
        weights = np.array([self.randomize[index] for index in alive])
        self._credit[alive] += weights / weights.sum()
        odds = np.maximum(self._credit[alive], 0.0)
        self._cur_sampler_idx = int(self.rng.choice(len(alive), p=odds / odds.sum()))
        self._credit[alive[self._cur_sampler_idx]] -= 1.0


def fuse(samplers: Mapping[str, CutSampler], fusion: str, weights: Mapping[str, float] | None, seed: int) -> CutSampler:
    """Join the samplers of several groups into one.

    Args:
        samplers: by the groups' names.
        fusion: ``zip`` (each batch holds one batch of each group; ends with the first that ends), ``round_robin``
            (in turns) or ``randomized_round_robin`` (by weights).
        weights: the groups' shares of the batches under ``randomized_round_robin``; None: equal ones.
        seed: of the draws.
    """
    if fusion == "zip":
        return ZipSampler(*samplers.values())
    if fusion == "round_robin":
        return RoundRobinSampler(*samplers.values())
    shares = [1.0 if weights is None else float(weights[name]) for name in samplers]
    return StationaryRoundRobinSampler(*samplers.values(), weights=shares, seed=seed)


def check_fusion(fusion: str, weights: Mapping[str, float] | None, groups: list[str], where: str) -> None:
    """Refuse a fusion that does not exist, and weights that do not fit the groups.

    Raises:
        ConfigError: naming the key.
    """
    if fusion not in FUSIONS:
        suggestion = nearest(str(fusion), FUSIONS)
        hint = f"did you mean '{suggestion}'?" if suggestion else f"it can be {', '.join(FUSIONS)}."
        raise ConfigError(f"{where}.sampler_fusion: '{fusion}' is unknown; {hint}")
    if weights is None:
        return
    for name in groups:
        if name not in weights:
            raise ConfigError(f"{where}.sampler_weights: the group '{name}' has none; give each group a weight.")
    for name, weight in weights.items():
        if name not in groups:
            raise ConfigError(
                f"{where}.sampler_weights: there is no group '{name}'; the groups are {', '.join(groups)}."
            )
        if not isinstance(weight, (int, float)) or weight <= 0:
            raise ConfigError(f"{where}.sampler_weights.{name}: {weight!r} is not a share; give a number above 0.")
