"""What the command `beit-fast` starts: `beit_fast.cli`, with an answer to signals from the start.

Importing torch and what a verb runs takes seconds. This file lies outside the package, so that
Ctrl-C before the work begins, during any import, ends with one line and 130, and not with a
traceback or an exception that some library's import swallows. Whoever reads the output and goes
away (`beit-fast --help | head -1`) ends the command as it ends others, with 141.
"""

import atexit
import contextlib
import os
import signal
import sys
from collections.abc import Iterator

# By which NVIDIA's profilers come into a process; they write when it ends in good order.
INJECTED = ("CUDA_INJECTION64_PATH", "NVTX_INJECTION64_PATH")


def main() -> int:
    """Run the command line, as a command: this ends the process. Returns its exit code where
    somebody looks on who has something to do at the end."""
    code = _run()
    if os.environ.get("WORLD_SIZE", "1") != "1":
        _end_rank(code)
    if not _watched():
        _end(code)
    return code


def _run() -> int:
    try:
        if os.environ.get("WORLD_SIZE", "1") != "1":
            # Of a peer that is gone torch's C++ warns with its own stack; what is to be said of it
            # is said by train/once.py.
            os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
        with _ended_by_ctrl_c():
            from beit_fast import cli
        try:
            return cli.main(preparing=_ended_by_ctrl_c)
        finally:
            if sys.stdout is not None:
                sys.stdout.flush()
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


def _watched() -> bool:
    """Whether a profiler, a debugger or a measure of coverage looks on, or a prompt is to follow
    (`python -i`)."""
    monitors = getattr(sys, "monitoring", None)  # from Python 3.12 on
    tools = [monitors.get_tool(number) for number in range(6)] if monitors else []
    looking = (sys.gettrace(), sys.getprofile(), *tools, *map(os.environ.get, INJECTED))
    return bool(sys.flags.inspect or any(looking))


def _end(code: int) -> None:
    """Without taking the interpreter down, which takes torch a second or more, while whoever sent
    a signal waits. What is registered for the end is done, and all is closed that writes."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # nothing is left to be told
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            with contextlib.suppress(OSError):  # it was told, or there is nowhere to tell it
                stream.flush()
    os._exit(code)


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
