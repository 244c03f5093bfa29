"""What a rank holds of its tensors, and whether weights are finite."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping

import torch
from torch import Tensor

from nemo_emmett.errors import NonFiniteError


def local_part(tensor: Tensor) -> Tensor:
    """What a tensor holds on this rank: of a distributed tensor (FSDP2), its shard."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def local_values(tensor: Tensor) -> Tensor:
    """The local part of a tensor; of a sparse one, its values."""
    tensor = local_part(tensor)
    return tensor._values() if tensor.is_sparse else tensor


def nonfinite_weight(
    parameters: Iterable[tuple[str, Tensor]], buffers: Iterable[tuple[str, Tensor]] = ()
) -> str | None:
    """The name of the first parameter that is not finite, or buffer that holds NaN; None if all is well.

    Buffers may be infinite: masks are.
    """
    checks = [
        (name, test(local_values(tensor.detach())))
        for tensors, test in ((parameters, lambda t: ~t.isfinite().all()), (buffers, lambda t: t.isnan().any()))
        for name, tensor in tensors
        if tensor.is_floating_point() and not tensor.is_meta
    ]
    if not checks:
        return None
    found = torch.stack([flag.to(checks[0][1].device) for _, flag in checks]).nonzero()
    return checks[int(found[0])][0] if len(found) else None


def refuse_nonfinite(weights: Mapping[str, Tensor], buffers: Collection[str] = ()) -> None:
    """Refuse to export weights that are not finite.

    Args:
        weights: by name.
        buffers: the names of those that are no parameters.

    Raises:
        NonFiniteError: naming a parameter.
    """
    name = nonfinite_weight(
        ((name, tensor) for name, tensor in weights.items() if name not in buffers),
        ((name, tensor) for name, tensor in weights.items() if name in buffers),
    )
    if name is not None:
        raise NonFiniteError(
            f"the weights are not finite ('{name}'), so they are not exported; export an earlier checkpoint with "
            "`nemo-emmett export`."
        )
