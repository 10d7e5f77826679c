"""The paired loss as public trainers write it. Tests and ``bench/`` compare with it."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import logsigmoid
from vpo_kernels.paired_dpo.contract import PairTensors


def eager_dpo_loss(*tensors: Tensor, beta: float = 500.0) -> Tensor:
    """Return the mean over pairs of -logsigmoid(margin), a float32 scalar, of the six tensors of ``PairTensors``.

    Inputs are upcast to float32 first, as SalesforceAIResearch/DiffusionDPO's ``train.py`` does in its other branch and
    flow_grpo does throughout.
    """
    of = PairTensors(*tensors)

    def error(prediction: Tensor, target: Tensor) -> Tensor:
        return (prediction.float() - target.float()).pow(2).flatten(1).mean(1)

    policy_difference = error(of.policy_winner, of.target_winner) - error(of.policy_loser, of.target_loser)
    reference_difference = error(of.reference_winner, of.target_winner) - error(
        of.reference_loser, of.target_loser
    )
    return -logsigmoid(-beta / 2 * (policy_difference - reference_difference)).mean()
