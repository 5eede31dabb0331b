"""Who a server that refuses to run as root runs as, when we are root.

In a user namespace that maps only root itself to an ordinary user: no account is made, no file changes its owner, no
directory is opened to others. Where the kernel refuses user namespaces: as `nobody`, who is given the server's
directories, provided that `nobody` can reach them.
"""

import os
import pwd
import stat
import subprocess
import sys
from pathlib import Path

from soma_common.embedded.process import PartFailed, launch_command

SELF = "self"


def server_identity(directory: Path, program: Path) -> str:
    """The identity (as `launch` takes it) under which `program` runs with its data in `directory`. Changes nothing.

    Raises:
        PartFailed: none is possible; the message says what stands in the way.
    """
    owner = directory.stat().st_uid if directory.exists() else os.geteuid()
    if os.geteuid() != 0:
        if owner != os.geteuid():
            raise PartFailed(
                f"{directory} belongs to uid {owner}, and this is uid {os.geteuid()}",
                "run as its owner, or choose another --home",
            )
        return SELF
    if owner not in server_owners():
        raise PartFailed(
            f"{directory} belongs to uid {owner}", "run as that user instead of root, or choose another --home"
        )
    return user_namespace(program) or _as_nobody((directory, program))


def server_owners() -> set[int]:
    """The uids that may own a server's directories: ours, and as root also that of `nobody`, who ran it before."""
    nobody = _nobody()
    return {os.geteuid()} | ({nobody.pw_uid} if nobody is not None and os.geteuid() == 0 else set())


def user_namespace(program: Path) -> str | None:
    """The identity in a user namespace; None where the kernel refuses it, found out by running `program --version`."""
    # Programs look their user up by name, so the uid inside must be one that the system knows.
    inside = next((user.pw_uid for user in pwd.getpwall() if user.pw_uid != 0), None)
    if sys.platform != "linux" or inside is None:
        return None
    identity = f"userns:{inside}"
    tried = subprocess.run(launch_command([program, "--version"], identity=identity), cwd="/", capture_output=True)
    return identity if tried.returncode == 0 else None


def give(tree: Path, identity: str) -> None:
    """Give the directory `tree` and all in it to the user that `identity` is on disk. Only root gives."""
    if os.geteuid() != 0:
        return
    kind, _, ids = identity.partition(":")
    uid, gid = (int(part) for part in ids.split(":")) if kind == "setuid" else (0, 0)
    for entry in (tree, *tree.rglob("*")):
        if entry.lstat().st_uid != uid:
            os.lchown(entry, uid, gid)


def first_closed_directory(path: Path, uid: int, gid: int) -> Path | None:
    """The first directory on the way down to `path` (itself included) that `uid` and `gid` may not enter."""
    for directory in reversed([path, *path.parents]):
        if not directory.exists():
            return None
        status = directory.stat()
        bit = stat.S_IXUSR if status.st_uid == uid else stat.S_IXGRP if status.st_gid == gid else stat.S_IXOTH
        if not status.st_mode & bit:
            return directory
    return None


def _as_nobody(reached: tuple[Path, ...]) -> str:
    nobody = _nobody()
    refused = "it refuses to run as root, user namespaces are refused here,"
    if nobody is None:
        raise PartFailed(f"{refused} and there is no user `nobody`", "run as an ordinary user")
    for path in reached:
        closed = first_closed_directory(path.parent, nobody.pw_uid, nobody.pw_gid)
        if closed is not None:
            raise PartFailed(
                f"{refused} and `nobody` cannot enter {closed}",
                f"run as an ordinary user, or let others pass through: chmod o+x {closed}",
            )
    return f"setuid:{nobody.pw_uid}:{nobody.pw_gid}"


def _nobody() -> pwd.struct_passwd | None:
    return next((user for user in pwd.getpwall() if user.pw_name == "nobody"), None)
