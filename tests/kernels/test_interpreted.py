"""The Triton kernels of all operations without a GPU, in Triton's interpreter; on a GPU the files *_gpu.py run them."""

import pytest
from interpreter import run_interpreted

COMMON = (
    "test_paired_dpo",
    "test_paired_dpo_goldens",
    "test_paired_dpo_options",
    "test_paired_dpo_registration",
    "test_paired_dpo_results",
    "test_paired_dpo_batched",
    "test_paired_dpo_numbers",
)
CHECKS = ("paired_dpo_triton_checks", "fused_ops/fused_ops_triton_checks")
# Gradcheck asks for hundreds of losses, which takes a minute interpreted; the checks have a small one.
SELECT = "triton and not test_gradcheck and not adds_the_winners_error and not test_compile"


@pytest.mark.long
def test_the_kernels_interpreted() -> None:
    """One process runs all tests that all backends pass, for Triton's, and the checks of Triton's kernels."""
    modules = (*COMMON, "test_ordered_delta", *CHECKS)
    run_interpreted(*(f"{module}.py" for module in modules), select=SELECT)
