"""Files of events as TensorBoard reads them, and what a full disk makes of them."""

import resource

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from beit_fast.train.scalars import Scalars


def read(folder):
    """What TensorBoard shows: of each name (step, value)."""
    shown = EventAccumulator(str(folder)).Reload()
    return {
        name: [(event.step, event.value) for event in shown.Scalars(name)]
        for name in shown.Tags()["scalars"]
    }


def test_tensorboard_shows_what_was_written_and_not_what_a_resume_takes_back(tmp_path):
    first = Scalars(tmp_path, 0)
    for step in (1, 2, 3):
        first.write(step, {"loss": 0.5 * step, "a/b c": float(step)})
    again = Scalars(tmp_path, 2)
    again.write(3, {"loss": 8.0})
    assert read(tmp_path)["loss"] == [(1, 0.5), (2, 1.0), (3, 8.0)]
    assert read(tmp_path)["a/b c"] == [(1, 1.0), (2, 2.0)]
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.promise("R7")
def test_half_an_event_is_taken_back_so_that_later_ones_are_read(tmp_path):
    events = Scalars(tmp_path, 0)
    events.write(1, {"loss": 1.0})
    (path,) = tmp_path.iterdir()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 9, hard))
    try:
        with pytest.raises(OSError, match="File too large") as error:
            events.write(2, {"loss": 2.0})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert error.value.filename == str(path)
    events.write(3, {"loss": 3.0})
    assert read(tmp_path)["loss"] == [(1, 1.0), (3, 3.0)]
