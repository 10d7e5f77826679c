"""The moving average of a policy that DeepSpeed divides: the one that a single process keeps, saved and loaded."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from process_group import run_in_group
from safetensors.torch import load_file
from torch import Tensor, nn
from zero_runs import HALF, LORA, divided_fully, make, make_steps, weights_of, zero

from vpo_engine.config_file import load_config
from vpo_engine.distributed.processes import Processes
from vpo_engine.memory.zero import ZeroOptimizer
from vpo_engine.online_vpo import OnlineVPO
from vpo_engine.protocols import at_hand
from vpo_engine.run_state import average_writer, capture, restore

# Not imported here: that takes seconds in every worker, also where these tests are left out.
pytestmark = pytest.mark.skipif(find_spec("deepspeed") is None, reason="needs deepspeed")

EMA = ("ema.decay=0.5",)
BOUND = 1e-6
"""That of the weights (see ``zero_runs.assert_same_training``), of which the average is a mean."""


def average_of(algorithm: OnlineVPO) -> Tensor:
    """Return the policy as it is evaluated; the trained weights are there again afterwards."""
    before = weights_of(algorithm)
    with algorithm.evaluated_weights():
        found = weights_of(algorithm)
    assert torch.equal(weights_of(algorithm), before)
    return found


def save(algorithm: OnlineVPO, folder: Path) -> None:
    """Save as the trainer does, with the average."""
    with algorithm.optimizer.whole():
        snapshot = capture(algorithm, 2, {})
        if algorithm.processes.first:
            for name in ("policy", "ema"):
                (folder / name).mkdir(parents=True)
            algorithm.model.save_policy(folder / "policy")
            write = average_writer(algorithm, None)
            assert write is not None
            write(folder / "ema")
            torch.save(snapshot, folder / "snapshot.pt")
    algorithm.processes.wait()


def load(algorithm: OnlineVPO, folder: Path) -> None:
    snapshot = torch.load(folder / "snapshot.pt", weights_only=True)
    restore(algorithm, snapshot["tensors"], snapshot["state"], folder / "policy", folder / "ema")


def divisions(folder: Path) -> dict[str, tuple[str, ...]]:
    return {
        "0": zero(0),
        "1": zero(1),
        "2": (*zero(2), "ema.on_host=true"),
        "3": zero(3, divided_fully(folder)),
    }


def in_group(folder: Path, settings: Sequence[str], names: Sequence[str]) -> None:
    """Make two steps, save, and make a third; load what another division has saved, and make the third."""
    processes = Processes.start("cpu")
    for name in names:
        own = (*settings, *EMA, *divisions(folder)[name])
        algorithm = make(own, processes)
        start = average_of(algorithm)
        make_steps(algorithm, [0, 1])
        save(algorithm, folder / f"saved {name}")
        kept = average_of(algorithm)
        make_steps(algorithm, [2])
        found = {"start": start, "kept": kept, "end": average_of(algorithm), "weights": weights_of(algorithm)}
        torch.save(found, folder / f"{name} {processes.rank}.pt")
    for name, saved in zip(names, [*names[1:], names[0]], strict=True):
        again = make((*settings, *EMA, *divisions(folder)[name]), processes)
        load(again, folder / f"saved {saved}")
        kept = average_of(again)
        make_steps(again, [2])
        torch.save(
            {"kept": kept, "end": average_of(again)}, folder / f"{name} after {saved} {processes.rank}.pt"
        )
    processes.stop()


@pytest.mark.long
@pytest.mark.parametrize("kind", ["full", "adapter"])
def test_the_divided_average_is_that_of_one_process(kind: str, tmp_path: Path) -> None:
    settings = LORA if kind == "adapter" else ()
    names = ["1", "3"] if kind == "adapter" else ["0", "1", "2", "3"]
    divided_fully(tmp_path)
    run_in_group(tmp_path, 2, in_group, tmp_path, settings, names)
    alone = make((*settings, *EMA), Processes.start("cpu"))
    start = average_of(alone)
    make_steps(alone, [0, 1])
    kept = average_of(alone)
    make_steps(alone, [2])
    end = average_of(alone)
    assert float((end - weights_of(alone)).abs().max()) > 100 * BOUND, "an average that lags behind"
    for file in tmp_path.glob("* *.pt"):
        found = torch.load(file, weights_only=True)
        for name, expected in {"start": start, "kept": kept, "end": end}.items():
            if name in found:
                torch.testing.assert_close(
                    found[name], expected, rtol=0, atol=BOUND, msg=lambda m, f=file, n=name: f"{f}, {n}: {m}"
                )
    resumed = make((*settings, *EMA), Processes.start("cpu"))
    load(resumed, tmp_path / "saved 3")
    torch.testing.assert_close(average_of(resumed), kept, rtol=0, atol=BOUND)


def masters(folder: Path) -> None:
    processes = Processes.start("cpu")
    algorithm = make((*HALF, *EMA, *zero(2)), processes)
    make_steps(algorithm, [0, 1])
    save(algorithm, folder / "saved")
    processes.stop()


@pytest.mark.long
def test_with_bfloat16_weights_the_average_is_of_their_masters(tmp_path: Path) -> None:
    """In checkpoints it has more than bfloat16 holds, and it is what the masters' steps were averaged to."""
    run_in_group(tmp_path, 2, masters, tmp_path)
    file = load_file(tmp_path / "saved/ema/model.safetensors")
    values = torch.cat([value.flatten() for value in file.values() if value.dtype == torch.float32])
    assert (values != values.bfloat16().float()).float().mean() > 0.5


@pytest.mark.parametrize(("device", "number"), [("cuda:1", 1), ("cpu", None)])
def test_deepspeed_works_on_the_device_of_the_run(
    device: str, number: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would take the GPU that LOCAL_RANK numbers, which is 0 for a process that was started alone."""
    given: list[int | None] = []

    def initialize(args: SimpleNamespace | None = None, *_: object, **__: object) -> None:
        given.append(None if args is None else args.device_rank)
        raise KeyboardInterrupt

    library = SimpleNamespace(initialize=initialize, ops=SimpleNamespace())
    monkeypatch.setattr("vpo_engine.memory.zero._import_deepspeed", lambda: library)
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    config = load_config(None, ["distributed.engine=deepspeed", "distributed.zero_stage=1"])
    with pytest.raises(KeyboardInterrupt):
        ZeroOptimizer(config, nn.Linear(2, 2), Processes(0, 1, torch.device(device)), at_hand)
    assert given == [number]
