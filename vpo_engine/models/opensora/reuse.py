"""Keep the values that all steps of one sampling loop share, so that they are computed once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor
from vpo_kernels.attention import TextPlan

from vpo_engine.distributed.sequence import SequenceGroup
from vpo_engine.models.opensora.blocks import KeysValues
from vpo_engine.models.step_cache import BlockCache


@dataclass(frozen=True)
class Constants:
    """The parts of a prediction that depend neither on the noisy latents nor on the time.

    texts: packed text, [tokens, C] or keys and values, for each block in the order in which they run. plans: how it is
    divided, for blocks over space and for blocks over time. rope: tables of the temporal attention. rate: embedded
    frame rate, [B, C].
    """

    texts: Sequence[Tensor | KeysValues]
    plans: tuple[TextPlan, TextPlan]
    rope: tuple[Tensor, Tensor]
    rate: Tensor


class Reuse:
    """An argument of all calls of one sampling loop: the first call fills it, the later ones read it.

    It serves one network with unchanged weights, one text (the same tensor) and one batch size, without gradients. It
    holds 2 C numbers for each text token and block. Each sampling loop makes its own.

    cache: None, or the relative change below which ``blocks`` lets a step take over what the last blocks added.
    run: computes a block in place of its forward, of the same arguments; None: that. shared: the processes that hold
    slices of the video, if there are any.
    """

    def __init__(
        self,
        cache: float | None = None,
        run: Callable[..., Tensor] | None = None,
        shared: SequenceGroup | None = None,
    ) -> None:
        self.blocks = None if cache is None else BlockCache(cache, shared)
        self.run = run
        self._owner: object = None
        self._text: Tensor | None = None
        self._constants: Constants | None = None

    @property
    def filled(self) -> bool:
        """Return whether the first call was made."""
        return self._constants is not None

    def constants(self, owner: object, text: Tensor, rows: int, make: Callable[[], Constants]) -> Constants:
        """Return what predictions of ``owner`` for ``rows`` samples of ``text`` share; the first call makes it."""
        if self._constants is None:
            self._owner, self._text, self._constants = owner, text, make()
        assert self._owner is owner, "keys and values belong to the network that made them"
        assert self._text is text, "keys and values belong to the text that they were made of"
        assert len(self._constants.rate) == rows, "a sampling loop keeps its batch size"
        return self._constants
