"""Batches arrive whole, in order and prepared, nothing stays open, and not too many wait."""

import pytest
import torch

from beit_fast.train import loop
from beit_fast.train.prefetch import STEPS_IN_FLIGHT, InFlight, device_batches


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


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs another stream")
@pytest.mark.parametrize("ahead", [False, True], ids=["in-turn", "ahead"])
def test_what_a_loader_made_on_the_device_stays_and_its_memory_with_it(ahead):
    """Made on a stream of the loader's own, which has the memory again when it is dropped."""
    device, maker = torch.device("cuda"), torch.cuda.Stream()

    def made():
        for number in range(20):
            with torch.cuda.stream(maker):
                x = torch.full((2**22,), number, device=device)
                maker.synchronize()
            x.record_stream(torch.cuda.current_stream())
            yield {"x": x, "y": torch.full((3,), number)}

    def slowly_doubled(batch):
        torch.cuda._sleep(20_000_000)
        return {name: 2 * value for name, value in batch.items()}

    came = list(device_batches(made(), device, slowly_doubled, ahead=ahead))
    for number, batch in enumerate(came):
        assert (batch["x"] == 2 * number).all()
        assert batch["y"].tolist() == [2 * number] * 3


def test_an_error_of_the_loader_closes_it_and_reaches_the_caller():
    closed = []

    def fails(batch):
        raise OSError("no space")

    with pytest.raises(OSError, match="no space"):
        next(device_batches(numbers(closed), torch.device("cpu"), fails))
    assert closed


class FakeDevice:
    """A device that does its work when the host waits for it, and not before."""

    def __init__(self):
        self.launched = self.done = 0

    def event(self, blocking):
        assert blocking  # a host that spins takes a core from the loader
        return FakeEvent(self)


class FakeEvent:
    def __init__(self, device):
        self.device, self.step = device, None

    def record(self):
        self.device.launched += 1
        self.step = self.device.launched

    def synchronize(self):
        assert self.step > self.device.done, "waits twice for one step"
        self.device.done = self.step


def test_at_most_two_steps_are_in_flight_and_a_second_one_always_is(
    tmp_path, run_toy, toy_task, monkeypatch
):
    device, task = FakeDevice(), toy_task()
    monkeypatch.setattr(torch.cuda, "Event", device.event)
    monkeypatch.setattr(loop, "InFlight", lambda _: InFlight(torch.device("cuda", 0)))
    in_flight, fetched = [], []

    def on_step(step):
        in_flight.append(step + 1 - device.done)
        fetched.append(len(task.fetched) - device.done)

    task.on_step = on_step
    run_toy(tmp_path, task, accumulate=1)
    assert in_flight == [1] + [STEPS_IN_FLIGHT] * 11
    assert max(fetched) == STEPS_IN_FLIGHT == 2  # batches that the device holds


def test_a_cpu_makes_no_events(monkeypatch):
    def no_event(**options):
        raise AssertionError("an event on a CPU")

    monkeypatch.setattr(torch.cuda, "Event", no_event)
    in_flight = InFlight(torch.device("cpu"))
    for _ in range(5):
        in_flight.add()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a device that runs behind")
def test_on_a_gpu_the_host_waits_for_the_step_before_and_not_for_the_last():
    in_flight, ends = InFlight(torch.device("cuda")), []
    for _ in range(4):
        torch.cuda._sleep(200_000_000)
        end = torch.cuda.Event()
        end.record()
        ends.append(end)
        in_flight.add()
        assert all(e.query() for e in ends[:-1])
        assert not ends[-1].query()
