"""AR and reAR on a harder set than garments: Freedoom scenes at 64 pixels, 256 codes an image, two seeds of each.

    pip install -e '.[freedoom]' && python -m rear_jax.data.freedoom --output=freedoom
    python -m rear_jax.main --config=configs/study_freedoom.py --workdir=DIR

One tokenizer and its codes for all. Generators of 1.8M parameters learn from 2040 scenes, 30 of each map, and their
mirror images: 0.6 codes for each parameter, where reAR-S has 1.6 on ImageNet. They see each scene 20 times.

Samples are scored without guidance, and at the best of five scales, found on other samples. Their distance from
reconstructions of held-out images is what the generator alone loses. What it gives is in docs/evidence.md.
"""

from ml_collections import ConfigDict

from rear_jax.config.experiments import freedoom


def get_config():
    config = freedoom()
    config.jobs = ("tokenizer", "tokenize", "study")
    config.tokenizer_training.loop.update(steps=2500, checkpoint_every=500)
    config.model.update(width=128, depth=4, heads=4, mlp_width=512)
    config.method.projector_width = 128
    config.train.num_images = 2040
    config.train.loop.update(steps=2500, log_every=50, checkpoint_every=500)
    config.train.optimizer.update(learning_rate=2e-3)
    config.sample.update(stage="train", num_images=2040)
    config.evaluate.update(tokenizer=False, reconstructed_reference=True)
    config.sweep.update(guidance_scale=(1.0, 1.5, 2.0, 3.0, 5.0), confirm=True)
    config.analyze.diagnostics = ("accuracy",)
    config.analyze.noise_shares = (0.0, 0.1)
    config.study.update(seeds=(0, 1), jobs=(), variant_jobs=("train", "sweep", "analyze"), last=10)
    with config.study.unlocked():
        config.study.variants = ConfigDict({"ar": {"method": {"name": "ar"}}, "rear": {}})
    return config
