"""Test the measures that only a GPU gives meaning to, at a tiny size on the CPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import gpu_measure
import pytest
from gpu_measure import SIZES, forward_flops, main, rule
from rows import Environment, Row, read

HERE = Environment("GPU", 1, "2", "3", "3.12", "abc", "2026-11-29T00:00:00+00:00", "python")
ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("measure", "topic", "count"), [("network", "network", 2), ("offload", "offload", 2)]
)
def test_a_measure_writes_rows(tmp_path: Path, measure: str, topic: str, count: int) -> None:
    assert main([measure, "--tiny", "--rows", str(tmp_path)]) == 0
    found = read(tmp_path)
    assert list(found) == [topic]
    assert len(found[topic]) == count
    assert all(row.numbers["seconds"] > 0 for row in found[topic])


def test_copies_are_near_the_policy(tmp_path: Path) -> None:
    assert main(["copies", "--tiny", "--rows", str(tmp_path)]) == 0
    found = {row.case["rollout.weights"]: row.numbers for row in read(tmp_path)["sampling_step"]}
    assert 0 < found["int8"]["relative_error"] < found["fp8"]["relative_error"] < 0.1


def test_wrong_results_are_an_exit_code(monkeypatch, capsys) -> None:
    monkeypatch.setitem(gpu_measure.PRODUCTS, "int8", lambda *given: 1.1 * gpu_measure.multiplied(*given))
    assert main(["copies", "--tiny"]) == 1
    assert "wrong: the int8 product is off by 0.1 of its norm" in capsys.readouterr().out


def test_full_sizes_need_a_gpu(monkeypatch, capsys) -> None:
    monkeypatch.setattr(gpu_measure, "on_gpu", lambda: False)
    with pytest.raises(SystemExit):
        main(["network"])
    assert "--tiny takes sizes for a CPU" in capsys.readouterr().err


@pytest.mark.long
def test_operations_of_a_prediction_are_those_of_the_matrices() -> None:
    """28 pairs of blocks; a token has 14 C^2 weights in a block, and attention to S patches, T frames or L words."""
    size, c, pairs = SIZES["240p x 34"], 1152, 28
    frames, patches, words = 10, 15 * 27, 120
    tokens = frames * patches
    weights = 2 * tokens * 14 * c * c + 2 * words * 2 * c * c  # keys and values of the words once
    attention = 4 * c * tokens * (patches + words) + 4 * c * tokens * (frames + words)
    expected = pairs * (2 * weights + attention)
    assert forward_flops(size) == pytest.approx(
        expected, rel=0.02
    )  # embedders and the last layer come on top


def fused_row(way: str, kind: str, seconds: float, kept: int = 100, size: str = "a") -> Row:
    case = {"operation": "modulated_norm", "size": size, "pass": kind, "implementation": way}
    return Row("fused_ops", case, {"seconds": seconds, "kept_bytes": kept}, HERE)


@pytest.mark.parametrize(
    ("seconds", "kept", "taken"),
    [(0.9, 100, "triton"), (0.95, 100, "reference"), (2.0, 99, "triton"), (0.5, 200, "triton")],
)
def test_the_rule_of_fused_operations(seconds: float, kept: int, taken: str) -> None:
    rows = [
        *(fused_row("compile", kind, 1.0) for kind in ("forward", "both")),
        *(fused_row("triton", kind, seconds, kept) for kind in ("forward", "both")),
    ]
    [line] = rule(rows)
    assert line.startswith(f"modulated_norm: {taken} (")
    slower = [fused_row("compile", kind, 1.0, 100, "b") for kind in ("forward", "both")]
    slower += [fused_row("triton", kind, 1.0, 100, "b") for kind in ("forward", "both")]
    assert rule([*rows, *slower])[0].startswith("modulated_norm: reference"), "every size counts"
    assert "not measured" in rule([*rows, *slower[:1]])[0]


KERNELS = """
import sys, torch, gpu_kernels as g
cpu, real = torch.device("cpu"), g.paired_dpo_loss
cases = {name.split()[0]: (name, case) for name, case in g.fused_cases(large=False)}
assert len(cases) == 4
g.fused_cases = lambda large: cases.values()
assert g.wrong_kernels(cpu, large=False) == []
g.fused_cases = lambda large: []
g.paired_dpo_loss = lambda *given, beta, backend: real(*given, beta=beta + (backend == "triton"), backend=backend)
assert len(g.wrong_kernels(cpu, large=False)) == 2, "a kernel with another beta, in two types"
"""


@pytest.mark.long
def test_kernels_are_compared_without_pytest() -> None:
    """With one case of each fused operation; tests/kernels/test_interpreted.py has them all.

    In another process, because Triton decides whether it interprets when it is imported.
    """
    paths = os.pathsep.join(str(ROOT / part) for part in (".", "kernels", "bench"))
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": paths}
    command = [sys.executable, "-c", KERNELS]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
