"""Checkpoints of our own that are damaged: what is not finite is named, pipes are not waited for."""

import os

import jax
import jax.numpy as jnp
import pytest

from rear_jax.errors import RearError
from rear_jax.runtime.checkpoints import Checkpoints, Saved

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
