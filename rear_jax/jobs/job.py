"""The record of a job."""

from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path

from ml_collections import ConfigDict


@dataclass(frozen=True)
class Job:
    """What the command line runs by name.

    Attributes:
      run: (config, workdir) does the work, and refuses what it cannot do.
      check: (config, workdir, names of jobs that run first) raises RearError where `run` would refuse: it reads
        settings, labels, and headers of files. It writes nothing, places no array on a device, and waits for no other
        process. What the jobs before will make is not looked for.
      shared: whether several processes run it together.
      leaves: what it leaves in the workdir: first the file or folder that is there once it has done its work, or the
        checkpoints of a training, then what else is worth a look.
      locks: whether it makes what other jobs go on from, so that one job at a time may work in a workdir.
      counts_classes: whether it needs the number of classes, which `config.data.num_classes` = 0 asks of the images.
    """

    run: Callable[[ConfigDict, Path], None]
    check: Callable[[ConfigDict, Path, Collection[str]], None]
    shared: bool = False
    locks: bool = True
    counts_classes: bool = True
    leaves: tuple[str, ...] = ()

    def found(self, workdir: Path) -> list[Path]:
        """What there is of `leaves`."""
        return [workdir / name for name in self.leaves if (workdir / name).exists()]
