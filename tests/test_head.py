"""The action head: learns a conditional distribution, ignores what is masked, shares its memory."""

import pytest
import torch

from selfflow.policies.head import ActionHead, HeadConfig, head_loss
from selfflow.worldmodel.sampler import euler

CONFIG = HeadConfig(hidden=32, depth=2, heads=2, mlp_ratio=2.0, chunk=2, channels=3, memory=8)


def head() -> ActionHead:
    torch.manual_seed(0)
    made = ActionHead(CONFIG)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.normal_(std=0.1)
    return made


def test_a_fresh_head_predicts_zero() -> None:
    velocity = ActionHead(CONFIG).velocity(
        torch.randn(2, 2, 3), torch.rand(2), torch.randn(2, 5, 8)
    )
    assert (velocity == 0).all()


def test_draws_that_share_a_memory_equal_draws_with_their_own() -> None:
    h, x, tau, memory = head(), torch.randn(6, 2, 3), torch.rand(6), torch.randn(2, 5, 8)
    shared = h.velocity(x, tau, memory)
    own = h.velocity(x, tau, memory.repeat_interleave(3, 0))
    assert torch.allclose(shared, own, atol=1e-6)
    assert torch.allclose(shared, h(x, h.modulations(tau), h.read(memory)))
    for changed in (h.velocity(x, tau, memory.flip(0)), h.velocity(x, 1 - tau, memory)):
        assert not torch.allclose(shared, changed, atol=1e-4)


def test_loss_is_the_mean_over_known_entries_and_draws() -> None:
    fresh, actions = ActionHead(CONFIG), torch.randn(2, 2, 3)
    noise, weight = torch.randn(5, 2, 2, 3), torch.tensor([1.0, 0.0, 2.0]).expand(2, 2, 3)
    loss = head_loss(fresh, actions, weight, torch.randn(2, 5, 8), noise, torch.rand(5, 2))
    error = (noise - actions).square().mean(0)  # a fresh head predicts 0
    assert loss.item() == pytest.approx(((error * weight).sum() / weight.sum()).item())


def test_masked_actions_have_no_gradient() -> None:
    h, memory = head(), torch.randn(2, 5, 8)
    actions = torch.randn(2, 2, 3, requires_grad=True)
    weight = torch.ones(2, 2, 3)
    weight[1] = 0
    noise, tau = torch.randn(4, 2, 2, 3), torch.rand(4, 2)
    head_loss(h, actions, weight, memory, noise, tau).backward()
    assert actions.grad is not None
    assert (actions.grad[0] != 0).any()
    assert (actions.grad[1] == 0).all()
    assert head_loss(h, actions, torch.zeros(2, 2, 3), memory, noise, tau) == 0


@pytest.mark.slow
def test_learns_a_conditional_distribution() -> None:
    """The memory names one of two means; around it, dimension 2 takes one of two values."""
    torch.manual_seed(0)
    h = ActionHead(CONFIG)
    optimizer = torch.optim.AdamW(h.parameters(), 3e-3, fused=True)
    codes, means = torch.randn(2, 4, 8), torch.tensor([-0.6, 0.6])

    def data(n: int) -> tuple[torch.Tensor, torch.Tensor]:
        which = torch.randint(0, 2, (n,))
        actions = means[which][:, None, None].repeat(1, 2, 3)
        actions[:, :, 2] = torch.where(torch.rand(n, 1) < 0.5, -1.0, 1.0)
        return codes[which], actions

    for _ in range(250):
        memory, actions = data(48)
        noise, tau = torch.randn(4, *actions.shape), torch.rand(4, 48)
        loss = head_loss(h, actions, torch.ones_like(actions), memory, noise, tau)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.inference_mode():
        memory = h.read(codes.repeat_interleave(200, 0))
        x = euler(
            lambda x, t: h(x, h.modulations(torch.full((400,), t)), memory),
            torch.randn(400, 2, 3),
            20,
        )
    assert x[:200, :, :2].mean().item() == pytest.approx(-0.6, abs=0.1)
    assert x[200:, :, :2].mean().item() == pytest.approx(0.6, abs=0.1)
    assert x[:, :, :2].reshape(2, -1).std(1).max() < 0.2
    third = x[:, :, 2]
    assert (third.abs() - 1).abs().median() < 0.2  # both values, and little between them
    assert (third > 0).float().mean().item() == pytest.approx(0.5, abs=0.12)
    assert (third[:, 0].sign() == third[:, 1].sign()).float().mean() > 0.95


def test_sizes_are_checked() -> None:
    with pytest.raises(ValueError, match="multiple of heads"):
        HeadConfig(32, 2, 5, 2.0, 2, 3, 8)
