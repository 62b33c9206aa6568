"""Memory that runs out in a step: what is said, and that nothing of the step is left."""

import hashlib

import pytest
import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

from beit_fast.data.bad_samples import BadDataError
from beit_fast.train.config import RunConfig
from beit_fast.train.memory import OutOfMemory, sizes_told
from beit_fast.train.state import checkpoint_paths
from faults import Injector, fired
from task_runs import assert_the_same_run, steps_of
from toy import ToyTask

pytestmark = pytest.mark.promise("R21")
PLACES = {
    "oom": "in the forward pass",
    "oom_backward": "in the backward pass, which exchanges gradients",
    "oom_update": "updating the weights",
}


class Short(ToyTask):
    """The toy that meets faults in a step, `number` of them in this process."""

    def __init__(self, injector):
        super().__init__()
        self.injector = injector
        self.on_step = lambda step: injector.meet("step", step + 1)

    def loss(self, batch):
        loss, metrics = super().loss(batch)
        return self.injector.meet("loss", self.step + 1, loss), metrics


def digests(folder):
    return {p.name: hashlib.sha256(p.read_bytes()).digest() for p in folder.iterdir()}


@pytest.mark.parametrize("kind", PLACES)
def test_the_error_has_step_place_and_sizes_and_the_last_checkpoint_stays(tmp_path, run_toy, kind):
    output, fault = tmp_path / "parts", f"0:6:{kind}"
    run_toy(output, stop_at=4)
    (path,) = checkpoint_paths(output)
    before = digests(path)
    task = Short(Injector(output, [fault]))
    hook = register_optimizer_step_pre_hook(
        lambda *_: task.injector.meet("update", task.step + 1) and None
    )
    try:
        with pytest.raises(OutOfMemory) as error:
            run_toy(output, task)
    finally:
        hook.remove()
    assert fired(output) == {fault: 1}
    assert str(error.value) == (
        "memory ran out (CUDA out of memory. Tried to allocate 2.00 GiB.) at step 6, "
        f"{PLACES[kind]}: 2 x 4 images on this rank in fp32 (x 4x8). Make the batches smaller "
        "(--data.batch_size, with --run.accumulate for the same step), or the model; the same "
        "command then goes on from the last checkpoint"
    )
    assert steps_of(output) == [4]
    assert digests(path) == before
    run_toy(output)
    run_toy(tmp_path / "whole")
    assert_the_same_run(output, tmp_path / "whole")


@pytest.mark.parametrize(
    ("met", "raised", "said"),
    [
        (RuntimeError("a bug"), RuntimeError, "^a bug$"),
        (BadDataError("of bad files: out of memory"), BadDataError, "^of bad files"),
        (MemoryError(), OutOfMemory, r"memory ran out \(MemoryError\) at step 1, "),
    ],
)
def test_other_errors_pass_as_they_are(met, raised, said):
    batches = [{"x": torch.zeros(4, 8)}]
    run = RunConfig(output="x", steps=1)
    with pytest.raises(raised, match=said), sizes_told(1, batches, run, images=4):
        raise met
