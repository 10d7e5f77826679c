"""Assertions in the helpers of these tests explain themselves, as those of the tests do."""

import pytest

pytest.register_assert_rewrite("checks", "engine")
