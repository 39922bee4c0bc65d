"""Time of one VA-π step, its parts, and the same step with every sample run through the generator on its own.

python benchmarks/posttrain_step.py [--group=8]
python benchmarks/posttrain_step.py --model=llamagen --width=1280 --layers=36 --heads=20 --codes=576 --codebook=16384 \\
    --batch=16 --dtype=bfloat16 --channels=128 --unroll=1 --perceptual=lpips [--remat=full]    # LlamaGen-XL, 384 px
python benchmarks/posttrain_step.py --model=llamagen --width=1536 --layers=48 --heads=24 --codes=576 --codebook=16384 \\
    --batch=16 --dtype=bfloat16 --channels=128 --unroll=1 --perceptual=lpips [--remat=full]    # LlamaGen-XXL, 384 px

With --batch=128 --accumulation=8 the whole step is that of the papers; parts are of one microbatch, as is the 8-fold
form, which runs in as many parts as there are samples so that it fits. All weights are random, LPIPS-VGG16's as well.
"""

import argparse
import statistics
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import measure
import optax
from ml_collections import ConfigDict

from rear_jax import generators, grpo, losses, tokenizers
from rear_jax.generators.interface import Generator
from rear_jax.generators.stack import REMAT
from rear_jax.metrics import perceptual
from rear_jax.metrics.efficientnet import SCALES
from rear_jax.metrics.lpips import LPIPS, SMALLEST
from rear_jax.runtime.mesh import map_rows
from rear_jax.training.posttraining import rewards, va_pi
from rear_jax.training.posttraining.teacher_forcing import Networks, unit_images
from rear_jax.training.state import accumulated_gradients, adamw, new_state

PAPERS = {"steps": 100, "images": 128}  # arXiv 2512.19680
HEAD = ("what", "seconds, median (min to max)", "share of the whole step", "TFLOP", "MFU")
Functions = dict[str, Callable[[Any, Any, Any], Any]]


def setup(arguments, **model: str) -> tuple[ConfigDict, Networks]:
    """Config and networks of the command line, and `model`'s settings; those of the perceptual one with parameters."""
    config, generator = measure.build(arguments, network=arguments.model, method="ar", **model)
    config.tokenizer["hidden_channels" if arguments.model == "rar" else "channels"] = arguments.channels
    config.tokenizer.dtype = arguments.tokenizer_dtype
    settings = config.posttrain
    settings.group, settings.accumulation, settings.loop.steps = arguments.group, arguments.accumulation, 100
    tokenizer = tokenizers.build(config.tokenizer, config.data.image_size)
    judges = {"perceptual": perceptual_network(arguments.perceptual, config)}
    return config, Networks(generator, tokenizer, judges)


def perceptual_network(name: str, config: ConfigDict) -> perceptual.PerceptualNetwork:
    """The network of that name, LPIPS-VGG16 with random weights."""
    if name != "lpips":
        return perceptual.load(name, config.lpips, option="--perceptual")
    image = jnp.zeros((1, SMALLEST, SMALLEST, 3))
    params = jax.jit(LPIPS().init)(jax.random.key(0), image, image)["params"]
    return perceptual.outline(name, option="--perceptual")._replace(params=params)


def make_weights(config: ConfigDict, networks: Networks) -> tuple[Any, Any]:
    """Random parameters of the generator, and of everything else."""
    key, size = jax.random.key(0), config.data.image_size
    params = measure.random_params(networks.generator)
    tokenizer = jax.jit(networks.tokenizer.init)(key, jnp.zeros((1, size, size, 3)))["params"]
    return params, {"tokenizer": tokenizer, "perceptual": networks.judges["perceptual"].params}


def make_batch(config: ConfigDict, count: int) -> dict[str, jax.Array]:
    """So many random images and labels."""
    size, numbers = config.data.image_size, jnp.arange(count)
    labels = numbers % config.data.num_classes
    images = jax.random.randint(jax.random.key(1), (count, size, size, 3), 0, 256).astype(jnp.uint8)
    return {"image": images, "label": labels, "condition": labels, "index": numbers}


def make_data(config: ConfigDict, num_codes: int, count: int) -> dict[str, jax.Array]:
    """A batch of so many, and what its parts find of one another's work: codes, samples, images, advantages."""
    group, size, codebook = config.posttrain.group, config.data.image_size, config.tokenizer.codebook_size
    keys = jax.random.split(jax.random.key(2), 4)
    return make_batch(config, count) | {
        "codes": jax.random.randint(keys[0], (count, num_codes), 0, codebook),
        "samples": jax.random.randint(keys[1], (count, group, num_codes), 0, codebook),
        "decoded": jax.random.uniform(keys[2], (count, group, size, size, 3)),
        "advantages": jax.random.normal(keys[3], (count, group)),
    }


def functions(config: ConfigDict, networks: Networks) -> Functions:
    """What a step consists of, by name: functions of the generator's parameters, the others, and `make_data`."""
    settings = config.posttrain

    def in_turn(function, rows):
        return map_rows(function, rows, at_once=settings.images_at_once)

    def encode(params, frozen, data):
        variables = {"params": frozen["tokenizer"]}
        return networks.tokenizer.apply(variables, unit_images(data), method="encode")

    def decode(params, frozen, data):
        variables = {"params": frozen["tokenizer"]}
        return in_turn(
            lambda codes: jnp.sum(networks.tokenizer.apply(variables, codes, method="decode")), data["samples"]
        )

    def perceive(params, frozen, data):
        def one(inputs):
            decoded, image, label = inputs
            seen = rewards.Seen(networks, frozen, None, image[None])
            return rewards.perceptual(decoded, jnp.full(len(decoded), label), seen)

        return in_turn(one, (data["decoded"], unit_images(data), data["label"]))

    def reward(params, frozen, data):
        return rewards.score(networks, settings, frozen, data["samples"], data)[0]

    group = settings.group
    return {
        "generator, one context an image": lambda *given: update(networks.generator, settings, *given, parts=1),
        f"generator, one an image and sample ({group}x)": lambda *given: update(
            networks.generator, settings, *given, parts=group
        ),
        "encode": encode,
        "decode all samples": decode,
        "perceptual network, all samples": perceive,
        "decode and reward": reward,
    }


def update(generator: Generator, settings: ConfigDict, params, frozen, data, *, parts: int) -> jax.Array:
    """Gradient norm of the generator that runs each context `parts` times, one after another, for a share of G each."""
    count, group, length = data["samples"].shape
    batch = {
        "codes": jnp.repeat(data["codes"], parts, axis=0),
        "label": jnp.repeat(data["label"], parts, axis=0),
        "samples": data["samples"].reshape(count * parts, group // parts, length),
        "advantages": data["advantages"].reshape(count * parts, group // parts),
    }

    def loss(params, batch, key):
        logits = generator.apply({"params": params}, batch["codes"], batch["label"]).logits
        new = grpo.gather_log_probabilities(logits, batch["samples"])
        policy = grpo.policy_terms(new, new, batch["advantages"])
        prior = jnp.mean(losses.next_code_cross_entropy(logits, batch["codes"]))
        return policy.loss + settings.prior_weight * prior, ()

    return optax.tree.norm(accumulated_gradients(loss, params, batch, jax.random.key(0), parts)[1])


def optimizer_of(config: ConfigDict, networks: Networks) -> optax.GradientTransformation:
    """That of the job."""
    rules = generators.family_of(networks.generator).parameters
    return adamw(config.posttrain.optimizer, config.posttrain.loop.steps, rules)


def time_step(arguments, config: ConfigDict, networks: Networks, params: Any, frozen: Any) -> list[float]:
    """Seconds of the whole step."""
    optimizer = optimizer_of(config, networks)
    step = jax.jit(va_pi.make_step(networks, config, optimizer), donate_argnums=0)
    state = new_state(jax.tree.map(jnp.copy, params), optimizer)
    batch, key = make_batch(config, arguments.batch), jax.random.key(3)
    return measure.timed(
        step, lambda last: (state if last is None else last[0], batch, key, frozen), arguments.repeats
    )[0]


def count_flops(arguments, num_codes: int, count: int) -> dict[str, int]:
    """FLOPs of the whole step and of its parts, by name, without what remat computes again."""
    config, networks = setup(arguments, remat="none", attention="plain")
    params, frozen = jax.eval_shape(lambda: make_weights(config, networks))
    data = jax.eval_shape(lambda: make_data(config, num_codes, count))
    counted = {
        name: measure.operations(part, params, frozen, data) for name, part in functions(config, networks).items()
    }
    optimizer = optimizer_of(config, networks)
    state = jax.eval_shape(lambda params: new_state(params, optimizer), params)
    batch = jax.eval_shape(lambda: make_batch(config, arguments.batch))
    step = va_pi.make_step(networks, config, optimizer)
    return counted | {"whole": measure.operations(step, state, batch, jax.random.key(0), frozen)}


def rows(
    arguments, config: ConfigDict, networks: Networks, counted: dict[str, int], peak: measure.Peak,
    found: dict[str, list[float]],
) -> Iterator[tuple]:  # fmt: skip
    """The table, the whole step first; `found` gets the seconds by name."""
    yield HEAD
    params, frozen = make_weights(config, networks)
    data = make_data(config, networks.generator.num_codes, arguments.batch // arguments.accumulation)

    def row(name: str, label: str, times: int, work: Callable[[], list[float]]) -> tuple:
        seconds, failure = measure.guarded(work)
        if failure:
            return label, failure, "", f"{counted[name] / 1e12:.4g}", ""
        found[name] = seconds
        share = f"{times * min(seconds) / min(found['whole']):.0%}" if "whole" in found else ""
        mfu = peak.mfu(counted[name], min(seconds))
        return label, measure.about(seconds), share, f"{counted[name] / 1e12:.4g}", mfu

    whole = f"the whole step, {arguments.batch} images in {arguments.accumulation} part(s)"
    yield row("whole", whole, 1, lambda: time_step(arguments, config, networks, params, frozen))
    for name, part in functions(config, networks).items():
        of = jax.jit(part)
        yield row(
            name,
            name,
            arguments.accumulation,
            lambda of=of: measure.timed(of, lambda _: (params, frozen, data), arguments.repeats)[0],
        )


def conclusions(arguments, counted: dict[str, int], found: dict[str, list[float]], peak: measure.Peak) -> None:
    """What the rows come to, as far as they are there."""
    one, many = (name for name in counted if name.startswith("generator"))
    if "whole" not in found:
        return
    whole, median = min(found["whole"]), statistics.median(found["whole"])
    if one in found and many in found:
        times = min(found[many]) / min(found[one])
        saved = arguments.accumulation * (min(found[many]) - min(found[one]))
        print(
            f"the released way costs {times:.1f} times as much in the generator, {1 + saved / whole:.1f} times in all"
        )
    released = counted["whole"] + arguments.accumulation * (counted[many] - counted[one])
    print(f"MFU of the whole step: {peak.mfu(counted['whole'], whole)}; ", end="")
    print(f"{peak.mfu(released, whole)} if the generator counts {arguments.group}-fold, as released")
    minutes = PAPERS["steps"] * PAPERS["images"] / arguments.batch * median / 60
    print(f"{arguments.batch / whole:.2f} images/s; {minutes:.1f} minutes for {PAPERS['steps']} steps of ", end="")
    print(f"{PAPERS['images']} images x {arguments.group} samples, from steps of {arguments.batch} images", flush=True)


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    measure.add_flags(parser)
    parser.set_defaults(batch=4)
    parser.add_argument("--model", default="rar", choices=["rar", "llamagen"])
    parser.add_argument("--group", type=int, default=8)
    parser.add_argument("--accumulation", type=int, default=1, help="parts in which the whole step takes its batch")
    parser.add_argument("--channels", type=int, default=32, help="of the tokenizer's outermost level; published: 128")
    parser.add_argument("--tokenizer-dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--perceptual", default="lite0", choices=[*SCALES, "lpips"])
    parser.add_argument("--remat", default="none", choices=REMAT)
    arguments = parser.parse_args()
    if arguments.group < 2:
        parser.error("--group must be 2 or more: a sample is judged beside others")
    if arguments.batch % arguments.accumulation:
        parser.error("--batch must be a multiple of --accumulation")
    return arguments


def main() -> None:
    arguments = parse()
    config, networks = setup(arguments, remat=arguments.remat)
    ceiling, found = measure.matmul_ceiling(arguments.dtype), {}
    peak, micro = measure.peak(ceiling, arguments.dtype), arguments.batch // arguments.accumulation
    counted = count_flops(arguments, networks.generator.num_codes, micro)
    measure.header(ceiling, arguments.dtype, peak)
    measure.table(rows(arguments, config, networks, counted, peak, found))
    print(f"\nparts are of {micro} images; peak {measure.peak_memory_gib():.1f} GiB over all rows")
    conclusions(arguments, counted, found, peak)


if __name__ == "__main__":
    main()
