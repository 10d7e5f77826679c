"""The base class of every group of settings."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """A group of settings. It cannot be changed once it is made, and it refuses unknown keys.

    The docstring below a field is its description: docs/settings.md, ``--help settings`` and configs/schema.json are
    made from these. A last sentence that begins with "Source:" says where the default comes from.
    """

    model_config = ConfigDict(
        extra="forbid", frozen=True, validate_default=True, use_attribute_docstrings=True
    )

    def __hash__(self) -> int:
        """Hash the settings by what they say, since fields may hold dictionaries."""
        return hash(self.model_dump_json())
