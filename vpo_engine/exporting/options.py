"""The options of an export."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Format = Literal["diffusers", "original", "peft"]
FORMATS: tuple[Format, ...] = ("diffusers", "original", "peft")
DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class ExportOptions:
    """The contents and the form of an export.

    step: the checkpoint; None for the newest. merge: merge an adapter into its base. form: the dialect of an adapter;
    None for the one that fits the family. ema: export the averaged weights. dtype: None for float32 of a merged export,
    and else that of the checkpoint. base: the published folder whose parts stand beside the policy; None for
    model.policy's own.
    """

    step: int | None = None
    merge: bool = False
    form: Format | None = None
    ema: bool = False
    dtype: str | None = None
    base: Path | None = None
