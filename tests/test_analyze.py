"""The diagnostics: forced decoding, hidden states, what each measures, and the job that writes them down."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rear_jax import generators
from rear_jax.config import alitok_generator
from rear_jax.generators.interface import Captions
from rear_jax.sampling.generate import Given, Sampler, decode, generate
from tests import toy

KEYS = jax.random.split(jax.random.key(7), 3)
LABELS, ROWS = jnp.array([0, 4]), jnp.array([0, 1, 1])
SAMPLER = Sampler("constant", 2.0, guidance_interval=5)


def alitok_config():
    """The toy experiment with an AliTok generator."""
    made = toy.config(method__name="ar")
    made.unlock()
    made.model = alitok_generator()
    made.model.update(width=16, depth=2, heads=2, mlp_width=32, dtype="float32", prefix_tokens=7)
    return made


FAMILIES = {  # name -> its toy experiment
    "rear": toy.config,
    "ar": lambda: toy.config(method__name="ar"),
    "llamagen": toy.llamagen_config,
    "captions": lambda: toy.llamagen_config(condition="text", caption_length=3, caption_dim=5),
    "alitok": alitok_config,
}


def scrambled(model):
    """Parameters with nothing at zero, so that every one counts."""
    shapes = generators.shapes(model)
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: jnp.asarray(rng.normal(0.0, 0.3, leaf.shape), jnp.float32), shapes)


def conditions_of(model):
    """Of two sequences."""
    if not generators.takes_captions(model):
        return LABELS
    rng = np.random.default_rng(1)
    return Captions(rng.normal(size=(2, 3, 5)).astype(np.float32), np.array([[False, True, True], [True] * 3]))


QUICK = ("rear", "captions")
CASES = [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in FAMILIES]


@pytest.fixture(scope="module", params=CASES)
def model_and_params(request):
    model = toy.generator(FAMILIES[request.param]())
    return model, scrambled(model)


def test_forced_codes_take_the_place_of_draws(model_and_params):
    model, params = model_and_params
    conditions, cached = conditions_of(model), generators.cached(model)
    true = jax.random.randint(jax.random.key(1), (3, 16), 0, 16)
    arguments = (cached, params, conditions, ROWS, KEYS, SAMPLER)
    forced = jax.jit(lambda mask: decode(*arguments, given=Given(true, mask), segments=1))
    free = jax.jit(lambda: generate(*arguments, segments=1))()
    np.testing.assert_array_equal(forced(np.zeros((3, 16), bool)).codes, free)
    whole = forced(np.ones((3, 16), bool))
    np.testing.assert_array_equal(whole.codes, true)
    some = np.random.default_rng(0).random((3, 16)) < 0.5
    mixed = forced(some).codes
    np.testing.assert_array_equal(mixed[some], true[some])
    assert (mixed != true)[~some].any()

    def logits(labels, codes):
        return model.apply({"params": params}, codes, labels).logits

    of_rows = jax.tree.map(lambda leaf: leaf[ROWS], conditions)
    without = generators.family_of(model).unconditional(model, params, of_rows)
    guided = logits(without, true) + 2.0 * (logits(of_rows, true) - logits(without, true))
    guided = jnp.where(jnp.arange(16)[:, None] <= 6, guided, logits(of_rows, true))
    likelihood = jnp.take_along_axis(jax.nn.log_softmax(guided), true[..., None], -1)[..., 0]
    np.testing.assert_allclose(whole.surprise, -likelihood, atol=2e-3)


def test_hidden_states_lie_where_codes_are_read_and_predicted(model_and_params):
    model, params = model_and_params
    of_rows = jax.tree.map(lambda leaf: leaf[ROWS], conditions_of(model))
    codes = jax.random.randint(jax.random.key(2), (3, 16), 0, 16)
    states = jax.jit(lambda codes: generators.hidden_states(model, params, codes, of_rows))
    before, after = states(codes), states(codes.at[:, 6].set((codes[:, 6] + 1) % 16))
    reads = generators.cached(model).prefix_length + 6
    assert before.shape[:2] == (3, 3)  # of two layers, and the input
    np.testing.assert_array_equal(before[:, :, :reads], after[:, :, :reads])
    assert (jnp.abs(before - after)[:, :, reads].max(axis=-1) > 1e-4).all()
    plain = model.apply({"params": params}, codes, of_rows)
    kept, _ = model.apply({"params": params}, codes, of_rows, mutable=["hidden"])
    np.testing.assert_array_equal(plain.logits, kept.logits)
    assert "hidden" not in model.init(jax.random.key(0), *generators.family_of(model).example_inputs(model))


def test_hidden_states_are_those_that_are_tapped():
    model = toy.generator(toy.config())
    params, codes = scrambled(model), jax.random.randint(jax.random.key(2), (3, 16), 0, 16)
    states = generators.hidden_states(model, params, codes, LABELS[ROWS])
    out, bound = model.apply({"params": params}, codes, LABELS[ROWS]), model.bind({"params": params})
    np.testing.assert_allclose(bound.shallow_projector(states[1, :, 2:]), out.shallow, atol=1e-5)
    np.testing.assert_allclose(bound.deep_projector(states[2, :, 1:17]), out.deep, atol=1e-5)
