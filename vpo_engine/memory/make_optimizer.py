"""Choose how the policy is stepped: by every process alike, or divided among the processes."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

from torch import Tensor, nn

from vpo_engine.config import Config, EmaConfig
from vpo_engine.distributed.processes import Processes
from vpo_engine.memory.optimizer import PolicyOptimizer, PreserveReference


class Average(Protocol):
    """The moving average of the policy; see ``PolicyAverage``. All processes must make the same calls."""

    updates: int

    @property
    def decay(self) -> float: ...

    def update(self) -> None: ...

    def tensors(self) -> list[Tensor]: ...

    def evaluated(self) -> AbstractContextManager[None]: ...

    def collect(self) -> None:
        """Bring the average to the first process, which may then enter ``in_place`` until the next update."""
        ...

    def in_place(self) -> AbstractContextManager[None]: ...

    def loaded(self) -> AbstractContextManager[None]: ...


class Optimizer(Protocol):
    """An optimizer of the policy, with the averaging of gradients over processes."""

    steps: int
    in_lockstep: bool
    """Whether all processes must make equally many backward passes."""
    settings: dict[str, Any] | None
    """What a library that divides the work was given, for the record; None without one."""

    def begin(self, rate: float) -> None:
        """Prepare a step with this learning rate. Call this before its backward passes."""
        ...

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of ``loss`` to those of the step's other backward passes."""
        ...

    def average_gradients(self, processes: Processes) -> None: ...

    def step(self) -> float:
        """Clip, make the step and return the norm of the gradients. NotFiniteError: nothing was changed."""
        ...

    def whole(self, changed: bool = False) -> AbstractContextManager[None]:
        """Return a context in which every process holds the whole policy; ``changed``: and changes it."""
        ...

    def gathered(self, parameters: Sequence[nn.Parameter]) -> AbstractContextManager[None]:
        """Return a context in which every process holds these parameters whole, to read them."""
        ...

    def tensors(self) -> list[Tensor]:
        """Return the optimizer's own tensors that may be moved to the host while they are not needed."""
        ...

    def average(self, settings: EmaConfig) -> Average:
        """Return the moving average of the weights that the optimizer steps; it begins with what they are now."""
        ...

    def state_dict(self) -> dict[str, Tensor]:
        """Return the state for a checkpoint. Every process must call this; the first one's counts."""
        ...

    def load_state_dict(self, state: dict[str, Tensor]) -> None: ...


def make_optimizer(
    config: Config, network: nn.Module, processes: Processes, preserve_reference: PreserveReference
) -> Optimizer:
    """Return the optimizer of distributed.engine over the trained parameters of ``network``."""
    if config.distributed.engine == "deepspeed":
        from vpo_engine.memory.zero import ZeroOptimizer

        return ZeroOptimizer(config, network, processes, preserve_reference)
    trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
    return PolicyOptimizer(
        trained,
        config.optimizer,
        config.optimizer_memory,
        seed=config.seed,
        preserve_reference=preserve_reference,
    )
