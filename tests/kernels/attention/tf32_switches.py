"""What attention multiplies fp32 with, after each sequence of torch's TF32 switches given.

    python tf32_switches.py '[["SWITCH; SWITCH", false], ["SWITCH", true]]'

Prints, as one JSON list, for each pair the sorted precisions of the launches of a forward and
backward, compiled if the pair says so. torch keeps its switches for the life of a process: one is
forked for each.
"""

import json
import os
import sys

import torch
import torch._dynamo  # here, so that no process imports it again

from beit_fast.kernels._triton import record
from beit_fast.kernels.attention import attention


def precisions_after(switches: str, is_compiled: bool) -> list[str]:
    exec(switches, {"torch": torch})
    q, k, v = torch.zeros(3, 1, 5, 2, 16, requires_grad=True).unbind()
    run = attention
    if is_compiled:
        run = torch.compile(attention, backend="aot_eager", fullgraph=True)
    with record() as launches:
        run(q, k, v, backend="triton").sum().backward()
    return sorted(
        launch.arguments["PRECISION"] for launch in launches if "PRECISION" in launch.arguments
    )


def in_a_process(*pair) -> list[str]:
    reads, writes = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            answer = precisions_after(*pair)
        except Exception as error:
            answer = [f"{type(error).__name__}: {error}"]
        os.write(writes, json.dumps(answer).encode())
        os._exit(0)
    os.close(writes)
    with os.fdopen(reads) as file:
        answer = json.load(file)
    os.waitpid(child, 0)
    return answer


print(json.dumps([in_a_process(*pair) for pair in json.loads(sys.argv[1])]))
