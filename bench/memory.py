"""Memory of a process on a CPU, which torch does not count."""

from pathlib import Path


def resident_kib(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1])
    raise OSError(f"/proc/self/status has no {field}: CPU memory is measured on Linux only")
