"""Which of several ranks says an error. Ranks are played, over a store of this process."""

import json

import pytest
import torch.distributed as dist

from beit_fast.cli import main
from beit_fast.errors import RunError, ToldElsewhere
from beit_fast.train import once
from beit_fast.train.board import Board
from beit_fast.train.launch import Launch
from beit_fast.train.once import RankLost, broke, say_once

pytestmark = pytest.mark.promise("R18", "R20")


@pytest.fixture
def boards():
    store = dist.HashStore()
    boards = [Board(store, Launch(rank, 2, address="node0:1")) for rank in range(2)]
    for board in boards:
        board.prepare()
    return boards


@pytest.fixture
def say(boards, monkeypatch, capfd, tmp_path):
    """`say(rank, message, error)`: what that rank prints, and what the launcher finds of it."""
    monkeypatch.setattr(once, "ALIKE", 0.2)

    def say(rank: int, message: str, error=None, launched: int = 2):
        variables = {"WORLD_SIZE": launched, "RANK": rank, "MASTER_ADDR": "node0"}
        for name, value in (variables | {"MASTER_PORT": 1}).items():
            monkeypatch.setenv(name, str(value))
        file = tmp_path / f"error_{rank}.json"
        monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(file))
        monkeypatch.setattr(once, "_board", boards[rank])
        say_once(message, error)
        found = json.loads(file.read_text())["message"]["message"] if file.exists() else None
        return capfd.readouterr().err, found

    return say


def failed(boards, rank: int, error: Exception) -> None:
    boards[rank].write("failure", {"text": once.text_of(error), "broken": False})


def test_what_all_meet_is_said_by_the_first_without_a_rank(boards, say):
    error = ValueError("no images: pass --data.path")
    for rank in range(2):
        failed(boards, rank, error)
    line = "beit-fast: no images: pass --data.path"
    assert say(1, line, error) == (f"{line}\n", line)
    assert say(0, line, error) == ("", line)


def test_what_one_meets_has_its_rank_and_the_others_refer_to_it(boards, say):
    error = OSError("the disk of this node is gone")
    failed(boards, 1, error)
    elsewhere = once.ELSEWHERE
    assert say(0, "beit-fast: broken", ToldElsewhere("broken")) == ("", elsewhere)
    said, _ = say(1, "beit-fast: the disk of this node is gone", error)
    assert said == "beit-fast: rank 1 of 2: the disk of this node is gone\n"


def test_other_errors_of_two_ranks_are_both_said(boards, say):
    errors = [ValueError("one"), ValueError("two")]
    for rank, error in enumerate(errors):
        failed(boards, rank, error)
    said = [say(rank, f"beit-fast: {error}", error)[0] for rank, error in enumerate(errors)]
    assert said == ["beit-fast: rank 0 of 2: one\n", "beit-fast: rank 1 of 2: two\n"]


def test_a_rank_that_is_lost_is_told_once_whatever_each_saw(boards, say):
    for rank, step in ((0, 5), (1, 6)):
        failed(boards, rank, RankLost(f"rank 2 is gone at step {step}"))
    assert say(0, "beit-fast: rank 2 is gone at step 5", RankLost("rank 2 is gone at step 5"))[0]
    assert not say(1, "beit-fast: rank 2 is gone at step 6", RankLost("rank 2 is gone at 6"))[0]


def test_a_fault_of_the_program_keeps_its_traceback_and_gets_its_rank(boards, say):
    failed(boards, 1, ZeroDivisionError("x"))
    said, found = say(1, "Traceback ...\nZeroDivisionError: x\n", ZeroDivisionError("x"))
    assert said.startswith("beit-fast: rank 1 of 2: a fault of the program\nTraceback ...\n")
    assert found.startswith("Traceback")


def test_one_process_says_all_and_writes_nothing_for_a_launcher(say):
    assert say(0, "beit-fast: no", ValueError("no"), launched=1) == ("beit-fast: no\n", None)


def test_without_a_store_each_says_it(boards, say, monkeypatch):
    def gone(name):
        raise dist.DistNetworkError("Connection reset by peer")

    monkeypatch.setattr(boards[1], "claim", gone)
    assert say(1, "beit-fast: no", ValueError("no"))[0] == "beit-fast: rank 1 of 2: no\n"


def test_wrong_arguments_are_said_by_the_first_that_reads_them(monkeypatch, capfd):
    """The launcher's own store is asked, for there is no world yet."""
    store = dist.HashStore()
    monkeypatch.setattr("beit_fast.train.board.agent_store", lambda: store)
    monkeypatch.setattr(once, "_board", None)
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    monkeypatch.setenv("MASTER_PORT", "1")
    said = []
    for rank, arguments in (("1", "--run.stepz"), ("0", "--run.stepz"), ("0", "--run.no")):
        monkeypatch.setenv("RANK", rank)
        with pytest.raises(SystemExit):
            main(["pretrain", "demo", arguments, "3"])
        said.append(capfd.readouterr().err)
    assert said[0].startswith("beit-fast: there is no flag --run.stepz, did you mean --run.steps?")
    assert said[0].count("\n") == 1
    assert said[1] == ""
    assert said[2].startswith("beit-fast: there is no flag --run.no")
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE")  # nobody can be asked
    for rank, start in (("0", "beit-fast: there"), ("1", "beit-fast: rank 1 of 2: there")):
        monkeypatch.setenv("RANK", rank)
        with pytest.raises(SystemExit):
            main(["pretrain", "demo", "--run.stepz", "3"])
        assert capfd.readouterr().err.startswith(start)


@pytest.mark.parametrize(
    ("error", "is_broken"),
    [
        (RuntimeError("[/gloo/transport/tcp/pair.cc:534] Connection closed by peer"), True),
        (RuntimeError("NCCL error in: ProcessGroupNCCL.cpp:3690, remote process exited"), True),
        (dist.DistBackendError("anything"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (RunError("loss is not finite"), False),
        (ConnectionError("Connection reset by a server of images"), False),
    ],
)
def test_a_broken_collective_is_told_from_other_errors(error, is_broken):
    assert broke(error) == is_broken
