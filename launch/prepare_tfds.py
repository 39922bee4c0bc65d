"""Prepares a TFDS data set as ArrayRecord files: `prepare_tfds.py NAME DATA_DIR DOWNLOADS`; needs TensorFlow."""

import sys

import tensorflow_datasets as tfds


def main(name: str, data_dir: str, downloads: str) -> None:
    """Writes `data_dir/name/version`; `downloads` holds the archives that TFDS cannot fetch itself, or is ''."""
    builder = tfds.builder(name, data_dir=data_dir, file_format="array_record")
    builder.download_and_prepare(download_config=tfds.download.DownloadConfig(manual_dir=downloads or None))
    images = ", ".join(f"{info.num_examples} {split}" for split, info in builder.info.splits.items())
    print(f"prepared {images} images: --config.data.source=tfds --config.data.path={builder.data_dir}")


if __name__ == "__main__":
    main(*sys.argv[1:])
