"""Shared settings of the suite: compiled programs are kept between tests, and tests see one CPU device."""

import fcntl
import logging
import os
import pathlib

import pytest

# a test's programs run a few times: compiling them is what takes time
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true")
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(pathlib.Path.home() / ".cache" / "rear_jax_tests"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")  # most are small: thousands of them

import jax

from tests import toy


@pytest.fixture(scope="module", autouse=True)
def no_programs_of_other_files():
    """Lets go of the compiled programs of a file: a worker that kept those of all slow tests grew to 9 GB."""
    yield
    jax.clear_caches()


@pytest.fixture(autouse=True)
def logging_as_it_was():
    """Gives the project's logger back its level and handlers: the next test on this worker reads its lines as well."""
    logger = logging.getLogger("rear_jax")
    level, handlers, propagate = logger.level, logger.handlers[:], logger.propagate
    yield
    logger.setLevel(level)
    logger.handlers, logger.propagate = handlers, propagate


@pytest.fixture(scope="session")
def trained(tmp_path_factory, worker_id):
    """A workdir in which a toy tokenizer and a toy generator have been trained and sampled; do not change it.

    The workers share it: the first that needs it makes it, and the others wait for the lock."""
    root = tmp_path_factory.getbasetemp()
    root = root if worker_id == "master" else root.parent
    workdir, complete = root / "trained", root / "trained_is_complete"
    with (root / "trained_lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not complete.exists():
            toy.run(workdir, "tokenizer", "tokenize", "train", "sample")
            complete.touch()
    return workdir
