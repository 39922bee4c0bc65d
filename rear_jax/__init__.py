"""Visual autoregressive models whose generator agrees with its tokenizer: reAR and VA-π in JAX."""

__version__ = "0.1.0"
