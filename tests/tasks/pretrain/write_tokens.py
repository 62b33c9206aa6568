"""`beit-fast pretokenize demo --config FILE` with a fault: `write_tokens.py FAULT FILE`."""

import os
import signal
import sys

import torch

from beit_fast.tasks.pretrain import pretokenize
from beit_fast_main import main

FAULTS = {"kill": (signal.SIGKILL, 0), "term": (signal.SIGTERM, 1)}  # signal, rank
BATCHES_BEFORE = 6  # whole ones, on that rank


def run(fault: str, file: str) -> int:
    torch.set_num_threads(1)
    signum, rank = FAULTS[fault]
    tokens, calls = pretokenize._Writer._tokens, []

    def with_fault(self, batch):
        calls.append(0)
        if self.world.rank == rank and len(calls) == BATCHES_BEFORE + 1:
            os.kill(os.getpid(), signum)
        return tokens(self, batch)

    pretokenize._Writer._tokens = with_fault
    sys.argv[1:] = ["pretokenize", "demo", "--config", file]
    return main()


if __name__ == "__main__":
    sys.exit(run(sys.argv[1], sys.argv[2]))
