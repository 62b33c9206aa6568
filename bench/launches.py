"""The launches that `machine_code.py` compiles: each kernel at the shapes that decide its code.

A case calls a launcher with meta tensors, which have shapes and no memory.
"""

from collections.abc import Callable

CASES: dict[str, Callable[[], object]] = {}
