"""Back to the queue after SIGUSR1; scontrol is played. A job as SLURM starts it: test_slurm.py."""

import os
import signal

import pytest

from beit_fast.train.config import RunConfig
from beit_fast.train.requeue import requeued
from beit_fast.train.stop import Interrupted

pytestmark = pytest.mark.promise("R10")
ON = RunConfig(output="x", steps=1, requeue=True)
OFF = RunConfig(output="x", steps=1)


@pytest.fixture
def scontrol(tmp_path, monkeypatch):
    """`scontrol(shell)`: a job of SLURM's, whose scontrol is that; `called()` says with what."""

    def install(shell="true"):
        program = tmp_path / "scontrol"
        program.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/called\n{shell}\n')
        program.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
        monkeypatch.setenv("SLURM_JOB_ID", "4711")
        return lambda: (tmp_path / "called").read_text() if (tmp_path / "called").exists() else ""

    return install


@pytest.mark.parametrize(
    ("run", "signum", "rank", "called"),
    [
        (ON, signal.SIGUSR1, 0, "requeue 4711\n"),
        (ON, signal.SIGTERM, 0, ""),
        (ON, signal.SIGUSR1, 1, ""),
        (OFF, signal.SIGUSR1, 0, ""),
    ],
    ids=["it", "other-signal", "other-rank", "not-asked"],
)
def test_the_main_rank_puts_its_job_back_after_that_signal(
    scontrol, monkeypatch, caplog, run, signum, rank, called
):
    calls = scontrol('kill -TERM "$PPID"')  # SLURM ends a job that is put back
    if rank:
        launch = {"RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "localhost", "MASTER_PORT": 1}
        for name, value in launch.items():
            monkeypatch.setenv(name, str(value))
    with pytest.raises(Interrupted), requeued(run):
        raise Interrupted(signum, "after step 3")
    assert calls() == called
    assert not caplog.text


def test_a_run_that_ends_otherwise_is_not_put_back(scontrol):
    calls = scontrol()
    with requeued(ON):
        pass
    with pytest.raises(OSError, match="a disk"), requeued(ON):
        raise OSError("a disk")
    assert not calls()


def test_an_scontrol_that_fails_is_one_warning(scontrol, caplog):
    calls = scontrol("echo 'slurm_update error: Requested operation is disabled' >&2; exit 1")
    with pytest.raises(Interrupted), requeued(ON):
        raise Interrupted(signal.SIGUSR1, "after step 3")
    assert calls()
    (record,) = caplog.records
    assert record.getMessage() == (
        "scontrol requeue 4711 failed (slurm_update error: Requested operation is disabled): the "
        "job is not in the queue again; submit it as before, and it goes on from its last "
        "checkpoint"
    )


def test_it_is_refused_where_there_is_no_job_or_no_scontrol(scontrol, tmp_path, monkeypatch):
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    said = r"SLURM_JOB_ID is not set\): start it by sbatch or srun, or leave --run\.requeue out"
    with pytest.raises(ValueError, match=said), requeued(ON):
        pytest.fail("it began")
    with requeued(OFF):  # the remedy
        pass
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    monkeypatch.setenv("PATH", str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match="none in PATH: add its folder"), requeued(ON):
        pytest.fail("it began")
    scontrol()
    with requeued(ON):  # the other one
        pass
