"""A harder set than the quickstart's, for two CPU cores or one GPU: Freedoom scenes at 64 pixels, 256 codes an image.

    pip install -e '.[freedoom]' && python -m rear_jax.data.freedoom --output=freedoom
    python -m rear_jax.main --config=configs/freedoom.py --workdir=DIR

Trains a tokenizer (16×16 codes of 512), encodes 20 400 scenes and their mirror images, trains a reAR generator of 4.8M
parameters, draws 75 scenes of each of the 68 maps, and scores them. The plain AR beside it, on the same codes:

    python -m rear_jax.main --config=configs/freedoom.py --workdir=DIR_AR --job=train,sample,evaluate \
        --config.method.name=ar --config.tokenizer_from=DIR/tokenizer --config.codes_from=DIR/codes

Not run here to the end: about 6 hours of one core for the two trainings, see docs/freedoom.md.
"""

from rear_jax.config.experiments import freedoom


def get_config():
    return freedoom()
