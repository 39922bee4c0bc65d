"""The optimiser, accumulation, checkpoints and the loop's refusals, without a whole job around them."""

import errno
import json
import threading
import time

import chex
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from jax.errors import JaxRuntimeError
from ml_collections import ConfigDict

from rear_jax import artifacts, generators, tokenizers
from rear_jax import config as configs
from rear_jax.errors import RearError
from rear_jax.runtime import identity
from rear_jax.runtime.checkpoints import Checkpoints, abstract
from rear_jax.runtime.input_wait import InputWait
from rear_jax.runtime.mesh import make_mesh, replicated
from rear_jax.runtime.writer import MetricWriter, read_metrics
from rear_jax.training import loop, objectives, state
from tests import toy

PARAMS = {"fc1": {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)}, "pos_embed": jnp.ones(3), "codebook": jnp.ones(3)}
RULES = (*generators.FAMILIES["rar"].parameters, *tokenizers.FAMILIES["maskgit_vqgan"].parameters)


def settings(**changes) -> ConfigDict:
    made = configs.optimizer_settings()
    made.update({"warmup_steps": 10, "learning_rate": 1.0, "final_learning_rate": 0.1, **changes})
    return made


def test_learning_rate_known_points():
    schedule = state.learning_rate(settings(), 110)
    np.testing.assert_allclose([schedule(s) for s in (0, 5, 10, 60, 110)], [0.0, 0.5, 1.0, 0.55, 0.1], atol=1e-6)


@pytest.mark.slow
def test_weight_decay_spares_biases_tables_and_codebooks():
    optimizer = state.adamw(settings(warmup_steps=0, weight_decay=0.5), 100, RULES)
    zero = jax.tree.map(jnp.zeros_like, PARAMS)
    after = state.apply_gradients(state.new_state(PARAMS, optimizer), zero, optimizer)
    np.testing.assert_allclose(after.params["fc1"]["kernel"], 0.5)
    for kept in (after.params["fc1"]["bias"], after.params["pos_embed"], after.params["codebook"]):
        np.testing.assert_array_equal(kept, 1.0)


def test_clipping_bounds_the_first_moment():
    optimizer = state.adamw(settings(clip_norm=1.0), 100, RULES)
    gradients = jax.tree.map(lambda p: 1e3 * p, PARAMS)
    after = state.apply_gradients(state.new_state(PARAMS, optimizer), gradients, optimizer)
    moments = jax.tree.leaves(jax.tree.map(jnp.square, after.opt_state[1][0].mu))
    assert float(jnp.sqrt(sum(m.sum() for m in moments))) == pytest.approx(0.1, rel=1e-5)  # (1 - b1)·1


def test_moving_average():
    optimizer = state.adamw(settings(warmup_steps=0), 100, RULES)
    before = state.new_state(PARAMS, optimizer, ema=True)
    after = state.apply_gradients(before, PARAMS, optimizer, ema_decay=0.75)
    want = jax.tree.map(lambda a, p: 0.75 * a + 0.25 * p, before.ema, after.params)
    chex.assert_trees_all_close(after.ema, want, rtol=1e-6)


@pytest.mark.parametrize("parts", [1, 2, 4])
def test_accumulation_is_the_whole_batch(parts):
    def loss_fn(params, batch, key):
        loss = jnp.mean(jnp.square(batch["x"] @ params - batch["y"]))
        return loss, {"loss": loss}

    x, y = jax.random.normal(jax.random.key(0), (8, 3)), jnp.arange(8.0)
    params = jnp.array([1.0, -1.0, 0.5])
    metrics, gradients = state.accumulated_gradients(loss_fn, params, {"x": x, "y": y}, jax.random.key(1), parts)
    metrics = jax.tree.map(jnp.mean, metrics)
    want, want_gradients = jax.value_and_grad(lambda p: loss_fn(p, {"x": x, "y": y}, None)[0])(params)
    np.testing.assert_allclose(metrics["loss"], want, rtol=1e-6)
    np.testing.assert_allclose(gradients, want_gradients, rtol=1e-5)


def run_loop(workdir, step_fn, steps=6, seconds=0.0, draw=None, **changes):
    """The last state of a job whose n-th batch holds n and takes so many seconds to come."""
    loop_settings = configs.loop_settings()
    loop_settings.update({"steps": steps, "batch_size": 1, "log_every": 2, "checkpoint_every": 2, "picture_every": 0})
    loop_settings.update(changes)
    checkpoints = Checkpoints(workdir / "checkpoints", keep=2, keep_every=loop_settings.keep_every)

    def batches(start):
        for n in range(start, 10**6):
            time.sleep(seconds)
            yield {"x": np.full((1,), n, np.float32)}

    learning = loop.Learning(
        job="job",
        step=step_fn,
        init=lambda given: state.TrainState(jnp.int32(0), {"sum": jnp.float32(0)}, ()),
        given=None,
        frozen={},
        batch={"x": jax.ShapeDtypeStruct((1,), jnp.float32)},
        rules=(),
        settings=loop_settings,
        seed=0,
    )
    run = loop.Run(
        batches=batches,
        mesh=make_mesh(toy.config().mesh),
        record={"a": 1},
        checkpoints=checkpoints,
        workdir=workdir,
        draw=draw,
        counts=lambda: {"counted": 3},
    )
    try:
        return loop.train(learning, run)
    finally:
        checkpoints.close()


def add(train_state, batch, key, frozen):
    total = train_state.params["sum"] + batch["x"][0] + jax.random.uniform(key)
    return train_state.replace(step=train_state.step + 1, params={"sum": total}), {"loss": total}


def test_loop_feeds_batch_n_and_key_n(tmp_path):
    final = run_loop(tmp_path, add)
    noise = sum(float(jax.random.uniform(jax.random.fold_in(jax.random.key(0), n))) for n in range(6))
    assert float(final.params["sum"]) == pytest.approx(sum(range(6)) + noise, rel=1e-6)
    run_loop(tmp_path / "two", add, steps=4)
    assert float(run_loop(tmp_path / "two", add).params["sum"]) == float(final.params["sum"])


def test_the_step_is_traced_once(tmp_path):
    chex.clear_trace_counter()
    run_loop(tmp_path, chex.assert_max_traces(add, n=1))
    with pytest.raises(AssertionError, match="traced > 0 times"):
        run_loop(tmp_path / "never", chex.assert_max_traces(add, n=0))


def test_input_wait_and_counts_are_written(tmp_path):
    """Of a step that takes no time, all the time that is not the loop's own is waiting for its batch."""
    run_loop(tmp_path, add, seconds=0.05)
    written = read_metrics(tmp_path, "job")
    assert [r["counted"] for r in written] == [3] * 3
    assert all(0.5 < r["input_wait"] <= 1 for r in written[:2])


class Launched:
    """What step number `step` gives; notes the number of the newest step when it is waited for."""

    def __init__(self, step: int, newest: list[int], waits: list[tuple[int, int]]):
        self._step, self._newest, self._waits = step, newest, waits

    def block_until_ready(self) -> "Launched":
        if threading.current_thread() is threading.main_thread():  # not that of `InputWait`
            self._waits.append((self._step, self._newest[0]))
        return self

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        return np.float32(1.0)[None][0]


def test_the_device_has_steps_ahead_of_it_whenever_the_host_waits(tmp_path, monkeypatch):
    """Log steps, of which every second one is, are no exception."""
    newest, waits = [0], []

    def launch(state, batch, flags, frozen):
        newest[0] += 1
        return state, {"loss": Launched(newest[0], newest, waits)}, None

    monkeypatch.setattr(loop, "compiled_step", lambda *_: launch)
    run_loop(tmp_path, add, steps=9, checkpoint_every=9)
    assert waits == [(n, n + loop.AHEAD) for n in range(1, 10 - loop.AHEAD)]


class Running:
    """Stands for what a step gives that ends at some moment."""

    def __init__(self, seconds: float):
        self._end = time.perf_counter() + seconds

    def block_until_ready(self) -> "Running":
        time.sleep(max(0.0, self._end - time.perf_counter()))
        return self


@pytest.mark.parametrize(("step", "fetch", "idle"), [(0.3, 0.1, 0.0), (0.1, 0.3, 0.2), (0.0, 0.2, 0.2)])
def test_input_wait_is_the_part_of_a_fetch_after_the_step(step, fetch, idle):
    with InputWait() as wait:
        with wait.fetching(Running(step)):
            time.sleep(fetch)
        time.sleep(0.5 - fetch)
        assert wait.share() == pytest.approx(idle / 0.5, abs=0.1)
        time.sleep(0.01)
        assert wait.share() == 0.0  # since the last call


def test_nan_stops_names_the_step_and_saves_nothing_bad(tmp_path):
    def poisoned(train_state, batch, key, frozen):
        train_state, _ = add(train_state, batch, key, frozen)
        return train_state, {"loss": jnp.where(train_state.step == 4, jnp.nan, 1.0)}

    with pytest.raises(RearError, match=r"loss not finite at step 4; the checkpoint of step 2 is intact"):
        run_loop(tmp_path, poisoned)
    assert Checkpoints(tmp_path / "checkpoints", keep=2).latest_step() == 2


def test_a_value_that_an_image_gave_is_told_from_a_rate_too_high(tmp_path):
    def poisoned(train_state, batch, key, frozen):
        train_state, metrics = add(train_state, batch, key, frozen)
        return train_state, metrics | {"reward": jnp.nan, loop.SUSPECT: jnp.int32(7)}

    with pytest.raises(RearError, match=r"reward not finite at step 1, first for image 7 .* Look at that image") as e:
        run_loop(tmp_path, poisoned)
    assert "learning rate" not in str(e.value)


def test_no_setting_deletes_every_checkpoint(tmp_path):
    (tmp_path / "7").mkdir()
    for keep, keep_every in ((0, 0), (-1, 0), (1, -1)):
        with pytest.raises(RearError, match="Keep 1 or more"):
            Checkpoints(tmp_path, keep=keep, keep_every=keep_every)
    assert (tmp_path / "7").is_dir()


def test_a_state_is_on_disk_whatever_becomes_of_its_pictures(tmp_path, monkeypatch):
    def draw(state):
        raise RuntimeError("no picture")

    monkeypatch.setattr(Checkpoints, "close", lambda _: None)  # a job that fails does not get to it
    with pytest.raises(RuntimeError, match="no picture"):
        run_loop(tmp_path, add, picture_every=4, draw=draw)
    assert (tmp_path / "checkpoints" / "4").is_dir()


def truncate(folder) -> None:
    """Every file of a checkpoint is cut in half."""
    for file in [p for p in folder.rglob("*") if p.is_file()]:
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


@pytest.mark.parametrize("item", ["state", ""])  # the arrays alone, or the record of the config too
def test_truncated_checkpoint_falls_back_to_the_one_before(tmp_path, caplog, item):
    final = run_loop(tmp_path / "whole", add, steps=8)
    run_loop(tmp_path, add)
    truncate(tmp_path / "checkpoints" / "6" / item)
    assert Checkpoints(tmp_path / "checkpoints", keep=2).record() == {"a": 1}
    with caplog.at_level("INFO"):
        again = run_loop(tmp_path, add, steps=8)
    assert "checkpoints/6 is damaged and was set aside; going back to step 4" in caplog.text
    assert float(again.params["sum"]) == float(final.params["sum"])
    assert Checkpoints(tmp_path / "checkpoints", keep=2).latest_step() == 8
    assert [r["step"] for r in read_metrics(tmp_path, "job")] == [2, 4, 6, 8]


def test_truncated_checkpoints_are_named_where_none_is_left(tmp_path):
    run_loop(tmp_path, add)
    for step in (4, 6):
        truncate(tmp_path / "checkpoints" / str(step) / "state")
    with pytest.raises(RearError, match=r"checkpoints.6 cannot be read .*delete that folder"):
        run_loop(tmp_path, add, steps=8)


SAVED = state.TrainState(jnp.int32(4), {"kernel": jnp.ones((2, 3))}, ())
WANTED = {  # what is asked for -> how the message goes on
    "more": (SAVED.replace(ema=SAVED.params), r"it lacks ema/kernel\. .* train\.ema_decay \(was 0\.0, now 0\.5\)"),
    "less": (SAVED.replace(params={}), r"it has besides params/kernel\. "),
    "other": (SAVED.replace(params={"kernel": jnp.ones((5, 3))}), r"it has params/kernel \[2, 3\] for \[5, 3\]\. "),
}


def shapes_of(tree):
    return abstract(jax.eval_shape(lambda: tree), replicated(make_mesh(toy.config().mesh)))


@pytest.fixture
def saved(tmp_path):
    """Checkpoints of steps 2 and 4."""
    checkpoints = Checkpoints(tmp_path, keep=2)
    for step in (2, 4):
        checkpoints.save(step, SAVED, toy.config().to_dict())
    checkpoints.wait()
    return checkpoints


@pytest.mark.parametrize("case", WANTED)
def test_a_state_of_other_settings_is_not_taken_for_damage(saved, case):
    wanted, message = WANTED[case]
    now = toy.config(train__ema_decay=0.5, train__loop__steps=99).to_dict()
    with pytest.raises(RearError, match=f"checkpoint .*/4 holds another state than this config makes: {message}") as e:
        saved.restore(shapes_of(wanted), now)
    assert "loop.steps" not in str(e.value)
    assert "delete" not in str(e.value)
    assert saved.restore(shapes_of(SAVED), now)[0] == 4


def test_parameters_of_other_shapes_are_not_taken_for_damage(saved):
    with pytest.raises(RearError, match=r"/4 holds other parameters .* params/kernel \[2, 3\] for \[5, 3\]\. Give"):
        saved.restore_params(shapes_of({"kernel": jnp.ones((5, 3))}))


@pytest.mark.parametrize(
    "error",
    [
        JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes."),
        ValueError("RESOURCE_EXHAUSTED: Error reading local file"),
        OSError(errno.EIO, "Input/output error"),
        MemoryError(),
    ],
    ids=lambda error: type(error).__name__,
)
@pytest.mark.parametrize("wrapped", [False, True])
def test_what_the_machine_lacks_is_not_taken_for_damage(saved, monkeypatch, error, wrapped):
    def fail(*_, **__):
        if wrapped:
            raise Exception("Encountered error while reading array index") from error
        raise error

    monkeypatch.setattr(ocp.StandardCheckpointHandler, "restore", fail)
    with pytest.raises(Exception if wrapped else type(error)) as caught:
        saved.restore(shapes_of(SAVED), {})
    assert not isinstance(caught.value, RearError)
    monkeypatch.undo()
    assert saved.restore(shapes_of(SAVED), {})[0] == 4


def test_checkpoints_are_kept_by_count_and_by_interval(tmp_path):
    run_loop(tmp_path, add, steps=14, keep_every=6)
    assert Checkpoints(tmp_path / "checkpoints", keep=2)._manager.all_steps() == [6, 12, 14]
    with pytest.raises(RearError, match=r"keep_every = 5 is no multiple of loop\.checkpoint_every = 2"):
        run_loop(tmp_path, add, steps=16, keep_every=5)


def test_full_disk_is_one_line(tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    checkpoints = Checkpoints(tmp_path, keep=1)
    monkeypatch.setattr(checkpoints._manager, "save", full)
    with pytest.raises(RearError, match=r"No space left on device.*free space"):
        checkpoints.save(1, {"x": jnp.ones(2)}, {})


def test_changed_settings_are_named_with_both_values():
    saved = json.loads(json.dumps(toy.config().to_dict()))
    identity.refuse_changes(saved, toy.config(model__dtype="bfloat16"), ("model.",), "here")
    with pytest.raises(RearError, match=r"model.depth \(was 2, now 5\)"):
        identity.refuse_changes(saved, toy.config(model__depth=5), ("model.",), "here")


def test_metrics_of_a_lost_stretch_are_forgotten(tmp_path):
    with MetricWriter(tmp_path, "a", start_step=0) as writer:
        for step in (1, 2, 3):
            writer.write(step, {"loss": 1.0})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"job": "a", "st')  # cut off by a kill
    with MetricWriter(tmp_path, "a", start_step=2) as writer:
        writer.write(3, {"loss": 2.0})
    assert [(r["step"], r["loss"]) for r in read_metrics(tmp_path, "a")] == [(1, 1.0), (2, 1.0), (3, 2.0)]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--config.train.loop.stps=3",), 'Did you mean "steps"'),
        (("--job=paint",), "unknown job 'paint'"),
        (("--config.train.loop.steps=many",), "steps"),
    ],
)
def test_command_line_errors_are_one_line(tmp_path, flags, message):
    done = toy.finish(tmp_path, *flags)
    assert done.returncode != 0
    assert message in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_a_stage_that_there_is_not_is_one_line(tmp_path):
    done = toy.finish(tmp_path, f"--config={toy.ROOT / 'configs' / 'tokenizer_titok_b64.py'}:3")
    assert done.returncode != 0
    assert "in stages 1 and 2, not '3'" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_workdir_that_cannot_be_written_and_buckets():
    done = toy.finish("s3://bucket/run")
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert "mount the bucket" in done.stderr


def test_codes_on_the_fly_are_made_a_microbatch_at_a_time():
    """The encoder takes memory for each image that it sees at once."""
    config = toy.config(codes__on_the_fly=True, train__loop__batch_size=8, train__accumulation=4)
    mesh = make_mesh(config.mesh)
    learning = objectives.learning(config, artifacts.outline_tokenizer(config), {})
    state, batch, frozen = learning.arguments(mesh)
    program = jax.make_jaxpr(learning.step)(state, batch, jax.random.key(0), frozen)
    assert set(convolved_rows(program.jaxpr)) == {2}


def convolved_rows(jaxpr) -> list[int]:
    """Images that each convolution of a program sees at once."""
    convolutions = [equation for equation in jaxpr.eqns if equation.primitive.name == "conv_general_dilated"]
    found = [equation.invars[0].aval.shape[0] for equation in convolutions]
    for equation in jaxpr.eqns:
        for value in equation.params.values():
            for inner in value if isinstance(value, list | tuple) else [value]:
                if hasattr(inner, "jaxpr") or hasattr(inner, "eqns"):
                    found += convolved_rows(getattr(inner, "jaxpr", inner))
    return found
