"""Generators: transformers over image codes, and what decoding needs of each of them."""

import dataclasses
from typing import Any, Protocol

import jax.numpy as jnp
from jaxtyping import Array, Float, Int
from ml_collections import ConfigDict

from rear_jax.errors import RearError
from rear_jax.models import alitok, llamagen
from rear_jax.models.alitok import AliTokTransformer
from rear_jax.models.alitok_decoder import AliTokDecoder
from rear_jax.models.attention_kernels import KERNELS
from rear_jax.models.llamagen import CONDITIONS, Captions, LlamaGenTransformer
from rear_jax.models.llamagen_decoder import LlamaGenDecoder
from rear_jax.models.rar import PROJECTORS, RARTransformer
from rear_jax.models.rar_decoder import RARDecoder
from rear_jax.models.stack import REMAT
from rear_jax.tokenizers import TOKENIZERS
from rear_jax.tokenizers.vit import SequenceTokenizer

Generator = RARTransformer | LlamaGenTransformer | AliTokTransformer

MODELS = {"rar": RARTransformer, "llamagen": LlamaGenTransformer, "alitok": AliTokTransformer}
DECODERS = {RARTransformer: RARDecoder, LlamaGenTransformer: LlamaGenDecoder, AliTokTransformer: AliTokDecoder}
DERIVED = {  # attributes that follow from other sections of the config
    "codebook_size",
    "num_classes",
    "num_codes",
    "projector",
    "projector_width",
    "embedding_dim",
    "shallow_layer",
    "deep_layer",
}


class Decoder(Protocol):
    """A generator as `decode.generate` sees it. All methods are pure; the cache is passed in and out.

    The transformer reads `prefix_length` positions that hold no codes, then code n at position prefix_length + n. What
    `conditions` are is the generator's own: labels [R], or a tree of arrays that lead with R.
    """

    num_codes: int  # N, codes in a sequence
    prefix_length: int

    def prepare(self, params: Any) -> Any:
        """Parameters in the form that the other methods take as `weights`, computed once per program."""

    def guides(self, scale: float) -> bool:
        """Whether this guidance scale needs the unconditional model at all."""

    def with_unconditional(
        self, weights: Any, conditions: Any, rows: Int[Array, " B"]
    ) -> tuple[Any, Int[Array, " 2B"]]:
        """Conditions and rows of a guided batch: B conditional sequences, then the same B without their condition."""

    def condition(self, weights: Any, conditions: Any, positions: Int[Array, " C"]) -> Any:
        """Whatever depends on (condition, position) but on no code: a tree of arrays with the C axis leading."""

    def new_cache(self, batch: int, length: int) -> Any:
        """An empty cache with room for `length` positions: a tree of arrays that lead with the batch."""

    def grow_cache(self, cache: Any, length: int) -> Any:
        """The same cache with room for `length` positions."""

    def prefill(
        self, weights: Any, conditions: Any, rows: Int[Array, " B"], cache: Any
    ) -> tuple[Float[Array, "B K"], Any]:
        """Reads the prefix of each sequence, whose condition is `conditions[rows]`; returns the logits of code 0."""

    def step(
        self,
        weights: Any,
        conditioning: Any,
        rows: Int[Array, " B"],
        codes: Int[Array, " B"],
        position: Int[Array, ""],
        cache: Any,
    ) -> tuple[Float[Array, "B K"], Any]:
        """Reads one code per sequence at `position` (with `condition`'s entry for it); returns the next logits."""


def build(config: ConfigDict, *, num_codes: int, embedding_dim: int) -> Generator:
    """The generator that `config.model` and `config.method` describe.

    Args:
      config: the experiment. `config.model` holds `name`, a key of MODELS, and every attribute of that module but the
        DERIVED ones under the attribute's own name; `dtype` as a string such as 'bfloat16'.
      num_codes: N, codes per image of the tokenizer.
      embedding_dim: width of its codebook's vectors.

    Raises:
      RearError: sizes that do not fit together, an unknown name, or keys missing from the section or unknown in it.
    """
    model = config.model
    if model.name not in MODELS:
        raise RearError(f"config.model.name = {model.name!r}: use one of {', '.join(MODELS)}.")
    _check_keys(model)
    for name, known in {"remat": REMAT, "attention": KERNELS}.items():
        if model[name] not in known:
            raise RearError(f"config.model.{name} = {model[name]!r}: use one of {', '.join(known)}.")
    if model.width % model.heads:
        raise RearError(f"config.model.width = {model.width} is not divisible by config.model.heads = {model.heads}.")
    family = {"rar": _rar, "llamagen": _llamagen, "alitok": _alitok}[model.name]
    return MODELS[model.name](
        codebook_size=config.tokenizer.codebook_size,
        num_classes=config.data.num_classes,
        num_codes=num_codes,
        **{key: model[key] for key in model if key not in ("name", "dtype")},
        dtype=jnp.dtype(model.dtype),
        **family(config, num_codes, embedding_dim),
    )


def decoder_of(model: Generator) -> Decoder:
    """The cached form of a generator."""
    return DECODERS[type(model)](model)


def example_inputs(model: Generator) -> tuple[Int[Array, "1 N"], Int[Array, " 1"] | Captions]:
    """Codes and condition of one sequence, all zero: what `model.init` needs to see."""
    codes = jnp.zeros((1, model.num_codes), jnp.int32)
    if takes_captions(model):
        shape = 1, model.caption_length
        return codes, Captions(jnp.zeros((*shape, model.caption_dim), jnp.float32), jnp.ones(shape, bool))
    return codes, jnp.zeros(1, jnp.int32)


def takes_captions(model: Generator) -> bool:
    """Whether the generator is conditioned by text instead of by a class."""
    return isinstance(model, LlamaGenTransformer) and model.condition == "text"


def _check_keys(model: ConfigDict) -> None:
    """Raises RearError unless the section has exactly the keys of its family."""
    wanted = {field.name for field in dataclasses.fields(MODELS[model.name])} - DERIVED - {"parent"}
    wrong = sorted(wanted ^ set(model))
    if wrong:
        keys = ", ".join(sorted(wanted))
        raise RearError(f"config.model {model.name!r} takes exactly the keys {keys}: mend {', '.join(wrong)}.")


def _rar(config: ConfigDict, num_codes: int, embedding_dim: int) -> dict[str, Any]:
    """Attributes of a RAR transformer that the method decides."""
    method, depth = config.method, config.model.depth
    regularised = method.name == "rear" and method.embedding_weight > 0
    if regularised and method.projector not in PROJECTORS:
        raise RearError(f"config.method.projector = {method.projector!r}: use one of {', '.join(PROJECTORS)}.")
    layers = {
        "shallow_layer": method.shallow_layer,
        "deep_layer": 3 * depth // 4 if method.deep_layer == -1 else method.deep_layer,
    }
    for name, layer in layers.items():
        if regularised and not 0 <= layer < depth:
            raise RearError(f"config.method.{name} = {layer} is not a layer of 0..{depth - 1}.")
    return {
        "projector": method.projector if regularised else "none",
        "projector_width": method.projector_width,
        "embedding_dim": embedding_dim,
        **layers,
    }


def _llamagen(config: ConfigDict, num_codes: int, embedding_dim: int) -> dict[str, Any]:
    """Nothing but checks: the method decides no attribute of a LlamaGen transformer."""
    model, method, tokenizer = config.model, config.method, config.tokenizer.name
    if method.name in ("rear", "rar"):
        raise RearError(
            f"config.method.name = {method.name!r} does not fit config.model.name = 'llamagen', whose published form "
            "has neither reAR's taps nor RAR's positions: use 'ar', or another model."
        )
    if issubclass(TOKENIZERS[tokenizer], SequenceTokenizer):
        raise RearError(
            "config.model.name = 'llamagen' needs a grid of codes, which "
            f"config.tokenizer.name = {tokenizer!r} has not: use another model, or another tokenizer."
        )
    if model.condition not in CONDITIONS:
        raise RearError(f"config.model.condition = {model.condition!r}: use one of {', '.join(CONDITIONS)}.")
    llamagen.rotation_table(num_codes, model.width // model.heads, prefix_length=1)  # refuses sizes that have none
    return {}


def _alitok(config: ConfigDict, num_codes: int, embedding_dim: int) -> dict[str, Any]:
    """Attributes of an AliTok transformer that the method decides: those of the RAR family."""
    model, tokenizer = config.model, config.tokenizer
    if config.method.name == "rar" and not model.target_positions:
        raise RearError("config.method.name = 'rar' generates in random orders: set config.model.target_positions.")
    if "prefix_tokens" in tokenizer and tokenizer.prefix_tokens != model.prefix_tokens:
        raise RearError(
            f"config.model.prefix_tokens = {model.prefix_tokens}, but config.tokenizer.prefix_tokens = "
            f"{tokenizer.prefix_tokens}: make them the same."
        )
    alitok.rotation_table(num_codes, model.width // model.heads, model.prefix_tokens)  # refuses sizes that have none
    return _rar(config, num_codes, embedding_dim)
