"""Batches arrive whole, in order and prepared, and nothing stays open."""

import pytest
import torch

from beit_fast.train.prefetch import device_batches


def numbers(closed):
    try:
        for number in range(100):
            yield {"x": torch.full((3,), number)}
    finally:
        closed.append(True)


def doubled(batch):
    return {"x": 2 * batch["x"]}


DEVICES = ["cpu"] + ["cuda"] * torch.cuda.is_available()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("ahead", [False, True], ids=["in-turn", "ahead"])
def test_batches_come_in_order_prepared_on_the_device(device, ahead):
    closed = []
    batches = device_batches(numbers(closed), torch.device(device), doubled, ahead=ahead)
    for number in range(5):
        batch = next(batches)
        assert batch["x"].device.type == device
        assert batch["x"].tolist() == [2 * number] * 3
    assert not closed
    batches.close()
    assert closed


def test_an_error_of_the_loader_closes_it_and_reaches_the_caller():
    closed = []

    def fails(batch):
        raise OSError("no space")

    with pytest.raises(OSError, match="no space"):
        next(device_batches(numbers(closed), torch.device("cpu"), fails))
    assert closed
