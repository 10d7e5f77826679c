"""Which candidates are worth finishing."""

from __future__ import annotations

import torch
from torch import Tensor


def extremes(scores: Tensor, keep: int) -> Tensor:
    """Numbers, int64 [P, keep] ascending, of each prompt's best and worst candidates by scores [P, N].

    The better half of ``keep`` (with the odd one) comes from the top, the rest from the bottom; of equal scores the
    lower candidate number counts as the better. ValueError if a score is not finite.
    """
    if not torch.isfinite(scores).all():
        prompt, candidate = (~torch.isfinite(scores)).nonzero()[0].tolist()
        raise ValueError(
            f"the reward of prompt {prompt}, candidate {candidate} of this step is {scores[prompt, candidate].item()} "
            "on its preview; every score must be finite. Look at the reward model, or raise rollout.prune.after or "
            "rollout.explore.steps"
        )
    assert 2 <= keep <= scores.shape[1]
    order = scores.argsort(dim=1, descending=True, stable=True)
    worst = keep // 2
    return torch.cat([order[:, : keep - worst], order[:, -worst:]], dim=1).sort(dim=1).values
