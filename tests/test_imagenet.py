"""ImageNet from its archives to ten-crop codes, and the crops against torchvision's."""

import hashlib
import io
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from rear_jax import artifacts
from rear_jax.data.codes import Codes, open_codes
from rear_jax.data.crops import ten_crop
from rear_jax.data.sources import open_source
from rear_jax.data.sources.folders import FolderSource
from rear_jax.errors import RearError
from tests import toy

# A virtual environment with TensorFlow, as launch/prepare_imagenet.sh makes it; by default the present one.
TENSORFLOW = Path(os.environ.get("REAR_TENSORFLOW_VENV", sys.prefix))

TRAIN = {  # archive -> pictures; the last two are among those that TFDS converts, from PNG and from CMYK
    "n01440764": ("n01440764_18.JPEG", "n01440764_36.JPEG", "n01440764_37.JPEG"),
    "n15075141": ("n15075141_54.JPEG",),
    "n02105855": ("n02105855_2933.JPEG",),
    "n01739381": ("n01739381_1309.JPEG",),
}
VALIDATION = {  # picture -> class, by the list of validation labels that TFDS carries
    "ILSVRC2012_val_00000001.JPEG": "n01751748",
    "ILSVRC2012_val_00000002.JPEG": "n09193705",
    "ILSVRC2012_val_00000003.JPEG": "n02105855",
}

# Sums of the ten crops and a hash of all their pixels, of `pattern(height, width)`: from Pillow 13.0, the ADM centre
# crop to int(1.1 * size) and torchvision 0.28's TenCrop(size), which is what LlamaGen's and RAR's extraction runs.
TORCHVISION = [
    (
        (375, 500, 256),
        [24892623, 24877216, 24913508, 24896438, 24915781, 24877216, 24892623, 24896438, 24913508, 24918092],
        "17315ff1cb2a8a4f",
    ),
    (
        (600, 900, 256),
        [25021051, 25034143, 25036155, 25045319, 25036703, 25034143, 25021051, 25045319, 25036155, 25039565],
        "9acb62e7845d5407",
    ),
    (
        (90, 70, 32),
        [390624, 396512, 392089, 395208, 395665, 396512, 390624, 395208, 392089, 395097],
        "fc1cf4aa833b2ded",
    ),
    (
        (33, 57, 31),
        [388722, 391983, 399774, 399130, 397778, 391983, 388722, 399130, 399774, 397889],
        "287554260ac28c35",
    ),
]


class Photographs(tfds.core.GeneratorBasedBuilder):
    """The pictures of `TRAIN` with ImageNet's features, prepared without TensorFlow."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self) -> tfds.core.DatasetInfo:
        features = {
            "image": tfds.features.Image(encoding_format="jpeg"),
            "label": tfds.features.ClassLabel(names=sorted(TRAIN)),
            "file_name": tfds.features.Text(),
        }
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, manager):
        return {"train": self._generate_examples()}

    def _generate_examples(self):
        for synset, names in TRAIN.items():
            for name in names:
                yield name, {"image": io.BytesIO(photograph(name)), "label": synset, "file_name": name}


def pattern(height: int, width: int) -> np.ndarray:
    row, column = np.mgrid[:height, :width]
    channels = (3 * row + 5 * column) % 256, row * column % 251, (7 * row * row + 11 * column) % 256
    return np.stack(channels, axis=2).astype(np.uint8)


def photograph(name: str, kind: str = "JPEG", mode: str = "RGB") -> bytes:
    """A smooth picture of a size of its own, as the file's bytes."""
    rng = np.random.default_rng(list(name.encode()))
    coarse = Image.fromarray(rng.integers(0, 256, (5, 6, 3), np.uint8)).convert(mode)
    stream = io.BytesIO()
    coarse.resize(tuple(rng.integers(40, 90, 2)), Image.Resampling.BICUBIC).save(stream, kind)
    return stream.getvalue()


def add(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    archive.addfile(info, io.BytesIO(content))


def write_archives(folder: Path) -> Path:
    """ILSVRC2012_img_train.tar, one archive per class in it, and ILSVRC2012_img_val.tar."""
    folder.mkdir()
    forms = {"n02105855_2933.JPEG": {"kind": "PNG"}, "n01739381_1309.JPEG": {"mode": "CMYK"}}
    with tarfile.open(folder / "ILSVRC2012_img_train.tar", "w") as train:
        for synset, names in TRAIN.items():
            stream = io.BytesIO()
            with tarfile.open(fileobj=stream, mode="w") as inner:
                for name in names:
                    add(inner, name, photograph(name, **forms.get(name, {})))
            add(train, f"{synset}.tar", stream.getvalue())
    with tarfile.open(folder / "ILSVRC2012_img_val.tar", "w") as validation:
        for name in VALIDATION:
            add(validation, name, photograph(name))
    return folder


def write_folders(root: Path) -> Path:
    """The pictures of `TRAIN` in a folder of class folders."""
    for synset, names in TRAIN.items():
        (root / "train" / synset).mkdir(parents=True)
        for name in names:
            (root / "train" / synset / name).write_bytes(photograph(name))
    return root


def rows(codes: Codes) -> set[tuple[int, ...]]:
    """Every record of a codes folder: label, view and codes."""
    every = codes.read(np.arange(len(codes)))
    return {(*map(int, row),) for row in np.column_stack([every["label"], every["augmentation"], every["codes"]])}


@pytest.mark.parametrize(("shape", "sums", "digest"), TORCHVISION)
def test_ten_crops_are_torchvisions(shape: tuple[int, int, int], sums: list[int], digest: str):
    height, width, size = shape
    views = ten_crop(pattern(height, width), size)
    assert [int(view.sum(dtype=np.int64)) for view in views] == sums
    assert hashlib.sha256(np.stack(views).tobytes()).hexdigest().startswith(digest)


def test_class_numbers_are_those_of_sorted_class_folders():
    features = tfds.builder_cls("imagenet2012")(data_dir="/nowhere").info.features
    assert len(features["label"].names) == 1000
    assert features["label"].names == sorted(features["label"].names)


def test_a_set_stored_as_tfrecord_is_refused(tmp_path: Path):
    builder = Photographs(data_dir=tmp_path, file_format="array_record")
    builder.download_and_prepare()
    info = Path(builder.data_dir) / "dataset_info.json"
    info.write_text(info.read_text().replace("array_record", "tfrecord").replace("ARRAY_RECORD", "TFRECORD"))
    with pytest.raises(RearError, match=r"not stored for random access: prepare it anew .* --dataset=photographs"):
        open_source("tfds", builder.data_dir, "train")


@pytest.mark.slow
def test_tfds_set_and_folder_give_the_same_ten_crop_codes(tmp_path: Path, trained: Path):
    builder = Photographs(data_dir=tmp_path / "tfds", file_format="array_record")
    builder.download_and_prepare()
    places = {"tfds": builder.data_dir, "folder": write_folders(tmp_path / "folder")}
    common = {"tokenizer_from": str(trained / "tokenizer"), "data__train_split": "train"}
    common |= {"codes__augmentation": "ten_crop", "codes__num_shards": 2, "codes__batch_size": 4}
    made = {}
    for source, path in places.items():
        toy.run(tmp_path / source, "tokenize", data__source=source, data__path=str(path), **common)
        made[source] = rows(open_codes(tmp_path / source / "codes"))
    assert len(made["tfds"]) == 10 * 6
    assert made["tfds"] == made["folder"]

    tokenizer = artifacts.load_tokenizer(toy.config(**common), tmp_path)
    image, label = open_source("folder", str(places["folder"]), "train")[4]
    pixels = np.stack(ten_crop(image, 32)).astype(np.float32) / 255
    codes = np.asarray(tokenizer.module.apply({"params": tokenizer.params}, pixels, method="encode"))
    wanted = {(label, view, *map(int, row)) for view, row in enumerate(codes)}
    assert wanted < made["tfds"]


@pytest.fixture(scope="module")
def imagenet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """ImageNet's version folder, prepared from hand-made archives by the real builder."""
    if subprocess.run([TENSORFLOW / "bin/python", "-c", "import tensorflow"], capture_output=True).returncode:
        pytest.skip(f"no TensorFlow in {TENSORFLOW}: set REAR_TENSORFLOW_VENV to an environment that has it")
    folder = tmp_path_factory.mktemp("imagenet")
    script = [toy.ROOT / "launch" / "prepare_imagenet.sh", f"--downloads={write_archives(folder / 'archives')}"]
    subprocess.run([*script, f"--data_dir={folder}", f"--venv={TENSORFLOW}"], check=True, timeout=300)
    return folder / "imagenet2012" / "5.1.0"


@pytest.fixture
def no_tensorflow(tmp_path: Path) -> dict[str, str]:
    """An environment for processes in which TensorFlow cannot be imported, even where it is installed."""
    (tmp_path / "blocked").mkdir()
    (tmp_path / "blocked" / "tensorflow.py").write_text("raise ImportError('TensorFlow is needed at run time')")
    environment = toy.environment()
    return environment | {"PYTHONPATH": f"{tmp_path / 'blocked'}:{environment['PYTHONPATH']}"}


@pytest.mark.slow
@pytest.mark.parametrize(("split", "count"), [("train", 6), ("validation", 3)])
def test_imagenet_to_ten_crop_codes(imagenet, no_tensorflow, tmp_path, trained, split: str, count: int):
    flags = [f"--config.tokenizer_from={trained / 'tokenizer'}", "--config.codes.augmentation=ten_crop"]
    flags += ["--config.data.source=tfds", f"--config.data.path={imagenet}", f"--config.data.train_split={split}"]
    command = toy.command(tmp_path, "--job=tokenize", "--config.data.num_classes=1000", *flags)
    done = subprocess.run(command, env=no_tensorflow, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert len(rows(open_codes(tmp_path / "codes"))) == 10 * count


@pytest.mark.slow
def test_imagenet_holds_the_archives_files(imagenet: Path, tmp_path: Path):
    folder = open_source("folder", str(write_folders(tmp_path)), "train")
    assert isinstance(folder, FolderSource)
    train = open_source("tfds", str(imagenet), "train")
    images = {image.tobytes(): train.class_names[label] for image, label in (train[i] for i in range(len(train)))}
    assert sorted(images.values()) == sorted(synset for synset, names in TRAIN.items() for _ in names)
    for index, file in enumerate(folder.files):
        if file.name not in ("n02105855_2933.JPEG", "n01739381_1309.JPEG"):  # stored as they are
            assert images[folder[index][0].tobytes()] == file.parent.name
    validation = open_source("tfds", str(imagenet), "validation")
    found = [validation.class_names[validation[i][1]] for i in range(len(validation))]
    assert sorted(found) == sorted(VALIDATION.values())
