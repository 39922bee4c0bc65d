"""One job at a time in a workdir: a lock file that says who works there and since when.

The file is made by `O_EXCL`, so one of several processes gets it. A lock outlives a process that is killed:

- On the same host (machine, boot and process namespace) the lock is stale as soon as its process is gone.
- A process of another host cannot be looked up. Its lock is watched: the holder touches it every `BEAT` seconds, and it
  is stale if nobody does for `STALE` seconds. No clocks are compared.

A stale lock is replaced, with a message. Those who want to do so at the same time take turns (`flock` on the folder);
where the file system has no `flock`, the last one stays, and the other ends as soon as it sees that. In a bucket the
lock is an object, and the bucket lets only one of them replace it: see `bucket_lock`.
"""

import contextlib
import dataclasses
import fcntl
import json
import logging
import os
import secrets
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from rear_jax.errors import RearError
from rear_jax.runtime import bucket_lock, distributed, places
from rear_jax.runtime.atomic import atomic_file
from rear_jax.runtime.stopping import ended_by

log = logging.getLogger(__name__)

NAME = "lock.json"
BEAT, STALE = 15.0, 120.0  # seconds
LARGEST = 10_000  # bytes of a lock that are read
STDERR = 2  # its descriptor


@dataclasses.dataclass(frozen=True)
class Holder:
    """Who works in a workdir.

    Attributes:
      host: name of the machine.
      place: where its process numbers mean something: the boot of the machine, and the namespace of the processes.
      pid: of the process.
      started: of the process, as the system counts; with it, a number that is used again is told apart.
      since: time at which it took the lock.
      token: of this lock alone.
    """

    host: str
    place: str
    pid: int
    started: str
    since: str
    token: str

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}, since {self.since}"


@contextlib.contextmanager
def held(workdir: Path) -> Iterator[None]:
    """Holds the lock of a workdir while the context lasts; SIGTERM lets go of it too. The first process acts for all.

    Raises RearError in every process: another job works there.
    """
    mine, failure = None, None
    if distributed.is_first():
        workdir.mkdir(parents=True, exist_ok=True)
        try:
            mine = _take(workdir)
        except RearError as error:
            failure = error
    if not distributed.everywhere(failure is None):
        raise failure or RearError(f"process 0 could not take the lock of {workdir}: see what it says.")
    if mine is None:
        yield
        return
    ended = threading.Event()
    threading.Thread(target=_beat, args=(workdir, mine, ended), daemon=True).start()
    try:
        with _let_go_at_sigterm(workdir, mine):
            yield
    finally:
        ended.set()
        _let_go(workdir, mine)


def _take(workdir: Path) -> Holder:
    """Makes the lock; raises RearError where somebody holds it who is alive."""
    file, mine, watched, since = workdir / NAME, _myself(), None, time.monotonic()
    while True:
        with _alone(workdir):
            if _create(file, mine):
                return mine
            seen = _look(file)
            holder = _holder(seen) if seen else None
            here, waited = _is_here(holder), time.monotonic() - since
            if _is_alive(holder) if here else watched not in (None, seen):
                raise RearError(f"{holder or 'another process'} works in {workdir}: wait for it to end, or stop it.")
            if here or waited > STALE:
                log.warning("%s: the lock of %s is stale, going on without it", workdir, holder or "nobody")
                if _replace(file, seen, mine):
                    return mine
        if watched is None:
            log.info("%s: seeing whether %s still works there, for %.0f seconds", workdir, holder or "somebody", STALE)
            watched, since = seen, time.monotonic()
        time.sleep(min(1.0, STALE))


def _beat(workdir: Path, mine: Holder, ended: threading.Event) -> None:
    """Touches the lock from time to time; ends this process if the lock has become that of another one.

    That happens to a process that was suspended for so long that it counted as gone.
    """
    file = workdir / NAME
    while not ended.wait(BEAT):
        with contextlib.suppress(OSError, RearError):
            if (seen := _look(file)) is None:
                continue
            if _is_mine(seen, mine):
                _touch(file, seen)
            elif not ended.is_set():
                print(f"error: {_holder(seen)} has taken over {workdir}: this process ends.", file=sys.stderr)
                os._exit(1)


def _let_go(workdir: Path, mine: Holder) -> None:
    """Removes the lock if it is still that of this process, and not of a child or of another one."""
    with contextlib.suppress(OSError, RearError), _alone(workdir):
        seen = _look(workdir / NAME)
        if seen and _is_mine(seen, mine) and os.getpid() == mine.pid:
            _remove(workdir / NAME, seen)


@contextlib.contextmanager
def _let_go_at_sigterm(workdir: Path, mine: Holder) -> Iterator[None]:
    """SIGTERM would end the process without cleaning up; where somebody else hears it, they do what is needed."""
    in_main = threading.current_thread() is threading.main_thread()
    if not in_main or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return

    def end(*_) -> None:
        os.write(STDERR, f"{ended_by('SIGTERM')}\n".encode())  # print may be at work already
        places.upload_last()
        _let_go(workdir, mine)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.raise_signal(signal.SIGTERM)

    signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Processes of one host take turns here; those of several do where the file system has locks for all."""
    if places.is_bucket(folder):
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # this file system has none
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _create(file: Path, mine: Holder) -> bool:
    """Whether the file was not there; then it is this process's now."""
    if places.is_bucket(file):
        return bucket_lock.write(file, _text(mine), bucket_lock.NONE)
    try:
        descriptor = os.open(file, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
    except FileExistsError:
        return False
    try:
        with os.fdopen(descriptor, "w") as opened:
            opened.write(_text(mine))
    except OSError:
        file.unlink()
        raise
    return True


def _look(file: Path) -> tuple[bytes, int] | None:
    """What the lock says and when it was touched, None where it is gone; raises RearError where it is no file."""
    if places.is_bucket(file):
        return bucket_lock.read(file)
    try:
        if not file.is_file():
            if not os.path.lexists(file):
                return None
            raise RearError(f"{file} is not the file that locks the workdir: remove it.")
        with file.open("rb") as opened:
            return opened.read(LARGEST), os.fstat(opened.fileno()).st_mtime_ns
    except FileNotFoundError:
        return None


def _replace(file: Path, seen: tuple[bytes, int] | None, mine: Holder) -> bool:
    """Makes a stale lock that of this process; False where it is no longer what was seen, as far as one can tell."""
    if places.is_bucket(file):
        return bucket_lock.write(file, _text(mine), seen[1] if seen else bucket_lock.NONE)
    with atomic_file(file, writer=mine.pid) as temporary:
        temporary.write_text(_text(mine))
    return True


def _touch(file: Path, seen: tuple[bytes, int]) -> None:
    """Shows that the holder is alive."""
    if places.is_bucket(file):
        bucket_lock.write(file, seen[0].decode(), seen[1])
    else:
        os.utime(file)


def _remove(file: Path, seen: tuple[bytes, int]) -> None:
    if places.is_bucket(file):
        bucket_lock.remove(file, seen[1])
    else:
        file.unlink()


def _holder(seen: tuple[bytes, int]) -> Holder | None:
    """Who made a lock; None where it does not say."""
    try:
        said = json.loads(seen[0])
        types = {field.name: field.type for field in dataclasses.fields(Holder)}
        return Holder(**said) if all(type(said[name]) is kind for name, kind in types.items()) else None
    except (ValueError, TypeError, KeyError, RecursionError):
        return None


def _text(holder: Holder) -> str:
    return json.dumps(dataclasses.asdict(holder), indent=2) + "\n"


def _is_mine(seen: tuple[bytes, int], mine: Holder) -> bool:
    return _holder(seen) == mine


def _myself() -> Holder:
    return Holder(
        socket.gethostname(), _place(), os.getpid(), _started(os.getpid()), time.strftime("%F %T"), secrets.token_hex(8)
    )


def _place() -> str:
    """The boot of this machine and the namespace of its processes, as far as the system says."""
    with contextlib.suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    return ""


def _started(pid: int) -> str:
    """When a process started, in ticks since the boot; '' where the system does not say or the process has ended."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()  # from the state on
    except OSError:
        return ""
    return "" if fields[0] in "ZX" else fields[19]


def _is_here(holder: Holder | None) -> bool:
    """Whether the number of the holder's process means something here."""
    return holder is not None and (holder.host, holder.place) == (socket.gethostname(), _place())


def _is_alive(holder: Holder) -> bool:
    """Whether the process of this host that made a lock still runs."""
    if holder.started:
        return _started(holder.pid) == holder.started
    try:
        os.kill(holder.pid, 0)
    except ProcessLookupError:
        return False
    except OSError:  # it is another user's
        return True
    return True
