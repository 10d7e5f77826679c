"""Shared by all tests: the two tiers of the suite, and the sprites world at its smallest for tests of whole runs.

Torch and the engine are imported where they are used, so that the process that only hands tests to pytest-xdist's
workers starts them seconds earlier.
"""

from __future__ import annotations

import functools
import gc
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if (
    "PYTEST_XDIST_WORKER_COUNT" in os.environ
):  # before torch: each worker, and what it starts, takes its share of cores
    share = (os.cpu_count() or 1) // int(os.environ["PYTEST_XDIST_WORKER_COUNT"])
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, share)))
    gc.disable()  # until all is imported and collected: see pytest_collection_finish

sys.path.insert(
    0, str(Path(__file__).parent.parent / "bench")
)  # as pytest does for the benchmarks themselves

import pytest
import unsynced  # noqa: F401  # before anything asks for os.fsync
from smallest_run import SMALL

if TYPE_CHECKING:
    from vpo_engine.config import Config

LEFT_OUT = pytest.StashKey[int]()


@pytest.hookimpl(trylast=True)  # after -k, so that only tests that would run are counted
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave long tests out, unless ``-m`` chooses tests by marker or the command line names single tests."""
    if config.option.markexpr or any("::" in argument for argument in config.args):
        return
    long = [item for item in items if item.get_closest_marker("long")]
    items[:] = [item for item in items if not item.get_closest_marker("long")]
    config.hook.pytest_deselected(items=long)
    config.stash[LEFT_OUT] = len(long)
    if hasattr(config, "workeroutput"):
        config.workeroutput["left_out"] = len(long)


def pytest_collection_finish() -> None:
    """Leave what imports and collection made out of all later searches for garbage; it stays to the end."""
    gc.freeze()
    gc.set_threshold(20_000)  # a search for every 700 objects takes some per cent of the time
    gc.enable()


def pytest_unconfigure() -> None:
    """Let the interpreter's end find what was left out; libraries report what it does not."""
    gc.unfreeze()


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any, error: object) -> None:
    """Take the number from a worker of pytest-xdist; each of them collects all tests."""
    node.config.stash[LEFT_OUT] = getattr(node, "workeroutput", {}).get("left_out", 0)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if left_out := config.stash.get(LEFT_OUT, 0):
        terminalreporter.write_line(f"{left_out} long tests left out; run them with `pytest -m long`")


@functools.cache
def measure_quickly() -> None:
    """Measure the device for a moment only, and count the operations of equal models once, in all runs of a worker."""
    from vpo_engine import trainer

    rate, count, counted = trainer.matrix_rate, trainer.count_row_flops, {}

    def count_once(model: Any, text: Any) -> Any:
        sizes = [(tuple(p.shape), p.dtype, p.requires_grad) for p in model.network.parameters()]
        key = repr((type(model), model.latent_shape, sizes, float(text.mask.sum()) / len(text)))
        if key not in counted:
            counted[key] = count(model, text)
        return counted[key]

    trainer.matrix_rate = lambda device, dtype: rate(device, dtype, seconds=0.03)
    trainer.count_row_flops = count_once


@pytest.fixture(scope="session")
def smallest(small_policy: str) -> list[str]:
    """The overrides that make the sprites run one of seconds, of a policy with few weights."""
    measure_quickly()
    return [*SMALL, small_policy]


@pytest.fixture(scope="session")
def small_policy(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The setting that makes a run one of a policy with few, random weights, which takes a fraction of the time."""
    from small_policy import write_small_policy

    return write_small_policy(tmp_path_factory.mktemp("small_policy") / "policy")


@pytest.fixture
def unplanned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let runs begin without a plan, which takes seconds for every new configuration, and measure quickly."""
    measure_quickly()
    monkeypatch.setattr("vpo_engine.training.check_fits", lambda config, *_: (config, ""))


@pytest.fixture
def small(smallest: list[str], tmp_path: Path) -> Callable[..., Config]:
    """A sprites configuration of seconds, in its own run directory; arguments override settings."""
    from vpo_engine.config_file import load_config

    def make(*overrides: str) -> Config:
        return load_config(None, [*smallest, f"run_dir={tmp_path / 'run'}", *overrides])

    return make
