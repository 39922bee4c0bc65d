"""The authors' reAR generator: logits, losses, gradients, and greedy decoding with guidance."""

import json

import jax
import jax.numpy as jnp
import numpy as np

from rear_jax import generators, losses
from rear_jax.generators.rar import FAMILY
from rear_jax.generators.rar.cached import CachedRAR
from rear_jax.generators.rar.network import RARTransformer
from rear_jax.sampling.generate import Sampler, generate
from rear_jax.weights import layout


def model_from(meta: dict) -> RARTransformer:
    return RARTransformer(
        codebook_size=meta["codebook_size"],
        num_classes=meta["num_classes"],
        num_codes=meta["seq_len"],
        width=meta["hidden_size"],
        depth=meta["num_layers"],
        heads=meta["num_heads"],
        mlp_width=meta["mlp_size"],
        projector="released",
        projector_width=meta["projection_dim"],
        embedding_dim=meta["embedding_dim"],
        shallow_layer=meta["encode_layer"],
        deep_layer=meta["decode_layer"],
    )


def params_from(golden, model: RARTransformer):
    tensors = {k.removeprefix("param/"): golden[k].astype(np.float32) for k in golden if k.startswith("param/")}
    params = layout.from_torch(tensors, generators.shapes(model), FAMILY.layout.torch_name)
    back = layout.to_torch(params, FAMILY.layout.torch_name)
    assert back.keys() == tensors.keys()
    assert all(np.array_equal(back[k], tensors[k]) for k in tensors)
    return params


def check(golden) -> None:
    meta = json.loads(str(golden["meta"]))
    model = model_from(meta)
    params = params_from(golden, model)
    codes = golden["in/tokens"]
    labels = np.where(golden["in/drop_label"], meta["num_classes"], golden["in/labels"])

    def loss_of(params):
        out = model.apply({"params": params}, golden["in/noisy_tokens"], labels)
        prediction = losses.next_code_cross_entropy(out.logits, codes).mean()
        terms = losses.codebook_embedding_losses(
            out.shallow, out.deep, jnp.asarray(golden["in/codebook"])[codes], golden["in/noise_mask"]
        )
        return prediction + terms.shallow + terms.deep, (out, prediction, terms)

    (loss, (out, prediction, terms)), gradients = jax.jit(jax.value_and_grad(loss_of, has_aux=True))(params)
    for name in ("logits", "encode_z", "decode_z"):
        mine = {"logits": out.logits, "encode_z": out.shallow, "decode_z": out.deep}[name]
        np.testing.assert_allclose(mine, golden[f"out/{name}"], atol=2e-4, rtol=0, err_msg=name)
    mine = {
        "loss": loss,
        "ar_loss": prediction,
        "embedding_loss": terms.shallow + terms.deep,
        "encode_loss": terms.shallow,
        "correct_tokens": losses.correct_codes(out.logits, codes).mean(),
    }
    for name, value in mine.items():
        np.testing.assert_allclose(value, golden[f"out/{name}"], rtol=1e-5, err_msg=name)

    gradients = layout.to_torch(gradients, FAMILY.layout.torch_name)
    for key in (k for k in golden if k.startswith("out/grad/")):
        want = golden[key]
        error = np.linalg.norm(gradients[key.removeprefix("out/grad/")] - want)
        assert error <= 1e-4 * np.linalg.norm(want), key
    for key, norm in meta["grad_norms"].items():
        np.testing.assert_allclose(np.linalg.norm(gradients[key]), norm, rtol=1e-4, atol=1e-6, err_msg=key)

    sampler = Sampler(guidance_scale=meta["guidance_scale"], guidance_power=meta["guidance_power"], temperature=0.0)
    labels = jnp.asarray(golden["in/labels"])
    keys = jax.random.split(jax.random.key(0), len(labels))
    run = jax.jit(generate, static_argnums=(0, 5), static_argnames="return_logits")
    tokens, logits = run(CachedRAR(model), params, labels, jnp.arange(len(labels)), keys, sampler, return_logits=True)
    np.testing.assert_array_equal(tokens, golden["out/greedy_tokens"])
    np.testing.assert_allclose(logits, golden["out/greedy_logits"], atol=2e-4, rtol=0)
