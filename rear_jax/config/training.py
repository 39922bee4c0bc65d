"""Settings of everything that is trained: tokenizers, generators, and post-training."""

from ml_collections import ConfigDict


def loop_settings(**changes: int) -> ConfigDict:
    """Length of one training job, and its intervals between logs, pictures and checkpoints."""
    loop = ConfigDict()
    loop.steps = 250_000  # number of training steps
    loop.batch_size = 2048  # images per step, over all devices and microbatches
    loop.log_every = 100  # steps between two entries of metrics
    loop.picture_every = 5_000  # steps between two pictures; 0 = none
    loop.checkpoint_every = 5_000  # steps between two checkpoints
    loop.keep_checkpoints = 2  # number of newest checkpoints that stay on disk
    # steps between two checkpoints that stay on disk for ever, a multiple of checkpoint_every; 0 = none
    loop.keep_every = 0
    # first and last step of a profile in <workdir>/tensorboard, such as (100, 105); () = none
    loop.profile_steps = ()
    loop.lock().update(changes)  # which knows no other keys
    return loop.unlock()


def optimizer_settings(**changes: float) -> ConfigDict:
    """AdamW with warm-up and cosine decay. The defaults are those of reAR."""
    optimizer = ConfigDict()
    optimizer.learning_rate = 4e-4  # learning rate at the end of the warm-up, the highest
    optimizer.final_learning_rate = 1e-5  # learning rate at the last step
    optimizer.warmup_steps = 62_500  # steps of linear growth from 0 to learning_rate
    optimizer.b1 = 0.9  # decay of the mean of gradients
    optimizer.b2 = 0.96  # decay of the mean of squared gradients
    optimizer.weight_decay = 0.03  # weight decay; the family of a network says which parameters have it
    optimizer.clip_norm = 1.0  # largest global norm of the gradient; 0 = no limit
    optimizer.lock().update(changes)
    return optimizer.unlock()


def tokenizer_training() -> ConfigDict:
    """The job 'tokenizer'."""
    vq = ConfigDict()
    # tokenizer to start from: a folder from job 'tokenizer' or 'convert', or a published file; '' = random parameters
    vq.init_from = ""
    vq.init_parts = "all"  # parts to take from init_from: 'all' or 'codes' (encoder and codebook, without the decoder)
    vq.trained = "all"  # parts to train: 'all' or 'decoder'; with 'decoder', encoder and codebook stay as in init_from
    vq.objective = "pixels"  # what the tokenizer predicts: 'pixels' or 'codes' (a TiTok predicts the codes of proxy)
    # MaskGIT-VQGAN for the objective 'codes': a folder from job 'tokenizer' or 'convert', or a published file
    vq.proxy = ""
    # The objective 'codes' does not read mse_weight, perceptual_* and discriminator_*.
    vq.mse_weight = 1.0  # weight of the mean squared error
    vq.perceptual_weight = 1.0  # weight of the perceptual distance; 0 = off
    vq.perceptual_network = "lite0"  # 'lite0' or 'lite2' (both EfficientNet-Lite) or 'lpips' (needs config.lpips)
    vq.commitment_weight = 0.25  # weight of the loss that pulls latents to their codes
    vq.codebook_update = "gradient"  # how codes learn: 'gradient' or 'ema' (exponential moving average of latents)
    vq.codebook_decay = 0.99  # decay per step of the moving averages: usage of codes and, with 'ema', their latents
    # lowest usage of a code, relative to the mean of all codes; a code below it becomes a random latent; 0 = off
    vq.revive_below = 0.01
    # random view of each training image: 'none', 'bicubic', 'flip', 'crop_flip', 'wide_crop_flip' (LlamaGen) or
    # 'window_flip'
    # (TiTok); see rear_jax/data/crops.py
    vq.augmentation = "crop_flip"
    vq.discriminator_weight = 0.0  # weight of the adversarial loss; 0 = no discriminator
    vq.discriminator_start = 0  # first step with the adversarial loss
    vq.discriminator_adaptive = True  # True = multiply the weight by the ratio of gradient norms at the last layer
    vq.discriminator_channels = 64  # channels after the first convolution
    vq.discriminator_layers = 3  # number of times that the discriminator halves the resolution
    vq.loop = loop_settings(steps=300_000, batch_size=256)
    vq.optimizer = optimizer_settings(learning_rate=1e-4, warmup_steps=5_000, b2=0.99, weight_decay=1e-4)
    return vq


def lpips() -> ConfigDict:
    """Files of LPIPS with VGG16, for each perceptual_network = 'lpips' and for the LPIPS score of a tokenizer."""
    lpips = ConfigDict()
    lpips.vgg16 = ""  # VGG16 file of torchvision; '' = none
    lpips.heads = ""  # file `weights/v0.1/vgg.pth` of the package lpips; '' = none
    return lpips


def clip() -> ConfigDict:
    """Files of CLIP, for posttrain.reward.clip; and its vocabulary, which posttrain.reward.hps needs too."""
    clip = ConfigDict()
    clip.weights = ""  # file of OpenAI's ViT-B/32 or ViT-L/14, or of open_clip's ViT-H-14; '' = none
    # tokenizer.json, folder with vocab.json and merges.txt, or bpe_simple_vocab_16e6.txt.gz; '' = none
    clip.vocabulary = ""
    clip.prefix = ""  # text before each caption, such as 'A photo depicts '
    return clip


def hps() -> ConfigDict:
    """File of HPSv2, for posttrain.reward.hps, and its preprocessing."""
    hps = ConfigDict()
    hps.weights = ""  # file HPS_v2_compressed.pt or HPS_v2.1_compressed.pt; '' = none
    hps.antialias = True  # True = images are resized as by torchvision since version 0.17; False = as before
    return hps


def method() -> ConfigDict:
    """The objective of the job 'train'. Only 'rear' reads the settings from noise_schedule to deep_layer."""
    method = ConfigDict()
    method.name = "rear"  # 'ar', 'rar' or 'rear'
    method.label_drop = 0.1  # probability that the null label replaces a label
    # limit of the noise rate: 'none', 'annealed', 'linear', 'uniform' or 'fixed'; see rear_jax/noise.py
    method.noise_schedule = "annealed"
    method.noise_rate = 0.5  # the constant of schedules 'uniform' and 'fixed', 0 to 1
    method.embedding_weight = 1.0  # λ, weight of both embedding losses; 0 = off
    # embedding losses that count: 'both', 'shallow' (of the current code) or 'deep' (of the next code)
    method.embedding_terms = "both"
    method.embedding_reading = "released"  # shallow term at replaced codes: 'released' (left out) or 'paper' (kept)
    method.projector = "released"  # 'released' (three layers with SiLU) or 'paper' (two layers with GELU)
    method.projector_width = 2048  # width of the hidden layers of each projector
    method.shallow_layer = 0  # index, from 0, of the block whose output predicts the embedding of the current code
    # index, from 0, of the block whose output predicts the embedding of the next code; -1 = 3/4 of the depth
    method.deep_layer = -1
    method.order_anneal_start = 0.5  # 'rar': up to this share of the steps, all sequences are in random order
    method.order_anneal_end = 0.75  # 'rar': from this share of the steps on, no sequence is in random order
    return method


def train() -> ConfigDict:
    """The job 'train'."""
    train = ConfigDict()
    # images of the training split that the generator learns from, evenly spread; 0 = all
    train.num_images = 0
    train.ema_decay = 0.0  # decay per step of the exponential moving average of the parameters; 0 = no average
    train.accumulation = 0  # microbatches per step; 0 = as few as fit into memory, on CPUs of 4 images
    train.evaluate_every = 0  # steps between two scores of a small set of samples; 0 = none
    # images in that set; the generator with the best score is kept, see config.sample.stage
    train.evaluate_images = 1_000
    train.loop = loop_settings()
    train.optimizer = optimizer_settings()
    return train


def posttrain() -> ConfigDict:
    """The job 'posttrain'. It starts from the generator of the job 'train', or from config.init_from."""
    post = ConfigDict()
    post.method = "va_pi"  # 'va_pi' (arXiv 2512.19680), or one of its baselines 'ste', 'tokenizer' or 'ar_grpo'
    post.group = 8  # G, samples per image; 'ste' draws them only for pictures
    # ξ, probability that noise replaces a code of the context, 0 to 1; 'ar_grpo' has no such context and needs 0
    post.noise_rate = 0.0
    post.noise_reading = "paper"  # code that replaces another: 'paper' (always a different one) or 'released' (any)
    post.reward = reward()
    post.clip_images = False  # True = rewards see images clipped to [0, 1]; False = as they are decoded, as released
    post.perceptual_network = "lpips"  # 'lite0' or 'lite2' (both EfficientNet-Lite) or 'lpips' (needs config.lpips)
    post.probe_images = 10_000  # largest number of training images for the classifier of reward.class_probability
    post.ste_temperature = 1.0  # τ, temperature of the softmax of 'ste'
    post.images_at_once = 1  # images that each device decodes at once, each with its G samples
    # Only 'va_pi' and 'ar_grpo' read max_advantage, clip_range, policy_weight, kl_weight and inner_updates.
    post.max_advantage = 5.0  # largest absolute value of an advantage
    post.clip_range = 0.2  # ε, the objective clips the probability ratio to 1 ± ε
    post.policy_weight = 1.0  # weight of the clipped objective; 0 = off, rewards are still logged
    # β, weight of the cross-entropy of the image's own codes; 'va_pi' and 'ste' read it, 'ar_grpo' needs 0
    post.prior_weight = 0.1
    # share of the prior that is the cross-entropy without label or caption, 0 to 1; it keeps guidance in order.
    # 'va_pi' and 'ste' read it.
    post.label_drop = 0.1
    post.kl_weight = 0.0  # weight of the divergence from the generator at the start; 0 = off
    post.inner_updates = 1  # optimiser steps per rollout
    post.accumulation = 0  # microbatches per step; 0 = as few as fit into memory
    post.augmentation = "none"  # random view of each training image, as in tokenizer_training.augmentation
    # a batch is of images, each with G samples
    post.loop = loop_settings(steps=100, batch_size=128, log_every=1, picture_every=50, checkpoint_every=50)
    post.optimizer = optimizer_settings(learning_rate=1e-6, final_learning_rate=1e-6, warmup_steps=0)
    post.optimizer.update(b2=0.999, weight_decay=1e-4)
    return post


def reward() -> ConfigDict:
    """Weight of each reward, 0 = off; see rear_jax/training/posttraining/rewards.py."""
    reward = ConfigDict()
    reward.mse = 1.0  # minus the mean squared difference from the original
    reward.perceptual = 1.0  # minus the perceptual distance from the original
    reward.l1 = 0.0  # minus the mean absolute difference from the original
    reward.codebook = 0.0  # mean cosine between the vectors of the sampled codes and the latents of the original
    reward.codebook_flattened = 0.0  # one cosine between all vectors of an image together and all latents together
    reward.discriminator = 0.0  # logit of the discriminator that the tokenizer was trained with
    reward.class_probability = 0.0  # log-probability of the label, from a linear classifier of real images
    reward.clip = 0.0  # cosine of image and caption in CLIP (needs config.clip)
    reward.hps = 0.0  # cosine of image and caption in HPSv2 (needs config.hps and config.clip.vocabulary)
    return reward
