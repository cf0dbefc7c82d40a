import torch

from tokmask_peft.model.memory.step import LiveBytes


def test_storages_are_counted_once_until_they_are_freed():
    before = torch.ones(100)
    with LiveBytes() as live:
        live.exclude(before)
        view = before[:50].view(2, 25)
        assert live.now == 0
        twice = view * 2
        assert live.now == 50 * 4
        also = twice.reshape(-1)
        del twice
        assert live.now == 50 * 4
        big = torch.empty(1000)
        del big, also
        assert live.now == 0
    assert live.peak == 50 * 4 + 4000
