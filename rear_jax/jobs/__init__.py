"""Jobs: one file each, a `run(config, workdir)` that reads top to bottom."""

from rear_jax.jobs import convert, evaluate, import_codes, posttrain, sample, study, tokenize, tokenizer, train

JOBS = {
    "tokenizer": tokenizer.run,
    "tokenize": tokenize.run,
    "import": import_codes.run,
    "train": train.run,
    "posttrain": posttrain.run,
    "sample": sample.run,
    "evaluate": evaluate.run,
    "study": study.run,
    "convert": convert.run,
}
