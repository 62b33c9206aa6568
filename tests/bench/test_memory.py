"""Memory is measured in processes that do one thing alone."""

import os

import pytest
import torch


@pytest.fixture
def memory(bench):
    return bench("memory")


def test_a_function_runs_in_a_new_process_of_as_many_threads(memory):
    assert memory.in_own_process(torch.get_num_threads, threads=2) == 2
    assert memory.in_own_process(os.getpid, threads=1) != os.getpid()


def test_a_process_was_never_smaller_than_it_is(memory):
    assert 0 < memory.resident_kib("VmRSS") <= memory.resident_kib("VmHWM")
    with pytest.raises(OSError, match="no VmNothing: CPU memory is measured on Linux only"):
        memory.resident_kib("VmNothing")
