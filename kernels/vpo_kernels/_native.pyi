"""The C++ extension (kernels/native). Addresses are not checked: they must outlive the call."""

from collections.abc import Callable, Sequence

Tensor = tuple[int, int, tuple[int, ...]]
"""Address, dtype and strides in elements. Dtypes: 0 bool, 1 bfloat16, 2 float16, 3 float32, 4 float64."""
Numbers = tuple[float, int]
"""A number for all pairs and 0, or anything and the address of float64 [P] in its place."""
Noise = tuple[Tensor, Numbers, Numbers]
"""Noise, x0_scale, noise_scale, as in ``contract.Noise``."""
Options = tuple[Numbers, Numbers, bool, float, float | None]
"""beta, pair_weight, whether errors are means, winner_anchor, loser_scaling, as in ``contract.Options``."""
Graded = tuple[Tensor, Tensor, Tensor, int]
"""Policy, target, where the gradient goes, and the address of its coefficients, float64 [P]."""

def instruction_sets() -> list[str]:
    """Those that this processor has, the fastest first. Results do not depend on them."""

def forward(
    instruction_set: str,
    shape: Sequence[int],
    sextet: Sequence[Tensor],
    noise: Noise | None,
    mask: Tensor | None,
    counted: Numbers,
    options: Options,
    wide: bool,
    threads: int,
    out: Sequence[int],
) -> None:
    """What ``contract.Backend.forward`` returns, written to the addresses of loss, margin, gaps, coefficient.

    sextet: in the order of ``contract.Sextet``. counted: elements per sample that the mask leaves. wide:
    arithmetic on elements is float64, which it must be if a tensor is, and so are loss, margin and gaps; else
    float32. At most ``threads`` threads, fewer where the work is small; bits do not depend on them.
    """

def gradient(
    instruction_set: str,
    shape: Sequence[int],
    members: Sequence[Graded],
    noise: Noise | None,
    mask: Tensor | None,
    scale: float,
    wide: bool,
    threads: int,
) -> None:
    """Writes scale * coefficient * (policy - target) of each member, 0 where the mask is False."""

def encode_delta(
    instruction_set: str,
    elements: int,
    reference: int,
    policy: int,
    difference: int,
    threads: int,
    allocate: Callable[[int], tuple[int, int]],
) -> None:
    """``ordered_delta.encode`` of contiguous arrays: bfloat16 ``reference`` and ``policy`` to int8 ``difference``.

    Once the number of spilled elements is known, ``allocate`` is called with it and returns the addresses of their
    index, int32, and value, bfloat16, which are then filled. Threads as in ``forward``.
    """

def decode_delta(
    instruction_set: str,
    elements: int,
    difference: int,
    index: int,
    value: int,
    spilled: int,
    policy: int,
    out: int,
    threads: int,
) -> None:
    """``ordered_delta.decode`` of contiguous arrays to bfloat16 ``out``, which may be ``policy``.

    Indices must ascend; those outside the array are not written.
    """
