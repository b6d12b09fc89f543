"""The ``flax-googlenet`` command, which is ``python -m flax_googlenet``: ends on Ctrl-C from its first moment on."""

import os
import signal
import sys
from types import FrameType

from flax_googlenet.commands.status import Status


def main() -> int:
    """Runs the command of this process, and returns its exit status."""
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:  # as it is for a job in the background of a script
        signal.signal(signal.SIGINT, _end)
    from flax_googlenet.commands import cli  # only now: imports take time

    status = cli.main()
    reader = sys.modules.get("flax_googlenet.training.reader")
    if reader and reader.hangs():  # and Python would wait for its thread
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    return status


def _end(signum: int, frame: FrameType | None) -> None:
    """Ends the process on the spot: outputs are made for that, as for any kill.

    KeyboardInterrupt would be lost in the callback that JAX gives to the garbage collector, and come out of an import
    as an ImportError.
    """
    if os.isatty(2):
        os.write(2, b"\r\x1b[2K\x1b[?25h")  # the line of progress goes, and the cursor comes back
    os._exit(Status.INTERRUPTED)


if __name__ == "__main__":
    sys.exit(main())
