"""Checkpoints on disk: the only file that knows orbax."""

import contextlib
import logging
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from etils import epath
from jax.errors import JaxRuntimeError
from orbax.checkpoint import checkpoint_managers as policies

from rear_jax.errors import RearError
from rear_jax.runtime import checksums, distributed, identity, places
from rear_jax.runtime.files import irregular_in

log = logging.getLogger(__name__)

STATE, RECORD, CHECKSUMS = "state", "record", "checksums"  # folders of a checkpoint
NAMED = 3  # entries that a message names
# tensorstore's words for what passes or is the machine's: the files may be whole
NOT_DAMAGE = ("RESOURCE_EXHAUSTED:", "PERMISSION_DENIED:", "UNAVAILABLE:", "DEADLINE_EXCEEDED:", "ABORTED:")


class Saved:
    """What a folder of checkpoints holds, told without reading arrays; it writes nothing and waits for no process."""

    def __init__(self, folder: Path):
        """Looks at a folder that exists."""
        self.folder = folder

    def steps(self) -> list[int]:
        """The complete steps, in any order; orbax renames a step to its number when it is complete, or marks it so."""
        numbered = [entry for entry in self.folder.iterdir() if entry.name.isascii() and entry.name.isdigit()]
        marked = places.is_bucket(self.folder)
        return [int(one.name) for one in numbered if not marked or ocp.utils.is_checkpoint_finalized(one)]

    def latest_step(self) -> int | None:
        """The newest complete step, or None."""
        return max(self.steps(), default=None)

    def param_names(self) -> set[str]:
        """Names of the top-level modules among the newest parameters."""
        step = self._existing_step()
        with self._reading(step):
            return set(_saved_tree(self._path(step) / STATE)["params"])

    def keeps_average(self) -> bool:
        """Whether the newest state has a moving average of its parameters."""
        step = self._existing_step()
        with self._reading(step):
            return bool(_saved_tree(self._path(step) / STATE).get("ema"))

    def record(self) -> dict:
        """What `save` stored beside the newest state, or the newest that can be read: its config."""
        return self._newest_readable(_read_record)[1]

    def refuse_other_params(self, like: Any, *, ema: bool = False) -> None:
        """Raises RearError unless the newest parameters, or their moving average, have the shapes of `like`."""
        step, name = self._existing_step(), "ema" if ema else "params"
        with self._reading(step):
            if other := _other_entries(self._path(step) / STATE, {name: like}, partial=True):
                raise RearError(
                    f"checkpoint {self._path(step)} holds other parameters than this config makes: {other}. Give the "
                    "settings that it was trained with."
                )

    def refuse_other_state(self, like: Any, record: dict) -> None:
        """Raises RearError unless the newest state has the shapes of `like`; arguments as of `Checkpoints.restore`."""
        self._newest_readable(lambda folder: self._refuse_other_state(folder, like, record))

    def _refuse_other_state(self, folder: epath.Path, like: Any, record: dict) -> None:
        if not (other := _other_entries(folder / STATE, like)):
            return
        differing = identity.differences(_read_record(folder), record, identity.STATE)
        changed = ", ".join(one for one in differing if ".loop." not in one) or "none"
        raise RearError(
            f"checkpoint {folder} holds another state than this config makes: {other}. Settings that changed: "
            f"{changed}. Give those that it depends on the old values, or use another --workdir."
        )

    def _path(self, step: int) -> epath.Path:
        """The folder of a step; raises RearError where it has pipes or devices, which orbax would wait for."""
        place = self.folder.resolve() / str(step)
        if odd := irregular_in(place):
            raise RearError(f"checkpoint {place} has {odd}, which is neither a file nor a folder: delete it.")
        return epath.Path(place)

    @contextlib.contextmanager
    def _reading(self, step: int) -> Iterator[None]:
        """Says of a damaged file which checkpoint it is of."""
        try:
            yield
        except Exception as error:  # orbax and tensorstore raise many kinds
            if not _is_damage(error):
                raise
            raise self._unreadable(step, error) from error

    def _newest_readable(
        self,
        read: Callable[[epath.Path], Any],
        everywhere: Callable[[bool], bool] = bool,
        damage_in: Callable[[Any], str] = lambda _: "",
    ) -> tuple[int, Any]:
        """The newest step that is not damaged, and what `read` makes of its folder; `everywhere` asks the others too.

        It reads by orbax's handlers: unlike its manager, they wait for no other process, which may have failed. When
        all have read, `damage_in` tells all of them what is wrong with the values, or ''.
        """
        newest, failure = self._existing_step(), None
        for step in sorted(self.steps(), reverse=True):
            found, damage = None, None
            try:
                found = read(self._path(step))
            except Exception as error:
                if not _is_damage(error):
                    raise
                damage = error
            if everywhere(damage is None):
                if not (told := damage_in(found)):
                    return step, found
                damage = ValueError(told)
            failure = failure or damage
        raise self._unreadable(newest, failure or RearError("another process cannot read it"))

    def _existing_step(self) -> int:
        step = self.latest_step()
        if step is None:
            raise RearError(f"no checkpoint in {self.folder}: run the job that makes it first, or mend the path.")
        return step

    def _unreadable(self, step: int, error: Exception) -> RearError:
        return RearError(
            f"checkpoint {self.folder / str(step)} cannot be read ({_reason(error)}): delete that folder to go on from "
            "the one before it, if there is one."
        )


class Checkpoints(Saved):
    """The checkpoints of one training job, in one folder, written in the background.

    A step that is on disk is complete: orbax writes under a temporary name and renames. Each holds the whole state
    and, as JSON, a record of the config that made it and checksums of both.
    """

    def __init__(self, folder: Path, *, keep: int, keep_every: int = 0):
        """Opens or makes the folder; it keeps the newest `keep`, and for ever those of every `keep_every`-th step.

        Raises RearError: `keep` is less than 1, which would delete them all, or `keep_every` is negative.
        """
        super().__init__(folder)
        if keep < 1 or keep_every < 0:
            raise RearError(
                f"{folder}: keep {keep} checkpoints and every {keep_every}th step? Keep 1 or more; 0 = none."
            )
        kept = [policies.LatestN(keep), *([policies.EveryNSteps(keep_every)] if keep_every else [])]
        options = ocp.CheckpointManagerOptions(
            preservation_policy=policies.AnyPreservationPolicy(kept), create=True, enable_async_checkpointing=True
        )
        self._manager = ocp.CheckpointManager(self.folder.resolve(), options=options)

    def steps(self) -> list[int]:
        """As `Saved.steps`; those whose saving has begun count as well."""
        return self._manager.all_steps()

    def latest_step(self) -> int | None:
        """The newest step, or None."""
        return self._manager.latest_step()

    def save(self, step: int, state: Any, record: dict) -> None:
        """Starts saving; returns as soon as the state is copied, so that its buffers may be donated.

        Raises RearError: the previous save failed (a full disk, say).
        """
        if step == self.latest_step():
            return
        kept = {STATE: checksums.of_arrays(state), RECORD: checksums.of_record(record)}
        items = {STATE: ocp.args.StandardSave(state), RECORD: ocp.args.JsonSave(record)}
        try:
            self._manager.save(step, args=ocp.args.Composite(**items, **{CHECKSUMS: ocp.args.JsonSave(kept)}))
        except (OSError, ValueError) as error:
            raise self._failed(error) from error

    def wait(self) -> None:
        """Blocks until everything is on disk; raises RearError if a save failed."""
        try:
            self._manager.wait_until_finished()
        except (OSError, ValueError) as error:
            raise self._failed(error) from error

    @contextlib.contextmanager
    def finishing(self) -> Iterator[None]:
        """An error that leaves the context loses no save that has begun; but for those of jax: others may be lost."""
        try:
            yield
        except JaxRuntimeError:
            raise
        except Exception:
            self.wait()
            raise

    def restore(self, like: Any, record: dict) -> tuple[int, Any]:
        """The newest step that can be read and its state, placed as the `jax.ShapeDtypeStruct`s of `like` say.

        Damaged steps after it are renamed, so that they can be taken and saved again. Several processes take the newest
        that all of them can read. Damaged is also a step whose arrays are not those that were saved.

        Args:
          like: the state that is wanted.
          record: of the config that wants it, as `save` takes it.

        Raises RearError: there is no checkpoint, none can be read, or it holds another state or one that is not finite.
        """

        def read(folder: epath.Path) -> tuple[Any, dict]:
            self._refuse_other_state(folder, like, record)
            handler = ocp.StandardCheckpointHandler(restore_concurrent_gb=_gigabytes_at_once(folder / STATE))
            return handler.restore(folder / STATE, args=ocp.args.StandardRestore(like)), _read_checksums(folder)

        step, (state, _) = self._newest_readable(read, distributed.everywhere, lambda found: _changed(*found))
        self._set_aside([later for later in self.steps() if later > step], step)
        self._require_finite(state, step)
        return step, state

    def restore_params(self, like: Any, *, ema: bool = False) -> tuple[int, Any]:
        """The newest step and its parameters alone, or their moving average."""
        step, name = self._existing_step(), "ema" if ema else "params"
        restore_args = ocp.checkpoint_utils.construct_restore_args({name: like})
        args = ocp.args.PyTreeRestore({name: like}, restore_args=restore_args, partial_restore=True)
        self.refuse_other_params(like, ema=ema)
        folder = self._path(step)
        with self._reading(step):
            handler = ocp.PyTreeCheckpointHandler(restore_concurrent_gb=_gigabytes_at_once(folder / STATE))
            params = handler.restore(folder / STATE, args=args)[name]
            kept = _read_checksums(folder)
        if changed := _changed({name: params}, kept):
            raise self._unreadable(step, ValueError(changed))
        self._require_finite(params, step)
        return step, params

    def _require_finite(self, tree: Any, step: int) -> None:
        """Raises RearError where an array is NaN or infinite; all processes that share the arrays must ask."""
        leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
        wrong = next((_name_of(path) for path, leaf in leaves if not _is_finite(leaf)), "")
        if wrong:
            raise RearError(
                f"checkpoint {self._path(step)}: {wrong} is not finite (NaN or infinite): delete that folder to go on "
                "from the one before it, if there is one."
            )

    def close(self) -> None:
        """Waits for the last save and lets go of the folder."""
        self.wait()
        self._manager.close()

    def _set_aside(self, damaged: list[int], step: int) -> None:
        """Renames steps, by the first process for all; `step` is the one that is gone back to."""
        for later in damaged if distributed.is_first() else ():
            (self.folder / str(later)).rename(self.folder / f"{later}.damaged-{time.time_ns()}")
            log.warning(
                "checkpoint %s is damaged and was set aside; going back to step %d", self.folder / str(later), step
            )
        distributed.wait("damaged checkpoints are set aside")
        self._manager.reload()

    def _failed(self, error: Exception) -> RearError:
        return RearError(
            f"saving a checkpoint to {self.folder} failed ({_reason(error)}): free space there and run again."
        )


def abstract(tree: Any, shardings: Any) -> Any:
    """Shapes and dtypes of a tree, to be restored with one sharding or a tree of them."""
    shardings = jax.tree.broadcast(shardings, tree)
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, shardings)


def _read_record(folder: epath.Path) -> dict:
    record = ocp.JsonCheckpointHandler().restore(folder / RECORD, args=ocp.args.JsonRestore())
    if not isinstance(record, dict):
        raise ValueError("its record is no table of settings")
    if _read_checksums(folder).get(RECORD) not in (None, checksums.of_record(record)):
        raise ValueError("its record is not the one that was saved")
    return record


def _read_checksums(folder: epath.Path) -> dict:
    """What was saved of the state and of the record; {} in a checkpoint of an earlier version."""
    if not (folder / CHECKSUMS).exists():
        return {}
    kept = ocp.JsonCheckpointHandler().restore(folder / CHECKSUMS, args=ocp.args.JsonRestore())
    if not (isinstance(kept, dict) and isinstance(kept.get(STATE), dict)):
        raise ValueError("its checksums are no table")
    return kept


def _changed(tree: Any, kept: dict) -> str:
    """What to say of arrays that are not those that were saved, or ''; `kept` is of `_read_checksums`."""
    name = checksums.first_differing(tree, kept.get(STATE, {})) if kept else ""
    return f"the values of {name} are not those that were saved" if name else ""


def _saved_tree(state: epath.Path) -> dict:
    """What a saved state is made of: names, shapes and dtypes."""
    return ocp.PyTreeCheckpointHandler().metadata(state).tree


def _gigabytes_at_once(state: epath.Path) -> int:
    """How much of a saved state orbax may read at a time, to save memory: its largest array fits, all do not.

    What is being read lies in memory two or three times: as it was packed, unpacked, and where it belongs.
    """
    arrays = jax.tree.leaves(_saved_tree(state))
    return 1 + max((math.prod(one.shape) * one.dtype.itemsize for one in arrays), default=0) // 10**9


def _other_entries(state: epath.Path, like: Any, *, partial: bool = False) -> str:
    """How the arrays of a saved state differ from those that are asked for, which may be a part; '' if they do not."""
    saved, wanted = _shapes(_saved_tree(state)), _shapes(like)
    reshaped = [
        f"{name} {list(saved[name])} for {list(wanted[name])}"
        for name in saved.keys() & wanted.keys()
        if saved[name] != wanted[name]
    ]
    named = {
        "it lacks": wanted.keys() - saved.keys(),
        "it has besides": () if partial else saved.keys() - wanted.keys(),
        "it has": reshaped,
    }
    return "; ".join(f"{how} {_some(sorted(names))}" for how, names in named.items() if names)


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    """Shape of every array, by its path."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {_name_of(path): tuple(leaf.shape) for path, leaf in leaves}


def _name_of(path: tuple) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


def _is_finite(leaf: jax.Array) -> bool:
    """Whether all values of an array, on whatever devices, are numbers."""
    return not jnp.issubdtype(leaf.dtype, jnp.inexact) or bool(_all_finite(leaf))


@jax.jit
def _all_finite(values: jax.Array) -> jax.Array:
    """bool []; of the whole array, as one part of it would be on other devices than the mesh around the caller."""
    return jnp.isfinite(values).all()


def _some(names: list[str]) -> str:
    """The first few, and how many there are besides."""
    return ", ".join(names[:NAMED]) + (f" and {len(names) - NAMED} more" if len(names) > NAMED else "")


def _is_damage(error: BaseException | None) -> bool:
    """Whether what orbax or tensorstore raised is about a file's content, rather than about this machine or config."""
    if error is None:
        return True
    of_this_machine = isinstance(error, RearError | MemoryError | JaxRuntimeError) or (
        isinstance(error, OSError) and not isinstance(error, FileNotFoundError)
    )
    return not of_this_machine and not str(error).startswith(NOT_DAMAGE) and _is_damage(error.__cause__)


def _reason(error: BaseException) -> str:
    """The first line of what lies behind an error."""
    while error.__cause__ is not None:
        error = error.__cause__
    return str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
