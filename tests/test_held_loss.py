"""The held-out flow loss, window by window."""

import pytest
import torch

from selfflow.eval.held_loss import by_window
from selfflow.worldmodel.flow import flow_loss


def test_a_windows_loss_is_its_own_flow_loss() -> None:
    answer, truth = torch.randn(2, 6, 5, 4)  # six windows
    mask = (torch.rand(6, 5, 1) > 0.4).float()
    mask[:, 0] = 1
    mask[3] = 0
    found = by_window(answer, truth, mask)
    for i in (0, 1, 2, 4, 5):
        one = slice(i, i + 1)
        whole = flow_loss({"x": answer[one]}, {"x": truth[one]}, {"x": mask[one]})["x"]
        assert found[i].item() == pytest.approx(whole.item(), rel=1e-5)
    assert found[3].isnan()  # says nothing, rather than a perfect 0
    apart = torch.rand(6, 5, 4).round()  # a mask by channel, as of actions after a subtask's end
    apart[:, 0] = 1
    assert by_window(torch.zeros(6, 5, 4), torch.full((6, 5, 4), 2.0), apart).tolist() == [4.0] * 6
