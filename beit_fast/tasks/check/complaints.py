"""What the JPEG library says of damaged data that it decodes all the same.

It writes that on the process's standard error, in C and without a name, and whoever decodes is told
nothing. So while images are looked at, standard error is a file. A thread whose image made it grow
has a suspect, perhaps by another's fault; suspects are decoded once more, one at a time. Everything
else that was written goes where it would have gone, as soon as `pass_on` is called.
"""

import contextlib
import os
import sys
import tempfile

_DESCRIPTOR = 2  # of standard error
# Of libjpeg-turbo's jerror.h, the warnings.
_SAID = (
    *(b"Corrupt JPEG data", b"Premature end of JPEG file", b"Inconsistent progression sequence"),
    *(b"Invalid SOS parameters", b"Unknown Adobe color transform", b"Warning: unknown JFIF"),
)


class Complaints:
    """Inside a `with`, standard error is looked at."""

    def __enter__(self) -> "Complaints":
        _flush()
        self._file = tempfile.TemporaryFile(buffering=0)
        try:
            self._usual: int | None = os.dup(_DESCRIPTOR)
        except OSError:  # it is closed
            self._usual = None
        os.dup2(self._file.fileno(), _DESCRIPTOR)
        self._passed_on, self._rest = 0, b""
        return self

    def __exit__(self, *_: object) -> None:
        _flush()
        self.pass_on()
        if self._usual is None:
            os.close(_DESCRIPTOR)
        else:
            os.dup2(self._usual, _DESCRIPTOR)
            self._write(self._rest)
            os.close(self._usual)
        self._file.close()

    def place(self) -> int:
        """Where standard error has come to."""
        return os.fstat(_DESCRIPTOR).st_size

    def since(self, place: int) -> str:
        """What the library said since then; "" for nothing."""
        lines = self._read(place).split(b"\n")
        return "; ".join(line.decode(errors="replace") for line in lines if line.startswith(_SAID))

    def pass_on(self) -> None:
        """All other lines go to the usual standard error. By one thread alone."""
        if self.place() == self._passed_on:
            return
        data = self._read(self._passed_on)
        self._passed_on += len(data)
        *lines, self._rest = (self._rest + data).split(b"\n")
        self._write(b"".join(line + b"\n" for line in lines if not line.startswith(_SAID)))

    def _read(self, place: int) -> bytes:
        return os.pread(_DESCRIPTOR, self.place() - place, place)

    def _write(self, data: bytes) -> None:
        if self._usual is None:
            return
        with contextlib.suppress(OSError):  # nobody reads it any more
            while data:
                data = data[os.write(self._usual, data) :]


def _flush() -> None:
    if sys.stderr is not None:
        with contextlib.suppress(OSError, ValueError):
            sys.stderr.flush()
