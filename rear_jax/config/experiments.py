"""Whole experiments that several files in configs/ start from."""

from ml_collections import ConfigDict

from rear_jax.config import default, janus, llamagen, llamagen_vq, titok
from rear_jax.errors import RearError


def fashion_mnist() -> ConfigDict:
    """The quickstart: all steps from images to scores on the embedded Fashion-MNIST, in minutes on two CPU cores."""
    config = default()
    config.jobs = ("tokenizer", "tokenize", "train", "posttrain", "sample", "evaluate")

    config.data.update(source="fashion_mnist", path="", eval_split="test", image_size=32, num_classes=10)  # embedded
    _small_tokenizer(config, codebook_size=256, hidden_channels=16, codebook_decay=0.9)
    vq = config.tokenizer_training
    # small batches, because this small network learns more from many small steps
    vq.loop.update(steps=640, batch_size=8, log_every=40, picture_every=640, checkpoint_every=320)
    vq.optimizer.update(learning_rate=2e-3, warmup_steps=100)
    config.codes.update(augmentation="center", num_shards=8, in_memory=True)

    config.model.update(width=128, depth=3, heads=4, mlp_width=512, dropout=0.0, dtype="float32", unroll=3)
    config.method.projector_width = 128
    config.train.loop.update(steps=280, batch_size=32, log_every=10, picture_every=0, checkpoint_every=140)
    config.train.optimizer.update(learning_rate=3e-3, warmup_steps=40)

    post = config.posttrain
    post.update(perceptual_network="lite0", images_at_once=8)
    post.clip_images = True  # most of an image is black, and a decoder that is a little below it makes no difference
    post.loop.update(steps=40, batch_size=32, log_every=4, picture_every=0, checkpoint_every=40)
    post.optimizer.update(learning_rate=3e-4, final_learning_rate=1e-5)

    config.sample.update(stage="posttrain", num_images=1000, batch_size=100, guidance_scale=3.0, guidance_power=1.0)
    config.evaluate.update(feature_size=64, num_reference=1000)
    return config


def fashion_captions() -> ConfigDict:
    """The quickstart from text: Fashion-MNIST with captions, a LlamaGen that takes them, VA-π, prompts and scores."""
    config = fashion_mnist()
    config.jobs = ("tokenizer", "tokenize", "caption", "train", "posttrain", "sample", "evaluate")
    config.data.source = "fashion_captions"
    config.text.update(encoder="random", dtype="float32")
    config.unlock()
    config.model = llamagen()
    config.model.update(width=128, depth=3, heads=4, mlp_width=344, dropout=0.0, token_dropout=0.0, dtype="float32")
    config.model.update(unroll=3, condition="text", caption_length=16, caption_dim=64)
    config.method.name = "ar"
    config.train.loop.steps = 800
    config.sample.update(images_per_prompt=1, guidance="constant", guidance_scale=3.0)
    return config.lock()


def fashion_mnist_sequence() -> ConfigDict:
    """The quickstart without post-training, for tokenizers that are vision transformers (TiTok and AliTok)."""
    config = fashion_mnist()
    config.jobs = ("tokenizer", "tokenize", "train", "sample", "evaluate")
    config.sample.stage = "train"
    config.tokenizer_training.optimizer.learning_rate = 1e-3
    return config


def freedoom() -> ConfigDict:
    """Freedoom scenes at 64 pixels, from rear_jax/data/freedoom.py: hours on two CPU cores, minutes on a GPU."""
    config = default()
    config.jobs = ("tokenizer", "tokenize", "train", "sample", "evaluate")

    config.data.update(source="arrays", path="freedoom/freedoom.npz", eval_split="test", image_size=64, num_classes=68)
    _small_tokenizer(config, codebook_size=512, hidden_channels=32, codebook_decay=0.99)
    vq = config.tokenizer_training
    vq.loop.update(steps=6000, batch_size=8, log_every=50, picture_every=500, checkpoint_every=250)
    vq.optimizer.update(learning_rate=1e-3, warmup_steps=100)
    config.codes.update(augmentation="flip", num_shards=8, in_memory=True)

    config.model.update(width=192, depth=6, heads=6, mlp_width=768, dropout=0.0, dtype="float32")
    config.method.projector_width = 192
    config.train.loop.update(steps=4000, batch_size=16, log_every=20, picture_every=500, checkpoint_every=250)
    config.train.optimizer.update(learning_rate=1e-3, warmup_steps=200)

    config.sample.update(num_images=5100, batch_size=100)  # 75 of each map, as many as are held out
    config.evaluate.update(feature_size=128, num_reference=5100)
    return config


def llamagen_imagenet(image_size: int) -> ConfigDict:
    """LlamaGen on ImageNet-1k with its own tokenizer, at the size of GPT-B and `image_size` pixels along each side."""
    config = default()
    config.data.image_size = image_size
    config.tokenizer = llamagen_vq()
    config.model = llamagen()
    config.method.name = "ar"
    config.train.loop.update(steps=300 * 5_004, batch_size=256)  # 300 epochs of 5004 whole batches
    optimizer = config.train.optimizer
    optimizer.update(learning_rate=1e-4, final_learning_rate=1e-4, warmup_steps=0, b2=0.95, weight_decay=0.05)
    config.sample.guidance = "constant"
    config.sample.image_size = 256 if image_size > 256 else 0  # pixels of the published FIDs
    return config.lock()


def llamagen_t2i(image_size: int) -> ConfigDict:
    """LlamaGen-XL from captions (arXiv 2406.06525), on images and captions in .tar shards of the user's.

    Trained as released: AdamW at a constant rate, batches of 256, dropout, and one caption in ten dropped.
    """
    config = llamagen_imagenet(image_size)
    config.data.update(source="webdataset", path="pairs", eval_split="test")
    config.codes.augmentation = "center"
    config.model.update(condition="text", width=1280, depth=36, heads=20, mlp_width=3584)
    config.text.update(depth=24, heads=32, head_size=64, mlp_width=5120, vocabulary_size=32128)  # flan-T5-XL, for plans
    config.sample.update(image_size=0, guidance_scale=7.5, top_k=1000, num_images=1000)
    return config.lock()


def janus_pro() -> ConfigDict:
    """Janus-Pro-1B (arXiv 2501.17811) at 384 pixels, on images and captions in .parquet files of the user's."""
    config = default()
    config.data.update(source="parquet", path="pairs", eval_split="test", image_size=384, num_classes=1)
    config.data.caption_key = "caption_original"
    config.tokenizer = llamagen_vq()
    config.model = janus()
    config.method.name = "ar"
    config.codes.augmentation = "center"
    config.sample.update(guidance="constant", guidance_scale=5.0, num_images=1000)
    return config.lock()


def titok_imagenet(stage: str) -> ConfigDict:
    """TiTok on ImageNet-1k at size B-64, in stage '1' or '2' of its training.

    Raises RearError: `stage` is neither '1' nor '2'.
    """
    if stage not in ("1", "2"):
        raise RearError(f"TiTok is trained in stages 1 and 2, not {stage!r}: end --config=FILE with :1 or :2.")
    config = default()
    config.jobs = ("tokenizer",)
    config.tokenizer = titok()
    config.tokenizer.dtype = "bfloat16"
    vq = config.tokenizer_training
    vq.objective, vq.trained = ("codes", "all") if stage == "1" else ("pixels", "decoder")
    vq.update(mse_weight=1.0, perceptual_weight=0.1, perceptual_network="lite2", revive_below=0.0)
    vq.augmentation = "window_flip"
    vq.commitment_weight = 0.25 if stage == "1" else 0.0
    vq.discriminator_weight = 0.0 if stage == "1" else 0.01
    vq.update(discriminator_start=20_000, discriminator_adaptive=False, discriminator_channels=128)
    vq.loop.update(steps=1_000_000 if stage == "1" else 500_000, batch_size=256)
    vq.optimizer.update(learning_rate=1e-4, final_learning_rate=1e-5, weight_decay=1e-4, b1=0.9)
    vq.optimizer.update(warmup_steps=10_000 if stage == "1" else 5_000, b2=0.99 if stage == "1" else 0.999)
    return config.lock()


def _small_tokenizer(config: ConfigDict, *, codebook_size: int, hidden_channels: int, codebook_decay: float) -> None:
    """Sets a tokenizer of a quarter of the pixels along each side that a CPU can train, and how it learns."""
    config.tokenizer.update(codebook_size=codebook_size, z_channels=16, hidden_channels=hidden_channels)
    config.tokenizer.update(channel_mult=(1, 2, 2), num_res_blocks=1)
    vq = config.tokenizer_training
    vq.update(mse_weight=4.0, perceptual_weight=0.1, augmentation="flip")
    vq.update(codebook_update="ema", codebook_decay=codebook_decay, revive_below=0.05)
