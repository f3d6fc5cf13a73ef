"""Linear layers by oneDNN: the same results, names and gradients."""

import pytest
import torch
from torch import nn

from selfflow.policies.head import ActionHead, HeadConfig
from selfflow.policies.quick import QuickLinear, quicken
from selfflow.worldmodel.layers import mlp


@pytest.mark.parametrize("copies", [False, True])
@pytest.mark.parametrize("rows", [1, 8, 83])
def test_results_are_the_same_to_rounding(rows: int, copies: bool):
    torch.manual_seed(0)
    plain, quick = mlp(192, 768), mlp(192, 768)
    quick.load_state_dict(plain.state_dict())
    quicken(quick, copies)
    if torch.backends.mkldnn.is_available():
        assert isinstance(quick[0], QuickLinear)
        assert isinstance(quick[1], nn.Identity)  # made with the first
    assert quick.state_dict().keys() == plain.state_dict().keys()
    x = torch.randn(2, rows, 192)
    with torch.no_grad():
        torch.testing.assert_close(quick(x), plain(x), rtol=1e-6, atol=1e-6)
    x.requires_grad_()
    (expected,) = torch.autograd.grad(plain(x).sum(), x)
    (found,) = torch.autograd.grad(quick(x).sum(), x)
    assert torch.equal(found, expected)


def test_a_head_at_one_time_is_the_same_for_many_rows():
    torch.manual_seed(0)
    head = ActionHead(HeadConfig(48, 2, 3, 4.0, 5, 8, 16)).requires_grad_(False)
    for parameter in head.parameters():
        parameter.normal_(std=0.2)
    x, features = torch.randn(3, 5, 8), torch.randn(1, 7, 16)
    one = head(x, head.modulations(torch.tensor([0.3])), head.read(features))
    each = head(x, head.modulations(torch.full((3,), 0.3)), head.read(features))
    torch.testing.assert_close(one, each, rtol=1e-4, atol=1e-5)
    quicken(head, copies=True)
    with torch.no_grad():
        quick = head(x, head.modulations(torch.tensor([0.3])), head.read(features))
    torch.testing.assert_close(quick, one, rtol=1e-4, atol=1e-5)
