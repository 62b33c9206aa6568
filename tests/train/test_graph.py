"""Steps in a CUDA graph are the steps without one."""

import pytest
import torch

from beit_fast.train.config import RunConfig
from beit_fast.train.graph import EAGER_STEPS, Graphed
from beit_fast.train.loop import graphed
from beit_fast.train.parallel import World
from beit_fast.train.state import checkpoint_paths, load_checkpoint

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
GPU = World(0, 1, torch.device("cuda", 0))


def weights_of(output):
    return load_checkpoint(checkpoint_paths(output)[-1]).tensors["model"]


def test_a_graph_is_refused_without_a_gpu(tmp_path, run_toy):
    with pytest.raises(ValueError, match=r"the device is cpu: CUDA graphs need a GPU; pass --run"):
        run_toy(tmp_path, cuda_graph=True)


def test_several_processes_are_told_that_they_run_without_a_graph(caplog):
    step = object()
    run = RunConfig(output="x", steps=1, cuda_graph=True)
    assert graphed(step, run, World(0, 2, torch.device("cpu"))) is step
    assert "exchanged between 2 processes" in caplog.text


def test_two_kinds_of_graphs_are_not_mixed():
    with pytest.raises(ValueError, match="choose one"):
        RunConfig(output="x", steps=1, cuda_graph=True, compile="reduce-overhead")


@needs_gpu
@pytest.mark.parametrize("accumulate", [1, 2])
def test_replays_give_the_numbers_of_eager_steps(tmp_path, run_toy, accumulate):
    for name, captured in (("eager", False), ("graph", True)):
        options = {"accumulate": accumulate, "compile": "off", "device": "cuda"}
        run_toy(tmp_path / name, world=GPU, cuda_graph=captured, **options)
    eager, graph = weights_of(tmp_path / "eager"), weights_of(tmp_path / "graph")
    for name, value in eager.items():
        assert torch.equal(value, graph[name]), name


@needs_gpu
def test_a_step_that_cannot_be_captured_goes_on_without_a_graph(
    tmp_path, run_toy, toy_task, caplog
):
    task, plain = toy_task(), toy_task()
    calls = iter(range(100))

    def wait(step):
        if next(calls) == 2 * EAGER_STEPS:  # in the capture alone
            torch.cuda.synchronize()

    task.on_step = wait
    run_toy(tmp_path / "graph", task, GPU, cuda_graph=True, compile="off", device="cuda")
    assert caplog.text.count("cannot be captured") == 1
    run_toy(tmp_path / "eager", plain, GPU, compile="off", device="cuda")
    for name, value in weights_of(tmp_path / "eager").items():
        assert torch.equal(value, weights_of(tmp_path / "graph")[name])


@needs_gpu
def test_the_preparation_is_a_graph_of_its_own(tmp_path, run_toy, toy_task, monkeypatch):
    captured = []
    capture = Graphed._capture

    def noted(self, batches):
        capture(self, batches)
        captured.append((self._name, self.is_captured))

    monkeypatch.setattr(Graphed, "_capture", noted)
    run_toy(tmp_path, toy_task(), GPU, cuda_graph=True, compile="off", device="cuda")
    assert sorted(captured) == [("the preparation of batches", True), ("the step", True)]
