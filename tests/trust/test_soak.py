"""The soak's own rule: what grows with the work is seen, what fills once is not."""

import pytest
import torch

from trust import soak

KEPT: list[object] = []


@pytest.fixture(autouse=True)
def nothing_kept():
    yield
    KEPT.clear()


def leaking(kib: int):
    return lambda number: KEPT.append(torch.ones(256 * kib))


def test_what_does_not_grow_is_flat(monkeypatch):
    """Also a cache that fills at first, and memory that is freed again."""

    def part(number: int) -> None:
        if number < 10:
            KEPT.append(torch.ones(2**20))
        torch.ones(2**18 * (1 + number % 7)).sum()

    monkeypatch.setitem(soak.PARTS, "part", (part, 60, 0))
    assert soak.flat(soak.soak("part"))


@pytest.mark.parametrize("leak", [leaking(256), lambda number: KEPT.append([number])])
def test_a_leak_of_each_call_is_seen(monkeypatch, leak):
    """256 KiB of memory, or one object: 120 calls in the second half."""
    monkeypatch.setitem(soak.PARTS, "part", (lambda number: [leak(number) for _ in range(2)], 120, 5))
    assert not soak.flat(soak.soak("part"))
