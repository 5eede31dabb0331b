"""The home directory of a standalone stack: where everything lives, and who owns it right now.

    <home>/auth/signing.key            private key that signs the tokens, 0600
    <home>/auth/keys.json              public keys (JWKS), given to every service
    <home>/auth/admin.token            bearer token of the administrator
    <home>/auth/services/<svc>.token   bearer token of each service
    <home>/auth/tenants/<t>.token      bearer token of each tenant's channels
    <home>/nats, <home>/postgres       data of the two servers
    <home>/logs/<name>.log             JSON lines, rotated; <name>.out holds what the process printed
    <home>/run/lock                    held by the supervisor for as long as it lives
    <home>/run/stack.json              what runs, with pids and addresses

Every directory below the home is open to its user alone (0700); so is a home made here, while one that was there keeps
its mode.
"""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from soma_common.embedded.process import PartFailed, private_directory
from somastack.shell import callable_name, from_here

HOME_VARIABLE = "SOMASTACK_HOME"
HERE = ".somastack"


class AlreadyRunning(PartFailed):
    """Another supervisor owns this home."""

    def __init__(self, home: "Home") -> None:
        super().__init__(
            f"a stack is already running in {home.path}",
            f"look at it ({home.command('status')}), or stop it ({home.command('down')})",
        )


@dataclass(frozen=True)
class Home:
    """Paths of one home. Making the object touches nothing."""

    path: Path

    @classmethod
    def chosen(cls, given: Path | None) -> "Home":
        """The home a command works on: `given`, else $SOMASTACK_HOME, else ./.somastack if there, else ~/.somastack."""
        if given is None and os.environ.get(HOME_VARIABLE):
            given = Path(os.environ[HOME_VARIABLE])
        if given is None:
            given = Path(HERE) if Path(HERE).is_dir() else Path.home() / HERE
        return cls(given.expanduser().absolute())

    def command(self, *words: str) -> str:
        """`somastack WORDS` on this home, as it can be pasted into a shell here."""
        at_home = () if Home.chosen(None) == self else ("--home", from_here(self.path))
        return " ".join((callable_name("somastack"), *words, *at_home))

    @property
    def auth(self) -> Path:
        """Keys and tokens."""
        return self.path / "auth"

    @property
    def nats(self) -> Path:
        """What the NATS server keeps."""
        return self.path / "nats"

    @property
    def postgres(self) -> Path:
        """What the PostgreSQL server keeps."""
        return self.path / "postgres"

    @property
    def logs(self) -> Path:
        """Logs of the supervisor and the services."""
        return self.path / "logs"

    @property
    def run(self) -> Path:
        """What is true only while a stack runs."""
        return self.path / "run"

    @property
    def lock_file(self) -> Path:
        """Locked by the running supervisor."""
        return self.run / "lock"

    @property
    def state_file(self) -> Path:
        """What runs, written by the supervisor."""
        return self.run / "stack.json"

    def make(self) -> None:
        """Create what is missing.

        Raises:
            PartFailed: the home cannot be made, or others could write to it.
        """
        try:
            if not self.path.exists():
                private_directory(self.path)
            for directory in (self.auth, self.auth / "services", self.auth / "tenants", self.logs, self.run):
                private_directory(directory)
        except OSError as error:
            raise PartFailed(
                f"the home {self.path} cannot be used: {error}", "choose another one with --home"
            ) from error
        if self.path.stat().st_mode & 0o022:
            raise PartFailed(f"other users can write to {self.path}", f"close it: chmod go-w {self.path}")

    @contextmanager
    def owned(self) -> Iterator[None]:
        """Own the home for the time of the block; the kernel gives it back when this process ends, however it ends.

        Raises:
            AlreadyRunning: somebody else owns it.
        """
        with open(self.lock_file, "a", encoding="utf-8") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise AlreadyRunning(self) from None
            yield

    def is_owned(self) -> bool:
        """Whether a supervisor owns the home right now."""
        try:
            with open(self.lock_file, encoding="utf-8") as file:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except FileNotFoundError:
            return False
        except BlockingIOError:
            return True
        return False
