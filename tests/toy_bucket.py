"""A bucket in memory, for tests that need neither gcsfs nor a server."""

import base64
import fnmatch
import hashlib
import itertools

from fsspec.implementations.memory import MemoryFileSystem

NAME = "gs://toys"


class Bucket(MemoryFileSystem):
    """What gcsfs offers of a bucket, as far as `places` and `epath` ask for it."""

    cachable = False
    protocol = ("gs", "gcs")

    def __init__(self):
        super().__init__()
        self.store, self.pseudo_dirs, self.fetched, self.uploaded = {}, [""], [], []
        self._generations, self._versions = itertools.count(1), {}

    @classmethod
    def _strip_protocol(cls, path):
        return "/" + str(path).removeprefix("gs:").strip("/")

    def info(self, path, **options):
        found = dict(super().info(path, **options))
        if found["type"] == "file":
            content = self.cat_file(path)
            key = path, content
            found["generation"] = self._versions.setdefault(key, next(self._generations))
            found["md5Hash"] = base64.b64encode(hashlib.md5(content).digest()).decode()
        return found

    def find(self, path, *, detail=False, **options):
        names = super().find(path, **options)
        return {name.strip("/"): self.info(name) for name in names} if detail else names

    def glob(self, path, **options):
        return [name.strip("/") for name in sorted(self.store) if fnmatch.fnmatch(name, self._strip_protocol(path))]

    def get_file(self, rpath, lpath, **options):
        self.fetched.append(str(rpath))
        super().get_file(rpath, lpath, **options)

    def put_file(self, lpath, rpath, **options):
        self.uploaded.append(str(rpath))
        super().put_file(lpath, rpath, **options)
