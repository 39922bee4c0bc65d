"""Several processes, one job: how they find one another, make sure that they agree, and end together."""

import hashlib
import os
import re
import sys
from typing import NoReturn

import jax
import numpy as np
from jax.experimental import multihost_utils

from rear_jax.errors import RearError
from rear_jax.runtime import places

ADDRESS = re.compile(r"(\[[0-9A-Fa-f:.%]+\]|[^\s:/]+):[0-9]{1,5}")  # of a process: a name, or IPv4, or IPv6 in []
PORTS = 2**16
MOST = 1_000_000  # processes
LOST_AFTER = 30  # seconds of silence after which a process counts as lost, and the others end


def start(address: str | None, count: int | None, index: int | None) -> None:
    """Joins the other processes of the job; call it before anything asks jax for its devices.

    Without arguments the cluster is asked: Cloud TPU, GKE, SLURM and MPI say who takes part. Where there is none, this
    process is alone.

    Args:
      address: 'host:port' of process 0.
      count: of processes.
      index: of this one.

    Raises RearError: only some of the three are given or make no sense, or the others cannot be reached.
    """
    given = [value is not None for value in (address, count, index)]
    if any(given) and not all(given):
        raise RearError("--coordinator_address, --num_processes and --process_id belong together: give all or none.")
    if all(given) and not (ADDRESS.fullmatch(address) and int(address.rpartition(":")[2]) < PORTS):
        raise RearError(f"--coordinator_address={address}: give host:port, such as 10.0.0.2:1234.")
    if all(given) and not 0 <= index < count <= MOST:
        raise RearError(f"--process_id={index} and --num_processes={count}: ids go from 0 to num_processes - 1.")
    jax.config.update("jax_enable_preemption_service", False)  # the training loop hears SIGTERM itself
    try:
        jax.distributed.initialize(address, count, index, heartbeat_timeout_seconds=LOST_AFTER)
    except ValueError as error:
        if any(given) or str(error) != "coordinator_address should be defined.":  # what jax says where no cluster is
            raise RearError(f"the processes of this job cannot be joined ({error}).") from error
    except RuntimeError as error:
        raise RearError(f"the processes of this job cannot be joined ({_first_line(error)}).") from error


def are_several() -> bool:
    """Whether this process works together with others."""
    return jax.distributed.is_initialized() and jax.process_count() > 1


def is_first() -> bool:
    """Whether this process is the one that writes files for all."""
    return jax.process_index() == 0


def wait(name: str) -> None:
    """Until every process is here."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def everywhere(mine: bool) -> bool:
    """Whether it is so in every process; all of them must ask."""
    if jax.process_count() == 1:
        return mine
    return bool(multihost_utils.process_allgather(np.array(mine)).all())


def every(mine: int) -> list[int]:
    """The number that each process brings, in their order; all of them must ask."""
    if jax.process_count() == 1:
        return [mine]
    found = multihost_utils.process_allgather(np.array([mine], np.int64).view(np.uint8))  # jax has no int64 by default
    return np.ascontiguousarray(found).view(np.int64).ravel().tolist()


def agree(what: str, value: str) -> None:
    """Raises RearError in every process unless all bring the same value."""
    if jax.process_count() == 1:
        return
    mine = np.frombuffer(hashlib.sha256(value.encode()).digest(), np.uint8)
    every = multihost_utils.process_allgather(mine)  # [processes, 32]
    if differing := np.flatnonzero((every != every[0]).any(axis=1)).tolist():
        raise RearError(
            f"process(es) {', '.join(map(str, differing))} differ from process 0 in {what}: mend that host."
        )


def lost(error: Exception) -> RearError:
    """What to say of a failure of the runtime while several processes work together."""
    return RearError(
        f"process {jax.process_index()} of {jax.process_count()} cannot go on ({_first_line(error)}): see why another "
        "one ended, and run the same command on all of them again."
    )


def fail(message: str) -> NoReturn:
    """Prints a message and exits with 1; without waiting for the others, which learn of it by themselves."""
    if are_several():
        print(message, file=sys.stderr, flush=True)
        places.upload_last()
        os._exit(1)
    sys.exit(message)


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0][:200]
