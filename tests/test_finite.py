"""Whether numbers are finite."""

import pytest
import torch

from hf_attribution.finite import all_finite


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("where", [0, 1234, 4999])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_one_entry_is_found_anywhere(dtype, where, value):
    values = torch.randn(50, 100, generator=torch.Generator().manual_seed(0)).to(dtype)
    assert all_finite(values)
    values.view(-1)[where] = value
    assert not all_finite(values)


def test_both_infinities_and_extremes():
    assert not all_finite(torch.tensor([-torch.inf, torch.inf]))
    assert all_finite(torch.full((3,), torch.finfo(torch.float32).max))
    assert all_finite(torch.tensor([], dtype=torch.float32))
    assert all_finite(torch.tensor([[1, 2]]))
