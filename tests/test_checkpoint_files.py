"""Checkpoints of our own that are damaged: changed values are found, NaN is named, pipes are not waited for."""

import json
import os
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rear_jax.errors import RearError
from rear_jax.runtime import checkpoints as checkpoint_files
from rear_jax.runtime import checksums
from rear_jax.runtime.checkpoints import Checkpoints, Saved, abstract
from rear_jax.training.state import TrainState

PARAMS = {"layer": {"kernel": jnp.arange(6.0).reshape(2, 3), "bias": jnp.zeros(3)}, "count": jnp.int32(3)}


def saved(folder, params):
    checkpoints = Checkpoints(folder, keep=1)
    checkpoints.save(1, {"params": params}, {"a": 1})
    checkpoints.close()
    return Checkpoints(folder, keep=1)


def like():
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), PARAMS)


def test_finite_parameters_are_read(tmp_path):
    step, params = saved(tmp_path, PARAMS).restore_params(like())
    assert step == 1
    assert params["layer"]["kernel"].sum() == 15


@pytest.mark.parametrize(("values", "gigabytes"), [(0, 1), (10, 1), (249_999_999, 1), (250_000_000, 2), (10**9, 5)])
def test_the_largest_array_can_be_read_and_not_much_more(monkeypatch, values, gigabytes):
    sizes = {"largest": jax.ShapeDtypeStruct((values,), jnp.float32), "step": jax.ShapeDtypeStruct((), jnp.int32)}
    monkeypatch.setattr(checkpoint_files, "_saved_tree", lambda _: sizes)
    assert checkpoint_files._gigabytes_at_once(None) == gigabytes  # orbax refuses an array of as many bytes as that


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf])
def test_a_parameter_that_is_not_finite_is_named(tmp_path, bad):
    params = PARAMS | {"layer": PARAMS["layer"] | {"bias": jnp.array([0.0, bad, 0.0])}}
    with pytest.raises(RearError, match=r"1: layer/bias is not finite .*delete that folder"):
        saved(tmp_path, params).restore_params(like())


@pytest.mark.parametrize("where", ["state", "record", ""])
def test_pipes_in_a_checkpoint_are_not_waited_for(tmp_path, where):
    checkpoints = saved(tmp_path, PARAMS)
    os.mkfifo(tmp_path / "1" / where / "pipe")
    for read in (Saved(tmp_path).record, Saved(tmp_path).param_names, lambda: checkpoints.restore_params(like())):
        with pytest.raises(RearError, match=r"1/.*pipe, which is neither a file nor a folder: delete it"):
            read()


def state(params=PARAMS, step: int = 1) -> TrainState:
    return TrainState(jnp.int32(step), params, {"moments": jax.tree.map(jnp.ones_like, params)}, ema=params)


def wanted() -> TrainState:
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return abstract(jax.eval_shape(state), sharding)


def saved_states(folder, *states: TrainState) -> Checkpoints:
    checkpoints = Checkpoints(folder, keep=len(states))
    for step, one in enumerate(states, 1):
        checkpoints.save(step, one, {"a": 1})
    checkpoints.close()
    return Checkpoints(folder, keep=len(states))


@pytest.mark.parametrize("bad", [jnp.nan, -jnp.inf])
@pytest.mark.parametrize("part", ["params", "opt_state"])
def test_no_training_goes_on_from_what_is_not_finite(tmp_path, bad, part):
    spoilt = state().replace(**{part: {"kernel": jnp.full((2, 3), bad)}})
    like = abstract(jax.eval_shape(lambda: spoilt), jax.sharding.SingleDeviceSharding(jax.devices()[0]))
    with pytest.raises(RearError, match=rf"2: {part}/kernel is not finite .*delete that folder to go on from the one"):
        saved_states(tmp_path, spoilt, spoilt).restore(like, {"a": 1})


def test_values_that_changed_on_disk_are_found(tmp_path, monkeypatch):
    """The files are whole, as orbax sees them, and the values are others; also where one alone is read."""
    monkeypatch.setattr(checksums, "of_arrays", lambda tree, true=checksums.of_arrays: other_bit(true(tree)))
    checkpoints = saved_states(tmp_path, state(), state(step=2))
    monkeypatch.undo()
    with pytest.raises(RearError, match=r"2 cannot be read \(the values of params/count are not those that were"):
        checkpoints.restore_params(like())
    with pytest.raises(RearError, match=r"2 cannot be read \(the values of .* delete that folder"):
        checkpoints.restore(wanted(), {"a": 1})


def other_bit(sums: dict) -> dict:
    return {name: [dtype, one ^ 1] for name, (dtype, one) in sums.items()}


def test_a_checkpoint_of_an_earlier_version_has_no_checksums(tmp_path):
    checkpoints = saved_states(tmp_path, state())
    shutil.rmtree(tmp_path / "1" / "checksums")
    assert checkpoints.restore(wanted(), {"a": 1})[0] == 1
    assert checkpoints.restore_params(like())[0] == 1


@pytest.fixture(scope="module")
def two_steps(tmp_path_factory):
    """A folder of checkpoints; copy it to change it."""
    folder = tmp_path_factory.mktemp("two_steps")
    saved_states(folder, big(1), big(2))
    return folder


@pytest.mark.parametrize("content", ["[]", '{"state": 7}', "x"])
def test_checksums_that_are_damaged(two_steps, tmp_path, content):
    shutil.copytree(two_steps, tmp_path, dirs_exist_ok=True)
    (tmp_path / "2" / "checksums" / "metadata").write_text(content)
    assert int(Checkpoints(tmp_path, keep=2).restore(big_wanted(), {"a": 1})[1].step) == 1


def test_a_record_with_another_value_is_damaged(two_steps, tmp_path):
    shutil.copytree(two_steps, tmp_path, dirs_exist_ok=True)
    (tmp_path / "2" / "record" / "metadata").write_text(json.dumps({"a": 3}))
    assert Saved(tmp_path).record() == {"a": 1}


def read_after_a_flip(folder, whole, choose) -> str:
    """Restores where a bit of the newest checkpoint differs; tells what came of it.

    `choose` takes the sizes of its files and gives the number of a file, a byte of it, and a bit of that.
    """
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(whole, folder)
    files = sorted(file for file in (folder / "2").rglob("*") if file.is_file() and file.stat().st_size)
    number, place, bit = choose([file.stat().st_size for file in files])
    data = bytearray(files[number].read_bytes())
    data[place] ^= 1 << bit
    files[number].write_bytes(data)
    try:
        step, found = Checkpoints(folder, keep=2).restore(big_wanted(), {"a": 1})
    except RearError as error:
        return str(error)
    for got, was in zip(jax.tree.leaves(found), jax.tree.leaves(big(step)), strict=True):
        np.testing.assert_array_equal(got, was, err_msg=f"{files[number]}, byte {place}")
    return f"step {step}"


def big(step: int) -> TrainState:
    values = np.random.default_rng(step).normal(size=(40, 50)).astype(np.float32)
    return state({"kernel": jnp.asarray(values)}, step)


def big_wanted() -> TrainState:
    return abstract(jax.eval_shape(lambda: big(1)), jax.sharding.SingleDeviceSharding(jax.devices()[0]))


def inside_the_largest(sizes: list[int]) -> tuple[int, int, int]:
    """A file of arrays."""
    return int(np.argmax(sizes)), max(sizes) // 2, 3


def flips(tmp_path, whole, count: int) -> None:
    """One in an array is found, and the checkpoint set aside; others may be harmless, as in a file of dates."""
    random = np.random.default_rng(0)

    def anywhere(sizes: list[int]) -> tuple[int, int, int]:
        number = random.integers(len(sizes))
        return number, random.integers(sizes[number]), random.integers(8)

    assert read_after_a_flip(tmp_path / "flipped", whole, inside_the_largest) == "step 1"
    told = [read_after_a_flip(tmp_path / "flipped", whole, anywhere) for _ in range(count - 1)]
    assert set(told) <= {"step 1", "step 2"}


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # tasks that orbax leaves
def test_flipped_bits_never_change_what_is_read(two_steps, tmp_path):
    flips(tmp_path, two_steps, 6)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # tasks that orbax leaves
@pytest.mark.slow
def test_many_flipped_bits_never_change_what_is_read(two_steps, tmp_path):
    flips(tmp_path, two_steps, 60)


def test_checksums_by_hand_and_of_every_dtype():
    """Bits times 1, 3, 5, ... modulo 2^32, by NumPy; any bit counts."""
    random = np.random.default_rng(0)
    for dtype in ("float32", "bfloat16", "int32", "uint8", "bool", "float16"):
        values = jnp.asarray(random.integers(0, 2 if dtype == "bool" else 200, (3, 4, 5))).astype(dtype)
        bits = np.asarray(values).view(f"u{values.dtype.itemsize}").ravel().astype(np.uint64)
        by_hand = int((bits * (2 * np.arange(60, dtype=np.uint64) + 1)).sum() % 2**32)
        assert checksums.of_arrays({"x": values}) == {"x": [dtype, by_hand]}
    whole = np.array(random.normal(size=(5, 7)), np.float32)
    for place in random.integers(0, whole.nbytes * 8, 40):
        flipped = whole.copy()
        flipped.view(np.uint8).reshape(-1)[place // 8] ^= np.uint8(1 << place % 8)
        assert checksums.first_differing({"x": flipped}, checksums.of_arrays({"x": whole})) == "x"
    assert checksums.of_arrays({"x": jnp.zeros((0, 3)), "y": jnp.int32(-1)})["y"] == ["int32", 2**32 - 1]
