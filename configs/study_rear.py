"""The ablation of reAR (arXiv 2510.04450) at the quickstart's size: what do noise and codebook embeddings do?

    python -m rear_jax.main --config=configs/study_rear.py --workdir=DIR

One tokenizer and its codes for all; seven objectives, each with three seeds and as many steps: plain AR, noisy context
alone, each embedding term alone, both terms, reAR (noise and both terms), and RAR. Generators learn from one image in
ten, each of which they see 27 times: the paper trains for 400 epochs, and a generator that sees an image a few times
has little to gain from regularisation. --config.train.num_images=0 takes all images, 2.7 times each.

Samples are scored without guidance, and at the best of four scales, found on other samples. Their distance from
reconstructions of held-out images is what the generator alone loses: from real images, most of it is the tokenizer's.
Not run to its end here yet.
"""

from ml_collections import ConfigDict

from rear_jax.config.experiments import fashion_mnist

CLEAN = {"noise_schedule": "none"}
VARIANTS = {
    "ar": {"name": "ar"},
    "noise": {"embedding_weight": 0.0},
    "shallow_embedding": CLEAN | {"embedding_terms": "shallow"},
    "deep_embedding": CLEAN | {"embedding_terms": "deep"},
    "both_embeddings": CLEAN,
    "rear": {},
    "rar": {"name": "rar"},
}


def get_config():
    config = fashion_mnist()
    config.jobs = ("tokenizer", "tokenize", "study")
    vq = config.tokenizer_training
    vq.loop.update(steps=800, batch_size=32, picture_every=400, checkpoint_every=400)
    vq.optimizer.warmup_steps = 30
    config.train.num_images = 1200
    config.train.loop.update(steps=1000, log_every=20, checkpoint_every=500)
    config.sample.stage = "train"
    config.evaluate.update(tokenizer=False, reconstructed_reference=True)
    config.sweep.update(guidance_scale=(1.0, 1.5, 2.0, 3.0), confirm=True)
    config.analyze.diagnostics = ("accuracy",)
    config.analyze.noise_shares = (0.0, 0.1)
    config.study.update(jobs=(), variant_jobs=("train", "sweep", "analyze"), last=10)
    with config.study.unlocked():
        config.study.variants = ConfigDict({name: {"method": method} for name, method in VARIANTS.items()})
    return config
