"""Scaling (arXiv 2510.04450, figure 1): what do width and steps give to AR and to reAR?

    python -m rear_jax.main --config=configs/study_scaling.py --workdir=DIR

One tokenizer and its codes for all, at the quickstart's size. Generators of width 64, 128 and 256 are trained as AR and
as reAR, each with two seeds. Every 200 steps a generator is scored by 1000 samples without guidance. The curves are in
study_distances.png: a colour for each network, solid for reAR, dashed for AR. The last scores are in study.md.

Most of the distance from training images is the tokenizer's blur; that from reconstructions is the generator's own.
Generators learn from all 12 000 images. A few images they learn by heart, and samples that repeat them score well, so
that width would say little. What it gives is in docs/evidence.md.

End --config=FILE with :imagenet for the networks and the recipe of configs/rear_s.py, rear_b.py and rear_l.py on
ImageNet-1k at 256 pixels, scored every 20 epochs of 400. The tokenizer is given, as in these files, by
--config.tokenizer_from=maskgit-vqgan-imagenet-f16-256.bin; --job=plan plans the largest network. Not run here.
"""

from ml_collections import ConfigDict

from rear_jax.config import default
from rear_jax.config.experiments import fashion_mnist
from rear_jax.errors import RearError

SMALL = [{"depth": 3, "width": width, "mlp_width": 4 * width, "heads": width // 32} for width in (64, 128, 256)]
PAPER = [  # reAR-S, -B and -L
    {"depth": 20, "width": 768, "mlp_width": 3072},
    {"depth": 24, "width": 768, "mlp_width": 3072},
    {"depth": 24, "width": 1024, "mlp_width": 4096},
]
METHODS = {"ar": {"method": {"name": "ar"}}, "rear": {}}


def small() -> ConfigDict:
    """Fashion-MNIST: 38 minutes of one CPU core for each seed, and the tokenizer."""
    config = fashion_mnist()
    config.jobs = ("tokenizer", "tokenize", "study")
    vq = config.tokenizer_training
    vq.loop.update(steps=800, batch_size=32, picture_every=400, checkpoint_every=400)
    vq.optimizer.warmup_steps = 30
    config.train.evaluate_every = 200
    config.train.loop.update(steps=1600, log_every=40, checkpoint_every=400)
    return config


def imagenet() -> ConfigDict:
    """ImageNet-1k at the paper's sizes; an epoch is 625 steps."""
    config = default()
    config.jobs = ("tokenize", "study")
    config.train.update(evaluate_every=12_500, evaluate_images=5_000)
    config.sample.num_images = 50_000
    config.plan.programs = ("train", "sample")
    return config


SIZES = {"small": (small, SMALL), "imagenet": (imagenet, PAPER)}


def get_config(size="small"):
    if size not in SIZES:
        raise RearError(f"there is no size {size!r}: end --config=FILE with one of :{', :'.join(SIZES)}.")
    make, networks = SIZES[size]
    config = make()
    config.model.update(networks[-1])
    config.sample.update(stage="train", guidance_scale=1.0)
    config.evaluate.update(tokenizer=False, reconstructed_reference=True)
    config.study.update(seeds=(0, 1), jobs=(), variant_jobs=("train", "sample", "evaluate"), last=10)
    with config.study.unlocked():
        config.study.variants = ConfigDict(
            {
                f"{method}_{model['depth']}x{model['width']}": {"model": model} | changes
                for model in networks
                for method, changes in METHODS.items()
            }
        )
    return config
