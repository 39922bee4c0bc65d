"""Whole experiments that several files in configs/ start from."""

from ml_collections import ConfigDict

from rear_jax.config import default, llamagen, llamagen_vq, titok
from rear_jax.errors import RearError


def fashion_mnist() -> ConfigDict:
    """The quickstart: everything at a size that two CPU cores train in minutes, on the embedded images."""
    config = default()
    config.jobs = ("tokenizer", "tokenize", "train", "posttrain", "sample", "evaluate")

    config.data.source = "fashion_mnist"
    config.data.path = ""  # the embedded subset
    config.data.eval_split = "test"
    config.data.image_size = 32
    config.data.num_classes = 10

    config.tokenizer.codebook_size = 256
    config.tokenizer.z_channels = 16
    config.tokenizer.hidden_channels = 16
    config.tokenizer.channel_mult = (1, 2, 2)
    config.tokenizer.num_res_blocks = 1

    vq = config.tokenizer_training
    vq.mse_weight = 4.0
    vq.perceptual_weight = 0.1
    vq.codebook_update = "ema"
    vq.codebook_decay = 0.9
    vq.revive_below = 0.05
    vq.augmentation = "flip"
    vq.loop.steps = 640
    vq.loop.batch_size = 8  # of the same images, many small steps teach a small network more than few large ones
    vq.loop.log_every = 40
    vq.loop.picture_every = 640
    vq.loop.checkpoint_every = 320
    vq.optimizer.learning_rate = 2e-3
    vq.optimizer.warmup_steps = 100

    config.codes.augmentation = "center"
    config.codes.num_shards = 8
    config.codes.in_memory = True

    config.model.width = 128
    config.model.depth = 3
    config.model.heads = 4
    config.model.mlp_width = 512
    config.model.dropout = 0.0
    config.model.dtype = "float32"
    config.model.unroll = 3
    config.method.projector_width = 128

    config.train.loop.steps = 280
    config.train.loop.batch_size = 32
    config.train.loop.log_every = 10
    config.train.loop.picture_every = 0
    config.train.loop.checkpoint_every = 140
    config.train.optimizer.learning_rate = 3e-3
    config.train.optimizer.warmup_steps = 40

    post = config.posttrain
    post.perceptual_network = "lite0"
    post.images_at_once = 8
    post.loop.steps = 40
    post.loop.batch_size = 32
    post.loop.log_every = 4
    post.loop.picture_every = 0
    post.loop.checkpoint_every = 40
    post.optimizer.learning_rate = 3e-4
    post.optimizer.final_learning_rate = 1e-5

    config.sample.stage = "posttrain"
    config.sample.num_images = 1000
    config.sample.batch_size = 100
    config.sample.guidance_scale = 3.0
    config.sample.guidance_power = 1.0

    config.evaluate.feature_size = 64
    config.evaluate.num_reference = 1000
    return config


def fashion_mnist_sequence() -> ConfigDict:
    """The quickstart without post-training, for tokenizers that are vision transformers: what both kinds share."""
    config = fashion_mnist()
    config.jobs = ("tokenizer", "tokenize", "train", "sample", "evaluate")
    config.sample.stage = "train"

    config.tokenizer_training.optimizer.learning_rate = 1e-3
    return config


def llamagen_imagenet(image_size: int) -> ConfigDict:
    """LlamaGen's experiment on ImageNet-1k with its own tokenizer, at the size of GPT-B; its configs start from it."""
    config = default()
    config.data.image_size = image_size
    config.tokenizer = llamagen_vq()
    config.model = llamagen()
    config.method.name = "ar"
    config.train.loop.batch_size = 256
    config.train.loop.steps = 300 * 5_004  # 300 epochs of whole batches
    optimizer = config.train.optimizer
    optimizer.learning_rate = optimizer.final_learning_rate = 1e-4  # constant
    optimizer.warmup_steps = 0
    optimizer.b2 = 0.95
    optimizer.weight_decay = 0.05
    config.sample.guidance = "constant"
    config.sample.image_size = 256 if image_size > 256 else 0  # its FIDs were taken at 256
    return config.lock()


def titok_imagenet(stage: str) -> ConfigDict:
    """TiTok's experiment on ImageNet-1k, stage '1' or '2' of its training, at size B-64; its configs start from it.

    Raises:
      RearError: there is no such stage.
    """
    if stage not in ("1", "2"):
        raise RearError(f"TiTok is trained in stages 1 and 2, not {stage!r}: end --config=FILE with :1 or :2.")
    config = default()
    config.jobs = ("tokenizer",)
    config.tokenizer = titok()
    config.tokenizer.dtype = "bfloat16"
    vq = config.tokenizer_training
    vq.objective, vq.trained = ("codes", "all") if stage == "1" else ("pixels", "decoder")
    vq.mse_weight = 1.0
    vq.perceptual_weight = 0.1
    vq.perceptual_network = "lite2"
    vq.commitment_weight = 0.25 if stage == "1" else 0.0
    vq.revive_below = 0.0
    vq.discriminator_weight = 0.0 if stage == "1" else 0.01
    vq.discriminator_start = 20_000
    vq.discriminator_adaptive = False
    vq.discriminator_channels = 128
    vq.loop.steps = 1_000_000 if stage == "1" else 500_000
    vq.loop.batch_size = 256
    vq.optimizer.learning_rate = 1e-4
    vq.optimizer.final_learning_rate = 1e-5
    vq.optimizer.warmup_steps = 10_000 if stage == "1" else 5_000
    vq.optimizer.b1 = 0.9
    vq.optimizer.b2 = 0.99 if stage == "1" else 0.999
    vq.optimizer.weight_decay = 1e-4
    return config.lock()
