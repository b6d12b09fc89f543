"""The entry of the command ``flax-googlenet``, or ``python -m flax_googlenet``, which Ctrl-C can end from the start."""

import gc
import os
import signal
import sys
from types import FrameType

from flax_googlenet.commands.status import Status


def main() -> int:
    """Run the command line of this process and return its exit status."""
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:  # a shell script ignores it in its background jobs
        signal.signal(signal.SIGINT, _end)
    # Imports and traces make many objects that stay. By default, Python looks for unused cycles among them for each 700
    # new ones, which takes 0.3 s: a tenth of what classify takes for one image.
    gc.set_threshold(10_000)
    from flax_googlenet.commands import cli  # after the handler is in place, because imports take time

    status = cli.main()
    reader, jax = sys.modules.get("flax_googlenet.training.reader"), sys.modules.get("jax")
    # Python would wait for ever for a reader that hangs, and JAX for the other processes of a run that failed.
    if (reader and reader.hangs()) or (jax and jax.distributed.is_initialized()):
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    gc.freeze()  # before it ends, Python would look for cycles once more, in all that JAX has made: another tenth
    return status


def _end(signum: int, frame: FrameType | None) -> None:
    """End the process at once. The output files survive this, as they survive any kill.

    A KeyboardInterrupt would be lost in the callback that JAX gives to the garbage collector, and an import would turn
    it into an ImportError.
    """
    if sys.stderr and sys.stderr.isatty():
        os.write(sys.stderr.fileno(), b"\r\x1b[2K\x1b[?25h")  # clear the progress line, and show the cursor
    os._exit(Status.INTERRUPTED)


if __name__ == "__main__":
    sys.exit(main())
