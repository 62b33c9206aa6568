"""Links planted in an output folder are written through by none of a run's files, and all modes
are the umask's. Of the lock: tests/train/test_lock.py."""

import os
import stat

import pytest

from beit_fast.tasks.pretrain.pipeline import run_pretraining
from beit_fast.train.state import checkpoint_paths

pytestmark = pytest.mark.promise("S10")
PRECIOUS = b"precious"
# Of a run. The names of TensorBoard's files hold the time and the process.
FOLDERS = {"checkpoints", "images", "tensorboard"}
NAMES = {".lock", "config.yaml", "metrics.jsonl", "picture.png", "curve.png"} | FOLDERS


@pytest.fixture
def config(pretrain_config):
    return pretrain_config(run={"steps": 1}, optim={"warmup_steps": 0})


def test_every_file_of_a_run_has_the_mode_of_the_umask(config, tmp_path):
    before = os.umask(0o027)
    try:
        run_pretraining(config)
    finally:
        os.umask(before)
    assert {path.name for path in (tmp_path / "run").iterdir()} == NAMES
    modes = {path: stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "run").rglob("*")}
    # One file of images, one of events; the step with its weights and manifest.
    assert len(modes) == len(NAMES) + 2 + 5
    wrong = {p: oct(m) for p, m in modes.items() if m != (0o750 if p.is_dir() else 0o640)}
    assert not wrong


def test_links_that_a_run_meets_go_and_their_targets_stay(config, tmp_path):
    folder, kept = tmp_path / "run", []
    (folder / "checkpoints").mkdir(parents=True)
    # What a checkpoint is called while it is written and deleted, the second for a file.
    under_way = ["checkpoints/.step_00000001", "checkpoints/.step_00000002.old"]
    for number, name in enumerate(["picture.png", "curve.png", "config.yaml", *under_way]):
        victim = tmp_path / f"victim_{number}"
        kept.append(victim / "file" if name == under_way[0] else victim)
        kept[-1].parent.mkdir(exist_ok=True)
        kept[-1].write_bytes(PRECIOUS)
        (folder / name).symlink_to(victim)
    run_pretraining(config)
    assert [path.read_bytes() for path in kept] == [PRECIOUS] * 5
    assert not [path for path in folder.rglob("*") if path.is_symlink()]
    assert {path.name for path in folder.iterdir()} == NAMES
    assert [path.name for path in checkpoint_paths(folder)] == ["step_00000001"]
