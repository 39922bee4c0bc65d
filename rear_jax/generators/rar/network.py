"""The RAR-family transformer: the generator of AR, RAR and reAR (arXiv 2411.00776; 2510.04450).

A causal transformer over [cls, class, code_1 .. code_N], N + 2 positions, with DiT-style modulation by the class and
the position. The output at position 1 + n predicts code n + 1, so N + 1 positions would carry predictions and the
first N of them carry a loss.

Training runs `RARTransformer.__call__` on whole sequences. Decoding, in `cached.py`, runs `Block.step`. Both share
every parameter and formula of a block; only the source of keys and values differs.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from rear_jax.generators.attention import self_attention
from rear_jax.generators.cached_attention import KeyValues, attend_to_past
from rear_jax.generators.dropout import Dropout, at, drop
from rear_jax.generators.heads import HeadNorm, Preparation
from rear_jax.generators.interface import Features, TappedGenerator
from rear_jax.generators.layers import HeadsLinear, dense, normal, projectors
from rear_jax.generators.modulated import Affine, Way, add_gated, add_gated_norm, layer_norm, norm
from rear_jax.generators.stack import keep, run_blocks
from rear_jax.runtime.precision import gelu
from rear_jax.runtime.sharding import by_rows

EXTRA_POSITIONS = 1024  # rows that the published position tables carry beyond N
EXTRA_TIMESTEPS = 100  # rows that the published timestep tables carry beyond N
WEIGHTS, MIXED, HIDDEN, OUTPUT = range(4)  # where a block drops: attention weights and output, the MLP's two layers


class Block(nn.Module):
    """One transformer block: modulated attention and MLP with gated residuals."""

    width: int
    heads: int
    mlp_width: int
    dropout: float
    dtype: Any
    attention: str = "auto"

    def setup(self):
        self.norm1 = Affine()
        self.qkv = HeadsLinear(self.heads, self.dtype)
        self.q_norm = HeadNorm(biased=True)
        self.k_norm = HeadNorm(biased=True)
        self.proj = dense(self.width, self.dtype)
        self.norm2 = Affine()
        self.fc1 = dense(self.mlp_width, self.dtype)
        self.fc2 = dense(self.width, self.dtype)
        self.adaln = dense(6 * self.width, self.dtype, kernel_init=nn.initializers.zeros)

    def modulation(self, condition: Float[Array, "... W"]) -> Float[Array, "... 6W"]:
        """Shifts, scales and gates, a linear function of SiLU(class + timestep embedding)."""
        return self.adaln(condition)

    def __call__(
        self, x: Float[Array, "B T W"], condition: Float[Array, "B T W"], *, dropout: Dropout | None
    ) -> Float[Array, "B T W"]:
        """Whole sequences, causal."""
        width, way = x.shape[-1], Way.of(self.attention, x.shape[-1])
        h, x, modulation = norm(x, self.norm1(width), by_rows(self.modulation(condition)), way)
        qkv, preparation = self._heads(h)
        where = at(dropout, WEIGHTS)
        mixed = self_attention(qkv, preparation, kernel=self.attention, rate=self.dropout, dropout=where)
        return self._residuals(x, mixed, modulation, dropout, way)

    def step(
        self, x: Float[Array, "B T W"], modulation: Float[Array, "B T 6W"], past: KeyValues, position: Int[Array, ""]
    ) -> tuple[Float[Array, "B T W"], KeyValues]:
        """T new positions from `position` on, seeing themselves and the past."""
        way = Way(fused=False)
        h, x, modulation = norm(x, self.norm1(x.shape[-1]), modulation, way)
        qkv, preparation = self._heads(h)
        mixed, past = attend_to_past(qkv, preparation, past, position)
        return self._residuals(x, mixed, modulation, None, way), past

    def _heads(self, h: jax.Array) -> tuple[jax.Array, Preparation]:
        """Queries, keys and values [B, T, 3, H, W/H], and what becomes of the first two."""
        qkv = self.qkv(h)
        return qkv, Preparation(self.q_norm(qkv.shape[-1]), self.k_norm(qkv.shape[-1]))

    def _residuals(
        self, x: jax.Array, mixed: jax.Array, modulation: jax.Array, dropout: Dropout | None, way: Way
    ) -> jax.Array:
        """Adds the gated attention output `mixed` [B, T, W] and the gated MLP to x."""
        rate, mixed, affine = self.dropout, keep(self.proj(keep(mixed))), self.norm2(x.shape[-1])
        x, h, modulation = add_gated_norm(x, mixed, affine, modulation, rate, at(dropout, MIXED), way)
        h = drop(gelu(keep(self.fc1(h))), rate, at(dropout, HIDDEN))
        return add_gated(x, keep(self.fc2(h)), modulation, rate, at(dropout, OUTPUT), way)


class RARTransformer(TappedGenerator):
    """The whole generator; `dropout` is the rate on attention weights, attention output and both MLP outputs."""

    def setup(self):
        positions = self.num_codes + EXTRA_POSITIONS
        self.embeddings = self.param("embeddings", normal, (self.codebook_size + 2 + self.num_classes, self.width))
        self.cls_token = self.param("cls_token", nn.initializers.zeros, (1, 1, self.width))
        self.pos_embed = self.param("pos_embed", normal, (1, positions, self.width))
        self.target_aware_pos_embed = self.param("target_aware_pos_embed", normal, (1, positions, self.width))
        self.timesteps_embeddings = self.param(
            "timesteps_embeddings", normal, (1, self.num_codes + EXTRA_TIMESTEPS, self.width)
        )
        self.blocks = block_of(self)
        self.head_adaln = dense(2 * self.width, self.dtype, kernel_init=nn.initializers.zeros)
        self.lm_head = dense(self.codebook_size, self.dtype, out_dtype=jnp.float32)
        if self.taps:
            self.shallow_projector, self.deep_projector = projectors(self)

    def __call__(
        self,
        codes: Int[Array, "B N"],
        labels: Int[Array, " B"],
        orders: Int[Array, "B N"] | None = None,
        *,
        dropout: Dropout | None = None,
    ) -> Features:
        """Teacher-forced predictions of every code from the (possibly noisy) codes before it.

        Args:
          codes: the context, in the order of generation; code n is read only by predictions of later codes.
          labels: class of each sequence, `num_classes` where it is dropped.
          orders: raster position of the n-th code that each sequence generates (RAR); None = raster order.
          dropout: where elements are dropped; None = nowhere.
        """
        x = jnp.concatenate([self._prefix(labels), self.embeddings[codes]], axis=1)  # [B, N+2, W]
        x += self._orders_vectors(jnp.arange(self.num_codes)[None] if orders is None else orders)
        condition = by_rows(self.conditions(labels, jnp.arange(self.num_codes + 2)))
        x, tapped = run_blocks(self, x, condition, dropout=dropout, taps=self.taps)
        predicting = slice(1, self.num_codes + 1)
        logits = self.head(x[:, predicting], by_rows(self.head_adaln(condition[:, predicting])))
        if not self.taps:
            return Features(logits)
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
        return self.lm_head(layer_norm(x, None, shift, scale))

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
