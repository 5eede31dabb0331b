"""The program through which a child process is started: it settles who the child is and whom it dies with, then execs.

It runs as a script in an isolated interpreter (`python -I -S launch.py ...`), because the same steps in a `preexec_fn`
would run Python code between fork and exec of a process with threads, which may deadlock.

    launch.py PARENT_PID DEATH_SIGNAL IDENTITY PROGRAM [ARGUMENT...]

PARENT_PID    the child ends at once when this is no longer its parent
DEATH_SIGNAL  number of the signal the kernel sends the child when its parent dies; 0 for none (off Linux: always none)
IDENTITY      `self`, `userns:UID` (this very user, seen as UID inside a user namespace) or `setuid:UID:GID`

Exit code 125 means that the program was never started; the reason is on stderr.
"""

import ctypes
import os
import sys

CLONE_NEWUSER = 0x10000000
"""From linux/sched.h; `os.unshare` exists only from Python 3.12 on."""
PR_SET_PDEATHSIG = 1
"""From linux/prctl.h."""
NOT_STARTED = 125
"""Exit code of this launcher when it could not start the program (the code `env` and `timeout` use for the same)."""


def main(arguments: list[str]) -> int:
    """Become the program named in `arguments`; returns only when that failed."""
    parent, death_signal, identity, program = int(arguments[0]), int(arguments[1]), arguments[2], arguments[3:]
    try:
        _take_identity(identity)
        if death_signal and sys.platform == "linux":
            # After the change of identity: the kernel forgets this setting when credentials change.
            _call("prctl", PR_SET_PDEATHSIG, death_signal, 0, 0, 0)
        if os.getppid() != parent:
            return NOT_STARTED  # The parent died before the setting above could see it die.
        os.execv(program[0], program)
    except OSError as error:
        sys.stderr.write(f"cannot start {program[0]} as {identity}: {error}\n")
    return NOT_STARTED


def _take_identity(identity: str) -> None:
    kind, _, ids = identity.partition(":")
    if kind == "userns":
        _enter_user_namespace(int(ids))
    elif kind == "setuid":
        uid, gid = (int(part) for part in ids.split(":"))
        os.setgroups([])
        os.setgid(gid)
        os.setuid(uid)


def _enter_user_namespace(inside_uid: int) -> None:
    """Map only the present user, as `inside_uid`: files keep their owner, and root's power ends with the exec."""
    uid, gid = os.geteuid(), os.getegid()
    _call("unshare", CLONE_NEWUSER)
    for name, line in (
        ("setgroups", "deny"),
        ("uid_map", f"{inside_uid} {uid} 1"),
        ("gid_map", f"{inside_uid} {gid} 1"),
    ):
        with open(f"/proc/self/{name}", "w", encoding="ascii") as file:
            file.write(line)


def _call(function: str, *arguments: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc[function](*arguments) != 0:
        code = ctypes.get_errno()
        raise OSError(code, f"{function}: {os.strerror(code)}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
