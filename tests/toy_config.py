"""The quickstart's shape at a size that tests can afford."""

from rear_jax.config import default


def get_config():
    config = default()
    config.jobs = ("tokenizer", "tokenize", "train", "sample", "evaluate")
    config.data.source = "fashion_mnist"
    config.data.path = ""
    config.data.train_split = "test"  # the smaller one
    config.data.eval_split = "test"
    config.data.image_size = 32
    config.data.num_classes = 10

    config.tokenizer.codebook_size = 16
    config.tokenizer.z_channels = 4
    config.tokenizer.hidden_channels = 8
    config.tokenizer.channel_mult = (1, 1, 1, 1)
    config.tokenizer.num_res_blocks = 1
    vq = config.tokenizer_training
    vq.augmentation = "flip"
    vq.perceptual_weight = 0.0
    vq.loop.steps = 6
    vq.loop.batch_size = 8
    vq.loop.log_every = 2
    vq.loop.picture_every = 0
    vq.loop.checkpoint_every = 3
    vq.optimizer.warmup_steps = 2

    config.codes.augmentation = "flip"
    config.codes.num_shards = 4
    config.codes.batch_size = 200
    config.codes.in_memory = True

    config.model.width = 16
    config.model.depth = 2
    config.model.heads = 2
    config.model.mlp_width = 32
    config.model.dtype = "float32"
    config.method.projector_width = 16
    config.train.loop.steps = 12
    config.train.loop.batch_size = 8
    config.train.loop.log_every = 3
    config.train.loop.picture_every = 0
    config.train.loop.checkpoint_every = 4
    config.train.optimizer.warmup_steps = 2

    config.sample.num_images = 24
    config.sample.batch_size = 8
    config.sample.guidance_scale = 2.0

    config.evaluate.feature_size = 32
    config.evaluate.num_reference = 60
    return config
