"""Messages that importing the engine's dependencies prints."""

from __future__ import annotations

import logging

import pytest

import vpo_engine


def test_bitsandbytes_is_silent_about_one_missing_kernel_only(caplog: pytest.LogCaptureFixture) -> None:
    assert vpo_engine.__version__
    logger = logging.getLogger("bitsandbytes.backends.cpu.ops")
    logger.warning("Failed to load CPU gemm_4bit_forward from kernels-community: %s. Please ...", "no module")
    logger.warning("Failed to load something else")
    assert [record.getMessage() for record in caplog.records] == ["Failed to load something else"]
