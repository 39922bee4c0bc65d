"""Settings of the device mesh, of buckets, and of the jobs 'study', 'plan', 'convert', 'import' and 'demo'."""

from ml_collections import ConfigDict


def mesh() -> ConfigDict:
    """Number of devices along each axis of the mesh, and what is divided over them.

    One number may be -1 = all devices that are left.
    """
    mesh = ConfigDict()
    mesh.data = -1  # this axis divides batches
    mesh.fsdp = 1  # this axis divides batches, parameters and optimiser state; each block gathers its parameters to run
    mesh.tensor = 1  # this axis divides heads, hidden features and vocabulary; a divisor of the devices of a process
    # True = 'data' divides the parameters between steps, the optimiser state and the moving average as well (ZeRO-1)
    mesh.divide_state = True
    return mesh


def buckets() -> ConfigDict:
    """What is at gs://, the workdir or artifacts of others; see docs/buckets.md."""
    buckets = ConfigDict()
    buckets.cache_gb = 50.0  # largest size in 1e9 bytes of the local copies of objects, in TMPDIR
    return buckets


def study() -> ConfigDict:
    """One experiment in several variants and with several seeds; see rear_jax/jobs/study.py."""
    study = ConfigDict()
    study.seeds = (0, 1, 2)  # values of config.seed, at least two
    study.jobs = ("train",)  # jobs that run once per seed, for all variants together
    study.variants = ConfigDict()  # name of each variant -> settings that it changes, nested as in the whole config
    # jobs that run once per seed and variant: a training job, then 'sample' and 'evaluate', or 'sweep' instead of both
    study.variant_jobs = ("posttrain", "sample", "evaluate")
    study.last = 20  # number of last log entries; the table shows the mean of each training metric over them
    return study


def plan() -> ConfigDict:
    """Memory and time that the config needs on other chips. The programs are compiled for them, and do not run."""
    plan = ConfigDict()
    # chips to compile for, such as 'v5e:16x16', 'v4:4x4x8' or 'h100:8'; see rear_jax/plan/chips.py; '' = none
    plan.topology = ""
    # programs to plan: 'tokenizer', 'train', 'posttrain', 'caption' and 'sample'; () = those of config.jobs, and for a
    # generator 'sample'
    plan.programs = ()
    plan.compiles = 6  # largest number of compilations in search of the largest batch of a program; 0 = no search
    # True = quick compilation for TPUs, in about a third of the time. Memory is then a few per cent larger and traffic
    # up to 1.5 times as large. The cost model of the compiler is left out.
    plan.quick = False
    plan.mfu = 0.4  # model FLOPs utilisation, 0 to 1, for the time that stands beside the lower bound
    plan.epoch_images = 1_281_167  # images in one epoch; ImageNet-1k has 1 281 167
    return plan


def convert() -> ConfigDict:
    """Conversion of published files to checkpoints, and of checkpoints to files with the key names of the authors."""
    convert = ConfigDict()
    convert.source = ""  # published file, hub folder or folder of checkpoints; '' = none
    # what to write: FILE.safetensors, FILE.bin or, for a TiTok, a hub FOLDER; '' = none
    convert.export = ""
    # published file or hub folder that the export is a copy of, with the weights of the source in their places, in the
    # dtypes of the original; a FOLDER to export to then gets its files; '' = the export holds the source alone
    convert.onto = ""
    convert.verify = False  # True = print a report of measured and published values, and write nothing
    convert.images = 256  # images from config.data.eval_split for the report on a tokenizer
    convert.sequences = 256  # code sequences from the folder of codes for the report on a generator
    return convert


def import_codes() -> ConfigDict:
    """Codes that others have published, for the job 'import'."""
    import_codes = ConfigDict()
    import_codes.source = ""  # .jsonl file (RAR), folder of .npy files (LlamaGen) or .npz file (AliTok); '' = none
    return import_codes


def demo() -> ConfigDict:
    """The page of the job 'demo'. What it begins with is in config.sample."""
    demo = ConfigDict()
    demo.host = "127.0.0.1"  # address that the page is served at; '0.0.0.0' lets every machine of the network use it
    demo.port = 7860  # port of that address; 0 = any that is free
    demo.batch_size = 8  # largest number of images that are drawn at once, if more are wanted they follow
    demo.most_images = 64  # largest number of images that one click may draw
    demo.queue_size = 16  # users who may wait for the networks; the page tells others to come again
    demo.max_upload_megabytes = 20  # largest file that the page takes
    return demo
