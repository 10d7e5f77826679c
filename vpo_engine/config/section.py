"""The base class of every group of settings."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, field_validator
from pydantic.fields import FieldInfo

_LARGEST = 2**63 - 1


class Section(BaseModel):
    """A group of settings. It cannot be changed once it is made, and it refuses unknown keys.

    The docstring below a field is its description: docs/settings.md, ``--help settings`` and configs/schema.json are
    made from these. A last sentence that begins with "Source:" says where the default comes from.
    """

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        validate_default=True,
        use_attribute_docstrings=True,
        serialize_by_alias=True,
        allow_inf_nan=False,
    )

    @classmethod
    def fields_by_key(cls) -> dict[str, FieldInfo]:
        """Return the fields by the keys that settings have in files; a key may be a reserved word of Python."""
        return {field.alias or name: field for name, field in cls.model_fields.items()}

    def __hash__(self) -> int:
        """Hash the settings by what they say, since fields may hold dictionaries."""
        return hash(self.model_dump_json())

    @field_validator("*")
    @classmethod
    def _complete_value(cls, value: Any) -> Any:
        """Replace a leading ~ of a path by the home folder. Refuse environment variables, which only a shell replaces,
        and numbers of more than 64 bits."""
        if isinstance(value, int) and abs(value) > _LARGEST:
            raise ValueError("does not fit in 64 bits; give a smaller number")
        if not isinstance(value, Path):
            return value
        if "\0" in str(value):
            raise ValueError("has the character NUL, which no path can have; write the path without it")
        try:
            path = value.expanduser()
        except RuntimeError as error:
            raise ValueError(f"there is no such home folder ({error}); write the path out") from error
        variable = re.search(r"\$\{?(\w+)", str(path))
        if variable is not None and not os.path.lexists(path):
            raise ValueError(
                f"${variable[1]} is not replaced in settings; write the path out, or let the shell replace it"
            )
        return path
