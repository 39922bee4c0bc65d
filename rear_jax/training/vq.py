"""The objective of `--job=tokenizer`: reconstruction, perception, commitment and, if asked for, a discriminator."""

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from rear_jax import losses
from rear_jax.tokenizers import quantizer
from rear_jax.training.state import TrainState, adamw, apply_gradients, learning_rate, new_state


class Networks(NamedTuple):
    """What plays a part.

    Attributes:
      tokenizer: the module to train.
      perceptual: `perceptual.PerceptualNetwork.distance`, (frozen parameters, images, images) -> [B].
      discriminator: a module, or None.
    """

    tokenizer: nn.Module
    perceptual: Callable[[Any, jax.Array, jax.Array], jax.Array]
    discriminator: nn.Module | None


def make_optimizer(config: ConfigDict) -> optax.GradientTransformation:
    """One AdamW for each of the two networks, so that neither's gradient norm clips the other."""
    settings = config.tokenizer_training
    names = ("tokenizer", "discriminator")
    return optax.multi_transform(
        {name: adamw(settings.optimizer, settings.loop.steps) for name in names},
        lambda params: {name: jax.tree.map(lambda _, n=name: n, tree) for name, tree in params.items()},
    )


def init_state(
    networks: Networks, config: ConfigDict, optimizer: optax.GradientTransformation, given: dict[str, Any]
) -> TrainState:
    """Fresh networks but for those `given` by name; `extra` is the statistics of the codebook."""
    size = config.data.image_size
    image = jnp.zeros((1, size, size, 3))
    tokenizer_key, discriminator_key = jax.random.split(jax.random.key(config.seed))
    params = {"tokenizer": networks.tokenizer.init(tokenizer_key, image)["params"]}
    if networks.discriminator is not None:
        params["discriminator"] = networks.discriminator.init(discriminator_key, image)["params"]
    params |= given
    method = config.tokenizer_training.codebook_update
    return new_state(
        params, optimizer, extra=quantizer.init_codebook_state(params["tokenizer"]["codebook"], method=method)
    )


def tokenizer_step(networks: Networks, config: ConfigDict, optimizer: optax.GradientTransformation):
    """step(state, batch of uint8 'image', key, frozen with 'perceptual') -> (state, metrics)."""
    settings = config.tokenizer_training
    schedule = learning_rate(settings.optimizer, settings.loop.steps)
    codebook_weight = 1.0 if settings.codebook_update == "gradient" else 0.0

    def step(state: TrainState, batch: dict, key: jax.Array, frozen: dict) -> tuple[TrainState, dict]:
        images = batch["image"].astype(jnp.float32) / 255.0

        def reconstruct(params):
            reconstruction, quantized = networks.tokenizer.apply({"params": params}, images)
            return (reconstruction, quantized.commitment_loss, quantized.codebook_loss), quantized

        def distance(reconstruction):
            mse = jnp.mean(losses.mean_squared_error(reconstruction, images))
            perceptual = jnp.float32(0.0)
            if settings.perceptual_weight:
                perceptual = jnp.mean(networks.perceptual(frozen["perceptual"], reconstruction, images))
            return settings.mse_weight * mse + settings.perceptual_weight * perceptual, (mse, perceptual)

        # One forward pass; reconstruction and adversary are pulled back through it separately, so that their
        # gradients can be weighed against each other at the last layer.
        (reconstruction, commitment, codebook_loss), pull_back, quantized = jax.vjp(
            reconstruct, state.params["tokenizer"], has_aux=True
        )
        (reconstruction_loss, (mse, perceptual)), d_images = jax.value_and_grad(distance, has_aux=True)(reconstruction)
        (gradients,) = pull_back((d_images, jnp.float32(settings.commitment_weight), jnp.float32(codebook_weight)))
        all_gradients = {"tokenizer": gradients}
        metrics = {
            "loss": reconstruction_loss + settings.commitment_weight * commitment + codebook_weight * codebook_loss,
            "mse": mse,
            "perceptual": perceptual,
            "commitment": commitment,
            "codebook_usage": quantizer.codebook_usage(quantized.codes, config.tokenizer.codebook_size),
            "perplexity": quantizer.perplexity(quantized.codes, config.tokenizer.codebook_size),
            "learning_rate": schedule(state.step),
        }
        if networks.discriminator is not None:
            all_gradients, more = _with_adversary(
                networks.discriminator, settings, state, images, reconstruction, gradients, pull_back
            )
            metrics |= more
        metrics["gradient_norm"] = optax.tree.norm(all_gradients["tokenizer"])
        state = apply_gradients(state, all_gradients, optimizer)
        return _keep_codebook(state, quantized, key, settings), metrics

    return step


def _with_adversary(discriminator, settings, state, images, reconstruction, gradients, pull_back):
    """Adds the adversarial gradient and makes the discriminator's, from step `discriminator_start` on.

    The adversary's weight is `discriminator_weight`, times |∇ reconstruction| / |∇ adversary| at the decoder's last
    kernel if `discriminator_adaptive` (VQGAN, arXiv 2012.09841, equation 7).
    """
    params = state.params["discriminator"]

    def logits(params, x):
        return discriminator.apply({"params": params}, x)

    def play(_):
        adversarial, d_images = jax.value_and_grad(lambda x: losses.hinge_generator(logits(params, x)))(reconstruction)
        (adversary,) = pull_back((d_images, jnp.float32(0.0), jnp.float32(0.0)))
        weight = jnp.float32(settings.discriminator_weight)
        if settings.discriminator_adaptive:
            ours, theirs = (jnp.linalg.norm(g["decoder"]["conv_out"]["kernel"]) for g in (gradients, adversary))
            weight *= jnp.clip(ours / (theirs + 1e-4), 0.0, 1e4)
        both = jax.tree.map(lambda a, b: a + weight * b, gradients, adversary)
        judged, judge = jax.value_and_grad(
            lambda p: losses.hinge_discriminator(logits(p, images), logits(p, jax.lax.stop_gradient(reconstruction)))
        )(params)
        return (
            {"tokenizer": both, "discriminator": judge},
            {"adversarial": adversarial, "adversarial_weight": weight, "discriminator": judged},
        )

    def wait(_):
        none = jax.tree.map(jnp.zeros_like, params)
        names = ("adversarial", "adversarial_weight", "discriminator")
        return {"tokenizer": gradients, "discriminator": none}, {name: jnp.float32(0.0) for name in names}

    return jax.lax.cond(state.step >= settings.discriminator_start, play, wait, None)


def _keep_codebook(state: TrainState, quantized: quantizer.Quantized, key: jax.Array, settings) -> TrainState:
    """Moving-average codes, usage statistics and the revival of dead codes."""
    tokenizer = dict(state.params["tokenizer"])
    tokenizer["codebook"], extra = quantizer.update_codebook(
        tokenizer["codebook"],
        state.extra,
        quantized.latents,
        quantized.codes,
        key,
        decay=settings.codebook_decay,
        revive_below=settings.revive_below,
        method=settings.codebook_update,
    )
    return state.replace(params=state.params | {"tokenizer": tokenizer}, extra=extra)
