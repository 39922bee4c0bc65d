"""How fast a training job is, what it costs, and how long it will take."""

import time

from jax.sharding import Mesh
from tqdm import tqdm

from rear_jax.runtime import chips

HOUR = 3600.0  # seconds


def peak(mesh: Mesh) -> float | None:
    """Operations per second of all devices in bfloat16; None where the numbers of the chip are not known here."""
    chip = chips.of_kind(mesh.devices.flat[0].device_kind)
    return chip and chip.flops * mesh.size


class Speed:
    """Counts steps and seconds between log steps."""

    def __init__(self, mesh: Mesh, steps: int, batch_size: int, *, share: float | None, spent: float):
        """Starts the clock.

        Args:
          mesh: whose devices work.
          steps: of the whole job.
          batch_size: images of a step.
          share: of a second in which the devices could make the operations of a step at their peak; None = not known.
          spent: device-hours of earlier runs of the job.
        """
        self._devices, self._steps, self._batch_size, self._share = mesh.size, steps, batch_size, share
        self._begin, self._spent = time.perf_counter(), spent
        self.restart()

    def restart(self) -> None:
        """Begins a new stretch of steps."""
        self._since = time.perf_counter()

    def of(self, step: int, made: int) -> tuple[dict[str, float], str]:
        """What to log after `step`, with so many steps in this stretch: metrics, and the progress in words.

        The metric `mfu` is the model FLOPs utilisation (arXiv 2204.02311).
        """
        now = time.perf_counter()
        rate = made / (now - self._since)
        metrics = {
            "steps_per_second": rate,
            "images_per_second": rate * self._batch_size,
            "device_hours": self._spent + self._devices * (now - self._begin) / HOUR,
        }
        if self._share is not None:
            metrics["mfu"] = rate * self._share
        left = tqdm.format_interval((self._steps - step) / rate)
        return metrics, f"step {step} of {self._steps}, {left} left"
