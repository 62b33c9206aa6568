"""What the command `beit-fast` starts: `beit_fast.cli`, with an answer to signals from the start.

Importing torch and what a verb runs takes seconds. This file lies outside the package, so that
Ctrl-C before the work begins, during any import, ends with one line and 130, and not with a
traceback or an exception that some library's import swallows. Whoever reads the output and goes
away (`beit-fast --help | head -1`) ends the command as it ends others, with 141.
"""

import contextlib
import os
import signal
import sys
from collections.abc import Iterator


def main() -> int:
    """Run the command line. Returns its exit code."""
    try:
        if os.environ.get("WORLD_SIZE", "1") != "1":
            # Of a peer that is gone torch's C++ warns with its own stack; what is to be said of it
            # is said by train/once.py.
            os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
        with _ended_by_ctrl_c():
            from beit_fast import cli
        try:
            code = cli.main(preparing=_ended_by_ctrl_c)
        finally:
            if sys.stdout is not None:
                sys.stdout.flush()
        if os.environ.get("WORLD_SIZE", "1") != "1":
            _end_rank(code)
        return code
    except BrokenPipeError:
        # What Python would flush at the end goes nowhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except KeyboardInterrupt:
        sys.stderr.write("beit-fast: interrupted\n")
        return 128 + signal.SIGINT


@contextlib.contextmanager
def _ended_by_ctrl_c() -> Iterator[None]:
    """Inside, Ctrl-C ends the process, for nothing has begun; afterwards it is an exception again.

    Where it is ignored (nohup), it stays so.
    """
    if signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return
    signal.signal(signal.SIGINT, _end_at_once)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _end_rank(code: int) -> None:
    """Without taking the interpreter down. That takes torch seconds, in which the other ranks and
    the launcher wait; and ranks were seen to abort in it after all was done and said ("terminate
    called without an active exception"). What thread caused that is not proven."""
    if sys.stderr is not None:
        sys.stderr.flush()
    os._exit(code)


def _end_at_once(signum: int, _frame: object) -> None:
    """Without an exception: it would pass through other people's imports."""
    os.write(2, b"beit-fast: interrupted before it began\n")
    os._exit(128 + signum)


if __name__ == "__main__":
    sys.exit(main())
