"""Numbers for TensorBoard: a file of events that is written at once, by whoever has the numbers.

TensorBoard's own writer has a thread, whose errors (a full disk) end it with a traceback beside the
run. A line of metrics is a few hundred bytes: there is nothing to gain by a thread.
"""

import contextlib
import io
import os
import socket
import time
from collections.abc import Mapping
from pathlib import Path

from beit_fast.files import naming


class Scalars:
    """A new file of events in `folder`. Events of before `start` that come later than it, of a run
    that was stopped and goes on, are hidden: TensorBoard is told so.

    Raises OSError that names the file, here and in `write`.
    """

    def __init__(self, folder: Path, start: int) -> None:
        # Here, for it takes a second and the other ranks have no use for it.
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog

        folder.mkdir(parents=True, exist_ok=True)
        # TensorBoard reads them in the order of their names.
        name = f"{time.time():.6f}.{socket.gethostname()}.{os.getpid()}"
        self._path = folder / f"events.out.tfevents.{name}"
        self._append(Event(wall_time=time.time(), file_version="brain.Event:2"))
        if start:
            begins = SessionLog(status=SessionLog.START)
            self._append(Event(wall_time=time.time(), step=start + 1, session_log=begins))

    def write(self, step: int, values: Mapping[str, float]) -> None:
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary

        shown = [Summary.Value(tag=name, simple_value=value) for name, value in values.items()]
        self._append(Event(wall_time=time.time(), step=step, summary=Summary(value=shown)))

    def _append(self, event: object) -> None:
        """An event, or nothing of it: behind half of one TensorBoard reads no further."""
        from tensorboard.summary.writer.record_writer import RecordWriter

        record = io.BytesIO()
        RecordWriter(record).write(event.SerializeToString())
        with naming(self._path), self._path.open("ab", buffering=0) as file:
            whole = file.tell()
            try:
                left = memoryview(record.getvalue())
                while left:
                    left = left[file.write(left) :]
            except OSError:
                with contextlib.suppress(OSError):
                    file.truncate(whole)
                raise
