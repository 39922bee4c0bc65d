"""The authors' AliTok generator: logits, loss, and greedy decoding with guidance, with and without the cache."""

import json

import jax
import jax.numpy as jnp
import numpy as np

from rear_jax import generators, guidance, losses
from rear_jax.generators.alitok import FAMILY
from rear_jax.generators.alitok.network import AliTokTransformer
from rear_jax.sampling.generate import Sampler, generate
from rear_jax.weights import layout


def model_and_params(golden):
    meta = json.loads(str(golden["meta"]))
    tensors = {k.removeprefix("param/"): golden[k].astype(np.float32) for k in golden if k.startswith("param/")}
    model = AliTokTransformer(
        codebook_size=meta["codebook_size"],
        num_classes=meta["num_classes"],
        num_codes=meta["prefix_tokens"] + meta["grid"] ** 2,
        prefix_tokens=meta["prefix_tokens"],
        **FAMILY.layout.sizes(tensors),
    )
    assert (model.width, model.depth, model.heads) == (meta["hidden_size"], meta["num_layers"], meta["num_heads"])
    params = layout.from_torch(tensors, generators.shapes(model), FAMILY.layout.torch_name)
    back = layout.to_torch(params, FAMILY.layout.torch_name)
    assert back.keys() == tensors.keys()
    assert all(np.array_equal(back[k], tensors[k]) for k in tensors)
    return meta, model, jax.tree.map(jnp.asarray, params)


def check(golden) -> None:
    meta, model, params = model_and_params(golden)
    apply = jax.jit(lambda codes, labels: model.apply({"params": params}, codes, labels).logits)
    codes = golden["in/tokens"]
    logits = apply(codes, np.where(golden["in/drop_label"], meta["num_classes"], golden["in/labels"]))
    np.testing.assert_allclose(logits, golden["out/logits"], atol=2e-4, rtol=0)
    loss = losses.next_code_cross_entropy(logits, codes).mean()
    np.testing.assert_allclose(loss, golden["out/ce"], rtol=1e-5)

    sampler = Sampler(guidance_scale=meta["guidance_scale"], guidance_power=meta["guidance_power"], temperature=0.0)
    labels = jnp.asarray(golden["in/labels"])
    keys = jax.random.split(jax.random.key(0), len(labels))
    run = jax.jit(generate, static_argnums=(0, 5), static_argnames="return_logits")
    cached = run(generators.cached(model), params, labels, jnp.arange(len(labels)), keys, sampler, return_logits=True)
    for tokens, guided in (cached, greedy_without_cache(meta, model, apply, golden["in/labels"])):
        np.testing.assert_array_equal(tokens, golden["out/greedy_tokens"])
        np.testing.assert_allclose(guided, golden["out/greedy_logits"], atol=2e-4, rtol=0)


def greedy_without_cache(meta, model, apply, labels):
    """One full forward pass of both halves per code."""
    codes, guided = np.zeros((len(labels), model.num_codes), np.int32), []
    null = np.full_like(labels, meta["num_classes"])
    for n in range(model.num_codes):
        weight = guidance.guidance_weight(
            "power_cosine", meta["guidance_scale"], n, model.num_codes, power=meta["guidance_power"]
        )
        guided.append(guidance.guide(apply(codes, labels)[:, n], apply(codes, null)[:, n], weight))
        codes[:, n] = np.argmax(guided[-1], axis=-1)
    return codes, np.stack(guided, axis=1)
