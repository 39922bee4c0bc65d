"""Settings of sampling, of scores and of diagnostics."""

from ml_collections import ConfigDict


def sample() -> ConfigDict:
    """The job 'sample'."""
    sample = ConfigDict()
    sample.stage = "train"  # generator: 'train' (the newest), 'best' (best score in job 'train') or 'posttrain'
    # images in the set, balanced over classes or captions; 0 = 50,000 if a job of the command scores it ('evaluate',
    # 'sweep' or 'study'), else a few of 10 classes or captions; not read if classes or prompts are given
    sample.num_images = 0
    # classes to draw, by number or by name, such as (207, 'otter'); () = all classes, or 10 of them, see num_images
    sample.classes = ()
    sample.images_per_class = 8  # images of each class, if classes are given or num_images is 0 and nothing scores
    sample.batch_size = 256  # images that all devices together draw at once
    sample.image_size = 0  # pixels along each side after bicubic resizing; 0 = no resizing
    # True = also write each image as a file, <workdir>/samples/000000.png and so on; prompts are in the names
    sample.png_folder = False
    sample.guidance = "power_cosine"  # schedule: 'power_cosine', 'linear' or 'constant'; see rear_jax/guidance.py
    sample.guidance_scale = 1.0  # full weight of guidance; 1 = off
    sample.guidance_power = 1.0  # exponent of the schedule 'power_cosine'
    # last decoding step with guidance; step n draws the code with index n + 1, as in LlamaGen; -1 = all steps
    sample.guidance_interval = -1
    # caption features for text-conditional generators: .npz file or folder, see rear_jax/data/captions.py; '' = none
    sample.captions = ""
    # prompts for text-conditional generators, instead of captions: .txt, .jsonl, .tsv or .json file or folder, see
    # rear_jax/data/prompts.py; '' = none
    sample.prompts = ""
    sample.prompt = ""  # one prompt, instead of a file of them; '' = none
    sample.images_per_prompt = 4  # images of each prompt; they go prompt by prompt
    # True = also write <workdir>/geneval for GenEval's scorer; prompts must be its evaluation_metadata.jsonl
    sample.geneval = False
    # True = also write <workdir>/hpsv2 for its scorer, the first image of each prompt; prompts must be its folder with
    # anime.json, concept-art.json, paintings.json and photo.json, or one of these
    sample.hpsv2 = False
    sample.temperature = 1.0  # divisor of the logits; 0 = always the most probable code
    sample.top_k = 0  # number of most probable codes to draw from; 0 = off
    sample.top_p = 1.0  # total probability of the most probable codes to draw from; 1 = off
    sample.use_ema = False  # True = take the moving average of the parameters, see config.train.ema_decay
    return sample


def sweep() -> ConfigDict:
    """The job 'sweep': a set of samples and its scores for each pair of a scale and a power."""
    sweep = ConfigDict()
    sweep.guidance_scale = ()  # values of config.sample.guidance_scale; () = only the value there
    sweep.guidance_power = ()  # values of config.sample.guidance_power; () = only the value there
    # True = the point with the smallest distance gets a second set of samples, from other random numbers; report its
    # scores, because those of the first set chose the point
    sweep.confirm = False
    return sweep


def evaluate() -> ConfigDict:
    """The job 'evaluate'."""
    evaluate = ConfigDict()
    # network for the scores: 'lite0' or 'lite2' (both EfficientNet-Lite) or 'inception' (for FID, sFID, IS and KID)
    evaluate.network = "lite2"
    evaluate.inception = ""  # weights for 'inception': the file pt_inception-2015-12-05-6726825d.pth
    # pixels along each side of the input of an EfficientNet-Lite, also in posttrain.reward.class_probability
    evaluate.feature_size = 224
    evaluate.batch_size = 64  # images per batch
    # images to compare with: an .npz file such as VIRTUAL_imagenet256_labeled.npz of ADM; '' = training images
    evaluate.reference = ""
    # number of training images to compare with; without samples also the number of held-out images
    evaluate.num_reference = 50_000
    evaluate.num_compared = 10_000  # largest number of images of the reference for precision, recall and KID
    evaluate.neighbours = 3  # k of precision and recall
    evaluate.kid_subsets = 100  # number of random pairs of subsets for KID
    evaluate.kid_subset_size = 1000  # images in each subset; 0 = no KID
    evaluate.tokenizer = True  # True = also score held-out images and their reconstructions
    evaluate.cache = ""  # folder for computed references; '' = <workdir>/references
    return evaluate


def analyze() -> ConfigDict:
    """The job 'analyze': the diagnostics of reAR, see docs/diagnostics.md. Codes are drawn as config.sample says."""
    analyze = ConfigDict()
    # what to measure: 'exposure', 'embeddings', 'accuracy', 'cka' and 'consistency'
    analyze.diagnostics = ("exposure", "embeddings", "accuracy", "cka", "consistency")
    # images of all diagnostics but 'accuracy', which takes both: 'held_out' (data.eval_split) or 'train'
    analyze.split = "held_out"
    analyze.num_images = 256  # images of a split, evenly spread and held in memory; a multiple of batch_size
    analyze.batch_size = 64  # images that all devices together take at once; 'cka' estimates HSIC in each batch
    analyze.true_shares = (0.0, 0.25, 0.5, 0.75, 1.0)  # r of 'exposure', shares of codes that are the image's own
    # r' of 'embeddings', probabilities that a wrong code becomes the one nearest to the right one
    analyze.nearest_shares = (0.0, 0.25, 0.5, 0.75, 1.0)
    analyze.noise_shares = (0.0, 0.1, 0.25, 0.5)  # of 'accuracy', probabilities that a context code becomes random
    return analyze
