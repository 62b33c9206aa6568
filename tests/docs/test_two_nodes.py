"""Two nodes, each with a torchrun and a rank of its own: by the page's command, in two network
namespaces where they can be had, and by SLURM's script on one machine, stopped and started again.
Both end with the same bits.
"""

import contextlib
import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
import uuid
from dataclasses import dataclass
from pathlib import Path

import pytest
from safetensors.torch import load_file

from beit_fast.cli import main
from beit_fast.train.state import checkpoint_paths
from pages import ROOT, commands_of, text_of
from slurm import Slurm
from task_runs import assert_the_same_run

ADDRESSES = ("10.77.41.1", "10.77.41.2")  # of the two namespaces
PAGE = ROOT / "docs" / "distributed.md"
STEPS = 30
TINY = shlex.split(
    "pretrain demo --model.predict pixels --tokenizer_training null --model.embed_dim 32 "
    "--model.depth 1 --model.num_heads 2 --model.img_size 32 --views.size 32 --views.token_size 32 "
    "--masking.num_masked 6 --data.batch_size 2 --data.num_threads 1 --run.log_every 1 "
    f"--run.steps {STEPS}"
)
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}


def programs(folder):
    """The commands torchrun and beit-fast of this checkout, wherever they are installed."""
    folder.mkdir(parents=True, exist_ok=True)
    starts = {
        "torchrun": f'exec {sys.executable} -m torch.distributed.run "$@"',
        "beit-fast": f'exec {sys.executable} {ROOT / "beit_fast_main.py"} "$@"',
    }
    for name, shell in starts.items():
        (folder / name).write_text(f"#!/bin/bash\n{shell}\n")
        (folder / name).chmod(0o755)
    return f"{folder}:{os.environ['PATH']}"


def free_port():
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return listening.getsockname()[1]


@contextlib.contextmanager
def running(commands, **options):
    """Processes in sessions of their own; none of them is left."""
    processes = []
    try:
        for command in commands:
            processes.append(
                subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    text=True,
                    start_new_session=True,
                    **options,
                )
            )
        yield processes
    finally:
        for process in processes:
            if process.poll() is None:
                process.terminate()  # torchrun ends its ranks
        for process in processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(40)
            process.kill()
            process.stdout.close()


def nodes_command():
    """What the page has every node run."""
    (command,) = {c.text for c in commands_of(text_of(PAGE)) if "--nnodes=2" in c.text}
    return command


def on_two_nodes(endpoint, output):
    """The page's command with a rank a node, that endpoint, and the tiny run."""
    command = nodes_command().replace("HEAD:29500", endpoint)
    launch, _, _ = command.replace("--nproc_per_node=8", "--nproc_per_node=1").partition(
        "beit-fast"
    )
    return [*shlex.split(launch), "beit-fast", *TINY, "--run.output", str(output)]


class NoNamespacesError(Exception):
    """Two machines in one cannot be made here, and why."""


@contextlib.contextmanager
def machines(folder, addresses=ADDRESSES):
    """What starts a command on each of two: a network namespace and a host name of its own, by
    that name. They see each other and nothing else. Nothing of them is left.

    Raises NoNamespacesError.
    """
    names = [f"beit-{uuid.uuid4().hex[:8]}" for _ in addresses]
    hosts = folder / "hosts"
    pairs = list(zip(addresses, names, strict=True))
    lines = [("127.0.0.1", "localhost"), *pairs]
    hosts.write_text("".join(f"{address} {name}\n" for address, name in lines))
    first, second = names
    set_up = [f"ip netns add {name}" for name in names]
    set_up.append(f"ip -n {first} link add eth0 type veth peer name eth0 netns {second}")
    for address, name in pairs:
        set_up += [
            f"ip -n {name} address add {address}/24 dev eth0",
            f"ip -n {name} link set eth0 up",
            f"ip -n {name} link set lo up",
        ]
    # Names are looked up in that file, and asked of nobody.
    inside = f"mount --bind {hosts} /etc/hosts && mount --bind /dev/null /etc/resolv.conf"
    starts = [
        [
            *shlex.split(f"ip netns exec {name} unshare --mount --uts bash -c"),
            f'{inside} && hostname {name} && exec "$@"',
            name,
        ]
        for name in names
    ]
    try:
        for command in [*map(shlex.split, set_up), *([*start, "true"] for start in starts)]:
            try:
                done = subprocess.run(command, capture_output=True, text=True)
            except FileNotFoundError as error:
                raise NoNamespacesError("there is no `ip`") from error
            if done.returncode:
                raise NoNamespacesError(f"{shlex.join(command)}: {done.stderr.strip()}")
        yield dict(zip(names, starts, strict=True))
    finally:
        for name in names:  # the interfaces go with them
            with contextlib.suppress(FileNotFoundError):
                subprocess.run(["ip", "netns", "delete", name], capture_output=True)


def test_machines_that_cannot_be_made_leave_nothing_behind(tmp_path):
    before = set(Path("/run/netns").glob("beit-*"))
    wrong = ("10.77.41.1", "nowhere")
    with pytest.raises(NoNamespacesError, match=r"`ip`|^ip "), machines(tmp_path, wrong):
        pass
    assert set(Path("/run/netns").glob("beit-*")) <= before


def bytes_sent(name):
    """Over the wire, by one of `machines`."""
    command = f"ip -n {name} -s -j link show eth0"
    done = subprocess.run(shlex.split(command), capture_output=True, text=True, check=True)
    (link,) = json.loads(done.stdout)
    return link["stats64"]["tx"]["bytes"]


@dataclass(frozen=True)
class Undisturbed:
    """A run by the page's command, the same on both nodes."""

    output: Path
    sent: dict[str, int]  # bytes that each machine sent, by its name
    no_machines: str  # why the nodes shared one


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """On two machines with a network between them, where that can be had."""
    folder = tmp_path_factory.mktemp("undisturbed")
    environment = ENVIRONMENT | {"PATH": programs(folder / "bin")}
    output, why = folder / "run", ""

    def run(starts, head):
        command = on_two_nodes(head, output)
        with running([[*s, *command] for s in starts], cwd=folder, env=environment) as nodes:
            texts = [node.communicate(timeout=120)[0] for node in nodes]
        assert [node.returncode for node in nodes] == [0, 0], texts

    sent = {}
    try:
        with machines(folder) as starts:
            run(starts.values(), f"{next(iter(starts))}:29500")
            sent = {name: bytes_sent(name) for name in starts}
    except NoNamespacesError as error:
        why = str(error)
        run([[], []], f"127.0.0.1:{free_port()}")
    return Undisturbed(output, sent, why)


def test_the_pages_command_makes_one_run_of_two_nodes(undisturbed, tmp_path):
    """And `convert` takes it as any other."""
    (*_, last) = checkpoint_paths(undisturbed.output)
    assert last.name == f"step_{STEPS:08d}"
    converted = tmp_path / "weights.safetensors"
    assert main(["convert", str(undisturbed.output), str(converted), "--to", "timm"]) == 0
    assert len(load_file(converted)) == 21


def test_two_machines_with_a_network_between_them_send_their_gradients_over_it(undisturbed):
    """That the run is right, the job of SLURM shows, whose nodes are on one machine."""
    if undisturbed.no_machines:
        pytest.skip(undisturbed.no_machines)
    model = load_file(checkpoint_paths(undisturbed.output)[-1] / "model.safetensors")
    gradients = STEPS * 4 * sum(weights.numel() for weights in model.values())
    for sent in undisturbed.sent.values():
        assert gradients < sent < 1.5 * gradients


def wait_for(done, process, seconds=120.0):
    """Until `done()`, as long as the process runs."""
    end = time.monotonic() + seconds
    while not done():
        assert process.poll() is None
        assert time.monotonic() < end
        time.sleep(0.01)


def lines_of_metrics(output):
    path = output / "metrics.jsonl"
    return path.read_text().count("\n") if path.exists() else 0


@pytest.mark.promise("R10")
def test_a_job_of_slurm_that_is_stopped_and_started_again_ends_with_the_same_bits(
    undisturbed, tmp_path
):
    slurm = Slurm(tmp_path / "slurm", environment={"OMP_NUM_THREADS": "1"})
    programs(slurm.bin)
    codes, steps = [], []
    for stops in (True, False):
        arguments = [*TINY, "--run.output", "run"]
        process = slurm.start(ROOT / "docs/slurm/train.sbatch", *arguments, cwd=tmp_path)
        try:
            if stops:
                wait_for(lambda: lines_of_metrics(tmp_path / "run") >= 8, process)
                process.send_signal(signal.SIGTERM)  # the time is nearly up
            codes.append(process.wait(120))
        finally:
            slurm.end(process)
        steps.append(int(checkpoint_paths(tmp_path / "run")[-1].name.removeprefix("step_")))
    assert codes == [143, 0], slurm.output
    assert slurm.job["requeued"] == 1
    assert 8 <= steps[0] < steps[1] == STEPS
    # The script's word to the nodes may come to a rank before the node's own.
    assert re.search(r"stopped by SIG(USR1|TERM) after step", slurm.output)
    assert_the_same_run(tmp_path / "run", undisturbed.output)
