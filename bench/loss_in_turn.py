"""The native loss and a warmed ``torch.compile`` of the formula, called in turn.

``PYTHONPATH=tests/kernels python bench/loss_in_turn.py THREADS`` prints a row per case: the native loss's median, and
two ratios, above 1 where it is faster: that of the medians, and that of the fastest fifth, which is nearer to an idle
machine.

Both get the same cold inputs, forward and backward, in the same minute. So a busy machine disturbs both alike, and the
threads of one meet those of the other, as they do in a trainer.
"""

from __future__ import annotations

import itertools
import sys
import time

import torch
from test_loss import DTYPES, LARGE, SHAPES, Case, gradients
from vpo_kernels import paired_dpo_loss

ROUNDS = 200


def in_turn(case: Case) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the sorted seconds of the native and of the compiled loss, [ROUNDS] each."""
    losses = [lambda *tensors: paired_dpo_loss(*tensors, backend="native").loss, case.compile()]
    turn, seconds = itertools.cycle(case.sets), torch.empty(2, ROUNDS)
    for i in range(-20, ROUNDS):
        for which in (0, 1) if i % 2 else (1, 0):
            tensors = next(turn)
            start = time.perf_counter()
            made = gradients(losses[which], tensors)
            seconds[which, max(i, 0)] = time.perf_counter() - start
            del made
    native, compiled = seconds.sort().values
    return native, compiled


def main() -> None:
    torch.set_num_threads(int(sys.argv[1]))
    for shape, dtypes in itertools.product(SHAPES, DTYPES):
        if shape == LARGE:
            continue
        case = Case(shape, dtypes)
        case.fill()
        native, compiled = in_turn(case)
        ratio = compiled / native
        print(
            f"{'x'.join(map(str, shape)):15} {dtypes:18} {1e6 * native[ROUNDS // 2]:6.0f} us "
            f"{ratio[ROUNDS // 2]:.2f} {ratio[ROUNDS // 5]:.2f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
