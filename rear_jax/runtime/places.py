"""Folders of this machine, and buckets at gs://: what is special about buckets is here, and in `bucket_lock`.

A local place is a `pathlib.Path`, and nothing here changes what happens to it. A place in a bucket is a `BucketPath`,
which lists, reads and writes as a path does. But:

- An object appears when its upload ends, whole: files are written in scratch, then uploaded (`written`, `staged`).
- Nothing is added to an object: a file that grows does so in scratch, and is uploaded now and then (`appended`).
- Libraries open files of this machine alone: an object is fetched into a cache of limited size (`local`).
- There are no folders: none is made, and one without objects does not exist.

Scratch is in TMPDIR. A process's part of it goes when the process ends; a killed one's goes when the next one starts.
"""

import atexit
import base64
import contextlib
import fcntl
import functools
import hashlib
import logging
import os
import re
import shutil
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from etils import epath

from rear_jax.errors import RearError, one_line
from rear_jax.runtime.extras import needed

log = logging.getLogger(__name__)

SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")
BUCKET = re.compile(r"gs://[a-z0-9][a-z0-9._-]{1,220}[a-z0-9](/|$)")
MOUNTED = ("fuse.gcsfuse", "fuse")  # as gcsfuse calls its file systems, and as its driver for GKE does
UPLOAD_SECONDS = 20.0  # between two uploads of a file that grows
GIGABYTE = 10**9
_limit = {"bytes": 50 * GIGABYTE}  # of the cache; see `limit_cache`


class BucketPath(type(epath.Path("gs://bucket"))):
    """A place in a bucket, as `epath` has it, but for what would be wrong there."""

    def mkdir(self, mode: int | None = None, parents: bool = False, exist_ok: bool = False) -> None:
        """Does nothing: gcsfs would ask for the bucket, which not everybody may, and make one."""

    def resolve(self, strict: bool = False) -> "BucketPath":
        """The same place: there are no links."""
        return self

    def open(self, mode: str = "r", **options: Any) -> IO:
        """As `epath` does, but for "a", which there replaces what was written before."""
        if "a" in mode or "+" in mode:
            raise ValueError(f"{self}: nothing is added to an object, see places.appended")
        return super().open(mode, **options)


def place(given: str | os.PathLike[str]) -> Path:
    """The place that a flag or a setting names, local or in a bucket.

    Raises RearError: it is at another scheme than gs://, names no bucket, or the packages for buckets are missing.
    """
    if isinstance(given, Path | BucketPath):
        return given
    found = SCHEME.match(text := os.fspath(given))
    if found is None:
        return Path(text)
    if found[1] == "s3":
        raise RearError(f"{text}: orbax keeps no checkpoints at s3://: mount the bucket and give the mount point.")
    if found[1] != "gs":
        raise RearError(f"{text}: {found[1]}:// is not read or written: give a folder of this machine or gs://BUCKET.")
    if not BUCKET.match(text):
        raise RearError(f"{text} names no bucket: give gs://BUCKET/FOLDER.")
    _files()
    return BucketPath(text)


def is_answer(error: Exception) -> bool:
    """Whether an error comes from a bucket, or from the way there: it did not answer, or somebody may not do that."""
    return type(error).__module__.startswith(("gcsfs.", "aiohttp.", "requests.", "google.auth.", "google.api_core."))


def told(error: Exception) -> str:
    """The error of a bucket in one line."""
    return f"the bucket answers: {one_line(str(error))[:200] or type(error).__name__}"


def is_bucket(path: os.PathLike[str]) -> bool:
    """Whether a place is in a bucket."""
    return isinstance(path, BucketPath)


def is_mounted_bucket(path: Path) -> bool:
    """Whether a local place is in a bucket that gcsfuse has mounted: a byte that changes there uploads the file."""
    with contextlib.suppress(OSError):
        mounts = [line.split()[1:3] for line in Path("/proc/self/mounts").read_text().splitlines()]
        there = os.path.abspath(path)
        around = [(at, kind) for at, kind in mounts if there == at or there.startswith(at.rstrip("/") + "/")]
        return bool(around) and max(around, key=lambda mount: len(mount[0]))[1] in MOUNTED
    return False


def require(workdir: Path) -> None:
    """Raises RearError unless a bucket can be asked what there is in a workdir."""
    if not is_bucket(workdir):
        return
    try:
        _files().call("GET", "b/{}/o", workdir.parts[2], maxResults=1, json_out=True)
    except Exception as error:  # of gcsfs, aiohttp, google.auth
        raise RearError(
            f"{workdir}: the bucket cannot be listed ({one_line(str(error))[:200] or type(error).__name__}): make it, "
            "log in by 'gcloud auth application-default login', or mend the name."
        ) from error


@contextlib.contextmanager
def written(path: Path) -> Iterator[Path]:
    """Yields a place in scratch; on a clean exit, the file that was written there is uploaded to a bucket, whole."""
    folder = scratch(path.parent)
    try:
        yield folder / path.name
        _files().put_file(str(folder / path.name), str(path))
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def staged(folder: Path) -> Iterator[Path]:
    """Yields a folder to write whole: `folder` itself if it is local.

    For a bucket it is one in scratch. On a clean exit, files that differ are uploaded, and others are removed there.
    """
    if not is_bucket(folder):
        yield folder
        return
    around = scratch(folder)
    try:
        yield around / folder.name
        upload_folder(around / folder.name, folder)
    finally:
        shutil.rmtree(around, ignore_errors=True)


def upload_folder(source: Path, target: Path) -> None:
    """Makes a folder of a bucket like a local one: uploads the files that differ, then removes others."""
    there = {f"gs://{name}": info for name, info in _files().find(str(target), detail=True).items()}
    wanted = {str(target / file.relative_to(source)): file for file in sorted(source.rglob("*")) if file.is_file()}
    new = {name: file for name, file in wanted.items() if there.get(name, {}).get("md5Hash") != _md5(file)}
    if new:
        _files().put([str(file) for file in new.values()], list(new))
    if others := [name for name in there if name not in wanted]:
        _files().rm(others)


def upload_into(source: Path, target: Path) -> None:
    """Uploads the files of a local folder into one of a bucket, beside what is there."""
    files = [file for file in sorted(source.rglob("*")) if file.is_file()]
    _files().put([str(file) for file in files], [str(target / file.relative_to(source)) for file in files])


def remove(folder: Path) -> None:
    """Removes a folder with all that is in it, where there is one."""
    if is_bucket(folder):
        folder.rmtree(missing_ok=True)
    else:
        with contextlib.suppress(FileNotFoundError):
            shutil.rmtree(folder)


def size(path: Path) -> int:
    """Bytes of a file."""
    found = path.stat()
    return found.length if is_bucket(path) else found.st_size


def is_newer(folder: Path, file: Path) -> bool:
    """Whether a folder is there and not older than a file. Folders of a bucket have no age: `staged` compares files."""
    return not is_bucket(folder) and folder.exists() and folder.stat().st_mtime_ns >= file.stat().st_mtime_ns


def limit_cache(gigabytes: float) -> None:
    """Sets how much of the disk the copies that `local` makes may take."""
    _limit["bytes"] = int(gigabytes * GIGABYTE)


def local(path: str | os.PathLike[str]) -> Path:
    """A file of this machine with the content of `path`: that itself if it is local, else a copy that is kept.

    An object is fetched anew if it has been replaced. The copies that were not asked for longest make room for others.

    Raises:
      FileNotFoundError, IsADirectoryError: there is no such object.
    """
    path = place(path)
    if not is_bucket(path):
        return path
    info = _files().info(str(path))
    if info["type"] == "directory":
        raise IsADirectoryError(f"{path} is a folder")
    version = f"{path} {info.get('generation') or info.get('etag')} {info['size']}"
    kept = _own("cache") / f"{hashlib.sha256(version.encode()).hexdigest()[:32]}{path.suffix}"
    with contextlib.suppress(FileNotFoundError):
        os.utime(kept)
        return kept
    _make_room(kept.parent, info["size"])
    temporary = kept.with_name(f"{kept.name}.{os.getpid()}.{threading.get_ident()}.tmp")
    try:
        _files().get_file(str(path), str(temporary))
        os.replace(temporary, kept)
    finally:
        temporary.unlink(missing_ok=True)
    return kept


def scratch(path: Path) -> Path:
    """A new folder in scratch for something that belongs to `path`."""
    return Path(tempfile.mkdtemp(prefix=f"{path.name[:40]}-", dir=_scratch_of_process()))


def appended(file: Path) -> Path:
    """Where lines are added to a file: the file itself if it is local.

    Of a bucket it is a copy in scratch, which is uploaded every `UPLOAD_SECONDS` and when the process ends, by SIGTERM
    too. A killed process loses what came after the last upload.
    """
    if not is_bucket(file):
        return file
    if (known := _growing.get(str(file))) is None:
        known = _growing[str(file)] = _Growing(file)
    return known.copy


def upload_appended() -> None:
    """Uploads what was added to files of buckets since the last time."""
    for one in tuple(_growing.values()):
        one.upload()


def upload_last() -> None:
    """The same; a failure is told and changes nothing else."""
    with _tolerating():
        upload_appended()


def finish_appended(copy: Path) -> None:
    """Uploads what was added to the copy that `appended` gave, and forgets it: other processes may write there now."""
    for name, one in tuple(_growing.items()):
        if one.copy == copy:
            one.upload()
            del _growing[name]


class _Growing:
    """A file of a bucket to which lines are added, in scratch. A signal may ask for an upload in the midst of one."""

    def __init__(self, file: Path):
        self._file, self.copy, self._lock = file, scratch(file.parent) / file.name, threading.RLock()
        if file.exists():
            self.copy.write_bytes(file.read_bytes())
        self._uploaded = self._state()
        _start_uploading()

    def upload(self) -> None:
        with self._lock:
            if (state := self._state()) not in (None, self._uploaded):
                _files().pipe_file(str(self._file), self.copy.read_bytes())
                self._uploaded = state

    def _state(self) -> tuple[int, int] | None:
        with contextlib.suppress(FileNotFoundError):
            found = self.copy.stat()
            return found.st_size, found.st_mtime_ns
        return None


_growing: dict[str, _Growing] = {}  # of this process, by their places


@functools.cache
def _start_uploading() -> None:
    """Once in a process."""
    atexit.register(upload_last)  # for those who call jobs from Python; it is too late to look up names of hosts
    threading.Thread(target=_upload_from_time_to_time, daemon=True).start()


def _upload_from_time_to_time() -> None:
    ended = threading.Event()
    while not ended.wait(UPLOAD_SECONDS):
        upload_last()


@contextlib.contextmanager
def _tolerating() -> Iterator[None]:
    """The next upload has all of what one that fails would have brought."""
    try:
        yield
    except Exception as error:  # of gcsfs, aiohttp, google.auth
        log.warning("lines were not uploaded (%s)", one_line(str(error))[:200])


def _files() -> Any:
    """The file system of gcsfs that `epath` uses as well; raises RearError where gcsfs is not installed.

    It does not remember what is in a folder: other processes change that, and so does orbax.
    """
    with needed("gcs"):
        import gcsfs
    files = epath.backend.fsspec_backend.fs("gs://")
    if not isinstance(files, gcsfs.GCSFileSystem):
        raise RearError(f"gs:// is read by {type(files).__name__}, wanted gcsfs.GCSFileSystem: install gcsfs anew.")
    files.dircache.use_listings_cache = False
    files.dircache.clear()
    return files


@functools.cache
def _own(name: str) -> Path:
    """A folder of this user in TMPDIR; raises RearError where it is another user's."""
    folder = Path(tempfile.gettempdir()) / f"rear_jax-{os.getuid()}" / name
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    for one in (folder.parent, folder):
        if one.is_symlink() or one.stat().st_uid != os.getuid():
            raise RearError(f"{one} belongs to another user: set TMPDIR to a folder of your own.")
    return folder


@functools.cache
def _scratch_of_process() -> Path:
    """A folder of this process alone, which holds a lock on it; those whose processes have ended are removed."""
    around = _own("scratch")
    with _locked(around):
        for left in around.iterdir():
            with _locked(left, wait=False) as free:
                if free:
                    shutil.rmtree(left, ignore_errors=True)
        mine = Path(tempfile.mkdtemp(dir=around))
        descriptor = os.open(mine, os.O_RDONLY)  # open, and so locked, until the process ends
        fcntl.flock(descriptor, fcntl.LOCK_EX)
    atexit.register(_remove_scratch, mine, os.getpid())
    return mine


def _remove_scratch(folder: Path, pid: int) -> None:
    if os.getpid() == pid:  # else it is a child
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def _locked(folder: Path, *, wait: bool = True) -> Iterator[bool]:
    """Holds the lock of a local folder; False where somebody else does and this does not wait."""
    descriptor, held = os.open(folder, os.O_RDONLY), False
    try:
        with contextlib.suppress(BlockingIOError):
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            held = True
        yield held
    finally:
        os.close(descriptor)


def _make_room(cache: Path, wanted: int) -> None:
    """Removes the copies that were not asked for longest until so many bytes fit, or none is left."""
    kept = []
    for file in cache.iterdir():
        with contextlib.suppress(FileNotFoundError):  # another process has removed it
            found = file.stat()
            kept.append((found.st_mtime_ns, found.st_size, file))
    total = wanted + sum(length for _, length, _ in kept)
    for _, length, file in sorted(kept):
        if total <= _limit["bytes"]:
            return
        file.unlink(missing_ok=True)
        total -= length


def _md5(file: Path) -> str:
    """As buckets give it."""
    with file.open("rb") as opened:
        return base64.b64encode(hashlib.file_digest(opened, "md5").digest()).decode()
