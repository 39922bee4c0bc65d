"""Janus-Pro's generator in the authors' modules: logits, loss, gradients, the dropped prompt, and greedy decoding."""

import json

import jax
import jax.numpy as jnp
import numpy as np

from rear_jax import generators, guidance, losses
from rear_jax.generators.interface import Tokens
from rear_jax.generators.janus import FAMILY
from rear_jax.generators.janus.network import JanusTransformer
from rear_jax.sampling.generate import Sampler, generate
from rear_jax.weights import layout

NAMES, IGNORED = FAMILY.layout.torch_name, FAMILY.layout.ignore


def model_and_params(golden):
    meta = json.loads(str(golden["meta"]))
    tensors = {k.removeprefix("param/"): golden[k].astype(np.float32) for k in golden if k.startswith("param/")}
    found = FAMILY.layout.sizes(tensors)
    assert found == {
        "vocabulary_size": meta["vocab_size"],
        "width": meta["width"],
        "depth": meta["num_layers"],
        "mlp_width": meta["mlp_size"],
        "code_dim": meta["codebook_dim"],
    }
    model = JanusTransformer(
        codebook_size=meta["codebook_size"],
        num_classes=0,
        num_codes=meta["seq_len"],
        heads=meta["num_heads"],
        prompt_length=golden["in/prompt_ids"].shape[1],
        pad_id=meta["pad_id"],
        **found,
    )
    params = layout.from_torch(tensors, generators.shapes(model), NAMES, ignore=IGNORED)
    back = layout.to_torch(params, NAMES)
    assert tensors.keys() - back.keys() == {"language_model.lm_head.weight"}
    assert all(np.array_equal(back[k], tensors[k]) for k in back)
    return meta, model, jax.tree.map(jnp.asarray, params)


def check(golden) -> None:
    meta, model, params = model_and_params(golden)
    codes, noisy = golden["in/codes"], golden["in/noisy_codes"]
    prompts = Tokens(jnp.asarray(golden["in/prompt_ids"]), jnp.asarray(golden["in/prompt_mask"]))
    assert (prompts.ids[:, -1] == meta["begin_of_image_id"]).all()

    nothing = FAMILY.unconditional(model, params, prompts)
    np.testing.assert_array_equal(nothing.ids, golden["in/unconditional_ids"])
    np.testing.assert_array_equal(nothing.mask, golden["in/prompt_mask"])

    @jax.jit
    def loss_of(params, context, prompts):
        logits = model.apply({"params": params}, context, prompts).logits
        return losses.next_code_cross_entropy(logits, codes).mean(), logits

    for name, context in (("", codes), ("noisy_", noisy)):
        loss, logits = loss_of(params, context, prompts)
        np.testing.assert_allclose(logits, golden[f"out/{name}logits"], atol=2e-4, rtol=0)
        np.testing.assert_allclose(loss, golden[f"out/{name}loss"], rtol=1e-5)
    conditional, unconditional = (loss_of(params, codes, given)[1] for given in (prompts, nothing))
    np.testing.assert_allclose(unconditional, golden["out/unconditional_logits"], atol=2e-4, rtol=0)
    guided = guidance.guide(conditional, unconditional, meta["guidance_scale"])
    np.testing.assert_allclose(guided, golden["out/guided_logits"], atol=2e-4, rtol=0)

    gradients = layout.to_torch(jax.jit(jax.grad(loss_of, has_aux=True))(params, codes, prompts)[0], NAMES)
    wanted = {key.removeprefix("out/grad/"): golden[key] for key in golden if key.startswith("out/grad/")}
    assert wanted
    for key, value in wanted.items():
        assert np.linalg.norm(gradients[key] - value) <= 1e-4 * np.linalg.norm(value), key

    sampler = Sampler("constant", meta["guidance_scale"], temperature=0.0)
    run = jax.jit(generate, static_argnums=(0, 5), static_argnames="return_logits")
    rows, keys = jnp.arange(len(codes)), jax.random.split(jax.random.key(0), len(codes))
    drawn, logits = run(generators.cached(model), params, prompts, rows, keys, sampler, return_logits=True)
    np.testing.assert_array_equal(drawn, golden["out/greedy_codes"])
    np.testing.assert_allclose(logits, golden["out/greedy_logits"], atol=2e-4, rtol=0)
