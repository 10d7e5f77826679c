"""The errors of the paired loss for wrong arguments."""

import inspect
import math

import pytest
import torch
from pair_tensors import random_tensors
from torch import Tensor
from vpo_kernels import available_backends, backends, paired_dpo_loss
from vpo_kernels.paired_dpo.contract import PairTensors


def test_signature() -> None:
    """Others rely on these names in this order; later parameters are keyword only."""
    parameters = inspect.signature(paired_dpo_loss).parameters
    positional = [name for name, p in parameters.items() if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert positional == [*PairTensors._fields, "beta", "reduction", "pair_weight", "mask", "backend"]
    defaults = {name: p.default for name, p in parameters.items() if p.default is not p.empty}
    assert defaults == {
        "beta": 500.0,
        "reduction": "mean",
        "pair_weight": None,
        "mask": None,
        "backend": "auto",
        "target_noise": None,
        "target_scales": None,
        "winner_anchor": 0.0,
        "loser_scaling": None,
        "margin_graph": False,
    }


@pytest.mark.parametrize("beta", [0, 0.0, -1.0, math.nan, math.inf, -math.inf, True, "500", None])
def test_bad_beta(beta: object) -> None:
    with pytest.raises(ValueError, match=r"beta=.* must be a finite number above 0"):
        paired_dpo_loss(*random_tensors(2, 3), beta=beta)


@pytest.mark.parametrize("argument", range(1, 6))
def test_shape_mismatch(argument: int) -> None:
    tensors = list(random_tensors(2, 3, 4))
    tensors[argument] = tensors[argument][:, :2]
    name = PairTensors._fields[argument]
    with pytest.raises(
        ValueError, match=rf"^{name} has shape \[2, 2, 4\], but must .*\[2, 3, 4\]; .*slice {name}"
    ):
        paired_dpo_loss(*tensors)


@pytest.mark.parametrize("argument", range(1, 6))
def test_device_mismatch(argument: int) -> None:
    tensors = list(random_tensors(2, 3))
    tensors[argument] = tensors[argument].to("meta")
    name = PairTensors._fields[argument]
    with pytest.raises(
        ValueError, match=rf"^{name} is on meta, but must be .* on cpu; pass {name}\.to\('cpu'\)"
    ):
        paired_dpo_loss(*tensors)


@pytest.mark.parametrize("argument", range(6))
def test_dtype_and_type(argument: int) -> None:
    name = PairTensors._fields[argument]
    tensors: list = list(random_tensors(2, 3))
    tensors[argument] = tensors[argument].detach().to(torch.int64)
    with pytest.raises(ValueError, match=rf"^{name} has dtype torch.int64, but must be .*{name}\.float\(\)"):
        paired_dpo_loss(*tensors)
    tensors[argument] = [1.0]
    with pytest.raises(ValueError, match=rf"^{name} is list, but must be a tensor"):
        paired_dpo_loss(*tensors)


@pytest.mark.parametrize("shape", [(0, 3), (2, 0), ()])
def test_empty(shape: tuple[int, ...]) -> None:
    empty = torch.zeros(shape)
    with pytest.raises(ValueError, match=r"at least one pair and one element; skip the step"):
        paired_dpo_loss(*[empty] * 6)


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (torch.ones(2, 3, 4), r"mask is torch.float32, but must be a bool tensor, .*pass mask != 0"),
        (torch.ones(5, dtype=torch.bool), r"mask has shape \[5\], but must broadcast to \[2, 3, 4\]; give"),
        (torch.ones(1, 2, 3, 4, dtype=torch.bool), r"mask has shape \[1, 2, 3, 4\], but must broadcast"),
        (torch.ones(4, dtype=torch.bool, device="meta"), r"mask is on meta, .*pass mask\.to\('cpu'\)"),
        (
            torch.tensor([[[True]], [[False]]]),
            r"mask leaves pair 1 of 2 no element that counts, .*drop the pair",
        ),
    ],
)
def test_bad_mask(mask: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        paired_dpo_loss(*random_tensors(2, 3, 4), mask=mask)


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        (torch.ones(3), r"pair_weight is \[3\], but must be .* tensor \[2\], one per pair; "),
        (torch.ones(2, 1), r"pair_weight is \[2, 1\], but"),
        (torch.ones(2, dtype=torch.int32), r"pair_weight has dtype torch.int32, .*pair_weight\.float\(\)"),
        (torch.ones(2, device="meta"), r"pair_weight is on meta, .*pair_weight\.to\('cpu'\)"),
    ],
)
def test_bad_pair_weight(weight: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        paired_dpo_loss(*random_tensors(2, 3), pair_weight=weight)


def test_bad_reduction() -> None:
    with pytest.raises(ValueError, match=r"reduction='none' must be 'mean' or 'sum'"):
        paired_dpo_loss(*random_tensors(2, 3), reduction="none")


def test_unknown_backend_names_what_there_is() -> None:
    message = r"backend='cuda' is unknown; it must be one of: auto, reference, native, triton"
    with pytest.raises(ValueError, match=message):
        paired_dpo_loss(*random_tensors(2, 3), backend="cuda")


def test_a_backend_that_does_not_run_here_says_why_and_what_does(monkeypatch: pytest.MonkeyPatch) -> None:
    reasons = {"native": "no compiler was there", "triton": ""}
    monkeypatch.setattr(backends, "_import_error", lambda operation, name: reasons.get(name, ""))
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    message = (
        r"backend='native' is not available for tensors on cpu: no compiler was there. .*: auto, reference$"
    )
    with pytest.raises(ValueError, match=message):
        paired_dpo_loss(*random_tensors(2, 3), backend="native")
    with pytest.raises(
        ValueError, match=r"backend='triton' .*on CUDA and ROCm devices, .*TRITON_INTERPRET=1"
    ):
        paired_dpo_loss(*random_tensors(2, 3), backend="triton")
    assert available_backends("cpu")["native"] == "no compiler was there"
    assert available_backends("cuda") == {"reference": "", "native": "it runs on the CPU only", "triton": ""}
    assert "CUDA" in available_backends("mps")["triton"]


def test_without_the_native_backend_auto_says_so_once_and_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "_import_error", lambda operation, name: "no compiler was there")
    backends._warn_of_fallback.cache_clear()
    tensors = random_tensors(2, 9)
    with pytest.warns(
        RuntimeWarning, match="native backend is not available .no compiler was there."
    ) as said:
        outs = [paired_dpo_loss(*tensors) for _ in range(3)]
    assert len(said) == 1
    named = paired_dpo_loss(*tensors, backend="reference")
    assert all(torch.equal(a, b) for a, b in zip(outs[0], named, strict=True))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"winner_anchor": -1.0}, r"winner_anchor=-1.0 must be a finite number of at least 0"),
        ({"winner_anchor": math.nan}, r"winner_anchor=nan must be"),
        ({"loser_scaling": 1.5}, r"loser_scaling=1.5 must be None or a number from 0 to 1"),
        ({"target_noise": torch.zeros(2, 3)}, r"target_noise is given without target_scales"),
        ({"target_scales": (1.0, -1.0)}, r"target_scales is given without target_noise"),
        (
            {"target_noise": torch.zeros(2, 4), "target_scales": (1, 1)},
            r"^target_noise has shape \[2, 4\], but",
        ),
        (
            {"target_noise": torch.zeros(2, 3), "target_scales": (torch.ones(3), 1.0)},
            r"target_scales\[0\] is \[3\], but must be a finite number or a tensor \[2\]",
        ),
        ({"beta": torch.ones(3)}, r"beta is \[3\], but must be a finite number or a tensor \[2\]"),
        ({"beta": torch.ones(2, dtype=torch.int64)}, r"beta has dtype torch.int64, .*beta\.float\(\)"),
    ],
)
def test_bad_options(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        paired_dpo_loss(*random_tensors(2, 3), **options)


def test_float8_is_refused() -> None:
    tensors = list(random_tensors(2, 3))
    tensors[2] = tensors[2].to(torch.float8_e4m3fn)
    with pytest.raises(ValueError, match=r"reference_winner has dtype torch.float8_e4m3fn, .*bfloat16\(\)"):
        paired_dpo_loss(*tensors)


@pytest.mark.parametrize("scaling", [-0.5, -1e-9])
def test_a_loser_scaling_below_zero_is_refused(scaling: float) -> None:
    with pytest.raises(ValueError, match=rf"loser_scaling={scaling!r} must be None or a number from 0 to 1"):
        paired_dpo_loss(*random_tensors(2, 3), loser_scaling=scaling)
