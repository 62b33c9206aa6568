"""Decodes files in a process whose memory ends: `bombed.py FOLDER BYTES SECONDS`.

BYTES more than it has when it begins, SECONDS of CPU. For each file of FOLDER and each decoder a
line of JSON: name and decoder, what became of it, seconds.
"""

import json
import os
import resource
import sys
import time
from pathlib import Path

from beit_fast.data.sources.decode import decode_fast, decode_pillow


def main(folder: Path, extra: int, seconds: int) -> None:
    files = sorted(folder.iterdir())
    decode_fast((folder / "small.jpeg").read_bytes())  # what it loads is no memory of the files
    taken = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGESIZE")
    resource.setrlimit(resource.RLIMIT_AS, (taken + extra, taken + extra))
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
    for file in files:
        data = file.read_bytes()
        for decode in (decode_fast, decode_pillow):
            began = time.monotonic()
            try:
                decode(data)
                became = "image"
            except BaseException as error:
                became = type(error).__name__
            line = [f"{file.name} {decode.__name__}", became, time.monotonic() - began]
            print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), *map(int, sys.argv[2:]))
