"""Settings of how gradients, the optimizer's state and weights are divided among processes."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, Self

from pydantic import Field, model_validator

from vpo_engine.config.stage_limits import StageLimits

ZeroStage = Literal[0, 1, 2, 3]


class DistributedConfig(StageLimits):
    """Settings of runs on several GPUs and machines: what averages the gradients, which process holds what, and how
    long a stage may take. They change nothing that is trained beyond rounding, so a run may be resumed with other
    settings, and checkpoints are the same files for all of them (see docs/processes.md and docs/many_machines.md)."""

    engine: Literal["data_parallel", "deepspeed"] = "data_parallel"
    """data_parallel: every process holds the whole policy, reference and optimizer. deepspeed: DeepSpeed's ZeRO divides
    the optimizer's state, gradients and weights among the processes; it needs pip install "vpo-engine[deepspeed]"."""
    zero_stage: ZeroStage | None = None
    """What ZeRO divides among the processes. 0: nothing. 1: the optimizer's state. 2: gradients, too. 3: the trained
    weights, too. null: the stage in distributed.deepspeed_config, or else 2. engine=deepspeed only."""
    offload_optimizer: bool | None = None
    """Keep the optimizer's state in host memory and make its steps there. null: as in distributed.deepspeed_config, or
    else false. engine=deepspeed only, from stage 1 on."""
    deepspeed_config: Path | None = None
    """A JSON file of DeepSpeed's. "auto" stands for the value that the other settings give; a value that contradicts
    them is refused. What DeepSpeed gets in the end is written to deepspeed.json in the run directory."""

    sequence_parallel: int = Field(1, ge=1)
    """Number of neighbouring processes that compute one video together: each holds a slice of its tokens, and so a part
    of the activations, in rollouts and in the update. They work on the same prompts. 1: each process computes whole
    videos. It must divide the number of training processes, together with processes.per_prompt, and be no larger than
    the video has latent frames and patches of a frame, or the network attention heads (see docs/processes.md)."""

    @model_validator(mode="after")
    def _only_for_deepspeed(self) -> Self:
        if self.engine == "data_parallel":
            for name in ("zero_stage", "offload_optimizer", "deepspeed_config"):
                value = getattr(self, name)
                if value is not None:
                    shown = str(value).lower() if isinstance(value, bool) else value
                    raise ValueError(
                        f"{name}={shown} is a setting of DeepSpeed, but engine=data_parallel; set "
                        f"distributed.engine=deepspeed, or leave distributed.{name} out"
                    )
        return self
