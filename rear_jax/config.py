"""Every setting there is, with its default. `configs/*.py` start from `default()` and change what they need.

The result is locked: a key that is not here is an error that names the nearest one that is. Sizes that follow from
one another (codes per image from the image size and the tokenizer, embedding width from the tokenizer) are not
settings; they are derived where they are used.
"""

from ml_collections import ConfigDict

from rear_jax.errors import RearError

FREE = (
    "dtype",
    "remat",
    "unroll",
    "dropout",
    "token_dropout",
)  # settings of a network that its parameters do not depend on


def default() -> ConfigDict:
    """The default experiment: reAR on ImageNet-1k at 256 pixels with the MaskGIT-VQGAN tokenizer."""
    config = ConfigDict()
    config.jobs = ("train",)  # what runs, in turn, when --job is not given
    config.seed = 0
    config.tokenizer_from = (
        ""  # '' = <workdir>/tokenizer; else another such folder, or a published .bin/.pt/.safetensors
    )
    config.codes_from = ""  # '' = <workdir>/codes; else another such folder
    config.init_from = ""  # '' = a generator from nothing; else a converted one, a workdir's, or a published file

    config.data = data = ConfigDict()
    data.source = "tfds"  # see rear_jax/data/images.py: 'fashion_mnist', 'folder', 'tfds', 'arrays'
    data.path = "imagenet2012"  # what the source opens
    data.train_split = "train"
    data.eval_split = "validation"
    data.image_size = 256  # pixels, both sides
    data.num_classes = 1000

    config.tokenizer = maskgit_vqgan()

    config.tokenizer_training = vq = ConfigDict()
    vq.init_from = ""  # '' = from nothing; else a tokenizer to fine-tune: a converted one, a workdir's, or a file
    vq.mse_weight = 1.0
    vq.perceptual_weight = 1.0
    vq.perceptual_network = "lite0"  # EfficientNet-Lite 'lite0' or 'lite2', or 'lpips' (needs config.lpips)
    vq.commitment_weight = 0.25
    vq.codebook_update = "gradient"  # or 'ema'
    vq.codebook_decay = 0.99  # of the EMA sums and of the usage statistics
    vq.revive_below = 0.01  # a code used less than this share of its fair share is re-set; 0 = never
    vq.augmentation = "crop_flip"  # 'none', 'flip' or 'crop_flip'
    vq.discriminator_weight = 0.0  # 0 = no discriminator
    vq.discriminator_start = 0  # first step at which it plays a part
    vq.discriminator_adaptive = True  # scale by the ratio of last-layer gradients (VQGAN)
    vq.discriminator_channels = 64
    vq.discriminator_layers = 3
    vq.loop = loop_settings()
    vq.loop.steps = 300_000
    vq.loop.batch_size = 256
    vq.optimizer = optimizer_settings()
    vq.optimizer.learning_rate = 1e-4
    vq.optimizer.warmup_steps = 5_000
    vq.optimizer.b2 = 0.99
    vq.optimizer.weight_decay = 1e-4

    config.lpips = lpips = ConfigDict()  # files of LPIPS-VGG, for whatever is told to use it
    lpips.vgg16 = ""  # torchvision's VGG16
    lpips.heads = ""  # the lpips package's `weights/v0.1/vgg.pth`

    config.codes = codes = ConfigDict()
    codes.augmentation = "ten_crop"  # 'center', 'flip' or 'ten_crop'
    codes.num_shards = 256
    codes.batch_size = 128  # images encoded at once
    codes.in_memory = False  # load all code files at the start (6.6 GB for ImageNet in ten crops); faster random reads
    codes.on_the_fly = False  # train from images, encoding each batch, instead of from code files

    config.model = rar()

    config.method = method = ConfigDict()
    method.name = "rear"  # 'ar', 'rar' or 'rear'
    method.label_drop = 0.1  # share of labels replaced by the null label
    method.noise_schedule = "annealed"  # see rear_jax/noise.py
    method.noise_rate = 0.5  # the constant of schedules 'uniform' and 'fixed'
    method.embedding_weight = 1.0  # λ
    method.embedding_reading = "released"  # or 'paper': are replaced positions part of the shallow term?
    method.projector = "released"  # or 'paper': three layers with SiLU, or two with GELU
    method.projector_width = 2048
    method.shallow_layer = 0  # 0-based block whose output predicts the current code's embedding
    method.deep_layer = 18  # ... and the next code's
    method.order_anneal_start = 0.5  # 'rar': up to this share of the steps every sequence is in random order,
    method.order_anneal_end = 0.75  # ... from this share on none is

    config.train = train = ConfigDict()
    train.ema_decay = 0.0  # of an exponential moving average of the parameters; 0 = none
    train.accumulation = 1  # microbatches per step
    train.loop = loop_settings()
    train.optimizer = optimizer_settings()

    config.posttrain = post = ConfigDict()  # VA-π (arXiv 2512.19680) on the generator of --job=train or init_from
    post.group = 8  # G, samples per image
    post.noise_rate = 0.0  # ξ, probability that a code of the context is replaced
    post.noise_reading = "paper"  # by a different code, or 'released': by any code
    post.mse_weight = 1.0  # of the reward's parts, images in [-1, 1]
    post.perceptual_weight = 1.0
    post.l1_weight = 0.0
    post.perceptual_network = "lpips"  # as in tokenizer_training
    post.images_at_once = 1  # how many images, each with its G samples, are decoded together
    post.max_advantage = 5.0
    post.clip_range = 0.2
    post.prior_weight = 0.1  # β, of the cross-entropy of the image's own codes
    post.kl_weight = 0.0  # of the divergence from the generator that training started from; 0 = none is kept
    post.inner_updates = 1  # optimiser steps per rollout
    post.accumulation = 1  # microbatches per step
    post.augmentation = "none"  # 'none', 'flip' or 'crop_flip'
    post.loop = loop_settings()
    post.loop.steps = 100
    post.loop.batch_size = 128  # images, each with G samples
    post.loop.log_every = 1
    post.loop.picture_every = 50
    post.loop.checkpoint_every = 50
    post.optimizer = optimizer_settings()
    post.optimizer.learning_rate = 1e-6
    post.optimizer.final_learning_rate = 1e-6
    post.optimizer.warmup_steps = 0
    post.optimizer.b2 = 0.999
    post.optimizer.weight_decay = 1e-4

    config.sample = sample = ConfigDict()
    sample.stage = "train"  # whose generator: that of --job=train, or 'posttrain'
    sample.num_images = 50_000
    sample.batch_size = 128
    sample.guidance = "power_cosine"  # see rear_jax/guidance.py
    sample.guidance_scale = 1.0
    sample.guidance_power = 1.0
    sample.guidance_interval = -1  # last decoding step that is guided, as LlamaGen counts; -1 = all
    sample.captions = ""  # text-conditional generators: an .npz with caption features and mask
    sample.temperature = 1.0
    sample.top_k = 0  # 0 = off
    sample.top_p = 1.0  # 1 = off
    sample.use_ema = False

    config.convert = convert = ConfigDict()
    convert.source = ""  # published checkpoint file, or a folder of checkpoints
    convert.export = ""  # .safetensors file to write with the authors' key names; '' = none
    convert.verify = False  # print a parity report instead of writing anything
    convert.images = 256  # of config.data.eval_split that the report looks at, for tokenizers
    convert.sequences = 256  # of the codes folder that the report looks at, for generators

    config.import_codes = import_codes = ConfigDict()
    import_codes.source = ""  # RAR's .jsonl, LlamaGen's folder of .npy files or AliTok's .npz

    config.evaluate = evaluate = ConfigDict()
    evaluate.network = "lite2"  # EfficientNet-Lite member whose features are compared
    evaluate.feature_size = 224  # pixels, both sides, at which that network looks
    evaluate.batch_size = 64
    evaluate.num_reference = 50_000  # training images that the score is taken against
    evaluate.neighbours = 3  # k of precision and recall
    return config.lock()


def maskgit_vqgan() -> ConfigDict:
    """The tokenizer of MaskGIT, RAR and reAR at its published size."""
    tokenizer = ConfigDict()
    tokenizer.name = "maskgit_vqgan"
    tokenizer.codebook_size = 1024
    tokenizer.z_channels = 256  # width of a codebook vector
    tokenizer.hidden_channels = 128
    tokenizer.channel_mult = (1, 1, 2, 2, 4)  # one entry per resolution; each but the first halves it
    tokenizer.num_res_blocks = 2
    tokenizer.l2_normalize = False  # unit-length codes and latents
    tokenizer.dtype = "float32"
    return tokenizer


def vqgan_plus() -> ConfigDict:
    """The tokenizer VQGAN+ of MaskBit at its published size."""
    tokenizer = ConfigDict()
    tokenizer.name = "vqgan_plus"
    tokenizer.codebook_size = 4096
    tokenizer.z_channels = 64  # width of a codebook vector
    tokenizer.hidden_channels = 128
    tokenizer.channel_mult = (1, 1, 2, 2, 4)  # one entry per resolution; each but the first halves it
    tokenizer.num_res_blocks = 2
    tokenizer.l2_normalize = False  # unit-length codes and latents
    tokenizer.dtype = "float32"
    return tokenizer


def llamagen_vq() -> ConfigDict:
    """The tokenizer VQ-16 of LlamaGen at its published size; VQ-8 differs only in channel_mult = (1, 2, 2, 4)."""
    tokenizer = ConfigDict()
    tokenizer.name = "llamagen_vq"
    tokenizer.codebook_size = 16384
    tokenizer.z_channels = 256  # width between the networks and the codebook
    tokenizer.codebook_dim = 8  # width of a codebook vector
    tokenizer.channels = 128
    tokenizer.channel_mult = (1, 1, 2, 2, 4)  # one entry per resolution; each but the first halves it
    tokenizer.num_res_blocks = 2  # of the encoder's levels; the decoder's have one more
    tokenizer.l2_normalize = True  # unit-length codes and latents
    tokenizer.dtype = "float32"
    return tokenizer


def rar() -> ConfigDict:
    """The RAR family's transformer, at the size of RAR-B and reAR-B."""
    model = ConfigDict()
    model.name = "rar"
    model.width = 768
    model.depth = 24
    model.heads = 16
    model.mlp_width = 3072
    model.dropout = 0.1
    model.dtype = "bfloat16"  # of the matrix products; parameters are float32
    model.remat = False  # recompute activations in the backward pass
    model.unroll = 1  # blocks compiled side by side in the layer scan
    return model


def alitok_generator() -> ConfigDict:
    """AliTok's transformer at the size of AliTok-B."""
    model = ConfigDict()
    model.name = "alitok"
    model.width = 768
    model.depth = 24
    model.heads = 16
    model.mlp_width = 2048
    model.prefix_tokens = 17  # codes before the grid, as many as the tokenizer's
    model.dropout = 0.1  # of attention weights, attention output and feed-forward output
    model.token_dropout = 0.1  # of the input of the first block
    model.target_positions = False  # tell a prediction its position; method 'rar' needs it, published files lack it
    model.dtype = "bfloat16"
    model.remat = False
    model.unroll = 1
    return model


def llamagen() -> ConfigDict:
    """LlamaGen's transformer at the size of GPT-B, class-conditional."""
    model = ConfigDict()
    model.name = "llamagen"
    model.width = 768
    model.depth = 12
    model.heads = 12
    model.mlp_width = 2048
    model.dropout = 0.1  # of attention output and feed-forward output
    model.token_dropout = 0.1  # of the input of the first block
    model.condition = "class"  # or 'text'
    model.caption_length = 120  # positions of a caption
    model.caption_dim = 2048  # width of its features; T5-XL's
    model.dtype = "bfloat16"
    model.remat = False
    model.unroll = 1
    return model


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
    return config.lock()


def loop_settings() -> ConfigDict:
    """How long one training job runs and how often it speaks and saves."""
    loop = ConfigDict()
    loop.steps = 250_000
    loop.batch_size = 2048  # over all devices and microbatches
    loop.log_every = 100
    loop.picture_every = 5_000  # 0 = never
    loop.checkpoint_every = 5_000
    loop.keep_checkpoints = 2
    return loop


def optimizer_settings() -> ConfigDict:
    """AdamW with warm-up and cosine decay; the defaults are reAR's."""
    optimizer = ConfigDict()
    optimizer.learning_rate = 4e-4
    optimizer.final_learning_rate = 1e-5
    optimizer.warmup_steps = 62_500
    optimizer.b1 = 0.9
    optimizer.b2 = 0.96
    optimizer.weight_decay = 0.03
    optimizer.clip_norm = 1.0  # of the global gradient norm; 0 = off
    return optimizer


def refuse_changes(saved: dict, now: ConfigDict, sections: tuple[str, ...], place: str) -> None:
    """Refuses to go on with a checkpoint whose model another config describes.

    Args:
      saved: the whole config as the checkpoint holds it.
      now: the config of this run.
      sections: dotted names of the settings that must agree.
      place: what holds the checkpoint, for the message.

    Raises:
      RearError: some differ; each is named with both values.
    """
    old, new = flatten(saved), flatten(now.to_dict())
    keys = [k for k in sorted(old.keys() | new.keys()) if k.startswith(sections) and k.split(".")[-1] not in FREE]
    differing = [f"{k} (was {old.get(k)!r}, now {new.get(k)!r})" for k in keys if old.get(k) != new.get(k)]
    if differing:
        raise RearError(
            f"{place} belongs to another config: {', '.join(differing)}. Use another --workdir or the old values."
        )


def flatten(config: dict, prefix: str = "") -> dict[str, object]:
    """Nested settings as 'a.b.c' -> value, tuples as lists (as JSON returns them)."""
    flat: dict[str, object] = {}
    for key, value in config.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = list(value) if isinstance(value, tuple) else value
    return flat
