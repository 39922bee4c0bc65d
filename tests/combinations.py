"""Settings that are right each for itself, put together at random: what does not fit together is one line.

`python -m tests.combinations SEED COUNT` tries so many combinations on eight devices, and ends with 1 where one fails.
"""

import contextlib
import logging
import random
import resource
import signal
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
from ml_collections import ConfigDict

from rear_jax import config as sections
from rear_jax import jobs
from rear_jax.config import ranges
from rear_jax.errors import RearError
from rear_jax.plan import programs
from rear_jax.runtime.mesh import make_mesh
from tests import toy, toy_sequence

LONGEST = 60.0  # seconds of a processor for one combination
MEMORY = 16 << 30  # bytes of address space
TRACED = 4  # of so many combinations one is traced, which takes five times as long as the check
NOWHERE = Path("no workdir")  # the checks write nothing
BEFORE = {  # job -> those that run before it, whose files are not looked for
    "tokenizer": (),
    "tokenize": ("tokenizer",),
    "train": ("tokenizer", "tokenize"),
    "posttrain": ("tokenizer", "tokenize", "train"),
    "sample": ("tokenizer", "tokenize", "train", "posttrain"),
    "evaluate": ("tokenizer", "tokenize", "train", "sample"),
    "analyze": ("tokenizer", "tokenize", "train"),
    "sweep": ("tokenizer", "tokenize", "train"),
}
QUICK = ("train", "posttrain", "sample", "tokenize", "sweep")  # whose checks take a fifth of a second
OFTEN = (*BEFORE, *QUICK[:3], *QUICK[:3], "train")
CNN = {"channel_mult": (1, 1, 1, 1), "num_res_blocks": 1, "codebook_size": 16, "z_channels": 4}
TOKENIZERS = {
    "maskgit_vqgan": CNN | {"hidden_channels": 8},
    "vqgan_plus": CNN | {"hidden_channels": 8},
    "llamagen_vq": CNN | {"channels": 8, "codebook_dim": 4},
    "titok": toy_sequence.TITOK,
    "alitok": toy_sequence.ALITOK,
}
SMALL = {"width": 16, "depth": 2, "heads": 2, "mlp_width": 32, "dtype": "float32"}
GENERATORS = {
    "rar": SMALL,
    "llamagen": SMALL | {"caption_length": 4, "caption_dim": 8},
    "janus": SMALL | {"vocabulary_size": 40, "code_dim": 8, "prompt_length": 6, "pad_id": 2},
    "alitok_generator": SMALL | {"prefix_tokens": 3},
}
OF_TEXT = ("llamagen", "janus")  # perhaps; their files are not here
FLAG = (True, False)
COUNT = (1, 2, 3, 4, 5, 7, 8, 16, 100)
SIZES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 31, 32, 33, 64, 96)
SHARES = (0.0, 1e-6, 0.3, 0.5, 1.0)
WEIGHTS = (0.0, 0.5, 1.0, 1e6)
SPLITS = ("train", "test", "", "validation", "none")
AUGMENTATIONS = ("none", "bicubic", "flip", "crop_flip", "wide_crop_flip", "window_flip", "center", "ten_crop")
LEVELS = ((1,), (1, 1), (1, 2), (2, 1, 1), (1, 1, 1, 1), (3, 5), (1,) * 6, (1,) * 12, (64, 1))
LOOP = {
    "steps": (1, 2, 3, 10, 10**9),
    "batch_size": (*COUNT, 24, 2**20),
    "log_every": (1, 2, 10**9),
    "picture_every": (0, 1, 7),
    "checkpoint_every": (1, 3, 10**9),
    "keep_every": (0, 1, 2, 3, 9),
    "profile_steps": ((), (1, 1), (1, 2), (2, 1), (5, 10**9), (3,)),
}
OPTIMIZER = {
    "learning_rate": (0.0, 1e-4, 1e3),
    "final_learning_rate": (0.0, 1e-5, 1e3),
    "warmup_steps": (0, 1, 2, 3, 12, 10**9),
    "b1": (0.0, 0.9),
    "weight_decay": (0.0, 0.1),
    "clip_norm": (0.0, 1.0),
}


def _under(section: str, table: dict) -> dict:
    return {f"{section}.{name}": values for name, values in table.items()}


VALUES: dict[str, tuple] = {
    "seed": (0, 2**32 - 1),
    **_under("mesh", dict.fromkeys(("data", "fsdp", "tensor"), (-1, 1, 2, 3, 4, 8))),
    "mesh.divide_state": FLAG,
    "data.image_size": (1, 2, 7, 8, 15, 16, 17, 24, 31, 32, 40, 64, 100, 256),
    "data.num_classes": (1, 2, 9, 10, 11, 1000),
    "data.train_split": SPLITS,
    "data.eval_split": SPLITS,
    "data.held_out_share": (1e-9, 0.05, 0.999999),
    **_under(
        "codes", {"augmentation": AUGMENTATIONS, "num_shards": (1, 4, 1000), "batch_size": COUNT, "on_the_fly": FLAG}
    ),
    **_under("model", dict.fromkeys(("width", "mlp_width", "caption_dim", "code_dim"), SIZES)),
    **_under("model", dict.fromkeys(("depth", "unroll"), (1, 2, 3, 4))),
    "model.heads": COUNT,
    **_under("model", {"caption_length": (1, 2, 4, 120), "prompt_length": (1, 2, 6, 300)}),
    **_under("model", dict.fromkeys(("dropout", "token_dropout"), (0.0, 0.1, 0.999))),
    **_under("model", {"remat": tuple(ranges.CHOICES["remat"]), "attention": tuple(ranges.CHOICES["attention"])}),
    **_under("model", {"condition": ("class", "caption", "text"), "dtype": ("float32", "bfloat16", "float16")}),
    **_under("model", {"pad_id": (0, 2, 39, 40, 2**24), "vocabulary_size": (2, 40)}),
    **_under("model", {"prefix_tokens": (0, 1, 3, 7, 12, 15, 16, 17, 2**16), "target_positions": FLAG}),
    **_under("tokenizer", dict.fromkeys(("z_channels", "hidden_channels", "channels", "codebook_dim"), SIZES)),
    **_under("tokenizer", dict.fromkeys(("encoder_width", "decoder_width", "proxy_channels", "proxy_dim"), SIZES)),
    **_under("tokenizer", dict.fromkeys(("encoder_depth", "decoder_depth"), (1, 2, 3))),
    **_under("tokenizer", dict.fromkeys(("encoder_heads", "decoder_heads"), COUNT)),
    **_under("tokenizer", dict.fromkeys(("num_res_blocks", "proxy_res_blocks"), (1, 2, 3))),
    **_under("tokenizer", dict.fromkeys(("channel_mult", "proxy_channel_mult"), LEVELS)),
    **_under("tokenizer", dict.fromkeys(("codebook_size", "proxy_codebook_size"), (2, 3, 16, 17, 256))),
    **_under("tokenizer", dict.fromkeys(("l2_normalize", "legacy_reshape", "causal_decoder"), FLAG)),
    **_under("tokenizer", {"predicts": ("codes", "pixels"), "patch_size": (1, 2, 3, 4, 8, 16, 64)}),
    **_under("tokenizer", {"num_latent_tokens": (1, 2, 5, 9, 64), "buffer_tokens": (0, 1, 2, 64)}),
    **_under("tokenizer", {"prefix_tokens": (0, 1, 3, 8, 16, 100), "dtype": ("float32", "bfloat16", "float16")}),
    "tokenizer.precision": ranges.PRECISIONS,
    **_under("tokenizer_training.loop", LOOP),
    **_under("tokenizer_training.optimizer", OPTIMIZER),
    **_under("tokenizer_training", {"objective": ("pixels", "codes"), "trained": ("all", "decoder")}),
    **_under("tokenizer_training", {"init_parts": ("all", "codes"), "codebook_update": ("gradient", "ema")}),
    **_under("tokenizer_training", {"perceptual_network": ("lite0", "lite2", "lpips"), "augmentation": AUGMENTATIONS}),
    **_under("tokenizer_training", dict.fromkeys(("mse_weight", "perceptual_weight", "discriminator_weight"), WEIGHTS)),
    **_under(
        "tokenizer_training", {"revive_below": SHARES, "discriminator_start": (0, 3), "discriminator_adaptive": FLAG}
    ),
    **_under("tokenizer_training", {"discriminator_channels": SIZES, "discriminator_layers": (1, 2, 3, 5, 12)}),
    **_under("method", {"name": ("ar", "rar", "rear"), "label_drop": SHARES, "noise_rate": SHARES}),
    **_under(
        "method", {"noise_schedule": ("none", "annealed", "linear", "uniform", "fixed"), "embedding_weight": WEIGHTS}
    ),
    **_under("method", {"embedding_terms": ("both", "shallow", "deep"), "embedding_reading": ("released", "paper")}),
    **_under("method", {"projector": ("released", "paper"), "projector_width": SIZES}),
    **_under("method", {"shallow_layer": (0, 1, 2, 3, 1024), "deep_layer": (-1, 0, 1, 2, 3, 1024)}),
    **_under("method", dict.fromkeys(("order_anneal_start", "order_anneal_end"), (0.0, 0.5, 0.75, 1.0))),
    **_under("train.loop", LOOP),
    **_under("train.optimizer", OPTIMIZER),
    **_under("train", {"ema_decay": (0.0, 0.9), "num_images": (0, 1, 7, 2**40), "accumulation": (0, *COUNT)}),
    **_under("train", {"evaluate_every": (0, 1, 5, 10**9), "evaluate_images": (1, 2, 10, 10**8)}),
    **_under("posttrain.loop", LOOP),
    **_under("posttrain.optimizer", OPTIMIZER),
    **_under("posttrain", {"method": ("va_pi", "ste", "tokenizer", "ar_grpo"), "group": COUNT}),
    **_under("posttrain", dict.fromkeys(("noise_rate", "label_drop"), SHARES)),
    **_under("posttrain", dict.fromkeys(("policy_weight", "prior_weight", "kl_weight"), WEIGHTS)),
    **_under("posttrain", {"noise_reading": ("paper", "released"), "clip_images": FLAG, "probe_images": (1, 10**8)}),
    **_under("posttrain", {"perceptual_network": ("lite0", "lite2", "lpips"), "images_at_once": (*COUNT, 2**20)}),
    **_under("posttrain", {"inner_updates": COUNT, "accumulation": (0, *COUNT), "augmentation": AUGMENTATIONS}),
    **_under("posttrain.reward", dict.fromkeys(("mse", "perceptual", "l1", "codebook"), WEIGHTS)),
    **_under("posttrain.reward", dict.fromkeys(("codebook_flattened", "discriminator", "class_probability"), WEIGHTS)),
    **_under(
        "sample", {"num_images": (0, 1, 7, 24, 10**8), "batch_size": (*COUNT, 2**20), "image_size": (0, 1, 31, 8192)}
    ),
    **_under(
        "sample", {"classes": ((), (0,), (9, 0), (9, 9), (10,), ("Sandal",), ("otter", 1)), "images_per_class": COUNT}
    ),
    **_under("sample", {"guidance": ("power_cosine", "linear", "constant"), "guidance_scale": (0.0, 1.0, 1e6)}),
    **_under("sample", {"guidance_power": (0.0, 1.0, 100.0), "guidance_interval": (-1, 0, 1, 15, 16, 2**24)}),
    **_under("sample", {"temperature": (0.0, 1e-6, 1e3), "top_k": (0, 1, 16, 17, 2**24), "top_p": (1e-9, 0.5, 1.0)}),
    **_under("sample", {"stage": ("train", "best", "posttrain"), "use_ema": FLAG, "png_folder": FLAG, "geneval": FLAG}),
    **_under("sweep", {"guidance_scale": ((), (1.0,), (1.0, 2.0), (2.0, 2.0)), "guidance_power": ((), (0.0, 1.0))}),
    "sweep.confirm": FLAG,
    **_under("analyze", {"split": ("held_out", "train"), "num_images": (1, 7, 10**8), "batch_size": COUNT}),
    **_under(
        "analyze", dict.fromkeys(("true_shares", "nearest_shares", "noise_shares"), ((0.0,), (1.0, 0.0), (0.5, 0.5)))
    ),
    **_under("evaluate", {"network": ("lite0", "lite2", "inception"), "feature_size": (1, 7, 31, 32, 224)}),
    **_under("evaluate", {"batch_size": COUNT, "neighbours": (1, 3, 59, 60, 1000), "num_reference": (1, 2, 60, 10**8)}),
    **_under(
        "evaluate", {"num_compared": (1, 2, 60, 10**8), "kid_subsets": (1, 10**5), "kid_subset_size": (0, 1, 10**6)}
    ),
    **_under("evaluate", {"tokenizer": FLAG, "reconstructed_reference": FLAG}),
}
SEEN_BY = {  # job -> beginnings of the settings that matter to it
    "tokenizer": ("tokenizer.", "tokenizer_training.", "data.", "mesh."),
    "tokenize": ("tokenizer.", "codes.", "data.", "mesh."),
    "train": ("tokenizer.", "model.", "method.", "train.", "codes.", "data.", "mesh."),
    "posttrain": ("tokenizer.", "model.", "posttrain.", "data.", "mesh."),
    "sample": ("tokenizer.", "model.", "sample.", "data.", "mesh."),
    "evaluate": ("evaluate.", "data.", "sample."),
    "analyze": ("model.", "tokenizer.", "analyze.", "data.", "sample."),
    "sweep": ("sweep.", "sample.", "evaluate.", "data."),
}


class Combination(NamedTuple):
    """A job, the families of its networks, and what is changed in the toy experiment."""

    job: str
    tokenizer: str
    generator: str
    changes: tuple[tuple[str, object], ...]

    def config(self) -> ConfigDict:
        made = toy.config(posttrain__reward__perceptual=0.0, posttrain__loop__batch_size=8, train__accumulation=1)
        made.sweep.guidance_scale = (1.0, 2.0)
        with made.unlocked():
            for section, name, sizes in (
                ("tokenizer", self.tokenizer, TOKENIZERS[self.tokenizer]),
                ("model", self.generator, GENERATORS[self.generator]),
            ):
                made[section] = getattr(sections, name)()
                made[section].update(sizes)
        if self.generator in OF_TEXT:
            made.method.name = "ar"
        for key, value in self.changes:
            *parents, name = key.split(".")
            section = made
            for parent in parents:
                section = section[parent]
            section[name] = value
        return made


def drawn(seed: int, among: Sequence[str] = OFTEN) -> Combination:
    """The combination of a seed, of one of some jobs."""
    rng = random.Random(seed)
    job = rng.choice(among)
    tokenizer = rng.choice(("maskgit_vqgan", *TOKENIZERS))
    generator = rng.choice(("rar", *GENERATORS))
    config = Combination(job, tokenizer, generator, ()).config()
    there = [key for key in VALUES if key.startswith(SEEN_BY[job]) and _holds(config, key)]
    groups: dict[str, list[str]] = {}
    for key in there:
        groups.setdefault(key.rpartition(".")[0], []).append(key)
    chosen: dict[str, object] = {}
    while len(chosen) < rng.choice((1, 2, 2, 3, 3, 4)):
        key = rng.choice(groups[rng.choice(sorted(groups))])
        chosen[key] = rng.choice(VALUES[key])
    return Combination(job, tokenizer, generator, tuple(chosen.items()))


def _holds(config: ConfigDict, key: str) -> bool:
    for name in key.split("."):
        if name not in config:
            return False
        config = config[name]
    return True


def fault(one: Combination, *, traced: bool = True) -> str:
    """What is wrong with how a combination is taken, in one line; '' where it is refused in one line, or traces.

    Without `traced` only the check of the job runs, which makes the shapes of all parameters.
    """
    refused = None
    try:
        with limited(LONGEST):
            config = ranges.checked(one.config())
            try:
                jobs.JOBS[one.job].check(config, NOWHERE, BEFORE[one.job])
            except RearError as error:
                refused = error
                if "\n" in str(error):
                    return f"a refusal of several lines: {error!s}"
            wanting_files = refused and one.generator in OF_TEXT
            if traced and one.job in programs.PROGRAMS and (wanting_files or not refused):
                mesh = make_mesh(config.mesh)
                with jax.set_mesh(mesh):
                    program = programs.PROGRAMS[one.job](config, mesh)
                    jax.eval_shape(program.function, *program.arguments)
    except RearError as error:
        return "" if refused else f"the check takes it, but: {error}"
    except Exception as error:
        return _where(error)
    return ""


def _where(error: Exception) -> str:
    """Kind of an exception, its message, and where our code was when it came."""
    own = [frame for frame in traceback.extract_tb(error.__traceback__) if "/rear_jax/" in frame.filename]
    place = f"{own[-1].filename.partition('/rear_jax/')[2]}:{own[-1].lineno}" if own else "?"
    return f"{type(error).__name__} at {place}: {' '.join(str(error).split())[:300]}"


@contextlib.contextmanager
def limited(seconds: float) -> Iterator[None]:
    """Raises TimeoutError after so many seconds of the processor."""

    def stop(*_: object) -> None:
        raise TimeoutError(f"more than {seconds} s")

    before = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


def shrunk(one: Combination, said: str) -> tuple[Combination, str]:
    """The same fault with as few changes as it needs."""
    kind = said.split(":")[0]
    for change in one.changes:
        fewer = one._replace(changes=tuple(other for other in one.changes if other != change))
        if (found := fault(fewer)).split(":")[0] == kind:
            one, said = fewer, found
    return one, said


def main(first: int, count: int) -> int:
    """Prints each kind of fault once, with the seed that shows it."""
    logging.disable(logging.CRITICAL)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    kinds: dict[str, int] = {}
    start = time.process_time()
    for seed in range(first, first + count):
        if (seed - first) % 50 == 49:
            print(f"... {seed - first + 1} of {count}, {time.process_time() - start:.0f} s", flush=True)
        one = drawn(seed)
        if not (said := fault(one, traced=seed % TRACED == 0)):
            continue
        kind = said[:60]
        kinds[kind] = kinds.get(kind, 0) + 1
        if kinds[kind] == 1:
            one, said = shrunk(one, said)
            print(f"seed {seed}: {one}\n    {said}", flush=True)
    print(f"{count} combinations from seed {first}, {time.process_time() - start:.0f} s, {kinds}")
    return 1 if kinds else 0


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), int(sys.argv[2])))
