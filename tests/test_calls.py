"""How modules' calls are followed: hooks that go away, states as they came, and calls made again."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from resode.calls import hooked, recorded, within


class Writing(nn.Module):
    """Writes into its state, and takes it twice."""

    def forward(self, x, other, *, scale=1.0):
        y = scale * (x + other)
        x.zero_()
        return y, "more"


def test_hooks_go_with_an_error_too():
    class Failing(nn.Module):
        def forward(self, x):
            raise RuntimeError("no")

    seen = []
    module = Failing()
    for always in (False, True):
        with pytest.raises(RuntimeError, match="no"):
            with hooked({"it": module}, after=lambda key, *called: seen.append(key), always=always):
                module(torch.ones(1))
        assert not module._forward_hooks and not module._forward_pre_hooks
    assert seen == ["it"]


def test_a_call_has_the_state_as_it_came_and_is_made_again():
    """The same tensor may be the state and another argument: only its first place takes another state."""
    module, x = Writing(), torch.ones(2, 3)
    with recorded({"it": module}, copies=True) as calls:
        module(x, x, scale=2.0)
    [made] = calls
    assert made.x is not None and torch.equal(made.x, torch.ones(2, 3)) and not x.any()
    assert made.y is not None and made.y.eq(4).all() and made.keeps_shape
    assert torch.equal(made.again(torch.full((2, 3), 5.0))[0], torch.full((2, 3), 10.0))
    made.check_shape()


def test_calls_are_in_the_order_of_their_ends():
    inner, outer = nn.Linear(2, 3), nn.Sequential()
    outer.append(inner)
    with recorded({"outer": outer, "outer.0": inner}) as calls:
        outer(torch.ones(1, 2))
    assert [made.name for made in calls] == ["outer.0", "outer"]
    assert calls[0].at_y == calls[1].at_y and calls[0].output is calls[1].output
    with pytest.raises(ValueError, match=r"must keep the state's shape: outer maps \(1, 2\) to \(1, 3\)"):
        calls[1].check_shape()
    with recorded({"it": inner}) as calls, torch.no_grad():
        inner(x := torch.ones(1, 2))
    assert calls[0].state is x and calls[0].x is x


def test_within_is_by_whole_names():
    assert within("a.b", None) and within("a.b", "") and within("", "") and within("a", ["c", "a"])
    assert not within("ab", "a") and not within("", "a") and not within("a", [])
