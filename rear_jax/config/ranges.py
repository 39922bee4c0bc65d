"""What each setting may be: one table, which `checked` goes through before any job runs.

A key is the dotted name of a setting; the keys of the sections `model` and `tokenizer` serve every family. The upper
ends lie beyond what anybody trains; they stop a slip of the keyboard before it fills the memory or the disk.
"""

import dataclasses
import difflib
import os
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

from ml_collections import ConfigDict

from rear_jax import guidance, noise
from rear_jax.errors import RearError
from rear_jax.generators.family import CHOICES
from rear_jax.generators.layers import PROJECTORS
from rear_jax.runtime.precision import PRECISIONS
from rear_jax.runtime.trackers import TRACKERS as WRITERS
from rear_jax.weights import hub

LONGEST_NAME, LONGEST_PATH = 255, 4095  # bytes, of a file and with its folders, on Linux
LONGEST_SHOWN = 80  # characters of a value in a message


@dataclasses.dataclass(frozen=True)
class Allowed:
    """What one setting may be.

    Attributes:
      fits: whether a value does.
      words: what is allowed, after 'give'.
      path: whether the value names a file or folder, in which '~' stands for the home.
      hub: whether it may name one of a model hub instead.
    """

    fits: Callable[[Any], bool]
    words: str
    path: bool = False
    hub: bool = False


def whole(least: int, most: int, *others: int) -> Allowed:
    """A whole number from `least` to `most`, or one of the others."""
    also = "".join(f", or {other}" for other in others)
    return Allowed(
        lambda value: type(value) is int and (least <= value <= most or value in others),
        f"a whole number of {least} to {most}{also}",
    )


def number(least: float, most: float, *, but: tuple[float, ...] = ()) -> Allowed:
    """A finite number from `least` to `most`, without these ends that are in `but`."""
    left_out = "".join(f", not {end:g}" for end in but)
    return Allowed(
        lambda value: _is_number(value) and least <= value <= most and value not in but,  # NaN is not in between
        f"a number of {least:g} to {most:g}{left_out}",
    )


def choice(values: Collection[str]) -> Allowed:
    """One of these words."""
    return Allowed(lambda value: isinstance(value, str) and value in values, f"one of {', '.join(values)}")


def several(one: Allowed, least: int, most: int) -> Allowed:
    """A tuple with `least` to `most` values, each of which `one` allows."""
    return Allowed(
        lambda value: isinstance(value, tuple | list) and least <= len(value) <= most and all(map(one.fits, value)),
        f"{least} to {most} values, each {one.words}",
    )


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and "\0" not in value


def _is_path(value: Any) -> bool:
    """Whether a file system can have such a path; '' stands for no file."""
    if (
        not _is_text(value)
        or value.startswith(hub.SCHEME)
        or (value.startswith("~") and os.path.expanduser(value) == value)
    ):
        return False
    encoded = os.fsencode(os.path.expanduser(value))
    return len(encoded) <= LONGEST_PATH and all(len(name) <= LONGEST_NAME for name in encoded.split(b"/"))


def _is_on_hub(value: Any) -> bool:
    return _is_text(value) and hub.parsed(value) is not None


FLAG = Allowed(lambda value: isinstance(value, bool), "True or False")
TEXT = Allowed(_is_text, "a text without the character NUL")
NAME = Allowed(lambda value: _is_text(value) and value != "", "a name")  # what reads the setting knows which there are
PATH = Allowed(_is_path, "a path: no part of it longer than 255 bytes, no NUL, and '~' before a home that exists", True)
WEIGHTS = Allowed(lambda value: _is_path(value) or _is_on_hub(value), f"a path, or {hub.FORM}", True, True)

CLASS = Allowed(lambda value: NAME.fits(value) or whole(0, 2**24).fits(value), "the number or the name of a class")

OWN = Allowed(  # a setting that somebody has added
    lambda value: isinstance(value, bool | str | tuple | list) or (_is_number(value) and -1e30 < value < 1e30),
    "a finite number, True, False, a word or a tuple",
)

SEED = whole(0, 2**32 - 1)  # jax takes 32 bits: 2**40 would be 0 again
SHARE = number(0, 1)
BELOW_ONE = number(0, 1, but=(1,))
ABOVE_ZERO = number(0, 1, but=(0,))
WEIGHT = number(0, 1e6)
SCALE = number(0, 1e6)
STEPS, STEPS_OR_NONE = whole(1, 10**9), whole(0, 10**9)
BATCH = whole(1, 2**20)
MICROBATCHES = whole(0, 2**20)
IMAGES, IMAGES_OR_NONE = whole(1, 10**8), whole(0, 10**8)
PIXELS = whole(1, 2**13)
SIZE = whole(1, 2**17)  # of one axis of a network's array
LAYERS = whole(1, 2**10)
ROWS = whole(2, 2**24)  # rows of a codebook or a vocabulary
TOKENS = whole(1, 2**16)
AXIS = whole(1, 2**20, -1)
LEVELS = several(whole(1, 64), 1, 12)
DTYPE = choice(("float32", "bfloat16", "float16"))
TEXT_DTYPE = choice(("bfloat16", "float32"))

LOOP = {
    "steps": STEPS,
    "batch_size": BATCH,
    "log_every": STEPS,
    "picture_every": STEPS_OR_NONE,
    "checkpoint_every": STEPS,
    "keep_checkpoints": whole(1, 10**6),  # of 0, nothing would be left
    "keep_every": STEPS_OR_NONE,
    "profile_steps": several(STEPS, 0, 2),
}
OPTIMIZER = {
    "learning_rate": number(0, 1e3),
    "final_learning_rate": number(0, 1e3),
    "warmup_steps": STEPS_OR_NONE,
    "b1": BELOW_ONE,
    "b2": BELOW_ONE,
    "weight_decay": number(0, 1e3),
    "clip_norm": WEIGHT,
}


def _under(section: str, table: Mapping[str, Allowed]) -> dict[str, Allowed]:
    return {f"{section}.{name}": allowed for name, allowed in table.items()}


OF_FAMILIES = {
    # generators
    **_under("model", dict.fromkeys(("width", "mlp_width", "caption_dim", "code_dim"), SIZE)),
    **_under("model", dict.fromkeys(("depth", "heads", "unroll"), LAYERS)),
    **_under("model", dict.fromkeys(("caption_length", "prompt_length"), TOKENS)),
    **_under("model", dict.fromkeys(("dropout", "token_dropout"), BELOW_ONE)),
    **_under("model", {name: choice(values) for name, values in CHOICES.items()}),
    "model.name": NAME,
    "model.condition": NAME,
    "model.dtype": DTYPE,
    "model.pad_id": whole(0, 2**24),
    "model.prefix_tokens": whole(0, 2**16),
    "model.target_positions": FLAG,
    "model.vocabulary_size": ROWS,
    # tokenizers
    **_under("tokenizer", dict.fromkeys(("z_channels", "hidden_channels", "channels", "codebook_dim"), SIZE)),
    **_under("tokenizer", dict.fromkeys(("encoder_width", "decoder_width", "proxy_channels", "proxy_dim"), SIZE)),
    **_under("tokenizer", dict.fromkeys(("encoder_depth", "decoder_depth", "encoder_heads", "decoder_heads"), LAYERS)),
    **_under("tokenizer", dict.fromkeys(("num_res_blocks", "proxy_res_blocks"), LAYERS)),
    **_under("tokenizer", dict.fromkeys(("channel_mult", "proxy_channel_mult"), LEVELS)),
    **_under("tokenizer", dict.fromkeys(("codebook_size", "proxy_codebook_size"), ROWS)),
    **_under("tokenizer", dict.fromkeys(("l2_normalize", "legacy_reshape", "causal_decoder"), FLAG)),
    "tokenizer.name": NAME,
    "tokenizer.predicts": NAME,
    "tokenizer.dtype": DTYPE,
    "tokenizer.precision": choice(PRECISIONS),
    "tokenizer.patch_size": PIXELS,
    "tokenizer.num_latent_tokens": TOKENS,
    "tokenizer.buffer_tokens": whole(0, 2**16),
    "tokenizer.prefix_tokens": whole(0, 2**16),
}

OF_TRAINING = {
    **_under("tokenizer_training.loop", LOOP),
    **_under("tokenizer_training.optimizer", OPTIMIZER),
    **_under("tokenizer_training", dict.fromkeys(("init_from", "proxy"), WEIGHTS)),
    **_under(
        "tokenizer_training",
        dict.fromkeys(("mse_weight", "perceptual_weight", "commitment_weight", "discriminator_weight"), WEIGHT),
    ),
    **_under("tokenizer_training", dict.fromkeys(("objective", "perceptual_network", "augmentation"), NAME)),
    "tokenizer_training.init_parts": choice(("all", "codes")),
    "tokenizer_training.trained": choice(("all", "decoder")),
    "tokenizer_training.codebook_update": choice(("gradient", "ema")),
    "tokenizer_training.codebook_decay": BELOW_ONE,
    "tokenizer_training.revive_below": SHARE,
    "tokenizer_training.discriminator_start": STEPS_OR_NONE,
    "tokenizer_training.discriminator_adaptive": FLAG,
    "tokenizer_training.discriminator_channels": SIZE,
    "tokenizer_training.discriminator_layers": whole(1, 12),
    **_under("lpips", dict.fromkeys(("vgg16", "heads"), WEIGHTS)),
    **_under("clip", {"weights": WEIGHTS, "vocabulary": WEIGHTS, "prefix": TEXT}),
    **_under("hps", {"weights": WEIGHTS, "antialias": FLAG}),
    "method.name": NAME,
    "method.label_drop": SHARE,
    "method.noise_schedule": choice(noise.SCHEDULES),
    "method.noise_rate": SHARE,
    "method.embedding_weight": WEIGHT,
    "method.embedding_terms": choice(("both", "shallow", "deep")),
    "method.embedding_reading": choice(("released", "paper")),
    "method.projector": choice(PROJECTORS),
    "method.projector_width": SIZE,
    "method.shallow_layer": whole(0, 2**10),
    "method.deep_layer": whole(0, 2**10, -1),
    "method.order_anneal_start": SHARE,
    "method.order_anneal_end": SHARE,
    **_under("train.loop", LOOP),
    **_under("train.optimizer", OPTIMIZER),
    "train.ema_decay": BELOW_ONE,
    "train.num_images": whole(0, 2**40),
    "train.accumulation": MICROBATCHES,
    "train.evaluate_every": STEPS_OR_NONE,
    "train.evaluate_images": IMAGES,
    **_under("posttrain.loop", LOOP),
    **_under("posttrain.optimizer", OPTIMIZER),
    **_under("posttrain", dict.fromkeys(("method", "perceptual_network", "augmentation"), NAME)),
    **_under("posttrain", dict.fromkeys(("noise_rate", "label_drop"), SHARE)),
    **_under("posttrain", dict.fromkeys(("policy_weight", "prior_weight", "kl_weight"), WEIGHT)),
    **_under(
        "posttrain.reward",
        dict.fromkeys(("mse", "perceptual", "l1", "codebook", "codebook_flattened", "discriminator"), WEIGHT),
    ),
    **_under("posttrain.reward", dict.fromkeys(("class_probability", "clip", "hps"), WEIGHT)),
    "posttrain.group": whole(1, 2**12),
    "posttrain.noise_reading": choice(("paper", "released")),
    "posttrain.clip_images": FLAG,
    "posttrain.probe_images": IMAGES,
    "posttrain.ste_temperature": number(0, 1e3, but=(0,)),
    "posttrain.images_at_once": BATCH,
    "posttrain.max_advantage": number(0, 1e6, but=(0,)),
    "posttrain.clip_range": number(0, 10, but=(0,)),
    "posttrain.inner_updates": whole(1, 2**10),
    "posttrain.accumulation": MICROBATCHES,
}

SAMPLER = {"guidance_scale": SCALE, "guidance_power": number(0, 100), "temperature": number(0, 1e3)}
ALLOWED: dict[str, Allowed] = {
    "jobs": several(NAME, 0, 100),
    "seed": SEED,
    "writers": several(choice(WRITERS), 0, len(WRITERS)),
    **dict.fromkeys(("codes_from", "captions_from"), PATH),
    **dict.fromkeys(("tokenizer_from", "init_from"), WEIGHTS),
    **dict.fromkeys(("tokenizer_section", "init_section"), TEXT),
    "buckets.cache_gb": number(0, 1e6),
    **_under("mesh", {"data": AXIS, "fsdp": AXIS, "tensor": AXIS, "divide_state": FLAG}),
    **_under("data", {"source": NAME, "path": PATH, "image_size": PIXELS, "num_classes": whole(0, 2**24)}),
    **_under("data", {"train_split": TEXT, "eval_split": TEXT, "caption_key": TEXT, "max_broken_share": BELOW_ONE}),
    **_under("data", {"label_key": NAME, "image_key": NAME}),
    **_under("data", {"held_out_share": number(0, 1, but=(0, 1)), "held_out_seed": SEED}),
    "inspect.num_images": whole(0, 10**8),
    **_under("codes", {"augmentation": NAME, "num_shards": whole(1, 10**5), "batch_size": BATCH}),
    **_under("codes", {"in_memory": FLAG, "on_the_fly": FLAG, "max_corrupt_share": BELOW_ONE}),
    **_under("text", {"encoder": WEIGHTS, "vocabulary": WEIGHTS, "length": whole(0, 2**16), "dtype": TEXT_DTYPE}),
    **_under("text", {"batch_size": BATCH, "on_the_fly": FLAG, "depth": LAYERS, "heads": LAYERS, "head_size": SIZE}),
    **_under("text", {"mlp_width": SIZE, "vocabulary_size": ROWS}),
    **_under("describe", {"images": PATH, "weights": WEIGHTS, "vocabulary": WEIGHTS}),
    **_under("describe", {"question": TEXT, "dtype": TEXT_DTYPE}),
    **_under("describe", {"max_tokens": TOKENS, "temperature": number(0, 1e3), "top_p": ABOVE_ZERO}),
    "describe.batch_size": BATCH,
    **OF_FAMILIES,
    **OF_TRAINING,
    **_under("study", {"seeds": several(SEED, 0, 1000), "last": whole(1, 10**6)}),
    **_under("study", dict.fromkeys(("jobs", "variant_jobs"), several(NAME, 0, 100))),
    **_under("sample", SAMPLER),
    **_under("sample", {"stage": NAME, "guidance": choice(guidance.SCHEDULES), "top_p": ABOVE_ZERO}),
    **_under("sample", {"captions": PATH, "prompts": PATH, "prompt": TEXT, "top_k": whole(0, 2**24)}),
    **_under("sample", {"num_images": IMAGES_OR_NONE, "batch_size": BATCH, "image_size": whole(0, 2**13)}),
    **_under("sample", dict.fromkeys(("png_folder", "geneval", "hpsv2", "use_ema"), FLAG)),
    **_under("sample", {"guidance_interval": whole(0, 2**24, -1), "images_per_prompt": whole(1, 10**6)}),
    **_under("sample", {"classes": several(CLASS, 0, 10**6), "images_per_class": whole(1, 10**6)}),
    **_under("sweep", {name: several(SAMPLER[name], 0, 1000) for name in ("guidance_scale", "guidance_power")}),
    "sweep.confirm": FLAG,
    **_under("analyze", {"diagnostics": several(NAME, 1, 100), "split": choice(("held_out", "train"))}),
    **_under("analyze", {"num_images": IMAGES, "batch_size": BATCH}),
    **_under("analyze", dict.fromkeys(("true_shares", "nearest_shares", "noise_shares"), several(SHARE, 1, 1000))),
    **_under("plan", {"topology": TEXT, "programs": several(NAME, 0, 100), "compiles": whole(0, 100), "quick": FLAG}),
    **_under("plan", {"mfu": ABOVE_ZERO, "epoch_images": whole(1, 10**12)}),
    **_under("convert", {"source": WEIGHTS, "export": PATH, "onto": WEIGHTS}),
    **_under("convert", {"verify": FLAG, "images": IMAGES, "sequences": IMAGES}),
    "import_codes.source": WEIGHTS,
    **_under("demo", {"host": NAME, "port": whole(0, 2**16 - 1), "batch_size": BATCH, "most_images": IMAGES}),
    **_under("demo", {"queue_size": whole(1, 10**6), "max_upload_megabytes": whole(1, 10**4)}),
    **_under(
        "evaluate", {"network": NAME, "inception": WEIGHTS, "reference": WEIGHTS, "cache": PATH, "tokenizer": FLAG}
    ),
    "evaluate.reconstructed_reference": FLAG,
    **_under("evaluate", {"feature_size": PIXELS, "batch_size": BATCH, "neighbours": whole(1, 1000)}),
    **_under("evaluate", {"num_reference": IMAGES, "num_compared": IMAGES}),
    **_under("evaluate", {"kid_subsets": whole(1, 10**5), "kid_subset_size": whole(0, 10**6)}),
}
OPEN = ("model.", "tokenizer.", "posttrain.reward.")  # sections to which families and rewards add keys
FREE = ("study.variants.",)  # nested settings, of variants that are checked as whole configs


def checked(config: ConfigDict) -> ConfigDict:
    """A copy of a config whose values are all in their ranges, with '~' in its paths replaced by the home.

    Raises RearError: a value is out of its range or of a wrong type, or the config has other settings than `default()`.
    """
    copy = config.copy_and_resolve_references()
    found = dict(leaves(copy))
    if missing := [key for key in ALLOWED if key not in found and not key.startswith(OPEN)]:
        raise RearError(f"config lacks {missing[0]}: a config file starts from rear_jax.config.default().")
    for key, (section, name) in found.items():
        allowed, value = ALLOWED.get(key, OWN if key.startswith(OPEN) else None), section[name]
        if allowed is None:
            nearest = "".join(f" Did you mean {near!r}?" for near in difflib.get_close_matches(key, ALLOWED, 1))
            raise RearError(f"config has no setting {key!r}.{nearest}")
        if not allowed.fits(value):
            raise RearError(f"config.{key} = {_shown(value)}: give {allowed.words}.")
        if allowed.path and value.startswith("~"):
            section[name] = os.path.expanduser(value)
    return copy


def leaves(section: ConfigDict, prefix: str = "") -> Iterator[tuple[str, tuple[ConfigDict, str]]]:
    """Dotted name of each setting, with the section and the key that it has there."""
    for name in section:
        key = f"{prefix}{name}"
        if isinstance(section[name], ConfigDict):
            if f"{key}." not in FREE:
                yield from leaves(section[name], f"{key}.")
        else:
            yield key, (section, name)


def _shown(value: Any) -> str:
    """A value as a message shows it: python does not write integers of thousands of digits."""
    if isinstance(value, int) and value.bit_length() > 128:
        return "an integer of more than 128 bits"
    text = repr(value)
    return text if len(text) <= LONGEST_SHOWN else f"{text[:LONGEST_SHOWN]}..."
