"""The objectives of `--job=tokenizer`: pixels (reconstruction, perception, a discriminator) or another's codes."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from rear_jax import losses, tokenizers
from rear_jax.data.batches import image_shapes
from rear_jax.errors import RearError
from rear_jax.metrics import perceptual
from rear_jax.runtime import divided
from rear_jax.runtime.sharding import Rule, Rules, whole_frozen
from rear_jax.tokenizers import discriminator, quantizer
from rear_jax.training.loop import Learning
from rear_jax.training.state import TrainState, adamw, apply_gradients, learning_rate, new_state

NETWORKS = ("tokenizer", "discriminator")  # that learn, each with an optimiser of its own
STATISTICS = Rule(r"^extra/(usage|sums)$")  # of the codebook, beside the parameters


class Networks(NamedTuple):
    """What plays a part.

    Attributes:
      tokenizer: the module to train.
      perceptual: `PerceptualNetwork.distance`, (frozen parameters, images, images) -> [B]; None with the
        objective 'codes'.
      discriminator: a module, or None.
      proxy: the frozen tokenizer whose codes are predicted, or None with the objective 'pixels'.
    """

    tokenizer: nn.Module
    perceptual: Callable[[Any, jax.Array, jax.Array], jax.Array] | None
    discriminator: nn.Module | None
    proxy: nn.Module | None = None


# What the backward pass reads of the tokenizer: what its convolutions and linear layers give. It computes normalisation
# and activations anew, which takes little time: 32 images of MaskGIT-VQGAN take 60 instead of 99 GiB.
KEPT = jax.checkpoint_policies.save_from_both_policies(
    jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    lambda primitive, *_, **__: primitive is jax.lax.conv_general_dilated_p,
)
NEEDS_PROXY = (
    "config.tokenizer_training.objective = 'codes' needs a tokenizer with config.tokenizer.predicts = 'codes' "
    "and, as config.tokenizer_training.proxy, the MaskGIT-VQGAN whose codes these are."
)


def outline(config: ConfigDict) -> tuple[Networks, dict[str, Any]]:
    """What plays a part, and the shapes of those parameters that stay frozen.

    Raises RearError: the objective is unknown or does not suit the tokenizer, or there is no such network.
    """
    settings, size = config.tokenizer_training, config.data.image_size
    tokenizer = tokenizers.build(config.tokenizer, size)
    frozen_entries(settings)
    if settings.objective == "codes":
        section = tokenizers.FAMILIES[config.tokenizer.name].proxy(config.tokenizer)
        if section is None:
            raise RearError(NEEDS_PROXY)
        proxy = tokenizers.build(section, size)
        return Networks(tokenizer, None, None, proxy), {"proxy": tokenizers.shapes(proxy)}
    option = "config.tokenizer_training.perceptual_network"
    seen_through = perceptual.outline(settings.perceptual_network, option=option)
    judge = None
    if settings.discriminator_weight:
        judge = discriminator.PatchDiscriminator(settings.discriminator_channels, settings.discriminator_layers)
    return Networks(tokenizer, seen_through.distance, judge), {"perceptual": seen_through.params}


def frozen_entries(settings: ConfigDict) -> tuple[str, ...]:
    """Entries of the tokenizer's parameters that training leaves as they are.

    Raises RearError: `objective` or `trained` is none that is known.
    """
    by_objective = {"pixels": (), "codes": ("pixel_codebook", "pixel_decoder")}
    by_trained = {"all": (), "decoder": ("encoder", "codebook")}
    entries = ()
    for setting, choices in (("objective", by_objective), ("trained", by_trained)):
        if settings[setting] not in choices:
            known = " or ".join(choices)
            raise RearError(f"config.tokenizer_training.{setting} = {settings[setting]!r}: use {known}.")
        entries += choices[settings[setting]]
    return entries


def learning(config: ConfigDict, networks: Networks, frozen: dict[str, Any], given: dict[str, Any]) -> Learning:
    """What `--job=tokenizer` computes.

    Args:
      config: the experiment.
      networks: what plays a part.
      frozen: parameters of those that stay as they are: 'perceptual', or 'proxy'.
      given: entries by network and name that do not start afresh.
    """
    settings = config.tokenizer_training
    rules = (
        whole_frozen(),
        *tokenizers.family_of(networks.tokenizer).parameters,
        *discriminator.PARAMETERS,
        STATISTICS,
    )
    optimizer = make_optimizer(config, rules)
    return Learning(
        job="tokenizer",
        step=tokenizer_step(networks, config, optimizer),
        init=lambda given: init_state(networks, config, optimizer, given),
        given=given,
        frozen=frozen,
        batch=image_shapes(settings.loop.batch_size, config.data.image_size),
        rules=rules,
        settings=settings.loop,
        seed=config.seed,
        divides=config.mesh.divide_state,
    )


def make_optimizer(config: ConfigDict, rules: Rules) -> optax.GradientTransformation:
    """One AdamW for each of the two networks, so that neither's gradient norm clips the other."""
    settings = config.tokenizer_training
    frozen = frozen_entries(settings)

    def labels(params):
        entries = {entry: "frozen" if entry in frozen else "tokenizer" for entry in params["tokenizer"]}
        return {name: name for name in params} | {"tokenizer": entries}

    transforms = {name: adamw(settings.optimizer, settings.loop.steps, rules) for name in NETWORKS}
    return optax.multi_transform(transforms | ({"frozen": optax.set_to_zero()} if frozen else {}), labels)


def init_state(
    networks: Networks, config: ConfigDict, optimizer: optax.GradientTransformation, given: dict[str, Any]
) -> TrainState:
    """Fresh networks but for the entries `given` by network and name; `extra` is the statistics of the codebook."""
    size = config.data.image_size
    image = jnp.zeros((1, size, size, 3))
    tokenizer_key, discriminator_key = jax.random.split(jax.random.key(config.seed))
    params = {"tokenizer": networks.tokenizer.init(tokenizer_key, image)["params"]}
    if networks.discriminator is not None:
        params["discriminator"] = networks.discriminator.init(discriminator_key, image)["params"]
    for network, entries in given.items():
        params[network] = params[network] | entries
    method = config.tokenizer_training.codebook_update
    return new_state(
        params, optimizer, extra=quantizer.init_codebook_state(params["tokenizer"]["codebook"], method=method)
    )


def tokenizer_step(networks: Networks, config: ConfigDict, optimizer: optax.GradientTransformation):
    """step(state, batch of uint8 'image', key, frozen) -> (state, metrics).

    Frozen is what the objective reads: with 'pixels' the parameters of 'perceptual', with 'codes' those of 'proxy'.
    """
    make = {"pixels": _pixel_gradients, "codes": _code_gradients}[config.tokenizer_training.objective]
    gradients_of = make(networks, config)
    settings = config.tokenizer_training
    schedule = learning_rate(settings.optimizer, settings.loop.steps)

    def step(state: TrainState, batch: dict, key: jax.Array, frozen: dict) -> tuple[TrainState, dict]:
        images = batch["image"].astype(jnp.float32) / 255.0
        params, _ = divided.gather(state.params)
        gradients, quantized, metrics = gradients_of(state.replace(params=params), images, frozen)
        gradients = divided.scatter(gradients)
        metrics |= {
            "commitment": quantized.commitment_loss,
            "codebook_usage": quantizer.codebook_usage(quantized.codes, config.tokenizer.codebook_size),
            "perplexity": quantizer.perplexity(quantized.codes, config.tokenizer.codebook_size),
            "learning_rate": schedule(state.step),
            "gradient_norm": optax.tree.norm(gradients["tokenizer"]),
        }
        state = apply_gradients(state, gradients, optimizer)
        if "codebook" in frozen_entries(settings):
            return state, metrics
        return _keep_codebook(state, quantized, key, settings), metrics

    return step


def _code_gradients(networks: Networks, config: ConfigDict):
    """(state, images, frozen) -> (gradients, quantised latents, metrics): TiTok's first stage (arXiv 2406.07550)."""
    settings = config.tokenizer_training
    held = frozen_entries(settings)

    def loss_of(params, images, codes):
        def call(method, x):
            return networks.tokenizer.apply({"params": _held(params, held)}, x, method=method)

        quantized = call("quantize", images)
        logits = call("pixel_logits", quantized.vectors)
        logits = logits.reshape(*codes.shape, -1)  # [B, cells of the proxy, its codes]
        cross_entropy = jnp.mean(losses.next_code_cross_entropy(logits, codes))
        correct = jnp.mean(losses.correct_codes(logits, codes))
        loss = cross_entropy + _codebook_terms(settings, quantized.commitment_loss, quantized.codebook_loss)
        return loss, (quantized, {"loss": loss, "cross_entropy": cross_entropy, "correct": correct})

    def gradients_of(state: TrainState, images: jax.Array, frozen: dict):
        codes = networks.proxy.apply({"params": frozen["proxy"]}, images, method="encode")
        params = state.params["tokenizer"]
        gradients, (quantized, metrics) = jax.grad(loss_of, has_aux=True)(params, images, codes)
        return {"tokenizer": gradients}, quantized, metrics

    return gradients_of


def _held(params: dict, held: tuple[str, ...]) -> dict:
    """The same parameters; no gradient reaches the entries that are held."""
    return {entry: jax.lax.stop_gradient(tree) if entry in held else tree for entry, tree in params.items()}


def _codebook_terms(settings: ConfigDict, commitment: jax.Array, codebook: jax.Array) -> jax.Array:
    """What the quantiser adds to the loss."""
    return settings.commitment_weight * commitment + _codebook_weight(settings) * codebook


def _codebook_weight(settings: ConfigDict) -> float:
    """Codes that are moving averages are not pulled as well."""
    return 1.0 if settings.codebook_update == "gradient" else 0.0


def _pixel_gradients(networks: Networks, config: ConfigDict):
    """(state, images, frozen) -> (gradients, quantised latents, metrics): VQGAN's objective (arXiv 2012.09841)."""
    settings = config.tokenizer_training
    held = frozen_entries(settings)

    def gradients_of(state: TrainState, images: jax.Array, frozen: dict):
        @functools.partial(jax.checkpoint, policy=KEPT)
        def reconstruct(params):
            reconstruction, quantized = networks.tokenizer.apply({"params": _held(params, held)}, images)
            return (reconstruction, quantized.commitment_loss, quantized.codebook_loss), quantized

        def distance(reconstruction):
            mse = jnp.mean(losses.mean_squared_error(reconstruction, images))
            perceptual = jnp.float32(0.0)
            if settings.perceptual_weight:
                perceptual = jnp.mean(networks.perceptual(frozen["perceptual"], reconstruction, images))
            return settings.mse_weight * mse + settings.perceptual_weight * perceptual, (mse, perceptual)

        # One forward pass; reconstruction and adversary are pulled back through it separately, so that their
        # gradients can be weighed against each other at the last layer.
        (reconstruction, *pulls), pull_back, quantized = jax.vjp(reconstruct, state.params["tokenizer"], has_aux=True)
        (loss, (mse, perceptual)), d_images = jax.value_and_grad(distance, has_aux=True)(reconstruction)
        weights = jnp.float32(settings.commitment_weight), jnp.float32(_codebook_weight(settings))
        (gradients,) = pull_back((d_images, *weights))
        all_gradients = {"tokenizer": gradients}
        metrics = {"loss": loss + _codebook_terms(settings, *pulls), "mse": mse, "perceptual": perceptual}
        if networks.discriminator is not None:
            all_gradients, more = _with_adversary(
                networks, settings, state, images, reconstruction, gradients, pull_back
            )
            metrics |= more
        return all_gradients, quantized, metrics

    return gradients_of


def _with_adversary(networks, settings, state, images, reconstruction, gradients, pull_back):
    """Adds the adversarial gradient and makes the discriminator's, from step `discriminator_start` on.

    The adversary's weight is `discriminator_weight`, times |∇ reconstruction| / |∇ adversary| at the decoder's last
    kernel if `discriminator_adaptive` (VQGAN, arXiv 2012.09841, equation 7).
    """
    params = state.params["discriminator"]

    def logits(params, x):
        return networks.discriminator.apply({"params": params}, x)

    def play(_):
        adversarial, d_images = jax.value_and_grad(lambda x: losses.hinge_generator(logits(params, x)))(reconstruction)
        (adversary,) = pull_back((d_images, jnp.float32(0.0), jnp.float32(0.0)))
        weight = jnp.float32(settings.discriminator_weight)
        if settings.discriminator_adaptive:
            last = networks.tokenizer.last_kernel
            ours, theirs = (
                jnp.linalg.norm(functools.reduce(dict.__getitem__, last, g)) for g in (gradients, adversary)
            )
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
