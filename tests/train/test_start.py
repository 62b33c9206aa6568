"""How a run begins: what its ranks compare, and whether they see one folder. Ranks are played."""

import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest

from beit_fast.data.run_images import RunImages
from beit_fast.errors import RunError
from beit_fast.kernels import _triton
from beit_fast.kernels.arguments import triton_or_torch
from beit_fast.kernels.attention.backends import Choice, warn_of_fallback
from beit_fast.recipes import PRETRAIN
from beit_fast.train import start
from beit_fast.train.start import check_alike, check_shared, open_run
from beit_fast.train.world import World
from loaded import Numbers
from task_runs import ALONE, with_fields
from toy import ToyTask, train_toy

pytestmark = pytest.mark.promise("R20")


class Played(World):
    """One of several ranks that are threads of this process."""

    def gather(self, value):
        self.meeting.wait(20)
        self.said[self.rank] = value
        self.meeting.wait(20)
        return [self.said[rank] for rank in range(self.size)]


@pytest.fixture
def on_ranks():
    """`on_ranks(function, ...)`: `function(world)` on each rank, and what each raised."""

    def on_ranks(*functions):
        meeting, said = threading.Barrier(len(functions)), {}

        def run(rank, function):
            world = Played(rank, len(functions), ALONE.device)
            object.__setattr__(world, "meeting", meeting)
            object.__setattr__(world, "said", said)
            try:
                function(world)
            except (ValueError, OSError) as error:
                return error
            return None

        with ThreadPoolExecutor(len(functions)) as pool:
            return list(pool.map(run, range(len(functions)), functions))

    return on_ranks


@pytest.mark.promise("R20")
@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"run": {"log_every": 7}}, r"run\.log_every is \d+ on rank 0, 7 on rank 1\."),
        ({"run": {"save_every": 7}}, r"run\.save_every is \d+ on rank 0, 7 on rank 1\."),
        ({"model": {"depth": 1}}, r"model\.depth is \d+ on rank 0, 1 on rank 1\."),
    ],
)
def test_ranks_under_other_settings_are_told_which(changes, said, on_ranks):
    config = PRETRAIN["digits"]()
    other = with_fields(config, **changes)
    errors = on_ranks(lambda w: check_alike(config, w), lambda w: check_alike(other, w))
    assert str(errors[0]) == str(errors[1])
    with pytest.raises(ValueError, match=said):
        raise errors[0]


def test_ranks_whose_files_lie_elsewhere_start(on_ranks):
    config = PRETRAIN["digits"]()
    other = with_fields(config, data={"path": "/elsewhere"}, run={"output": "here"})
    assert on_ranks(lambda w: check_alike(config, w), lambda w: check_alike(other, w)) == [None] * 2


@pytest.mark.promise("R20")
def test_ranks_of_other_code_are_told_so(on_ranks, monkeypatch):
    config, digests = PRETRAIN["digits"](), iter(("abc", "def"))
    lock = threading.Lock()

    def digest():
        with lock:
            return next(digests)

    monkeypatch.setattr(start, "code_digest", digest)
    errors = on_ranks(*[lambda w: check_alike(config, w)] * 2)
    assert "code is '" in str(errors[0])
    assert "Give every node the same version" in str(errors[0])


def test_one_folder_that_all_see_is_left_as_it_was(tmp_path, on_ranks):
    (tmp_path / "kept").touch()
    check = [lambda w: check_shared(tmp_path, w, "run.output")] * 2
    assert on_ranks(*check) == [None] * 2
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]


def test_ranks_with_folders_of_their_own_are_refused(tmp_path, on_ranks, monkeypatch):
    monkeypatch.setattr(start, "VISIBLE", 0.3)
    folders = [tmp_path / "node0", tmp_path / "node1"]
    errors = on_ranks(
        lambda w: check_shared(folders[0], w, "run.output"),
        lambda w: check_shared(folders[1], w, "run.output"),
    )
    said = (
        f"rank 0 writes to {folders[0]}, and what it wrote there is not found by rank 1 in "
        f"{folders[1]}: every rank has to see the same folder, so give all the same --run.output "
        "on a disk that all nodes share"
    )
    assert [str(error) for error in errors] == [said] * 2
    shutil.rmtree(folders[0])
    assert not folders[1].exists()


def test_a_folder_that_rank_0_cannot_write_is_an_error_of_all(tmp_path, on_ranks):
    (tmp_path / "file").touch()
    folder = tmp_path / "file" / "run"
    errors = on_ranks(*[lambda w: check_shared(folder, w, "run.output")] * 2)
    assert all(isinstance(error, OSError) for error in errors)
    said = f"nothing can be written to {folder} (Not a directory): give another --run.output"
    assert [str(error) for error in errors] == [said] * 2


@pytest.mark.promise("R22")
@pytest.mark.parametrize(
    "falls_back",
    [
        lambda: triton_or_torch("mask_embed", None, "its kernel k does not compile"),
        lambda: warn_of_fallback(Choice("sdpa", fallback="its kernel k does not compile")),
    ],
    ids=["torch", "sdpa"],
)
def test_a_kernel_that_falls_back_ends_a_strict_run_and_no_other(falls_back, tmp_path, monkeypatch):
    monkeypatch.setattr(_triton, "_warned", set())
    config = PRETRAIN["digits"]()
    config = replace(config, run=replace(config.run, strict=True, device="cpu", cpu_threads=1))
    said = r"runs on \w+, slower.*: its kernel k does not compile\. --run\.strict false goes on"
    with pytest.raises(RunError, match=said), open_run(config, str(tmp_path)):
        falls_back()
    config = replace(config, run=replace(config.run, strict=False))
    with pytest.warns(UserWarning, match="does not compile"), open_run(config, str(tmp_path)):
        falls_back()


@pytest.mark.promise("R20")
def test_ranks_with_other_images_of_the_same_number_do_not_start(tmp_path, on_ranks):
    def begin(kind):
        def run(world):
            task = ToyTask(world=world)
            task.images = RunImages(kind(task.num_images))
            train_toy(tmp_path, task, world)

        return run

    class Renamed(Numbers):
        def key(self, index):
            return f"photo-{index}"

    errors = on_ranks(begin(Numbers), begin(Renamed))
    assert str(errors[0]) == str(errors[1])
    ours, theirs = [RunImages(kind(ToyTask.num_images)).digest for kind in (Numbers, Renamed)]
    assert f"data.images is '{ours}' on rank 0, '{theirs}' on rank 1. Give" in str(errors[0])
    assert not list(tmp_path.iterdir())
