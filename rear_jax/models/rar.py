"""The RAR-family transformer: the generator of AR, RAR and reAR (arXiv 2411.00776; 2510.04450).

A causal transformer over [cls, class, code_1 .. code_N], N + 2 positions, with DiT-style modulation by the class and
the position. The output at position 1 + n predicts code n + 1, so N + 1 positions would carry predictions and the
first N of them carry a loss.

Training runs `RARTransformer.__call__` on whole sequences. Decoding, in `rar_decoder.py`, runs `Block.step`, which
shares every parameter and formula of a block and differs only in where keys and values come from.
"""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from rear_jax.models.attention import (
    KeyValues,
    apply_dropout,
    attend,
    causal_attention,
    update_key_values,
)
from rear_jax.models.partition import by_heads, by_rows
from rear_jax.models.stack import run_blocks

EXTRA_POSITIONS = 1024  # rows that the published position tables carry beyond N
PROJECTORS = {"released": 3, "paper": 2}  # linear layers
EXTRA_TIMESTEPS = 100  # rows that the published timestep tables carry beyond N

_normal = nn.initializers.truncated_normal(0.02)


class Modulation(NamedTuple):
    """What a block needs to know of (class, position); every leaf is [..., W]."""

    shift_attention: jax.Array
    scale_attention: jax.Array
    gate_attention: jax.Array
    shift_mlp: jax.Array
    scale_mlp: jax.Array
    gate_mlp: jax.Array

    @classmethod
    def split(cls, modulation: Float[Array, "... 6W"]) -> "Modulation":
        """The six parts, in the published order."""
        return cls(*jnp.split(modulation, 6, axis=-1))


class Features(NamedTuple):
    """What a generator returns for whole sequences.

    Attributes:
      logits: [B, N, K] float32; entry n is the prediction of code n from the codes before it.
      shallow: [B, N, D] projection of the shallow layer at the position that reads code n, or None.
      deep: [B, N, D] projection of the deep layer at the position that predicts code n, or None.
    """

    logits: jax.Array
    shallow: jax.Array | None
    deep: jax.Array | None


class Linear(nn.Dense):
    """`nn.Dense` on [..., in], run on the flattened [rows, in].

    The same numbers; but XLA transposes a three-dimensional cotangent in memory before the weight gradient, which on a
    CPU more than doubles its time.
    """

    @nn.compact
    def __call__(self, x: Float[Array, "... in"]) -> Float[Array, "... out"]:
        return super().__call__(x.reshape(-1, x.shape[-1])).reshape(*x.shape[:-1], self.features)


class HeadsLinear(nn.Module):
    """The linear layer from [..., W] to queries, keys and values of all heads, [..., 3, heads, W / heads].

    Its parameters are those of a `Linear` of 3 W features. Under tensor parallelism each device has heads of its own
    (Megatron-LM, arXiv 1909.08053), which no equal cut through the 3 W columns gives: each block's kernel is dealt out
    by heads when it is used.
    """

    heads: int
    dtype: Any
    use_bias: bool = True
    kernel_init: Any = _normal

    @nn.compact
    def __call__(self, x: Float[Array, "... W"]) -> Float[Array, "... 3 H D"]:
        width = x.shape[-1]
        kernel = self.param("kernel", self.kernel_init, (width, 3 * width), jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, (3 * width,), jnp.float32) if self.use_bias else None
        x, kernel, bias = nn.dtypes.promote_dtype(x, kernel, bias, dtype=self.dtype)
        kernel = by_heads(kernel.reshape(width, 3, self.heads, -1))
        out = jnp.tensordot(x.reshape(-1, width), kernel, 1)
        if bias is not None:
            out += bias.reshape(kernel.shape[1:])
        return out.reshape(*x.shape[:-1], *kernel.shape[1:])


def dense(features: int, dtype: Any, name: str | None = None, kernel_init: Any = _normal) -> Linear:
    """A biased linear layer with the family's initialisation."""
    return Linear(features, dtype=dtype, kernel_init=kernel_init, name=name)


def layer_norm(dtype: Any, *, affine: bool = True) -> nn.LayerNorm:
    """LayerNorm with the family's epsilon; statistics in float32."""
    return nn.LayerNorm(epsilon=1e-6, use_scale=affine, use_bias=affine, dtype=dtype)


def gelu(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """Exact GELU, x·½(1 + erf(x/√2)): in this form, not jax.nn's with erfc, an eighth of the time on a CPU."""
    return 0.5 * x * (1.0 + jax.lax.erf(x * 0.5**0.5))


class Block(nn.Module):
    """One transformer block: modulated attention and MLP with gated residuals."""

    width: int
    heads: int
    mlp_width: int
    dropout: float
    dtype: Any
    attention: str = "auto"

    def setup(self):
        self.norm1 = layer_norm(self.dtype)
        self.qkv = HeadsLinear(self.heads, self.dtype)
        self.q_norm = layer_norm(self.dtype)
        self.k_norm = layer_norm(self.dtype)
        self.proj = dense(self.width, self.dtype)
        self.norm2 = layer_norm(self.dtype)
        self.fc1 = dense(self.mlp_width, self.dtype)
        self.fc2 = dense(self.width, self.dtype)
        self.adaln = dense(6 * self.width, self.dtype, kernel_init=nn.initializers.zeros)

    def modulation(self, condition: Float[Array, "... W"]) -> Float[Array, "... 6W"]:
        """Shifts, scales and gates, a linear function of SiLU(class + timestep embedding)."""
        return self.adaln(condition)

    def __call__(
        self, x: Float[Array, "B T W"], condition: Float[Array, "B T W"], *, train: bool
    ) -> Float[Array, "B T W"]:
        """Whole sequences, causal; `train` switches dropout on."""
        modulation = Modulation.split(by_rows(self.modulation(condition)))
        q, k, v = self._heads(x, modulation)
        key = self.make_rng("dropout") if train and self.dropout else None
        mixed = causal_attention(q, k, v, kernel=self.attention, dropout=self.dropout, key=key)
        return self._residuals(x, mixed, modulation, train=train)

    def step(
        self, x: Float[Array, "B T W"], modulation: Float[Array, "B T 6W"], past: KeyValues, position: Int[Array, ""]
    ) -> tuple[Float[Array, "B T W"], KeyValues]:
        """T new positions from `position` on, seeing themselves and the past."""
        modulation = Modulation.split(modulation)
        q, k, v = self._heads(x, modulation)
        past = update_key_values(past, k, v, position)
        return self._residuals(x, attend(q, past, position), modulation, train=False), past

    def _heads(self, x: jax.Array, modulation: Modulation) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Normalised queries and keys, and values, each [B, T, H, W/H]."""
        h = self.norm1(x) * (1 + modulation.scale_attention) + modulation.shift_attention
        qkv = self.qkv(h)
        q, k, v = qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2]
        return self.q_norm(q), self.k_norm(k), v

    def _residuals(self, x: jax.Array, mixed: jax.Array, modulation: Modulation, *, train: bool) -> jax.Array:
        """Adds the gated attention output `mixed` [B, T, H, W/H] and the gated MLP to x."""
        mixed = self._drop(self.proj(mixed.reshape(x.shape)), train)
        x = x + modulation.gate_attention * mixed
        h = self.norm2(x) * (1 + modulation.scale_mlp) + modulation.shift_mlp
        h = self._drop(gelu(self.fc1(h)), train)
        return x + modulation.gate_mlp * self._drop(self.fc2(h), train)

    def _drop(self, x: jax.Array, train: bool) -> jax.Array:
        return apply_dropout(self.make_rng("dropout"), x, self.dropout) if train and self.dropout else x


class Projector(nn.Module):
    """Maps hidden states into the codebook's space, in training only.

    `layers` linear layers of hidden width `hidden`: three with SiLU are the released code's (and its checkpoints'),
    two with GELU the paper's text.
    """

    hidden: int
    features: int
    layers: int
    dtype: Any

    @nn.compact
    def __call__(self, x: Float[Array, "B N W"]) -> Float[Array, "B N D"]:
        activation = nn.silu if self.layers == 3 else nn.gelu
        for i in range(self.layers - 1):
            x = activation(dense(self.hidden, self.dtype, name=f"layer{i}")(x))
        return dense(self.features, self.dtype, name=f"layer{self.layers - 1}")(x)


class RARTransformer(nn.Module):
    """The whole generator.

    Attributes:
      codebook_size: K; codes are 0..K-1.
      num_classes: labels are 0..num_classes-1; `num_classes` itself is the null label.
      num_codes: N, codes per image.
      width, depth, heads, mlp_width: of the transformer.
      dropout: rate on attention weights, attention output and both MLP outputs.
      projector: 'none' (no projections, no taps), 'released' (3 layers, SiLU) or 'paper' (2 layers, GELU).
      projector_width: hidden width of the projectors.
      embedding_dim: D, width of the codebook's vectors.
      shallow_layer, deep_layer: 0-based index of the blocks whose output is projected.
      dtype: of the matrix products; parameters, residual stream, normalisation statistics and softmax are float32.
      attention: the kernel of whole sequences, one of `attention_kernels.KERNELS`.
      remat: what the backward pass computes anew instead of reading it, a key of `stack.REMAT`.
      unroll: how many blocks of the layer scan are compiled side by side (`depth` = no loop at all).
    """

    codebook_size: int
    num_classes: int
    num_codes: int
    width: int
    depth: int
    heads: int
    mlp_width: int
    dropout: float = 0.0
    projector: str = "none"
    projector_width: int = 2048
    embedding_dim: int = 256
    shallow_layer: int = 0
    deep_layer: int = 0
    dtype: Any = jnp.float32
    attention: str = "auto"
    remat: str = "none"
    unroll: int = 1

    def setup(self):
        positions = self.num_codes + EXTRA_POSITIONS
        self.embeddings = self.param("embeddings", _normal, (self.codebook_size + 2 + self.num_classes, self.width))
        self.cls_token = self.param("cls_token", _normal, (1, 1, self.width))
        self.pos_embed = self.param("pos_embed", _normal, (1, positions, self.width))
        self.target_aware_pos_embed = self.param("target_aware_pos_embed", _normal, (1, positions, self.width))
        self.timesteps_embeddings = self.param(
            "timesteps_embeddings", _normal, (1, self.num_codes + EXTRA_TIMESTEPS, self.width)
        )
        self.blocks = block_of(self)
        self.head_norm = layer_norm(self.dtype, affine=False)
        self.head_adaln = dense(2 * self.width, self.dtype, kernel_init=nn.initializers.zeros)
        self.lm_head = dense(self.codebook_size, self.dtype)
        if self.projector != "none":
            layers = PROJECTORS[self.projector]
            self.shallow_projector = Projector(self.projector_width, self.embedding_dim, layers, self.dtype)
            self.deep_projector = Projector(self.projector_width, self.embedding_dim, layers, self.dtype)

    def __call__(
        self,
        codes: Int[Array, "B N"],
        labels: Int[Array, " B"],
        orders: Int[Array, "B N"] | None = None,
        *,
        train: bool = False,
    ) -> Features:
        """Teacher-forced predictions of every code from the (possibly noisy) codes before it.

        Args:
          codes: the context, in the order of generation; code n is read only by predictions of later codes.
          labels: class of each sequence, `num_classes` where it is dropped.
          orders: raster position of the n-th code that each sequence generates (RAR); None = raster order.
          train: dropout on; needs the 'dropout' random stream.
        """
        x = jnp.concatenate([self._prefix(labels), self.embeddings[codes]], axis=1)  # [B, N+2, W]
        x += self._orders_vectors(jnp.arange(self.num_codes)[None] if orders is None else orders)
        condition = by_rows(self.conditions(labels, jnp.arange(self.num_codes + 2)))
        taps = () if self.projector == "none" else (self.shallow_layer, self.deep_layer)
        x, tapped = run_blocks(self, x, condition, train=train, taps=taps)
        predicting = slice(1, self.num_codes + 1)
        logits = self.head(x[:, predicting], by_rows(self.head_adaln(condition[:, predicting])))
        if self.projector == "none":
            return Features(logits, None, None)
        shallow, deep = tapped
        return Features(logits, self.shallow_projector(shallow[:, 2:]), self.deep_projector(deep[:, predicting]))

    def _class_vectors(self, labels: Int[Array, " B"]) -> Float[Array, "B W"]:
        """Class embeddings; the null label is the row after the last class. Row K is RAR's unused mask code."""
        return self.embeddings[self.codebook_size + 1 + labels]

    def _position_vectors(self, positions: Int[Array, " T"]) -> Float[Array, "T W"]:
        """Position embedding plus, where a code is predicted, the target-aware one of the position it will take."""
        predicts = (positions >= 1) & (positions <= self.num_codes)
        target = jnp.where(predicts[:, None], self.target_aware_pos_embed[0][positions + 1], 0.0)
        return self.pos_embed[0][positions] + target

    def _orders_vectors(self, orders: Int[Array, "B N"]) -> Float[Array, "B N+2 W"]:
        """`_position_vectors` of a whole sequence whose n-th code lies at raster position orders[n]."""
        rows, slots = orders.shape[0], 2 + orders
        own = jnp.concatenate(
            [jnp.broadcast_to(self.pos_embed[:, :2], (rows, 2, self.width)), self.pos_embed[0][slots]], 1
        )
        return own + jnp.pad(self.target_aware_pos_embed[0][slots], ((0, 0), (1, 1), (0, 0)))

    def _prefix(self, labels: Int[Array, " B"]) -> Float[Array, "B 2 W"]:
        """cls and class, without their positions."""
        classes = self._class_vectors(labels)[:, None]
        return jnp.concatenate([jnp.broadcast_to(self.cls_token[0], classes.shape), classes], axis=1)

    def head(self, x: Float[Array, "B T W"], modulation: Float[Array, "B T 2W"]) -> Float[Array, "B T K"]:
        """Logits, float32. The family's head takes its modulation in the order scale, shift."""
        scale, shift = jnp.split(modulation, 2, axis=-1)
        return self.lm_head(self.head_norm(x) * (1 + scale) + shift).astype(jnp.float32)

    def embed_code(self, codes: Int[Array, " B"], position: Int[Array, ""]) -> Float[Array, "B 1 W"]:
        """Input of the transformer at one position that holds a code."""
        return self.embeddings[codes][:, None] + self._position_vectors(position[None])

    def embed_prefix(self, labels: Int[Array, " B"]) -> Float[Array, "B 2 W"]:
        """Input of the transformer at the two positions before the codes: cls and class."""
        return self._prefix(labels) + self._position_vectors(jnp.arange(2))

    def conditions(self, labels: Int[Array, " R"], positions: Int[Array, " C"]) -> Float[Array, "R C W"]:
        """SiLU(class + timestep embedding), what every modulation is a linear function of."""
        classes = self._class_vectors(labels)[:, None]
        return nn.silu(classes + self.timesteps_embeddings[0][positions]).astype(self.dtype)

    def head_modulation(self, conditions: Float[Array, "R C W"]) -> Float[Array, "R C 2W"]:
        """Scale and shift of the head."""
        return self.head_adaln(conditions)


def block_of(model: RARTransformer) -> Block:
    """One block, as every layer of the model has it."""
    return Block(model.width, model.heads, model.mlp_width, model.dropout, model.dtype, model.attention)
