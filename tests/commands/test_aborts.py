"""A process that C++ code aborts ends in one line; what that code wrote is in a file."""

import os
import re
import socket
import subprocess
import sys
from pathlib import Path

from flax_googlenet.commands.status import Status

PROGRAM = """
import ctypes, os, sys, threading, time
from flax_googlenet.commands.aborts import aborts_in_one_line

def abort():  # as jaxlib does, in a thread of C++
    os.write(2, b"E0000 a reason\\n*** Check failure stack trace: ***\\n")
    ctypes.CDLL(None).abort()

with aborts_in_one_line():
    print("a message", file=sys.stderr)
    {}
print("after the block", file=sys.stderr)
os.write(2, b"from C++, too\\n")
"""


def run(statement: str, folder: Path) -> tuple[int, str]:
    """Return the status of the program, and its standard error."""
    command = [sys.executable, "-c", PROGRAM.format(statement)]
    process = subprocess.run(command, env=os.environ | {"TMPDIR": str(folder)}, capture_output=True, text=True)
    return process.returncode, process.stderr


def test_an_abort_in_a_thread_ends_in_one_line_that_names_the_file_with_the_stack_trace(tmp_path: Path) -> None:
    status, error = run("threading.Thread(target=abort).start(); time.sleep(60)", tmp_path)
    assert status == Status.GAVE_UP
    message, line = error.splitlines()
    assert message == "a message"
    assert line.startswith("error: JAX ended this process")
    (log,) = re.findall(r"\(JAX's log is in (.*?)\)", line)
    assert Path(log).read_text() == "E0000 a reason\n*** Check failure stack trace: ***\n"
    assert Path(log).parent == tmp_path


def test_what_other_code_writes_is_printed_at_the_end(tmp_path: Path) -> None:
    status, error = run('os.write(2, b"W0000 a warning\\n")', tmp_path)
    assert (status, error) == (0, "a message\nW0000 a warning\nafter the block\nfrom C++, too\n")
    assert not list(tmp_path.iterdir())


def test_an_abort_does_not_cut_the_message_of_a_failed_run_short(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
    hook = f"""
    def print_and_end(kind, error, traceback):  # as `python -m flax_googlenet` does
        threading.Thread(target=abort).start()
        time.sleep(0.5)
        print(error, file=sys.stderr)
        os._exit(70)

    sys.excepthook = print_and_end
    import jax
    jax.distributed.initialize("{address}", num_processes=1, process_id=0)
    1 / 0
"""
    assert run(hook, tmp_path) == (70, "a message\ndivision by zero\n")
