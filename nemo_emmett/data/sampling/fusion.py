"""Which group of sources gives the next batch, where each group has a sampler of its own."""

from __future__ import annotations

from collections.abc import Mapping

from lhotse.dataset import RoundRobinSampler, ZipSampler
from lhotse.dataset.sampling.base import CutSampler

from nemo_emmett.config import nearest
from nemo_emmett.errors import ConfigError

FUSIONS = ("zip", "round_robin", "randomized_round_robin", "mux")

TRAIN_SALM_GPT = (
    "train nemo_emmett's SALMGPT instead, which takes text, speech and both, and whose checkpoints NeMo's SALM can "
    "load (examples/speechlm/train.py with ++model._target_=salm_gpt)"
)
"""What to do where NeMo's SALM cannot take the data."""


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
    shares = True if weights is None else [float(weights[name]) for name in samplers]
    return RoundRobinSampler(*samplers.values(), randomize=shares, seed=seed)


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


def check_for_nemo_salm(has_text: Mapping[str, bool], fusion: str | None, where: str) -> None:
    """Refuse data of which NeMo's SALM may get a batch without speech: its preprocessor fails on one.

    Args:
        has_text: whether a group has sources of text, by the group's name; "" is that of a dataset without groups.
        fusion: of the groups; None where there are none.
        where: the dataset's place in the recipe.

    Raises:
        ConfigError: naming the first group with text.
    """
    can_be_zipped = fusion is not None and not all(has_text.values())
    if not any(has_text.values()) or (can_be_zipped and fusion == "zip"):
        return
    place = f"{where}.{next(name for name, found in has_text.items() if found)}".rstrip(".")
    how = "" if fusion is None else f"with sampler_fusion: {fusion} "
    remedy = (
        f"set ++{where}.sampler_fusion=zip, so that each batch holds both"
        if can_be_zipped
        else "remove its text sources"
    )
    raise ConfigError(
        f"{place}: holds text, so {how}a batch may hold nothing else, and NeMo's SALM cannot take a batch without "
        f"speech; {TRAIN_SALM_GPT}, or {remedy}."
    )
