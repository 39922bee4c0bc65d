"""Everything once, on real images, in under five minutes on two CPU cores: Fashion-MNIST at 32 pixels.

    python -m rear_jax.main --config=configs/quickstart.py --workdir=/tmp/quickstart

Trains a tokenizer (8×8 codes of 256), encodes 12 000 images that ship with the package, trains a small reAR on the
codes, post-trains it by VA-π, samples 100 garments of each of the ten classes, and scores them. See README.md for what
to expect.
"""

from rear_jax.config.experiments import fashion_mnist


def get_config():
    return fashion_mnist()
