"""Sampling of code sequences from any generator: one compiled program, prefill and scan over an explicit cache."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray
from ml_collections import ConfigDict

from rear_jax import guidance, losses
from rear_jax.errors import RearError
from rear_jax.generators import CachedGenerator, family_of
from rear_jax.runtime.sharding import gathered


@dataclasses.dataclass(frozen=True)
class Sampler:
    """How codes are drawn; hashable, so that it can be a static argument.

    Attributes:
      guidance: name of the schedule in `guidance.SCHEDULES`.
      guidance_scale: full strength; `CachedGenerator.guides` says which scales switch guidance off.
      guidance_power: exponent of the power-cosine schedule.
      guidance_interval: last decoding step that is guided, as `guidance.guidance_weight` counts; -1 guides all.
      temperature: divides guided logits; 0 takes the most probable code.
      top_k: keep the k most probable codes; 0 keeps all.
      top_p: keep the most probable codes up to this probability; 1 keeps all.
    """

    guidance: str = "power_cosine"
    guidance_scale: float = 1.0
    guidance_power: float = 1.0
    guidance_interval: int = -1
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0


def sampler_of(settings: ConfigDict) -> Sampler:
    """The sampler that `config.sample` describes; raises RearError where the guidance schedule is unknown."""
    if settings.guidance not in guidance.SCHEDULES:
        raise RearError(f"config.sample.guidance = {settings.guidance!r}: use one of {', '.join(guidance.SCHEDULES)}.")
    return Sampler(**{field.name: settings[field.name] for field in dataclasses.fields(Sampler)})


class Given(NamedTuple):
    """Codes that are known beforehand.

    Attributes:
      codes: [B, N].
      mask: [B, N] bool, True where the code is taken from `codes` and not drawn.
    """

    codes: Int[Array, "B N"]
    mask: Bool[Array, "B N"]


class Decoded(NamedTuple):
    """What decoding gives.

    Attributes:
      codes: [B, N] int32.
      logits: [B, N, K] float32, the guided logits that each code was drawn from, or None.
      surprise: [B, N] float32, the negative log-likelihood of each code of `Given` under these logits, or None.
    """

    codes: Int[Array, "B N"]
    logits: Float[Array, "B N K"] | None = None
    surprise: Float[Array, "B N"] | None = None


def generate(
    cached: CachedGenerator,
    params: Any,
    conditions: Any,
    rows: Int[Array, " B"],
    keys: PRNGKeyArray,
    sampler: Sampler,
    *,
    segments: int = 4,
    return_logits: bool = False,
) -> Any:
    """Draws one code sequence per row.

    Arguments are those of `decode`. Returns codes [B, N] int32, or with `return_logits` (codes, logits [B, N, K]).
    """
    decoded = decode(cached, params, conditions, rows, keys, sampler, segments=segments, return_logits=return_logits)
    return (decoded.codes, decoded.logits) if return_logits else decoded.codes


def decode(
    cached: CachedGenerator,
    params: Any,
    conditions: Any,
    rows: Int[Array, " B"],
    keys: PRNGKeyArray,
    sampler: Sampler,
    *,
    given: Given | None = None,
    segments: int = 4,
    return_logits: bool = False,
) -> Decoded:
    """Draws one code sequence per row, or takes some of its codes as given.

    The draw of code n of a sequence uses `fold_in(its key, n)` and nothing of its neighbours, so a sequence does not
    depend on the batch it is in. Nor do the random numbers of a draw depend on what is given elsewhere.

    Args:
      cached: the generator's cached form.
      params: its parameters.
      conditions: the distinct conditions of the batch (repeats allowed), labels [U] or a tree of arrays that lead with
        U: what depends on the condition alone is computed once each.
      rows: index into `conditions` for each sequence.
      keys: one random key per sequence.
      sampler: guidance and filters.
      given: codes that take the place of draws; None draws all of them.
      segments: into how many stretches the scan is cut; each attends over no more of the cache than it can need.
      return_logits: also return the guided logits that each code was drawn from.
    """
    weights = prepare(cached, params)
    guided = _guided_codes(cached, sampler)
    decoding = new_decoding(
        cached, weights, conditions, rows, keys, sampler, guided=guided > 0, given=given, return_logits=return_logits
    )
    carry, output = decoding.begin(cached.prefix_length)
    outputs = [output]
    for start, stop in segment_bounds(cached.num_codes, segments, cut=guided):
        if start >= guided:  # from here on the unconditional half is not asked
            decoding, carry = decoding.without_guidance(carry)
        carry = Carry(carry.codes, cached.grow_cache(carry.cache, cached.prefix_length + stop - 1))
        carry, output = decoding.go_on(carry, jnp.arange(start, stop))
        outputs.append(output)
    return jax.tree.map(lambda *parts: jnp.concatenate(parts, axis=1), *outputs)


def prepare(cached: CachedGenerator, params: Any) -> Any:
    """Inside a program: parameters as decoding reads them, whole on every device but for what 'tensor' divides."""
    return gathered(cached.prepare(params), family_of(cached.model).parameters)


class Carry(NamedTuple):
    """What one stretch of decoding hands to the next.

    Attributes:
      codes: [B], the last ones.
      cache: of the generator, for B sequences, or with the unconditional ones for 2B.
    """

    codes: Int[Array, " B"]
    cache: Any


@dataclasses.dataclass(frozen=True)
class Decoding:
    """The decoding of one batch, inside a program, in stretches as long as the caller wants; see `new_decoding`.

    Attributes:
      rows: [B], or [2B] with the unconditional half.
      cached, weights, conditions, keys, sampler, given, return_logits: see `decode` and `prepare`.
    """

    cached: CachedGenerator
    weights: Any
    conditions: Any
    rows: Int[Array, " B"] | Int[Array, " 2B"]
    keys: PRNGKeyArray
    sampler: Sampler
    given: Given | None
    return_logits: bool

    def begin(self, length: int) -> tuple[Carry, Decoded]:
        """Reads the prefix into a cache with room for `length` positions, and draws code 0: arrays [B, 1, ...]."""
        cache = self.cached.new_cache(self.rows.shape[0], length)
        logits, cache = self.cached.prefill(self.weights, self.conditions, self.rows, cache)
        codes, output = self._draw(logits, jnp.int32(0))
        return Carry(codes, cache), jax.tree.map(lambda leaf: leaf[:, None], output)

    def go_on(self, carry: Carry, numbers: Int[Array, " C"]) -> tuple[Carry, Decoded]:
        """Draws the codes with these numbers, which follow on what was drawn: arrays [B, C, ...].

        The cache must have room for position `prefix_length` + the last number - 1.
        """
        positions = self.cached.prefix_length + numbers - 1
        conditioning = self.cached.condition(self.weights, self.conditions, positions)
        carry, outputs = jax.lax.scan(self._step, carry, (numbers, conditioning))
        return carry, jax.tree.map(lambda leaf: leaf.swapaxes(0, 1), outputs)

    def without_guidance(self, carry: Carry) -> tuple["Decoding", Carry]:
        """The same for the conditional half alone."""
        batch = self.keys.shape[0]
        halved = dataclasses.replace(self, rows=self.rows[:batch])
        return halved, Carry(carry.codes, jax.tree.map(lambda leaf: leaf[:batch], carry.cache))

    def _step(self, carry: Carry, inputs: Any) -> tuple[Carry, Decoded]:
        """Reads code n - 1, draws code n."""
        n, conditioning = inputs
        read = jnp.concatenate([carry.codes] * (self.rows.shape[0] // self.keys.shape[0]))
        position = self.cached.prefix_length + n - 1
        logits, cache = self.cached.step(self.weights, conditioning, self.rows, read, position, carry.cache)
        codes, output = self._draw(logits, n)
        return Carry(codes, cache), output

    def _draw(self, logits: jax.Array, n: jax.Array) -> tuple[jax.Array, Decoded]:
        """Logits of the conditional half, or of both -> (code n of each sequence, what else is wanted of it)."""
        sampler, given = self.sampler, self.given
        if logits.shape[0] > self.keys.shape[0]:
            logits = _guide(sampler, logits, n, self.cached.num_codes)
        step_keys = jax.vmap(jax.random.fold_in, (0, None))(self.keys, n)
        codes = guidance.draw(
            step_keys, logits, temperature=sampler.temperature, top_k=sampler.top_k, top_p=sampler.top_p
        )
        surprise = None
        if given is not None:
            surprise = losses.next_code_cross_entropy(logits, given.codes[:, n])
            codes = jnp.where(given.mask[:, n], given.codes[:, n], codes)
        return codes, Decoded(codes, logits if self.return_logits else None, surprise)


def new_decoding(
    cached: CachedGenerator,
    weights: Any,
    conditions: Any,
    rows: Int[Array, " B"],
    keys: PRNGKeyArray,
    sampler: Sampler,
    *,
    guided: bool,
    given: Given | None = None,
    return_logits: bool = False,
) -> Decoding:
    """The decoding of a batch; arguments are those of `decode` but for two.

    Args:
      weights: from `prepare`.
      guided: whether the unconditional half is decoded as well.

    The numbers of `sampler` may be traced arguments of the program.
    """
    if guided:
        conditions, rows = cached.with_unconditional(weights, conditions, rows)
    return Decoding(cached, weights, conditions, rows, keys, sampler, given, return_logits)


def _guide(sampler: Sampler, logits: Float[Array, "2B K"], n: jax.Array, num_codes: int) -> Float[Array, "B K"]:
    """The guided logits of code n, from those of the conditional half and then of the unconditional one."""
    weight = guidance.guidance_weight(
        sampler.guidance,
        sampler.guidance_scale,
        n,
        num_codes,
        power=sampler.guidance_power,
        interval=sampler.guidance_interval,
    )
    return guidance.guide(*jnp.split(logits, 2), weight)


def _guided_codes(cached: CachedGenerator, sampler: Sampler) -> int:
    """How many codes of a sequence are guided; the others need the conditional model alone."""
    if not cached.guides(sampler.guidance_scale):
        return 0
    last = sampler.guidance_interval + 1  # code n is drawn in step n - 1
    return cached.num_codes if sampler.guidance_interval < 0 else min(cached.num_codes, last + 1)


def segment_bounds(num_codes: int, segments: int, *, cut: int = 0) -> list[tuple[int, int]]:
    """Cuts codes 1 .. N-1 (code 0 comes from the prefill) into at most `segments` stretches [start, stop).

    One more where `cut` lies inside a stretch: it begins one.
    """
    size = -(-num_codes // segments)
    starts = sorted({1, *range(size, num_codes, size), *([cut] if 1 < cut < num_codes else [])})
    stops = [*starts[1:], num_codes]
    return [(a, b) for a, b in zip(starts, stops, strict=True) if a < b]
