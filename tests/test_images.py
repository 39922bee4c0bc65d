"""Image sources and the batches made of them."""

import dataclasses
import gzip
import io
import itertools
import shutil
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from rear_jax.data import fashion_mnist
from rear_jax.data.batches import image_batches, ordered_batches
from rear_jax.data.crops import center_crop
from rear_jax.data.sources import SOURCES, fingerprint, open_source
from rear_jax.data.sources.arrays import ArraySource
from rear_jax.data.sources.interface import ImageSource
from rear_jax.errors import RearError


class TinyPictures(tfds.core.GeneratorBasedBuilder):
    """Seven noise pictures of two classes, stored as png."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self) -> tfds.core.DatasetInfo:
        features = {"image": tfds.features.Image(), "label": tfds.features.ClassLabel(names=["cat", "dog"])}
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, manager):
        return {"train": self._generate_examples()}

    def _generate_examples(self):
        for index in range(7):
            yield index, {"image": io.BytesIO(encoded(picture(index))), "label": index % 2}


class Counted(TinyPictures):
    """The same with a number for a label."""

    def _info(self) -> tfds.core.DatasetInfo:
        features = {"image": tfds.features.Image(), "label": tfds.features.Scalar(np.int64)}
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))


def picture(index: int) -> np.ndarray:
    return np.random.default_rng(index).integers(0, 256, (20 + index, 24, 3), np.uint8)


def encoded(image: np.ndarray, kind: str = "PNG") -> bytes:
    stream = io.BytesIO()
    Image.fromarray(image).save(stream, kind)
    return stream.getvalue()


@pytest.fixture
def numbered() -> ImageSource:
    """Ten 8-pixel images whose left half has their number's value and whose label is that number."""
    images = np.zeros((10, 8, 8, 3), np.uint8)
    images[:, :, :4] = np.arange(10)[:, None, None, None]
    return ArraySource(images, np.arange(10), "numbered", 10)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for class_name, kinds in {"dog": ["b.png", "a.JPEG"], "ant": ["z.webp"]}.items():
        (tmp_path / "train" / class_name).mkdir(parents=True)
        for index, name in enumerate(kinds):
            kind = name.split(".")[1].upper()
            (tmp_path / "train" / class_name / name).write_bytes(encoded(picture(index), kind))
    (tmp_path / "train" / "ant" / "notes.txt").write_text("not an image")
    return tmp_path


def take(iterator, count: int) -> list[dict[str, np.ndarray]]:
    batches = list(itertools.islice(iterator, count))
    iterator.close()
    return batches


def test_fingerprint_tells_what_differs(numbered: ImageSource):
    """One pixel or label of a small source, its order, its length or its classes."""
    images, labels = numbered.images.copy(), numbered.labels.copy()
    images[7, 0, 5], labels[4] = 1, 3
    others = [
        dataclasses.replace(numbered, images=images),
        dataclasses.replace(numbered, labels=labels),
        dataclasses.replace(numbered, images=numbered.images[::-1], labels=numbered.labels[::-1]),
        dataclasses.replace(numbered, images=numbered.images[:9], labels=numbered.labels[:9]),
        dataclasses.replace(numbered, num_classes=11),
        dataclasses.replace(numbered, class_names=tuple("abcdefghij")),
    ]
    found = [fingerprint(source) for source in (numbered, *others)]
    assert len(set(found)) == len(found)
    assert fingerprint(dataclasses.replace(numbered, images=numbered.images.copy(), name="elsewhere")) == found[0]


def test_unknown_source_lists_the_known_ones():
    with pytest.raises(RearError, match=", ".join(SOURCES)):
        open_source("imagenet", "", "train")


@pytest.mark.parametrize(("split", "per_class"), [("train", 1200), ("test", 200)])
def test_embedded_set(split: str, per_class: int):
    source = open_source("fashion_mnist", "", split)
    assert len(source) == 10 * per_class
    labels = [source[index][1] for index in range(len(source))]
    np.testing.assert_array_equal(np.bincount(labels), np.full(10, per_class))
    image, _ = source[0]
    assert image.shape == (32, 32, 3)
    assert image.dtype == np.uint8
    assert image[:2].max() == image[-2:].max() == image[:, :2].max() == image[:, -2:].max() == 0
    assert (image[:, :, 0] == image[:, :, 2]).all()
    assert image[2:-2, 2:-2].max() > 200
    assert source.class_names[8] == "Bag"


def test_embedded_set_is_small_and_licensed():
    assert fashion_mnist.EMBEDDED.stat().st_size < 6_000_000
    assert "Zalando SE" in (fashion_mnist.EMBEDDED.parent / "LICENSE").read_text()


@pytest.fixture
def published(tmp_path: Path) -> Path:
    """A folder in the form of the published files, 25 images a split with the labels 0 to 9 in turn."""
    for prefix in fashion_mnist.FILE_PREFIX.values():
        images = np.random.default_rng(0).integers(0, 256, (25, 28, 28), np.uint8)
        labels = (np.arange(25) % 10).astype(np.uint8)
        for name, array in (("images-idx3", images), ("labels-idx1", labels)):
            header = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes()
            (tmp_path / f"{prefix}-{name}-ubyte.gz").write_bytes(gzip.compress(header + array.tobytes()))
    return tmp_path


def test_full_fashion_mnist(published: Path):
    source = open_source("fashion_mnist", str(published), "test")
    assert len(source) == 25
    assert [source[index][1] for index in range(12)] == [*range(10), 0, 1]
    with pytest.raises(RearError, match="no split 'validation'; use one of: train, test"):
        open_source("fashion_mnist", str(published), "validation")


def test_embedded_set_is_built_reproducibly(published: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(fashion_mnist, "SUBSET_PER_CLASS", {"train": 2, "test": 1})
    targets = [published / "first.npz", published / "second.npz"]
    for target in targets:
        fashion_mnist.build_embedded(published, target)
    assert targets[0].read_bytes() == targets[1].read_bytes()
    full_images, _ = fashion_mnist.load_full(published, "train")
    with np.load(targets[0]) as arrays:
        np.testing.assert_array_equal(arrays["train_labels"], [*range(10), *range(10)])
        np.testing.assert_array_equal(arrays["train_images"], full_images[:20])
        np.testing.assert_array_equal(arrays["test_labels"], range(10))


def test_damaged_idx_files_are_named(published: Path):
    file = published / "train-images-idx3-ubyte.gz"
    whole = file.read_bytes()
    garbled = whole[:1000] + b"\xff" * 100 + whole[1100:]
    for damaged in (whole[:1000], garbled, gzip.compress(gzip.decompress(whole)[:1000]), b"no gzip at all"):
        file.write_bytes(damaged)
        with pytest.raises(RearError, match=r"train-images-idx3-ubyte\.gz"):
            open_source("fashion_mnist", str(published), "train")
    file.unlink()
    with pytest.raises(RearError, match=r"train-images-idx3-ubyte.gz is missing"):
        open_source("fashion_mnist", str(published), "train")


@pytest.mark.parametrize("split", ["train", ""])
def test_folder(folder: Path, split: str):
    source = open_source("folder", str(folder if split else folder / "train"), split)
    assert source.class_names == ("ant", "dog")
    assert source.num_classes == 2
    assert [source[index][1] for index in range(len(source))] == [0, 1, 1]
    np.testing.assert_array_equal(source[2][0], picture(0))  # dog/b.png, after dog/a.JPEG


def test_folder_converts_grey_and_transparent_pictures(folder: Path):
    (folder / "train" / "ant" / "z.png").write_bytes(encoded(np.full((5, 6), 9, np.uint8)))
    (folder / "train" / "dog" / "z.png").write_bytes(encoded(np.full((5, 6, 4), 9, np.uint8)))
    source = open_source("folder", str(folder), "train")
    assert source[0][0].shape == source[4][0].shape == (5, 6, 3)


def test_folder_errors_name_the_file(folder: Path):
    with pytest.raises(RearError, match="does not exist"):
        open_source("folder", str(folder / "nowhere"), "train")
    with pytest.raises(RearError, match="has no folder"):
        open_source("folder", str(folder), "validation")
    (folder / "empty").mkdir()
    with pytest.raises(RearError, match="holds no class folders"):
        open_source("folder", str(folder), "empty")
    (folder / "train" / "cat").mkdir()
    with pytest.raises(RearError, match=r"train/cat holds no \.png"):
        open_source("folder", str(folder), "train")


@pytest.mark.parametrize("damage", [b"", b"no picture", None])
def test_unreadable_picture_is_named(folder: Path, damage: bytes | None):
    file = folder / "train" / "dog" / "b.png"
    file.write_bytes(file.read_bytes()[:300] if damage is None else damage)
    batches = ordered_batches(open_source("folder", str(folder), "train"), image_size=8, batch_size=1)
    with pytest.raises(RearError, match=r"dog/b.png is not a readable image"):
        list(batches)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    builder = TinyPictures(data_dir=tmp_path_factory.mktemp("tfds"), file_format="array_record")
    builder.download_and_prepare()
    return Path(builder.data_dir)


def test_tfds(prepared: Path):
    source = open_source("tfds", str(prepared), "train")
    assert (source.name, source.num_classes, source.class_names) == ("tiny_pictures", 2, ("cat", "dog"))
    assert len(source) == 7
    for index in range(7):
        image, label = source[index]
        number = image.shape[0] - 20
        np.testing.assert_array_equal(image, picture(number))
        assert label == number % 2
    assert len(open_source("tfds", str(prepared), "train[:3]")) == 3


def test_tfds_by_name(prepared: Path):
    with pytest.raises(RearError, match=r"--dataset=tiny_pictures --data_dir=DIR`, or set TFDS_DATA_DIR"):
        open_source("tfds", "tiny_pictures", "train")
    tfds.core.add_data_dir(prepared.parent.parent)
    assert len(open_source("tfds", "tiny_pictures", "train")) == 7


def test_tfds_labels_must_be_classes(tmp_path: Path):
    builder = Counted(data_dir=tmp_path, file_format="array_record")
    builder.download_and_prepare()
    with pytest.raises(RearError, match="label is no ClassLabel but Scalar"):
        open_source("tfds", builder.data_dir, "train")


@pytest.mark.parametrize("name", ["dataset_info.json", "features.json", "*.array_record*"])
@pytest.mark.parametrize("content", [b"", b"[]", b"{}", b"\xff\xfe" * 5000, None])
def test_damaged_tfds_sets_are_told_in_one_line(prepared: Path, tmp_path: Path, name: str, content: bytes | None):
    place = shutil.copytree(prepared, tmp_path / "set")
    for file in place.glob(name):
        file.unlink() if content is None else file.write_bytes(content)

    def read():
        source = open_source("tfds", str(place), "train")
        return [source[index] for index in range(len(source))]

    with pytest.raises(RearError) as raised:
        read()
    assert str(raised.value).isprintable()


def test_tfds_errors(prepared: Path):
    for path in (str(prepared.parent), str(prepared / "nowhere"), "no_such_set", ""):
        with pytest.raises(RearError, match="neither a prepared TFDS version folder nor a TFDS name"):
            open_source("tfds", path, "train")
    with pytest.raises(RearError, match="cannot give split 'test'; it has: train"):
        open_source("tfds", str(prepared), "test")


def test_arrays(tmp_path: Path):
    images = np.stack([picture(0), picture(0)[::-1]])
    np.savez(
        tmp_path / "both.npz", images=images, test_images=images[:1], labels=[3, 0], test_labels=[2], num_classes=7
    )
    source = open_source("arrays", str(tmp_path / "both.npz"), "")
    assert (len(source), source.num_classes, source.name) == (2, 7, "both")
    np.testing.assert_array_equal(source[1][0], images[1])
    assert open_source("arrays", str(tmp_path / "both.npz"), "test")[0][1] == 2
    np.savez(tmp_path / "plain.npz", images=images[..., 0], labels=[3, 0])
    plain = open_source("arrays", str(tmp_path / "plain.npz"), "")
    assert plain.num_classes == 4
    assert plain[0][0].shape == images[0].shape


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        (
            {"images": np.zeros((2, 4, 4, 3), np.uint8)},
            "labels is not a file .*give an .npz with the arrays images and labels",
        ),
        ({"images": np.zeros((2, 4, 4, 3)), "labels": [0, 1]}, "wanted uint8"),
        ({"images": np.zeros((2, 4, 4, 3), np.uint8), "labels": [0]}, "one integer per image"),
        ({"images": np.zeros((0, 4, 4, 3), np.uint8), "labels": np.zeros(0, int)}, "holds no images"),
        ({"images": np.zeros((1, 4, 4, 3), np.uint8), "labels": [5], "num_classes": 5}, r"label 5 is outside \[0, 5\)"),
    ],
)
def test_arrays_that_do_not_fit_are_refused(tmp_path: Path, entries: dict, message: str):
    np.savez(tmp_path / "bad.npz", **entries)
    with pytest.raises(RearError, match=message):
        open_source("arrays", str(tmp_path / "bad.npz"), "")


def test_arrays_in_a_broken_file(tmp_path: Path):
    for content in (b"", b"nothing of the kind"):
        (tmp_path / "bad.npz").write_bytes(content)
        with pytest.raises(RearError, match=r"bad\.npz cannot be read .*give an \.npz"):
            open_source("arrays", str(tmp_path / "bad.npz"), "")


def test_ordered_batches_end_with_what_is_left(numbered: ImageSource):
    batches = list(ordered_batches(numbered, image_size=8, batch_size=4, start=1))
    assert [batch["label"].tolist() for batch in batches] == [[1, 2, 3, 4], [5, 6, 7, 8], [9]]
    np.testing.assert_array_equal(batches[0]["image"][2], numbered[3][0])
    assert {(name, array.dtype.name) for name, array in batches[2].items()} == {
        ("image", "uint8"),
        ("label", "int32"),
        ("augmentation", "int32"),
    }


def test_ordered_batches_keep_the_views_of_an_image_together(numbered: ImageSource):
    (batch,) = ordered_batches(numbered, image_size=8, batch_size=3, stop=2, augmentation="flip", num_threads=0)
    assert batch["label"].tolist() == [0, 0, 1, 1]
    assert batch["augmentation"].tolist() == [0, 1, 0, 1]
    np.testing.assert_array_equal(batch["image"][3], batch["image"][2][:, ::-1])


def test_ordered_batches_crop(prepared: Path):
    source = open_source("tfds", str(prepared), "train")
    (batch,) = ordered_batches(source, image_size=16, batch_size=7)
    np.testing.assert_array_equal(batch["image"][5], center_crop(source[5][0], 16))


def test_an_epoch_visits_every_image_once(numbered: ImageSource):
    batches = take(image_batches(numbered, image_size=8, augment="none", batch_size=5, seed=0), 4)
    first, second = (np.concatenate([b["label"] for b in half]) for half in (batches[:2], batches[2:]))
    np.testing.assert_array_equal(np.sort(first), np.arange(10))
    np.testing.assert_array_equal(np.sort(second), np.arange(10))
    assert (first != second).any()
    for batch in batches:
        np.testing.assert_array_equal(batch["image"][:, 3, 0, 1], batch["label"])


def test_flips_are_drawn_anew_in_every_epoch(numbered: ImageSource):
    batches = take(image_batches(numbered, image_size=8, augment="flip", batch_size=10, seed=0), 12)
    flipped = np.zeros(10, int)
    for batch in batches:
        flipped[batch["label"]] += batch["image"][:, 0, 0, 0] == 0
    assert ((flipped[1:] > 0) & (flipped[1:] < 12)).all()


@pytest.mark.parametrize("process_count", [1, 2, 4])
@pytest.mark.parametrize("num_threads", [0, 3])
def test_batches_depend_on_the_step_alone(numbered: ImageSource, process_count: int, num_threads: int):
    def batches(**rest):
        return image_batches(numbered, image_size=6, augment="crop_flip", batch_size=8, seed=5, **rest)

    whole = take(batches(), 6)
    shares = [
        take(batches(start_step=3, process_index=p, process_count=process_count, num_threads=num_threads), 3)
        for p in range(process_count)
    ]
    for step in range(3):
        for key in ("image", "label"):
            joined = np.concatenate([share[step][key] for share in shares])
            np.testing.assert_array_equal(joined, whole[3 + step][key])


def test_bad_requests(numbered: ImageSource):
    with pytest.raises(RearError, match="unknown augmentation 'mixup'; the known ones are: none, flip, crop_flip"):
        image_batches(numbered, image_size=8, augment="mixup", batch_size=4, seed=0)
    with pytest.raises(RearError, match="center, flip, ten_crop"):
        ordered_batches(numbered, image_size=8, batch_size=4, augmentation="twenty_crop")
    with pytest.raises(RearError, match="batch_size 5 does not divide among 2 processes"):
        image_batches(numbered, image_size=8, augment="none", batch_size=5, seed=0, process_count=2)
