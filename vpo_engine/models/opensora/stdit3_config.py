"""The published configuration of STDiT3: which keys define the network, and which are refused."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from vpo_engine.foreign_settings import check_settings

CONFIG = "config.json"
_IGNORED_KEYS = frozenset(
    {
        "_name_or_path",
        "architectures",
        "dtype",
        "enable_flash_attn",
        "enable_layernorm_kernel",
        "enable_sequence_parallelism",
        "input_size",
        "only_train_temporal",
        "torch_dtype",
        "transformers_version",
    }
)
"""Published keys that choose how the original code runs, and do not change what it computes."""


@dataclass(frozen=True, kw_only=True)
class STDiT3Config:
    """The keys of the published config.json that define the function; defaults are the published class's.

    ``class_dropout_prob`` is a record for whoever pretrains: nothing here applies it (see
    ``CaptionEmbedder.drop``). ``freeze_y_embedder`` keeps the caption projection out of training, as in the
    released recipe.
    """

    input_sq_size: int = 512
    in_channels: int = 4
    patch_size: tuple[int, int, int] = (1, 2, 2)
    hidden_size: int = 1152
    depth: int = 28
    num_heads: int = 16
    mlp_ratio: float = 4.0
    class_dropout_prob: float = 0.1
    pred_sigma: bool = True
    drop_path: float = 0.0
    caption_channels: int = 4096
    model_max_length: int = 300
    qk_norm: bool = True
    freeze_y_embedder: bool = False
    skip_y_embedder: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "patch_size", tuple(self.patch_size))
        required = {"drop_path": 0.0, "qk_norm": True, "skip_y_embedder": False}
        for name, value in required.items():
            if getattr(self, name) != value:
                raise ValueError(
                    f"STDiT3 config: {name}={getattr(self, name)!r} is not supported; every published STDiT3 "
                    f"has {name}={value!r}"
                )
        if len(self.patch_size) != 3 or self.patch_size[0] != 1:
            raise ValueError(f"STDiT3 config: patch_size={self.patch_size} must be (1, rows, columns)")
        if self.hidden_size % (2 * self.num_heads) or self.hidden_size % 4:
            raise ValueError(
                f"STDiT3 config: hidden_size={self.hidden_size} must be divisible by 4 and give each of "
                f"num_heads={self.num_heads} an even number of channels"
            )

    @classmethod
    def from_dict(cls, config: Mapping[str, Any], where: Path | str = CONFIG) -> STDiT3Config:
        """Build the configuration from the contents of config.json, the file ``where``.

        Raise ValueError for an unknown key, a value that the network cannot have, or another model's file.
        """
        if config.get("model_type", "STDiT3") != "STDiT3":
            raise ValueError(f"config.json says model_type={config['model_type']!r}, expected 'STDiT3'")
        known = {field.name for field in fields(cls)}
        values = {key: value for key, value in config.items() if key not in _IGNORED_KEYS | {"model_type"}}
        unknown = sorted(set(values) - known)
        if unknown:
            raise ValueError(
                f"STDiT3 config: unknown key {unknown[0]!r}; known keys are {', '.join(sorted(known))}"
            )
        check_settings(values, cls, where, "download it again")
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """Return what ``from_dict`` and the published loader take."""
        values = asdict(self)
        values["patch_size"] = list(self.patch_size)
        return {"architectures": ["STDiT3"], "model_type": "STDiT3", **values}
