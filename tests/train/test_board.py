"""How ranks come together: threads that play them, over one store, as the launcher's is."""

import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch.distributed as dist

from beit_fast.train import board
from beit_fast.train.board import Board, StartError, digest_of, meet
from beit_fast.train.launch import Launch


@pytest.fixture
def launcher(monkeypatch):
    """`launcher(rank, size)`: that rank's launch, by a launcher whose store answers."""
    server = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    address = f"localhost:{server.port}"

    def rendezvous(url, timeout):
        yield dist.TCPStore("localhost", server.port, is_master=False), 0, 0

    monkeypatch.setattr(board.dist, "rendezvous", rendezvous)
    return lambda rank, size=2: Launch(rank, size, rank, address)


def test_ranks_meet_and_after_a_restart_the_new_ones_meet_and_not_the_old(launcher):
    names = set()
    for _ in range(3):  # the launcher's store stays
        with ThreadPoolExecutor(2) as pool:
            late = pool.submit(meet, launcher(1), 20.0)
            time.sleep(0.1)  # finds the name of the start before
            stores = [meet(launcher(0), 20.0), late.result()]
        boards = [Board(store, launcher(rank)) for rank, store in enumerate(stores)]
        assert boards[0].read("note") == [None, None]  # nothing of the start before
        boards[1].write("note", {"step": 3})
        assert boards[0].clone().read("note") == [None, {"step": 3}]
        assert boards[0].claim("it")
        assert not boards[1].claim("it")
        names.add(stores[0].get("all"))
    assert threading.active_count() < 10


def test_ranks_that_do_not_come_are_named(launcher):
    with pytest.raises(StartError, match=r"of 3 ranks, ranks 1-2 have not come within 0\.2 s: see"):
        meet(launcher(0, 3), 0.2)
    with pytest.raises(StartError, match=r"some ranks have not come within 0\.2 s"):
        meet(launcher(1, 3), 0.2)


def test_a_rank_that_comes_before_rank_0_says_so(launcher):
    with pytest.raises(StartError, match=r"rank 0 has not come within 0\.2 s: see that every"):
        meet(launcher(1), 0.2)


def test_a_store_that_does_not_answer_is_named_with_what_to_look_at(monkeypatch):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    for name, value in {"MASTER_ADDR": "localhost", "MASTER_PORT": port, "WORLD_SIZE": 2}.items():
        monkeypatch.setenv(name, str(value))
    where = rf"localhost:{port}"
    for rank, said in (
        (0, rf"not all 2 ranks have come to {where} within 1 s: see that every node"),
        (1, rf"no store answers at {where} \(MASTER_ADDR:MASTER_PORT\) within 1 s"),
    ):
        monkeypatch.setenv("RANK", str(rank))
        with pytest.raises(StartError, match=said):
            meet(Launch(rank, 2, rank, where), 1.0)


def test_a_digest_is_of_names_and_values_in_any_order():
    assert digest_of({"a": 1, "b": [2]}) == digest_of({"b": [2], "a": 1})
    assert digest_of({"a": 1}) != digest_of({"a": 2})
