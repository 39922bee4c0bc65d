"""Post-training: VA-π and the methods it is compared with, one file each.

A method is a module with

  TRAINS                          which network the state holds: 'generator' or 'decoder', that of the tokenizer;
  check(config)                   raises RearError where its settings cannot work;
  make_step(networks, config, optimizer)
                                  step(state, batch, key, frozen) -> (state, metrics) for the training loop;
  draw_samples(networks, config, params, frozen, batch, key)
                                  codes [B, G, N] that the generator with `params` draws for a batch, to look at.

A batch holds 'image' [B, H, W, 3] uint8, 'label' [B], 'condition' (labels or captions, as the generator takes them) and
'index' [B], where in the data set each image is. `frozen` holds parameters by name, see `parts.Networks`.
"""

from rear_jax.training.posttraining import ar_grpo, decoder, ste, va_pi

METHODS = {"va_pi": va_pi, "ste": ste, "tokenizer": decoder, "ar_grpo": ar_grpo}
