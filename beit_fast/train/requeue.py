"""After SIGUSR1, which SLURM sends before a job's time is up, the job goes back to the queue."""

import contextlib
import logging
import shutil
import signal
import subprocess
from collections.abc import Iterator

from beit_fast.flags import flag
from beit_fast.train.config import RunConfig
from beit_fast.train.launch import launched_rank, slurm_job
from beit_fast.train.once import deaf
from beit_fast.train.stop import Interrupted

ANSWERS = 20.0  # seconds; ten less than a launcher gives ranks once it ends them

logger = logging.getLogger("beit_fast.train")


@contextlib.contextmanager
def requeued(run: RunConfig) -> Iterator[None]:
    """Around a whole run: once SIGUSR1 has ended it, saved, the main rank puts its job back, where
    `run.requeue` asks for that. Raises ValueError, before the block, where there is no such job."""
    job = slurm_job()
    if run.requeue:
        leave_out = f"or leave {flag('run.requeue')} out"
        if not job:
            raise ValueError(
                f"{flag('run.requeue')} puts a job of SLURM's back, and this process is of none "
                f"(SLURM_JOB_ID is not set): start it by sbatch or srun, {leave_out}"
            )
        if launched_rank().rank == 0 and shutil.which("scontrol") is None:
            raise ValueError(
                f"{flag('run.requeue')} calls scontrol, and there is none in PATH: add its folder "
                f"(of a container: mount it), {leave_out}"
            )
    try:
        yield
    except Interrupted as stop:
        if run.requeue and stop.signum == signal.SIGUSR1 and launched_rank().rank == 0:
            with deaf():  # SLURM ends a job that is put back, and there is something left to say
                _requeue(job)
        raise


def _requeue(job: str) -> None:
    try:
        done = subprocess.run(
            ["scontrol", "requeue", job],
            capture_output=True,
            text=True,
            timeout=ANSWERS,
            check=False,
        )
        failed = done.returncode and (" ".join(done.stderr.split()) or f"code {done.returncode}")
    except (OSError, subprocess.TimeoutExpired) as error:
        failed = str(error)
    if failed:
        logger.warning(
            "scontrol requeue %s failed (%s): the job is not in the queue again; submit it as "
            "before, and it goes on from its last checkpoint",
            *(job, failed),
        )
