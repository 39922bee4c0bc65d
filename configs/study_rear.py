"""The ablation of reAR (arXiv 2510.04450) at the quickstart's size: what do noise and codebook embeddings do?

    python -m rear_jax.main --config=configs/study_rear.py --workdir=DIR

One tokenizer and its codes for all; seven objectives, each with three seeds and as many steps: plain AR, noisy context
alone, each embedding term alone, both terms, reAR (noise and both terms), and RAR. Generators learn from one image in
ten, each of which they see 27 times: the paper trains for 400 epochs, and a generator that sees an image a few times
has little to gain from regularisation.

End --config=FILE with :all for ten times as many images and steps: all 12 000 images, each of them 27 times as well,
for AR and reAR. That is 0.6 codes for each parameter in the place of 0.06. reAR-S on ImageNet has 1.6, and it sees ten
crops of each image.

Samples are scored without guidance, and at the best of four scales, found on other samples. Their distance from
reconstructions of held-out images is what the generator alone loses: from real images, most of it is the tokenizer's.
What it gives is in docs/evidence.md.
"""

from ml_collections import ConfigDict

from rear_jax.config.experiments import fashion_mnist
from rear_jax.errors import RearError

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


STUDIES = {  # name -> images (0 = all), steps, variants
    "few": (1200, 1000, tuple(VARIANTS)),
    "all": (0, 10_000, ("ar", "rear")),
}


def get_config(study="few"):
    if study not in STUDIES:
        raise RearError(f"there is no study {study!r}: end --config=FILE with one of :{', :'.join(STUDIES)}.")
    images, steps, names = STUDIES[study]
    config = fashion_mnist()
    config.jobs = ("tokenizer", "tokenize", "study")
    vq = config.tokenizer_training
    vq.loop.update(steps=800, batch_size=32, picture_every=400, checkpoint_every=400)
    vq.optimizer.warmup_steps = 30
    config.train.num_images = images
    config.train.loop.update(steps=steps, log_every=steps // 50, checkpoint_every=500)
    config.sample.stage = "train"
    config.evaluate.update(tokenizer=False, reconstructed_reference=True)
    config.sweep.update(guidance_scale=(1.0, 1.5, 2.0, 3.0), confirm=True)
    config.analyze.diagnostics = ("accuracy",)
    config.analyze.noise_shares = (0.0, 0.1)
    config.study.update(jobs=(), variant_jobs=("train", "sweep", "analyze"), last=10)
    with config.study.unlocked():
        config.study.variants = ConfigDict({name: {"method": VARIANTS[name]} for name in names})
    return config
