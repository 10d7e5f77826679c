"""The C++ extension (kernels/native). It does not check addresses: they must be valid until the call returns."""

from collections.abc import Callable, Sequence

Tensor = tuple[int, int, tuple[int, ...]]
"""Address, dtype and strides in elements. Dtypes: 0 bool, 1 bfloat16, 2 float16, 3 float32, 4 float64."""
Numbers = tuple[float, int]
"""A number for all pairs and 0, or any number and the address of float64 [P], whose values then take its place."""
Noise = tuple[Tensor, Numbers, Numbers]
"""Noise, x0_scale, noise_scale, as in ``contract.TargetNoise``."""
Options = tuple[Numbers, Numbers, bool, float, float | None]
"""beta, pair_weight, whether errors are means, winner_anchor, loser_scaling, as in ``contract.Options``."""
Graded = tuple[Tensor, Tensor, Tensor, int]
"""Policy, target, where the gradient goes, and the address of its coefficients, float64 [P]."""

def instruction_sets() -> list[str]:
    """Return the instruction sets that this processor has, the fastest first. Results do not depend on them."""

def forward(
    instruction_set: str,
    shape: Sequence[int],
    tensors: Sequence[Tensor],
    noise: Noise | None,
    mask: Tensor | None,
    counted: Numbers,
    options: Options,
    wide: bool,
    threads: int,
    out: Sequence[int],
) -> None:
    """Write what ``contract.Backend.forward`` returns to the addresses ``out``.

    tensors: in the order of ``contract.PairTensors``. counted: number of elements per sample that the mask leaves.
    wide: arithmetic on elements is float64, which it must be if a tensor is, and so are loss and per_pair;
    else they are float32. threads: the most that are used; fewer are where the work is small. Results do not depend on
    them. out: addresses of the tensors of ``contract.Forward``, in its order.
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
    """Write scale * coefficient * (policy - target) of each member, 0 where the mask is False."""

def encode_delta(
    instruction_set: str,
    elements: int,
    reference: int,
    policy: int,
    difference: int,
    threads: int,
    allocate: Callable[[int], tuple[int, int]],
) -> None:
    """Encode as ``ordered_delta`` does: contiguous bfloat16 ``reference`` and ``policy`` to int8 ``difference``.

    Once the number of spilled elements is known, ``allocate`` is called with it. It returns the addresses of their
    index, int32, and value, bfloat16, which are then filled. Threads are as in ``forward``.
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
    """Decode contiguous arrays as ``ordered_delta`` does, to bfloat16 ``out``, which may be ``policy``.

    Indices must ascend; those outside the array are not written.
    """
