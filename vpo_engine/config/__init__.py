"""The typed configuration of a run: one YAML file, in which unknown keys are refused.

"Paper" in the sources of defaults is OnlineVPO, arXiv 2412.15159.
"""

from vpo_engine.config.disk import DiskConfig
from vpo_engine.config.distributed import DistributedConfig
from vpo_engine.config.guards import GuardsConfig, HeldOutRewardConfig
from vpo_engine.config.log import LogConfig
from vpo_engine.config.memory import ActivationCheckpointing, MemoryConfig
from vpo_engine.config.model import LoraConfig, ModelConfig
from vpo_engine.config.pairs import PairsConfig
from vpo_engine.config.processes import ProcessesConfig
from vpo_engine.config.reward import RewardConfig
from vpo_engine.config.rollout import PruneConfig, RolloutConfig
from vpo_engine.config.run import CheckpointConfig, Config, EvaluationConfig, PromptsConfig
from vpo_engine.config.section import Section
from vpo_engine.config.update import EmaConfig, ObjectiveConfig, OptimizerConfig, ReferenceConfig

__all__ = [
    "ActivationCheckpointing",
    "CheckpointConfig",
    "Config",
    "DiskConfig",
    "DistributedConfig",
    "EmaConfig",
    "EvaluationConfig",
    "GuardsConfig",
    "HeldOutRewardConfig",
    "LogConfig",
    "LoraConfig",
    "MemoryConfig",
    "ModelConfig",
    "ObjectiveConfig",
    "OptimizerConfig",
    "PairsConfig",
    "ProcessesConfig",
    "PromptsConfig",
    "PruneConfig",
    "ReferenceConfig",
    "RewardConfig",
    "RolloutConfig",
    "Section",
]
