"""Becomes a child of the launcher that cannot outlive it: asks for SIGKILL at the parent's death, then execs.

Run as `python -I -S exec_child.py PARENT_PID PROGRAM ARGS...`, so that nothing runs between the fork and an exec.
Standard library only, and as little of it as possible: this is on the way of every start.
"""

import os
import sys

_PR_SET_PDEATHSIG = 1
_SIGKILL = 9


def die_with_parent(parent: int) -> None:
    """Arranges SIGKILL for the moment `parent` dies; exits when it is dead already. Does nothing outside Linux."""
    if sys.platform.startswith("linux"):
        import ctypes

        if ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, _SIGKILL, 0, 0, 0) != 0:
            print(f"prctl failed: {os.strerror(ctypes.get_errno())}", file=sys.stderr)
    if os.getppid() != parent:  # it died before the request was in place
        os._exit(1)


def main(argv: list[str]) -> None:
    """argv: parent's pid, program, its arguments."""
    die_with_parent(int(argv[0]))
    try:
        os.execvp(argv[1], argv[1:])
    except OSError as error:
        print(f"{argv[1]} cannot be started: {error.strerror}", file=sys.stderr)
        os._exit(127)


if __name__ == "__main__":
    main(sys.argv[1:])
