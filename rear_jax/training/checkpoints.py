"""Checkpoints on disk: the only file that knows orbax."""

import logging
import time
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint import checkpoint_managers as policies

from rear_jax.errors import RearError

log = logging.getLogger(__name__)


class Checkpoints:
    """The checkpoints of one training job, in one folder, written in the background.

    A step that is on disk is complete: orbax writes under a temporary name and renames. Each holds the whole state
    and, as JSON, a record of the config that made it.
    """

    def __init__(self, folder: Path, *, keep: int, keep_every: int = 0):
        """Opens or makes the folder; it keeps the newest `keep`, and for ever those of every `keep_every`-th step."""
        self.folder = folder
        kept = [policies.LatestN(keep), *([policies.EveryNSteps(keep_every)] if keep_every else [])]
        options = ocp.CheckpointManagerOptions(
            preservation_policy=policies.AnyPreservationPolicy(kept), create=True, enable_async_checkpointing=True
        )
        self._manager = ocp.CheckpointManager(self.folder.resolve(), options=options)

    def latest_step(self) -> int | None:
        """The newest complete step, or None."""
        return self._manager.latest_step()

    def save(self, step: int, state: Any, record: dict) -> None:
        """Starts saving; returns as soon as the state is copied, so that its buffers may be donated.

        Raises:
          RearError: the previous save failed (a full disk, say).
        """
        if step == self.latest_step():
            return
        try:
            self._manager.save(
                step, args=ocp.args.Composite(state=ocp.args.StandardSave(state), record=ocp.args.JsonSave(record))
            )
        except (OSError, ValueError) as error:
            raise self._failed(error) from error

    def wait(self) -> None:
        """Blocks until everything is on disk; raises RearError if a save failed."""
        try:
            self._manager.wait_until_finished()
        except (OSError, ValueError) as error:
            raise self._failed(error) from error

    def restore(self, like: Any) -> tuple[int, Any]:
        """The newest step that can be read and its state, placed as the `jax.ShapeDtypeStruct`s of `like` say.

        Damaged steps after it are renamed, so that they can be taken and saved again.

        Raises:
          RearError: there is no checkpoint, or none can be read.
        """
        args = ocp.args.Composite(state=ocp.args.StandardRestore(like))
        step, restored = self._newest_readable(args)
        for later in [s for s in self._manager.all_steps() if s > step]:
            (self.folder / str(later)).rename(self.folder / f"{later}.damaged-{time.time_ns()}")
            log.warning(
                "checkpoint %s is damaged and was set aside; going back to step %d", self.folder / str(later), step
            )
        self._manager.reload()
        return step, restored["state"]

    def restore_params(self, like: Any, *, ema: bool = False) -> tuple[int, Any]:
        """The newest step and its parameters alone, or their moving average."""
        step, name = self._existing_step(), "ema" if ema else "params"
        restore_args = ocp.checkpoint_utils.construct_restore_args({name: like})
        args = ocp.args.PyTreeRestore({name: like}, restore_args=restore_args, partial_restore=True)
        try:
            restored = self._manager.restore(step, args=ocp.args.Composite(state=args))
        except Exception as error:
            raise self._unreadable(step, error) from error
        return step, restored["state"][name]

    def param_names(self) -> set[str]:
        """Names of the top-level modules among the newest parameters."""
        step = self._existing_step()
        try:
            metadata = ocp.PyTreeCheckpointHandler().metadata(epath.Path(self.folder.resolve() / str(step) / "state"))
            return set(metadata.tree["params"])
        except Exception as error:
            raise self._unreadable(step, error) from error

    def record(self) -> dict:
        """What `save` stored beside the newest state, or the newest that can be read: its config."""
        return self._newest_readable(ocp.args.Composite(record=ocp.args.JsonRestore()))[1]["record"]

    def close(self) -> None:
        """Waits for the last save and lets go of the folder."""
        self.wait()
        self._manager.close()

    def _newest_readable(self, args: ocp.args.Composite) -> tuple[int, Any]:
        """The newest step of which orbax can restore what `args` ask for.

        Several processes try the newest alone: the damage may be such that not all of them see it.
        """
        newest, failure = self._existing_step(), None
        for step in sorted(self._manager.all_steps(), reverse=True):
            try:
                return step, self._manager.restore(step, args=args)
            except Exception as error:  # orbax and tensorstore raise many kinds for a damaged file
                failure = failure or self._unreadable(newest, error)
                if jax.process_count() > 1:
                    break
        raise failure

    def _existing_step(self) -> int:
        step = self.latest_step()
        if step is None:
            raise RearError(f"no checkpoint in {self.folder}: run the job that makes it first, or mend the path.")
        return step

    def _unreadable(self, step: int, error: Exception) -> RearError:
        reason = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
        return RearError(
            f"checkpoint {self.folder / str(step)} cannot be read ({reason}): delete that folder to go on from the one "
            "before it, if there is one."
        )

    def _failed(self, error: Exception) -> RearError:
        reason = str(error).strip().splitlines()[0][:200]
        return RearError(f"saving a checkpoint to {self.folder} failed ({reason}): free space there and run again.")


def abstract(tree: Any, shardings: Any) -> Any:
    """Shapes and dtypes of a tree, to be restored with one sharding or a tree of them."""
    shardings = jax.tree.broadcast(shardings, tree)
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, shardings)
