"""AdamW for weights of few bits, which keeps a float32 copy of them (``trainer.precision: bf16-true``)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

MASTER = "master"
"""Of a parameter's state: its float32 copy."""


class MasterWeightAdamW(torch.optim.AdamW):
    """AdamW whose updates are made to a float32 copy of each weight, of which the weight is the rounded value (mixed
    precision training, arXiv 1710.03740, section 3.1).

    bfloat16 has 8 bits of precision: an update below some 1/500 of a weight is lost without the copy. A parameter takes
    2 bytes, its gradient 2, and its state 12: the 16 bytes of ``bf16-mixed``, where the weights that are gathered, sent
    and multiplied are half as large here. Parameters that are float32 have no copy.

    Args:
        params: parameters, or groups of them.
        lr: learning rate.
        betas: decay of the running means of gradient and squared gradient.
        eps: added to the denominator.
        weight_decay: decoupled from the gradient.
        fused: torch's fused kernel.

    Example:
        In a recipe::

            model:
              optimizer:
                _target_: nemo_emmett.optimizers.MasterWeightAdamW
                lr: 1.0e-4
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        fused: bool | None = None,
    ) -> None:
        super().__init__(params, lr, tuple(betas), eps, weight_decay, fused=fused)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update the copies, and round them to the weights."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            params = [parameter for parameter in group["params"] if parameter.grad is not None]
            if not params:
                continue
            states = [self._state_of(parameter, group["fused"]) for parameter in params]
            masters = [state.get(MASTER, parameter) for state, parameter in zip(states, params, strict=True)]
            adamw(
                masters,
                [parameter.grad.to(master.dtype) for parameter, master in zip(params, masters, strict=True)],
                *([state[name] for state in states] for name in ("exp_avg", "exp_avg_sq")),
                [],
                [state["step"] for state in states],
                fused=group["fused"],
                amsgrad=False,
                beta1=group["betas"][0],
                beta2=group["betas"][1],
                lr=group["lr"],
                weight_decay=group["weight_decay"],
                eps=group["eps"],
                maximize=False,
            )
            for parameter, master in zip(params, masters, strict=True):
                if master is not parameter:
                    parameter.copy_(master)
        return loss

    def _state_of(self, parameter: nn.Parameter, fused: bool | None) -> dict[str, Tensor]:
        state = self.state[parameter]
        if not state:
            wide = parameter.detach().float()
            if wide.dtype != parameter.dtype:
                state[MASTER] = wide
            state["step"] = torch.zeros((), device=parameter.device if fused else None, dtype=torch.float32)
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(wide), torch.zeros_like(wide)
        return state

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restore the state in float32; torch's would round it to the type of the weights."""
        super().load_state_dict(dict(state_dict))
        numbers = [number for group in state_dict["param_groups"] for number in group["params"]]
        params = [parameter for group in self.param_groups for parameter in group["params"]]
        for number, parameter in zip(numbers, params, strict=True):
            for name, value in state_dict["state"].get(number, {}).items():
                if name != "step":
                    self.state[parameter][name] = value.to(parameter.device, torch.float32)
