"""Time of one VA-π step, its parts, and the same step with every sample run through the generator on its own.

python benchmarks/posttrain_step.py [--group=8]
python benchmarks/posttrain_step.py --model=llamagen --width=1280 --layers=36 --heads=20 --codes=576 --codebook=16384 \\
    --batch=16 --dtype=bfloat16 --channels=128 --unroll=1    # LlamaGen-XL, 384 px
"""

import argparse
import math

import jax
import jax.numpy as jnp
import measure
import optax

from rear_jax import grpo, losses, models, tokenizers
from rear_jax.config import llamagen_vq, maskgit_vqgan
from rear_jax.training import perceptual
from rear_jax.training.posttraining import parts as posttraining
from rear_jax.training.posttraining import va_pi
from rear_jax.training.state import adamw, new_state

TOKENIZERS = {"rar": maskgit_vqgan, "llamagen": llamagen_vq}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    measure.add_flags(parser)
    parser.set_defaults(batch=4)
    parser.add_argument("--model", default="rar", choices=list(TOKENIZERS))
    parser.add_argument("--group", type=int, default=8)
    parser.add_argument("--channels", type=int, default=32, help="of the tokenizer's outermost level; published: 128")
    parser.add_argument("--unroll", type=int, default=0, help="layers compiled side by side; 0 = all")
    arguments = parser.parse_args()

    config, generator = measure.build(arguments, network=arguments.model, method="ar", unroll=arguments.unroll)
    config.tokenizer = TOKENIZERS[arguments.model]()
    config.tokenizer["hidden_channels" if arguments.model == "rar" else "channels"] = arguments.channels
    config.tokenizer.codebook_size = arguments.codebook
    settings = config.posttrain
    settings.group, settings.images_at_once = arguments.group, 1
    size = 16 * math.isqrt(arguments.codes)  # pixels: every tokenizer here halves four times
    tokenizer = tokenizers.build(config.tokenizer, size)
    network = perceptual.load("lite0", config.lpips, option="perceptual_network")
    networks = posttraining.Networks(generator, tokenizer, network)

    key = jax.random.key(0)
    images = jax.random.randint(key, (arguments.batch, size, size, 3), 0, 256).astype(jnp.uint8)
    labels = jnp.arange(arguments.batch) % arguments.classes
    batch = {"image": images, "label": labels, "condition": labels, "index": jnp.arange(arguments.batch)}
    params = jax.jit(generator.init)(key, *models.example_inputs(generator))["params"]
    frozen = {
        "tokenizer": jax.jit(tokenizer.init)(key, jnp.zeros((1, size, size, 3)))["params"],
        "perceptual": network.params,
    }
    optimizer = adamw(settings.optimizer, 100)
    codes = jax.random.randint(key, (arguments.batch, arguments.codes), 0, arguments.codebook)
    samples = jax.random.randint(key, (arguments.batch, arguments.group, arguments.codes), 0, arguments.codebook)
    advantages = jax.random.normal(key, (arguments.batch, arguments.group))

    def update(params, repeats):
        """Forward and backward of the generator, its context run `repeats` times."""

        def loss(params):
            context, labels = (jnp.repeat(x, repeats, axis=0) for x in (codes, batch["label"]))
            logits = generator.apply({"params": params}, context, labels).logits
            drawn = samples.reshape(len(context), -1, arguments.codes)
            new = grpo.gather_log_probabilities(logits, drawn)
            policy = grpo.policy_terms(new, new, advantages.reshape(drawn.shape[:2]))
            prior = jnp.mean(losses.next_code_cross_entropy(logits, context))
            return policy.loss + settings.prior_weight * prior

        return optax.tree.norm(jax.grad(loss)(params))

    def encode(frozen):
        return tokenizer.apply({"params": frozen["tokenizer"]}, images / 255.0, method="encode")

    def decode(frozen):
        def one(codes):
            return jnp.sum(tokenizer.apply({"params": frozen["tokenizer"]}, codes, method="decode"))

        return jax.lax.map(one, samples)

    def reward(frozen):
        return posttraining.score(networks, settings, frozen, samples, batch)[0]

    parts = {
        "generator, one context an image": measure.timed(jax.jit(lambda p: update(p, 1)), lambda _: (params,), 3),
        f"generator, one an image and sample ({arguments.group}x)": measure.timed(
            jax.jit(lambda p: update(p, arguments.group)), lambda _: (params,), 3
        ),
        "encode": measure.timed(jax.jit(encode), lambda _: (frozen,), 3),
        "decode all samples": measure.timed(jax.jit(decode), lambda _: (frozen,), 3),
        "decode and reward": measure.timed(jax.jit(reward), lambda _: (frozen,), 3),
    }
    step = jax.jit(va_pi.make_step(networks, config, optimizer), donate_argnums=0)
    state = new_state(jax.tree.map(jnp.copy, params), optimizer)
    whole, _ = measure.timed(
        step, lambda last: (state if last is None else last[0], batch, key, frozen), arguments.repeats
    )

    measure.header(measure.matmul_ceiling(arguments.dtype), arguments.dtype)
    rows = [("what", "seconds, median (min to max)", "share of the whole step")]
    for name, (seconds, _) in parts.items():
        rows.append((name, measure.about(seconds), f"{min(seconds) / min(whole):.0%}"))
    rows.append(("the whole step", measure.about(whole), "100%"))
    measure.table(rows)
    one, many = (min(seconds) for seconds, _ in list(parts.values())[:2])
    print(f"\nthe released way costs {many / one:.1f} times as much in the generator, ", end="")
    print(f"{1 + (many - one) / min(whole):.1f} times in all; {arguments.batch / min(whole):.2f} images/s")


if __name__ == "__main__":
    main()
