"""Settings of the images, and of the codes that a tokenizer makes of them."""

from ml_collections import ConfigDict


def data() -> ConfigDict:
    """The images of the experiment."""
    data = ConfigDict()
    data.source = "tfds"  # kind of source; see rear_jax/data/sources/__init__.py
    data.path = "imagenet2012"  # folder, file or TFDS name, as the source needs it; '' = the embedded Fashion-MNIST
    data.train_split = "train"  # name of the split for training; '' = no splits
    data.eval_split = "validation"  # name of the split of held-out images
    # share of the images without splits that are held out, above 0 and below 1; a hash of its name decides on each
    data.held_out_share = 0.05
    data.held_out_seed = 0  # seed of that hash
    data.image_size = 256  # pixels along each side
    data.num_classes = 1000  # number of classes, labels are from 0; 0 = as many as the training images have
    # key or column of the captions, in metadata files, .json files and .parquet files; '' = classes, not captions
    data.caption_key = "text"
    data.label_key = "label"  # key or column of the classes, in the same files, where there are no captions
    data.image_key = "image"  # column of the images in .parquet files
    # share of the images, or pairs of image and caption, that may be broken, 0 to below 1; broken pairs are left out,
    # and the next good image takes the place of one that cannot be decoded; 0 = none may be
    data.max_broken_share = 0.001
    return data


def inspect() -> ConfigDict:
    """The job 'inspect', which looks at the images of config.data.train_split and config.data.eval_split."""
    inspect = ConfigDict()
    inspect.num_images = 0  # images of each split, evenly spread; 0 = all
    return inspect


def codes() -> ConfigDict:
    """The code files that the job 'tokenize' writes and the job 'train' reads."""
    codes = ConfigDict()
    codes.augmentation = "ten_crop"  # views of each image: 'center' (1 view), 'flip' (2) or 'ten_crop' (10)
    codes.num_shards = 256  # number of code files
    codes.batch_size = 32  # views that each device encodes at once
    codes.in_memory = False  # True = load all codes at the start, for faster reads; ImageNet in ten crops takes 6.6 GB
    # share of the records that may be damaged, 0 to below 1; the next good record replaces each; 0 = none may be
    codes.max_corrupt_share = 0.001
    # True = job 'train' reads no code files; it encodes batches of images, in views of tokenizer_training.augmentation
    codes.on_the_fly = False
    return codes
