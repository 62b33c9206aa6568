"""No verb opens a connection or looks a name up: in a process where both raise."""

import json
import subprocess
import sys

import pytest

from labelled_images import write_class_folders
from task_runs import SUPPORT

pytestmark = pytest.mark.promise("S9")
# Run with the folder as argument: from nothing to predictions, offline by force.
CHILD = """
import json, os, socket, sys
tried = []

def refuse(name):
    def refused(*arguments, **_):
        tried.append([name, repr(arguments[-1])])
        raise OSError("a connection was tried")
    return refused

for name in ("connect", "connect_ex", "sendto", "bind"):
    setattr(socket.socket, name, refuse(name))
for name in ("getaddrinfo", "gethostbyname", "create_connection"):
    setattr(socket, name, refuse(name))
from beit_fast.cli import main
folder = sys.argv[1]
os.chdir(folder)
cpu = ["--run.device", "cpu", "--data.num_threads", "1"]
step = ["--run.steps", "1", "--optim.warmup_steps", "0", *cpu]
epoch = ["--run.epochs", "1", "--optim.warmup_epochs", "0", *cpu]
tiny = ["--model.embed_dim", "16", "--model.num_heads", "2", "--model.depth", "1"]
tokenizer = ["--tokenizer_training.run.steps", "1", "--tokenizer_training.optim.warmup_steps", "0"]
tokenizer += ["--tokenizer_training.data.batch_size", "2"]
classes = ["--data.path", "images", "--data.test", "images", "--data.batch_size", "3"]
codes = {}
for name, arguments in {
    "pretrain": ["demo", *step, *tiny, *tokenizer, "--data.batch_size", "2"],
    "finetune": ["small_data", "--init", "runs/demo", *epoch, *classes],
    "evaluate": ["runs/finetune_small_data", "images", "--device", "cpu"],
    "predict": ["runs/finetune_small_data", "images", "--device", "cpu"],
    "convert": ["runs/demo", "hub", "--to", "hf"],
}.items():
    codes[name] = main([name, *arguments])
print(json.dumps([codes, tried]))
try:
    socket.create_connection(("localhost", 1))  # what stands guard does
except OSError:
    print(json.dumps(tried))
"""


def test_none_of_the_verbs_asks_for_one(tmp_path):
    write_class_folders(tmp_path / "images", 1, seed=0)
    environment = {"PYTHONPATH": str(SUPPORT), "PATH": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", CHILD, str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=300,
        env=environment | {"HOME": str(tmp_path)},
    )
    assert done.returncode == 0, done.stderr
    *_, said, guarded = done.stdout.splitlines()
    codes, tried = json.loads(said)
    assert codes == dict.fromkeys(("pretrain", "finetune", "evaluate", "predict", "convert"), 0), (
        done.stderr
    )
    assert tried == []
    assert json.loads(guarded) == [["create_connection", "('localhost', 1)"]]
