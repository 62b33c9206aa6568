"""Steps in a CUDA graph are the steps without one, and a failed capture ends the run."""

import collections
import contextlib
import subprocess
import sys

import pytest
import torch

from beit_fast.train import graph
from beit_fast.train.config import RunConfig
from beit_fast.train.graph import EAGER_STEPS, CaptureError, Graphed, graphed
from beit_fast.train.state import checkpoint_paths, load_checkpoint
from beit_fast.train.world import World
from task_runs import SUPPORT

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
    assert "a process that dies leaves the others waiting" in caplog.text


def test_two_kinds_of_graphs_are_not_mixed():
    with pytest.raises(ValueError, match="choose one"):
        RunConfig(output="x", steps=1, cuda_graph=True, compile="reduce-overhead")


def test_the_compilers_graphs_are_refused_with_accumulation_and_both_remedies_are_taken():
    options = {"output": "x", "steps": 1}
    with pytest.raises(ValueError, match=r"run\.accumulate is 2: pass --run\.compile default") as e:
        RunConfig(**options, compile="reduce-overhead", accumulate=2)
    for remedy in ("--run.cuda_graph true goes with it", "--run.accumulate 1"):
        assert remedy in str(e.value)
    RunConfig(**options, compile="default", accumulate=2, cuda_graph=True)
    RunConfig(**options, compile="reduce-overhead", accumulate=1)


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
@pytest.mark.parametrize(("fault", "why"), [("wait", "not permitted"), ("memory", "out of memory")])
def test_on_a_gpu_a_failed_capture_ends_the_run_which_resumes_without_a_graph(
    tmp_path, run_toy, fault, why
):
    # In a process of its own: it can do nothing more afterwards.
    script = SUPPORT / "failed_capture.py"
    command = [sys.executable, str(script), str(tmp_path / "run"), fault]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert "CaptureError: the step cannot be captured" in ended.stderr
    message = ended.stderr.partition("CaptureError: the step cannot")[2]
    assert why in message
    assert "--run.cuda_graph false" in message
    assert load_checkpoint(checkpoint_paths(tmp_path / "run")[-1]).step == 2
    options = {"accumulate": 1, "compile": "off", "device": "cuda"}
    for name in ("run", "undisturbed"):
        run_toy(tmp_path / name, world=GPU, **options)
    undisturbed = weights_of(tmp_path / "undisturbed")
    for name, value in weights_of(tmp_path / "run").items():
        assert torch.equal(value, undisturbed[name]), name


@needs_gpu
def test_the_preparation_is_a_graph_of_its_own(tmp_path, run_toy, toy_task, monkeypatch):
    captured = []
    capture = Graphed._capture

    def noted(self, batches):
        captured.append(self._name)
        return capture(self, batches)

    monkeypatch.setattr(Graphed, "_capture", noted)
    run_toy(tmp_path, toy_task(), GPU, cuda_graph=True, compile="off", device="cuda")
    assert sorted(captured) == ["the preparation of batches", "the step"]


@needs_gpu
def test_two_graphs_at_once_draw_the_numbers_of_none(tmp_path, run_toy, toy_task):
    for name, used in (("plain", False), ("both", True)):
        task = toy_task()
        # Time for the next preparation to be replayed before this step draws its dropout.
        task.on_step = lambda step: torch.cuda._sleep(20_000_000)
        options = {"accumulate": 1, "compile": "off", "device": "cuda", "log_every": 12}
        run_toy(tmp_path / name, task, GPU, cuda_graph=used, prepare_ahead=used, **options)
    plain, both = weights_of(tmp_path / "plain"), weights_of(tmp_path / "both")
    for name, value in plain.items():
        assert torch.equal(value, both[name]), name


class FakeState:
    """The default generator of a GPU as far as a capture needs it; `state` is any object."""

    def __init__(self, state):
        self.state = state

    def graphsafe_get_state(self):
        return FakeState(self.state)

    def clone_state(self):
        return FakeState(object())

    def graphsafe_set_state(self, other):
        self.state = other.state

    def manual_seed(self, seed):
        pass


class FakeStream:
    def wait_stream(self, other):
        pass


class FakeCuda:
    """Captures on a CPU: what is captured runs at once, and a replay does nothing.

    What fails ends the capture as in torch 2.11: with an error of its own over the first.
    """

    def __init__(self, monkeypatch):
        self.own = object()
        self.generator = FakeState(self.own)
        self.capturing = False
        self.captures = []  # stream, generator's state at the begin and at the end
        self.num_replays = 0
        for name, value in {
            "Stream": lambda device: FakeStream(),
            "current_stream": lambda device: FakeStream(),
            "stream": lambda stream: contextlib.nullcontext(),
            "default_generators": collections.defaultdict(lambda: self.generator),
            "CUDAGraph": lambda: self,
            "graph": self.graph,
        }.items():
            monkeypatch.setattr(torch.cuda, name, value)
        monkeypatch.setattr(torch.Tensor, "record_stream", lambda tensor, stream: None)

        def on_fake_cuda(function, device, name, **options):
            return Graphed(function, torch.device("cuda", 0), name, **options)

        monkeypatch.setattr(graph, "Graphed", on_fake_cuda)

    @contextlib.contextmanager
    def graph(self, graph, *, stream, capture_error_mode):
        begin, self.capturing = self.generator.state, True
        try:
            yield
        except RuntimeError:
            raise RuntimeError("CUDA error: operation failed due to a previous error") from None
        finally:
            self.capturing = False
            self.captures.append((stream, begin, self.generator.state))

    def replay(self):
        self.num_replays += 1


@pytest.fixture
def fake_cuda(monkeypatch):
    return FakeCuda(monkeypatch)


REMEDY = "pass --run.cuda_graph false"
FAULTS = {
    "wait": (RuntimeError("CUDA error: not permitted when capturing\nmore"), "not permitted"),
    "memory": (torch.OutOfMemoryError("CUDA out of memory. Tried to"), "a smaller --data.batch"),
    "other": (ValueError("no such thing"), "no such thing"),
}


def ones(number):
    return [{"x": torch.full((2,), float(number))}]


@pytest.mark.parametrize("fault", FAULTS)
def test_a_failed_capture_raises_says_why_and_what_to_pass_and_calls_nothing_again(
    fake_cuda, fault
):
    error, reason = FAULTS[fault]
    calls = []

    def function(batches):
        calls.append(fake_cuda.capturing)
        if fake_cuda.capturing:
            raise error
        return batches[0]

    graph = Graphed(function, torch.device("cuda", 0), "the thing")
    for number in range(EAGER_STEPS):
        graph(ones(number))
    expected = ValueError if fault == "other" else CaptureError
    with pytest.raises(expected) as raised:
        graph(ones(EAGER_STEPS))
    assert reason in str(raised.value)
    if fault != "other":
        assert raised.value.__cause__ is error
        assert str(raised.value).startswith("the thing cannot be captured in a CUDA graph: ")
        assert REMEDY in str(raised.value)
        assert "more" not in str(raised.value)
    assert calls == [False] * EAGER_STEPS + [True]
    assert fake_cuda.num_replays == 0


def test_a_run_whose_step_cannot_be_captured_keeps_its_checkpoint_and_resumes_without_a_graph(
    fake_cuda, tmp_path, run_toy, toy_task
):
    task, steps = toy_task(), []

    def wait(step):
        steps.append(step)
        if fake_cuda.capturing:
            raise RuntimeError("CUDA error: operation not permitted when stream is capturing")

    task.on_step = wait
    options = {"accumulate": 1, "save_every": 2}
    with pytest.raises(CaptureError, match=f"^the step cannot be captured.*{REMEDY}"):
        run_toy(tmp_path / "run", task, cuda_graph=True, **options)
    assert steps == [0, 1, 2, 3]
    assert load_checkpoint(checkpoint_paths(tmp_path / "run")[-1]).step == 2
    for name in ("run", "undisturbed"):
        run_toy(tmp_path / name, cuda_graph=False, **options)
    undisturbed = weights_of(tmp_path / "undisturbed")
    for name, value in weights_of(tmp_path / "run").items():
        assert torch.equal(value, undisturbed[name]), name


@pytest.mark.parametrize("fails", [False, True], ids=["captured", "failed"])
@pytest.mark.parametrize("draws", [False, True], ids=["draws-nothing", "draws"])
def test_what_draws_nothing_is_captured_with_a_generator_state_of_its_own(fake_cuda, draws, fails):
    def function(batches):
        if fails and fake_cuda.capturing:
            raise RuntimeError("CUDA error: no")
        return batches[0]

    graph = Graphed(function, torch.device("cuda", 0), "the thing", draws=draws)
    with pytest.raises(CaptureError) if fails else contextlib.nullcontext():
        for number in range(EAGER_STEPS + 2):
            assert fake_cuda.generator.state is fake_cuda.own
            graph(ones(number))
    ((_, begin, end),) = fake_cuda.captures
    assert begin is end
    assert (begin is fake_cuda.own) == draws
    assert fake_cuda.generator.state is fake_cuda.own
    assert fake_cuda.num_replays == (0 if fails else 2)


def test_step_and_preparation_share_neither_stream_nor_generator_state(
    fake_cuda, tmp_path, run_toy
):
    run_toy(tmp_path, cuda_graph=True)
    (stream, state, _), (other_stream, other_state, _) = fake_cuda.captures
    assert stream is not other_stream
    assert state is not other_state
    assert other_state is fake_cuda.own  # the step's, captured second: its numbers are the run's
