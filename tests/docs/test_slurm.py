"""The job scripts for SLURM: what they start, how they stop, and when they go back to the queue.

SLURM is tests/support/slurm.py, torchrun and its ranks are shell scripts; a real run of the script
is in test_two_nodes.py.
"""

import os
import re
import shlex
import signal
import sys
import time

import pytest

from pages import ROOT
from slurm import Slurm

ONE_PROCESS = ROOT / "docs" / "slurm" / "one_process.sbatch"
TINY = shlex.split(
    "pretrain demo --model.predict pixels --tokenizer_training null --model.embed_dim 16 "
    "--model.depth 1 --model.num_heads 2 --model.img_size 32 --views.size 32 --views.token_size 32 "
    "--masking.num_masked 6 --data.batch_size 2 --data.num_threads 1 --run.log_every 1 "
    "--run.steps 100000 --run.device cpu --run.output run"
)
SCRIPT = ROOT / "docs" / "slurm" / "train.sbatch"
# A rank saves for a second once it is told to stop. torchrun that is told kills it before that, as
# the real one does after 30 s, and ends with 1 whatever happened.
TORCHRUN = """
printf '%s\\n' "$*" > "$FAKE_SLURM/arguments"
bash -c 'trap "sleep 1; touch $FAKE_SLURM/saved_$SLURM_NODEID; exit 143" TERM
         touch "$FAKE_SLURM/ready_$SLURM_NODEID"
         for _ in $(seq $RANK_LASTS); do sleep 0.05; done; exit $RANK_ENDS' &
rank=$!
trap 'kill -TERM $rank; sleep 0.3; kill -KILL $rank; exit 1' TERM
wait $rank || exit 1
"""


def wait_for(done, seconds=60.0):
    """Until `done()` is true."""
    end = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < end, "it did not come"
        time.sleep(0.02)


@pytest.fixture
def job(tmp_path):
    """Start the job on shells; `end()` gives its exit code."""
    slurm = Slurm(tmp_path / "slurm")
    slurm.program("torchrun", TORCHRUN)
    started = []

    def start(lasts=1000, ends=0, ready=True, script=SCRIPT):
        slurm.environment = {"RANK_LASTS": str(lasts), "RANK_ENDS": str(ends)}
        for old in (tmp_path / "slurm").glob("[rs]*_[01]"):
            old.unlink()
        process = slurm.start(script, "pretrain", "demo", "--data.path", "a b", cwd=tmp_path)
        started.append(process)
        if ready:
            wait_for(lambda: len(list((tmp_path / "slurm").glob("ready_*"))) == 2)
            time.sleep(0.1)  # the node's shell sets its trap after it started torchrun
        return process

    yield slurm, start
    for process in started:
        slurm.end(process)


def saved(slurm):
    return sorted(path.name for path in slurm.folder.glob("saved_*"))


def test_a_job_starts_torchrun_on_every_node(job):
    slurm, start = job
    assert start(lasts=1).wait(20) == 0, slurm.output
    words = (slurm.folder / "arguments").read_text()
    assert "--nnodes=2 --nproc_per_node=1 --rdzv_backend=c10d" in words
    assert "--rdzv_endpoint=127.0.0.1:24711 --rdzv_id=4711" in words
    assert words.endswith("--no-python beit-fast pretrain demo --data.path a b\n")
    assert slurm.job["requeued"] == 0


@pytest.mark.promise("R10")
@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGUSR1])
def test_before_the_limit_the_ranks_save_and_the_job_goes_back_to_the_queue(job, signum):
    slurm, start = job
    process = start()
    process.send_signal(signum)  # --signal=B:TERM@300
    assert process.wait(20) == 143, slurm.output
    assert saved(slurm) == ["saved_0", "saved_1"]
    assert slurm.job["requeued"] == 1


def test_a_preemption_that_only_the_steps_hear_goes_back_to_the_queue(job):
    slurm, start = job
    process = start()
    slurm.preempt(whole_step=False)
    assert process.wait(20) == 143, slurm.output
    assert saved(slurm) == ["saved_0", "saved_1"]
    assert slurm.job["requeued"] == 1


@pytest.mark.parametrize("state", ["CANCELLED", "PENDING"])
def test_a_job_that_was_cancelled_or_is_queued_already_is_not_put_back(job, state):
    slurm, start = job
    process = start()
    slurm.write(state=state)
    process.send_signal(signal.SIGTERM)
    slurm.preempt()
    assert process.wait(20) == 143, slurm.output
    assert slurm.job["requeued"] == 0


def test_a_run_that_fails_does_not_come_again(job):
    slurm, start = job
    assert start(lasts=1, ends=2).wait(20) == 1, slurm.output
    assert slurm.job["requeued"] == 0


def test_the_header_has_what_the_script_relies_on():
    text = SCRIPT.read_text(encoding="utf-8")
    options = re.findall(r"^#SBATCH --(.*)$", text, re.MULTILINE)
    for needed in ("requeue", "signal=B:TERM@300", "ntasks-per-node=1", "open-mode=append"):
        assert needed in options
    assert text.index("#SBATCH") < text.index("\nset -u")  # later ones are not read
    assert os.access(SCRIPT, os.R_OK)


@pytest.mark.promise("R10")
def test_one_process_is_told_by_slurm_saves_and_has_its_job_put_back(tmp_path):
    """The command itself."""
    slurm = Slurm(tmp_path / "slurm", nodes=1, environment={"OMP_NUM_THREADS": "1"})
    slurm.program("beit-fast", f'exec {sys.executable} {ROOT / "beit_fast_main.py"} "$@"')
    process = slurm.start(ONE_PROCESS, *TINY, cwd=tmp_path)
    try:
        metrics = tmp_path / "run" / "metrics.jsonl"
        wait_for(lambda: metrics.exists() and metrics.read_text().count("\n") > 3)
        slurm.tell(signal.SIGUSR1)
        assert process.wait(30) == 138, slurm.output
    finally:
        slurm.end(process)
    (step,) = re.findall(r"stopped by SIGUSR1 after step (\d+); the checkpoint is", slurm.output)
    assert (tmp_path / f"run/checkpoints/step_{int(step):08d}").is_dir()
    assert slurm.job["requeued"] == 1
    header = re.findall(r"^#SBATCH --(.*)$", ONE_PROCESS.read_text("utf-8"), re.MULTILINE)
    assert {"requeue", "signal=USR1@180", "ntasks=1", "open-mode=append"} <= {*header}


@pytest.mark.parametrize(
    ("was", "wrong", "said"),
    [
        ('--cpus-per-task="$SLURM_CPUS_PER_TASK"', "", "would get one core"),
        ("--export=ALL", "--expert=ALL", "unrecognized option"),
        ("'scancel --signal=USR1 \"$SLURM_JOB_ID\"'", "'kill $step'", "forcing job termination"),
    ],
    ids=["cores", "option", "kill"],
)
def test_a_script_with_what_srun_would_not_bear_does_not_pass(job, tmp_path, was, wrong, said):
    """So that the stand-in is not kinder than SLURM."""
    slurm, start = job
    text = SCRIPT.read_text(encoding="utf-8")
    assert was in text
    script = tmp_path / "wrong.sbatch"
    script.write_text(text.replace(was, wrong))
    process = start(script=script, ready=wrong == "'kill $step'")
    if wrong == "'kill $step'":
        process.send_signal(signal.SIGTERM)
    assert process.wait(20) != 0
    assert said in slurm.output
    assert not saved(slurm)
    assert slurm.job["requeued"] == 0
