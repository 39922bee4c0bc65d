"""Every setting there is, with its default. `configs/*.py` start from `default()` and change what they need.

The result is locked: a key that is not here is an error that names the nearest one that is. Sizes that follow from
one another (codes per image from the image size and the tokenizer, embedding width from the tokenizer) are not
settings; they are derived where they are used.
"""

from ml_collections import ConfigDict

from rear_jax.errors import RearError

FREE = (
    "dtype",
    "attention",
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

    config.mesh = mesh = ConfigDict()  # devices along each axis; one may be -1, the rest
    mesh.data = -1  # batches are divided
    mesh.fsdp = 1  # batches, parameters and optimiser state are divided; each block's parameters gathered when it runs
    mesh.tensor = 1  # heads, hidden features and vocabulary are divided; it must divide a process's devices

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
    vq.init_parts = "all"  # or 'codes': of init_from take encoder and codebook alone; the decoder starts afresh
    vq.trained = "all"  # or 'decoder': encoder and codebook stay as init_from has them
    vq.objective = "pixels"  # or 'codes': those that `proxy` gives the image, predicted by a TiTok
    vq.proxy = ""  # that tokenizer, a MaskGIT-VQGAN: a converted one, a workdir's, or a published file
    vq.mse_weight = 1.0  # these two and the discriminator: of the objective 'pixels' alone
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
    codes.batch_size = 32  # views that a device encodes at once
    codes.in_memory = False  # load all code files at the start (6.6 GB for ImageNet in ten crops); faster random reads
    codes.max_corrupt_share = 0.001  # of the records may be damaged: others take their place; 0 = the first one ends it
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
    method.deep_layer = -1  # ... and the next code's; -1 = at three quarters of the depth, as in the paper
    method.order_anneal_start = 0.5  # 'rar': up to this share of the steps every sequence is in random order,
    method.order_anneal_end = 0.75  # ... from this share on none is

    config.train = train = ConfigDict()
    train.ema_decay = 0.0  # of an exponential moving average of the parameters; 0 = none
    train.accumulation = 1  # microbatches per step
    train.evaluate_every = 0  # steps between scores of a small set drawn as config.sample says; 0 = never
    train.evaluate_images = 1_000  # in that set; the best generator is kept, see sample.stage
    train.loop = loop_settings()
    train.optimizer = optimizer_settings()

    config.posttrain = post = ConfigDict()  # of the generator of --job=train or init_from
    post.method = "va_pi"  # (arXiv 2512.19680), or a baseline: 'ste', 'tokenizer' or 'ar_grpo'
    post.group = 8  # G, samples per image; of 'ste', only to look at
    post.noise_rate = 0.0  # ξ, probability that a code of the context is replaced; 'ar_grpo' has no such context
    post.noise_reading = "paper"  # by a different code, or 'released': by any code
    post.reward = reward = ConfigDict()  # weight of each reward, see rear_jax/training/posttraining/rewards.py
    reward.mse = 1.0
    reward.perceptual = 1.0
    reward.l1 = 0.0
    reward.codebook = 0.0
    reward.discriminator = 0.0  # the one that the tokenizer was trained with
    reward.class_probability = 0.0
    post.perceptual_network = "lpips"  # as in tokenizer_training
    post.probe_images = 10_000  # training images that the class probe is fitted to
    post.captions = ""  # text-conditional generators: caption features; an image's label is the number of its caption
    post.ste_temperature = 1.0  # τ of 'ste'
    post.images_at_once = 1  # how many images of a device, each with its G samples, are decoded together
    post.max_advantage = 5.0  # this, clip_range, policy_weight, kl_weight, inner_updates: 'va_pi' and 'ar_grpo' alone
    post.clip_range = 0.2
    post.policy_weight = 1.0  # of the clipped objective; 0 leaves the prior alone, with rewards watched
    post.prior_weight = 0.1  # β, of the cross-entropy of the image's own codes; 'va_pi' and 'ste' read it
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

    config.study = study = ConfigDict()  # one experiment in variants, over seeds; see rear_jax/jobs/study.py
    study.seeds = (0, 1, 2)
    study.jobs = ("train",)  # once a seed, for all variants
    study.variants = ConfigDict()  # name -> settings that differ, nested as here
    study.variant_jobs = ("posttrain", "sample", "evaluate")  # once a seed and variant; the last two may be 'sweep'
    study.last = 20  # logged steps that the table's training metrics are means of

    config.sample = sample = ConfigDict()
    sample.stage = "train"  # whose generator: that of --job=train, the 'best' of it, or that of 'posttrain'
    sample.num_images = 50_000
    sample.batch_size = 128
    sample.image_size = 0  # pixels to which samples are resized, bicubic; 0 = as they are decoded
    sample.png_folder = False  # also write each sample as <workdir>/samples/000000.png, ...
    sample.guidance = "power_cosine"  # see rear_jax/guidance.py
    sample.guidance_scale = 1.0
    sample.guidance_power = 1.0
    sample.guidance_interval = -1  # last decoding step that is guided, as LlamaGen counts; -1 = all
    sample.captions = ""  # text-conditional generators: an .npz with caption features and mask
    sample.temperature = 1.0
    sample.top_k = 0  # 0 = off
    sample.top_p = 1.0  # 1 = off
    sample.use_ema = False

    config.sweep = sweep = ConfigDict()  # sets of config.sample, each point with other guidance
    sweep.guidance_scale = ()  # () = that of config.sample
    sweep.guidance_power = ()

    config.plan = plan = ConfigDict()  # what the config would take on chips that are not here
    plan.topology = ""  # chips to compile for: 'v5e:16x16', 'v4:4x4x8', 'h100:8', see rear_jax/plan/chips.py
    plan.programs = ()  # of 'train', 'posttrain' and 'sample'; () = the config's jobs, and sampling
    plan.compiles = 6  # at most, in search of each program's largest batch; 0 = do not search
    plan.quick = False  # compile in a fifth of the time: memory within 1 %, traffic half as much again, no cost model
    plan.mfu = 0.4  # model FLOPs utilisation at which time is told beside the bound
    plan.epoch_images = 1_281_167  # of one epoch; ImageNet-1k's

    config.convert = convert = ConfigDict()
    convert.source = ""  # published checkpoint file, or a folder of checkpoints
    convert.export = ""  # FILE.safetensors or FILE.bin with the authors' key names, or a hub's FOLDER of a TiTok
    convert.verify = False  # print a parity report instead of writing anything
    convert.images = 256  # of config.data.eval_split that the report looks at, for tokenizers
    convert.sequences = 256  # of the codes folder that the report looks at, for generators

    config.import_codes = import_codes = ConfigDict()
    import_codes.source = ""  # RAR's .jsonl, LlamaGen's folder of .npy files or AliTok's .npz

    config.evaluate = evaluate = ConfigDict()
    evaluate.network = "lite2"  # EfficientNet-Lite 'lite0' or 'lite2', or 'inception' for FID, sFID, IS and KID
    evaluate.inception = ""  # the latter's weights, pt_inception-2015-12-05-6726825d.pth
    evaluate.feature_size = 224  # pixels, both sides, at which an EfficientNet looks
    evaluate.batch_size = 64
    evaluate.reference = ""  # '' = training images; else an .npz such as ADM's VIRTUAL_imagenet256_labeled.npz
    evaluate.num_reference = 50_000  # training images that the score is taken against
    evaluate.num_compared = 10_000  # images of the reference that precision, recall and KID look at
    evaluate.neighbours = 3  # k of precision and recall
    evaluate.kid_subsets = 100
    evaluate.kid_subset_size = 1000  # 0 = no KID
    evaluate.tokenizer = True  # score held-out images and their reconstructions too
    evaluate.cache = ""  # folder that keeps what a reference comes to; '' = <workdir>/references
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


def titok() -> ConfigDict:
    """The tokenizer TiTok at the published size B-64; the `vq8k` networks differ as `predicts` says."""
    tokenizer = ConfigDict()
    tokenizer.name = "titok"
    tokenizer.codebook_size = 4096
    tokenizer.codebook_dim = 12  # width of a codebook vector
    tokenizer.num_latent_tokens = 64  # codes per image
    tokenizer.patch_size = 16  # pixels
    tokenizer.encoder_width = 768
    tokenizer.encoder_depth = 12
    tokenizer.encoder_heads = 12
    tokenizer.decoder_width = 768
    tokenizer.decoder_depth = 12
    tokenizer.decoder_heads = 12
    tokenizer.l2_normalize = True  # unit-length codes and latents
    tokenizer.legacy_reshape = True  # the released encoder mixes latents up (False in the `vq8k` networks)
    tokenizer.predicts = "codes"  # of MaskGIT-VQGAN, or 'pixels' (the `vq8k` networks)
    tokenizer.proxy_codebook_size = 1024  # sizes of that MaskGIT-VQGAN, not read with 'pixels'
    tokenizer.proxy_dim = 256
    tokenizer.proxy_channels = 128
    tokenizer.proxy_channel_mult = (1, 1, 2, 2, 4)  # its cells must be as many as patches
    tokenizer.proxy_res_blocks = 2
    tokenizer.dtype = "float32"
    return tokenizer


def alitok() -> ConfigDict:
    """The tokenizer AliTok at its published size."""
    tokenizer = ConfigDict()
    tokenizer.name = "alitok"
    tokenizer.codebook_size = 4096
    tokenizer.codebook_dim = 32  # width of a codebook vector
    tokenizer.prefix_tokens = 17  # codes before those of the patches
    tokenizer.patch_size = 16  # pixels
    tokenizer.encoder_width = 768
    tokenizer.encoder_depth = 12
    tokenizer.encoder_heads = 12
    tokenizer.decoder_width = 1024
    tokenizer.decoder_depth = 24
    tokenizer.decoder_heads = 16
    tokenizer.buffer_tokens = 32  # learned tokens that the decoder sees beside the codes
    tokenizer.causal_decoder = False  # True in the first stage of training
    tokenizer.l2_normalize = False  # unit-length codes and latents
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
    model.attention = "auto"  # 'cudnn' or 'splash' where they can run, else 'plain'; see models/attention_kernels.py
    model.remat = "none"  # keep all activations; 'dots': what linear layers give; 'full': blocks' inputs; the rest anew
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
    model.attention = "auto"
    model.remat = "none"
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
    model.attention = "auto"
    model.remat = "none"
    model.unroll = 1
    return model


def loop_settings() -> ConfigDict:
    """How long one training job runs and how often it speaks and saves."""
    loop = ConfigDict()
    loop.steps = 250_000
    loop.batch_size = 2048  # over all devices and microbatches
    loop.log_every = 100
    loop.picture_every = 5_000  # 0 = never
    loop.checkpoint_every = 5_000
    loop.keep_checkpoints = 2  # the newest
    loop.keep_every = 0  # and for ever those of every so many steps, a multiple of checkpoint_every; 0 = none
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
    if differing := differences(saved, now.to_dict(), sections):
        raise RearError(
            f"{place} belongs to another config: {', '.join(differing)}. Use another --workdir or the old values."
        )


def differences(saved: dict, now: dict, sections: tuple[str, ...]) -> list[str]:
    """Settings in sections by dotted name that differ between two configs, each with both values."""
    old, new = flatten(saved), flatten(now)
    keys = [k for k in sorted(old.keys() | new.keys()) if k.startswith(sections) and k.split(".")[-1] not in FREE]
    return [f"{k} (was {old.get(k)!r}, now {new.get(k)!r})" for k in keys if old.get(k) != new.get(k)]


def flatten(config: dict, prefix: str = "") -> dict[str, object]:
    """Nested settings as 'a.b.c' -> value, tuples as lists (as JSON returns them)."""
    flat: dict[str, object] = {}
    for key, value in config.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = list(value) if isinstance(value, tuple) else value
    return flat
