"""Text to image with nothing to bring, in minutes on two CPU cores: Fashion-MNIST with captions, at 32 pixels.

    python -m rear_jax.main --config=configs/fashion_t2i.py --workdir=DIR

The captions say the kind of garment, and whether it is bright or dark and wide or narrow among its kind
(rear_jax/data/fashion_captions.py). The command trains a tokenizer, makes a small text encoder with random weights,
encodes images and captions, trains a LlamaGen on both, post-trains it by VA-π, draws an image for each of 1000 captions
of held-out images, and scores how many images are what their prompts say. A prompt of your own afterwards:

    python -m rear_jax.main --config=configs/fashion_t2i.py --workdir=DIR --job=sample \
        --config.sample.prompt="a bright, wide bag" --config.sample.images_per_prompt=12
"""

from rear_jax.config.experiments import fashion_captions


def get_config():
    return fashion_captions()
