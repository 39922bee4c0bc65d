"""The authors' LlamaGen generators: logits, loss, greedy decoding with and without the cache, and the filters."""

import json

import jax
import jax.numpy as jnp
import numpy as np

from rear_jax import generators, guidance, losses
from rear_jax.generators.interface import Captions
from rear_jax.generators.llamagen import FAMILY
from rear_jax.generators.llamagen.network import LlamaGenTransformer
from rear_jax.sampling.generate import Sampler, generate
from rear_jax.weights import layout


def model_and_params(golden):
    meta = json.loads(str(golden["meta"]))
    tensors = {k.removeprefix("param/"): golden[k].astype(np.float32) for k in golden if k.startswith("param/")}
    found = FAMILY.layout.sizes(tensors)
    assert (found["width"], found["depth"]) == (meta["dim"], meta["num_layers"])
    assert found["condition"] == {"c2i": "class", "t2i": "text"}[meta["kind"]]
    if meta["kind"] == "t2i":
        assert (found["caption_length"], found["caption_dim"]) == (meta["condition_length"], meta["caption_dim"])
    model = LlamaGenTransformer(
        codebook_size=meta["codebook_size"],
        num_classes=meta["num_classes"],
        num_codes=meta["seq_len"],
        **found | {"heads": meta["num_heads"]},
    )
    params = layout.from_torch(tensors, generators.shapes(model), FAMILY.layout.torch_name, ignore=FAMILY.layout.ignore)
    back = layout.to_torch(params, FAMILY.layout.torch_name)
    assert back.keys() == tensors.keys()
    assert all(np.array_equal(back[k], tensors[k]) for k in tensors)
    return meta, model, jax.tree.map(jnp.asarray, params)


def check(golden) -> None:
    meta, model, params = model_and_params(golden)
    apply = jax.jit(lambda codes, conditions: model.apply({"params": params}, codes, conditions).logits)
    codes, text = golden["in/tokens"], meta["kind"] == "t2i"
    if text:
        features = golden["in/caption_embeddings"]
        context = Captions(features, np.ones(features.shape[:2], bool))
        conditions = Captions(features, golden["in/caption_mask"] > 0)
        null = conditions._replace(features=np.broadcast_to(params["null_caption"], features.shape))
    else:
        context, conditions = golden["in/labels_with_drop"], golden["in/labels"]
        null = np.full_like(golden["in/labels"], meta["num_classes"])
    logits = apply(codes, context)
    np.testing.assert_allclose(logits, golden["out/logits"], atol=2e-4, rtol=0)
    loss = losses.next_code_cross_entropy(logits, codes).mean()
    np.testing.assert_allclose(loss, golden["out/ce"], rtol=1e-5)

    sampler = Sampler(
        guidance="constant",
        guidance_scale=meta["guidance_scale"],
        guidance_interval=meta["guidance_interval"],
        temperature=0.0,
    )
    rows = jnp.arange(len(codes))
    run = jax.jit(generate, static_argnums=(0, 5), static_argnames="return_logits")
    keys = jax.random.split(jax.random.key(0), len(codes))
    conditions_on_device = jax.tree.map(jnp.asarray, conditions)
    cached, cached_logits = run(
        generators.cached(model), params, conditions_on_device, rows, keys, sampler, return_logits=True
    )
    full, full_logits = greedy_without_cache(meta, model, apply, conditions, null, len(codes))
    for tokens, guided in ((cached, cached_logits), (full, full_logits)):
        np.testing.assert_array_equal(tokens, golden["out/greedy_tokens"])
        np.testing.assert_allclose(guided, golden["out/greedy_logits"], atol=2e-4, rtol=0)

    filtered = golden["in/filter_logits"]
    np.testing.assert_array_equal(guidance.keep_top_k(filtered, 5), golden["out/top_k5"])
    np.testing.assert_array_equal(guidance.keep_top_p(filtered, 0.8), golden["out/top_p08"])
    both = guidance.keep_top_p(guidance.keep_top_k(filtered, 7), 0.6)
    np.testing.assert_array_equal(both, golden["out/top_k7_top_p06"])


def greedy_without_cache(meta, model, apply, conditions, null, batch):
    """One full forward pass of both halves per code, LlamaGen's guidance written out."""
    scale, interval = meta["guidance_scale"], meta["guidance_interval"]
    codes, guided = np.zeros((batch, model.num_codes), np.int32), []
    for n in range(model.num_codes):
        c = apply(codes, conditions)[:, n]
        if scale > 1 and (n == 0 or interval < 0 or n - 1 <= interval):
            u = apply(codes, null)[:, n]
            c = u + scale * (c - u)
        guided.append(c)
        codes[:, n] = np.argmax(c, axis=-1)
    return codes, np.stack(guided, axis=1)
