"""What the command `beit-fast` starts: `beit_fast.cli`, with an answer to signals from the start.

Importing torch and the package takes seconds. This file lies outside the package, whose own import
is the first of them, so that Ctrl-C meanwhile ends with one line and 130 and not with a traceback,
or an exception that some library's import swallows. Whoever reads the output and goes away
(`beit-fast --help | head -1`) ends the command as it ends others, with 141.
"""

import os
import signal
import sys


def main() -> int:
    """Run the command line. Returns its exit code."""
    answers = signal.getsignal(signal.SIGINT) is signal.default_int_handler  # nohup ignores it
    if answers:
        signal.signal(signal.SIGINT, _end_at_once)
    from beit_fast import cli

    try:
        if answers:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            return cli.main()
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


def _end_at_once(signum: int, _frame: object) -> None:
    """Without an exception: nothing has begun, and it would pass through other people's imports."""
    os.write(2, b"beit-fast: interrupted before it began\n")
    os._exit(128 + signum)


if __name__ == "__main__":
    sys.exit(main())
