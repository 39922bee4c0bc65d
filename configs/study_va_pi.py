"""The ablation of VA-π (arXiv 2512.19680) at the quickstart's size: what do reward and prior do, each alone and both?

    python -m rear_jax.main --config=configs/study_va_pi.py --workdir=DIR

One tokenizer, which sees five times as many images as the quickstart's, a reAR generator for each of three seeds, and
four post-trainings of each: at learning rate 0 (the generator as it was, with its rewards watched), reward only, prior
only, both. Samples of each are scored without guidance, as the paper does, and with the quickstart's, and compared with
reconstructions of held-out images too, from which the generator alone is at a distance. Rewards look through
EfficientNet-Lite0, scores through EfficientNet-Lite2. The divergence from the generator before is watched, by a weight
that moves nothing. In the paper (LlamaGen-XXL, FID without guidance): 14.36 before, 38.6 reward only, 14.17 prior only,
7.65 both. What it gives here is in docs/evidence.md.

End --config=FILE with the name of another study. All of these start from generators of 2000 steps, not of 280:

    :long      400 steps of post-training in the place of 64
    :after_ar  400 steps after plain AR in the place of reAR, before and both only
    :prior     64 steps with other weights of the prior (β)
    :noise     64 steps with other shares of noise in the context (ξ)
"""

from ml_collections import ConfigDict

from rear_jax.config.experiments import fashion_mnist
from rear_jax.errors import RearError

STILL = {"learning_rate": 0.0, "final_learning_rate": 0.0}
BEFORE = {"posttrain": {"optimizer": STILL}}
BRIEFLY = {"posttrain": {"optimizer": STILL, "loop": {"steps": 40}}}  # nothing changes: why wait for all 400 steps?
PARTS = {
    "before": BEFORE,
    "reward_only": {"posttrain": {"prior_weight": 0.0}},
    "prior_only": {"posttrain": {"policy_weight": 0.0}},
    "both": {},
}
STUDIES = {  # name -> variants; numbers in their names are in per cent
    "parts": PARTS,
    "long": PARTS | {"before": BRIEFLY},
    "after_ar": {"before": BRIEFLY, "both": {}},
    "prior": {"before": BEFORE}
    | {f"prior_{beta}": {"posttrain": {"prior_weight": beta / 100}} for beta in (1, 10, 100)},
    "noise": {"before": BEFORE} | {f"noise_{xi}": {"posttrain": {"noise_rate": xi / 100}} for xi in (0, 25, 50, 95)},
}
LONG = ("long", "after_ar")


def get_config(study="parts"):
    if study not in STUDIES:
        raise RearError(f"there is no study {study!r}: end --config=FILE with one of :{', :'.join(STUDIES)}.")
    config = fashion_mnist()
    config.jobs = ("tokenizer", "tokenize", "study")
    vq = config.tokenizer_training
    vq.loop.steps = 800
    vq.loop.batch_size = 32
    vq.loop.picture_every = vq.loop.checkpoint_every = 400
    vq.optimizer.warmup_steps = 30
    config.method.name = "ar" if study == "after_ar" else "rear"
    if study != "parts":
        config.train.loop.update(steps=2000, checkpoint_every=500)
    config.posttrain.loop.steps = 400 if study in LONG else 64
    config.posttrain.kl_weight = 1e-6
    config.sweep.guidance_scale = (1.0, 3.0)
    config.evaluate.update(tokenizer=False, reconstructed_reference=True)
    config.study.variant_jobs = ("posttrain", "sweep")
    config.study.last = 10
    with config.study.unlocked():
        config.study.variants = ConfigDict(STUDIES[study])
    return config
