"""Which classes are drawn and how many images of them, by number and by name, and the picture that shows them."""

import json

import numpy as np
import pytest
from PIL import Image

from rear_jax import jobs
from rear_jax.data.class_names import class_names, class_numbers, imagenet_names
from rear_jax.errors import RearError
from rear_jax.jobs import study, sweep
from rear_jax.runtime.mesh import make_mesh
from rear_jax.sampling import draw, sheet
from rear_jax.sampling.conditions import SCORED_SET, labels_of_classes, num_images, open_conditions
from tests import toy

IMAGENET = {"data__source": "tfds", "data__path": "imagenet2012", "data__num_classes": 1000}


def test_imagenets_names_are_a_thousand_different_ones_in_the_usual_order():
    names = imagenet_names()
    assert len({name.casefold() for name in names}) == 1000
    assert [names[number] for number in (0, 1, 207, 264, 360, 388, 474, 999)] == [
        "tench",
        "goldfish",
        "golden retriever",
        "Cardigan Welsh corgi",
        "otter",
        "giant panda",
        "cardigan",
        "toilet tissue",
    ]


@pytest.mark.parametrize(
    ("wanted", "numbers"),
    [
        ((207, 360), [207, 360]),
        (("golden retriever", "Otter"), [207, 360]),
        (("GOLDEN_RETRIEVER", 360), [207, 360]),
        (("golden-retriever,360, otter",), [207, 360, 360]),
        (("T-shirt",), None),
    ],
)
def test_classes_by_number_and_by_name(wanted, numbers):
    data = toy.config(**IMAGENET).data
    if numbers is None:
        with pytest.raises(
            RearError, match=r"no class is called 'T-shirt'\. The nearest: '.*' \(\d+\), '.*' \(\d+\), "
        ):
            class_numbers(wanted, data)
    else:
        assert class_numbers(wanted, data).tolist() == numbers


def test_an_unknown_name_is_one_line_with_the_nearest_ones():
    with pytest.raises(RearError) as refused:
        class_numbers(("goldne retriever",), toy.config(**IMAGENET).data)
    assert str(refused.value).startswith(
        "config.sample.classes: no class is called 'goldne retriever'. The nearest: 'golden retriever' (207), "
    )
    with pytest.raises(RearError, match=r"'retriever'.*The nearest: .*retriever"):
        class_numbers(("retriever",), toy.config(**IMAGENET).data)


def test_names_come_from_the_images_where_they_have_them(tmp_path):
    assert class_names(toy.config().data)[9] == "Ankle boot"
    for name in ("train/zebra", "train/ant"):
        (tmp_path / name).mkdir(parents=True)
    folder = {"data__source": "folder", "data__path": str(tmp_path), "data__train_split": "train"}
    assert class_names(toy.config(**folder).data) == ("ant", "zebra")
    assert class_numbers(("Zebra",), toy.config(**folder).data).tolist() == [1]
    for number in range(1000):
        (tmp_path / "wordnet" / f"n{number:08d}").mkdir(parents=True)
    ids = folder | {"data__path": str(tmp_path / "wordnet"), "data__train_split": "", "data__num_classes": 1000}
    assert class_names(toy.config(**ids).data) == imagenet_names()
    absent = toy.config(**folder | {"data__path": "/nowhere"}).data
    assert class_names(absent) == ()
    with pytest.raises(RearError, match=r"'zebra' is no number, and nothing tells the names of the classes"):
        class_numbers(("zebra",), absent)
    assert class_names(toy.config(**IMAGENET | {"data__path": "/data/imagenet2012/5.1.0"}).data)[207][:6] == "golden"


@pytest.mark.parametrize(
    ("changes", "labels"),
    [
        ({"num_images": 12}, [*range(10), 0, 1]),
        ({"classes": (7, 3), "images_per_class": 2, "num_images": 12}, [7, 7, 3, 3]),
        ({"classes": ("bag", "Ankle boot"), "images_per_class": 1}, [8, 9]),
        ({"num_images": 0, "images_per_class": 2}, [n // 2 for n in range(20)]),
    ],
)
def test_what_is_drawn(changes, labels, tmp_path):
    config = toy.config(**{f"sample__{key}": value for key, value in changes.items()})
    conditions = open_conditions(config, tmp_path, toy.generator(config))
    assert conditions.labels.tolist() == labels
    assert conditions.labels.dtype == np.int32
    assert num_images(config, toy.generator(config)) == len(labels)
    assert conditions.recipe.get("classes") == (
        None if changes.get("num_images") == 12 and len(changes) == 1 else [*dict.fromkeys(labels)]
    )


def test_a_look_at_many_classes_is_evenly_spread():
    labels = labels_of_classes(toy.config(sample__num_images=0, **IMAGENET))
    assert labels.tolist() == np.repeat(np.arange(0, 1000, 100), 8).tolist()


def test_a_set_that_is_scored_is_large(tmp_path, monkeypatch):
    """Of 'sample' alone it is a look; 'evaluate' in the same command, a sweep or a study ask for 50,000."""
    seen = []
    for name in ("sample", "evaluate"):
        monkeypatch.setitem(jobs.JOBS, name, jobs.Job(None, lambda config, *_: seen.append(config.sample.num_images)))
    config = toy.config(sample__num_images=0)
    jobs.check_all(("sample",), config, tmp_path)
    jobs.check_all(("sample", "evaluate"), config, tmp_path)
    jobs.check_all(("sample", "evaluate"), toy.config(), tmp_path)
    assert seen == [0, SCORED_SET, SCORED_SET, 24, 24]
    assert SCORED_SET == 50_000
    config.sweep.guidance_scale = (1.0, 2.0)
    assert [point.sample.num_images for point in sweep._points(config)] == [SCORED_SET] * 2
    assert study._plan(config, tmp_path, 1)[0].sample.num_images == SCORED_SET


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        ((10,), "there is no class 10: give 0 to 9"),
        (("boot",), r"no class is called 'boot'. The nearest: 'Ankle boot'"),
    ],
)
def test_classes_that_are_not_there_are_refused_before_any_work(trained, classes, message):
    with pytest.raises(RearError, match=message):
        jobs.JOBS["sample"].check(toy.config(sample__classes=classes), trained, ())


def test_a_generator_of_texts_takes_no_classes(tmp_path):
    config = toy.llamagen_config(condition="text", caption_length=3, caption_dim=4)
    config.sample.update(classes=(1,), prompt="a dog")
    with pytest.raises(RearError, match=r"config\.sample\.classes is set, and this generator takes text"):
        open_conditions(config, tmp_path, toy.generator(config))


def test_few_images_make_a_small_batch():
    config = toy.config()
    mesh = make_mesh(config.mesh)
    assert [draw.batch_size(config, count, mesh) for count in (3, 8, 20)] == [3, 8, 8]


@pytest.mark.parametrize(
    ("labels", "blocks", "size"),
    [
        (np.repeat([207, 360], 8), (2, 8), (8 * 65 - 1, 2 * (64 + 17) + 2)),  # a row for each class
        (np.arange(8), (8, 1), (8 * 66 - 2, 64 + 17)),  # one row, a caption under each image
        (np.arange(24) % 10, (10, 2), (5 * (129 + 2) - 2, 2 * (64 + 17) + 2)),  # five classes in a row
        (np.arange(5000) % 1000, (20, 5), (2 * (5 * 65 - 1) + 2, 10 * (64 + 17) + 9 * 2)),
    ],
)
def test_the_sheet_is_filled(labels, blocks, size):
    green = np.array([7, 200, 3], np.uint8)
    images = np.broadcast_to(green, (len(labels), 32, 32, 3))
    drawn = sheet.class_sheet(images, labels, imagenet_names())
    assert drawn.shape[1::-1] == size
    count, each = blocks
    assert (drawn == green).all(-1).sum() == count * each * 64 * 64
    assert (drawn.max(-1) < 100).sum() > 10 * count  # the ink of captions


def test_the_sheet_shows_classes_in_the_order_of_the_set():
    images = np.arange(4, dtype=np.uint8)[:, None, None, None] * np.ones((64, 64, 3), np.uint8)
    drawn = sheet.class_sheet(images, np.array([7, 7, 3, 3]))
    assert drawn[0, [0, 65, 131, 196], 0].tolist() == [0, 1, 2, 3]


def test_a_look_does_not_take_the_place_of_a_larger_set(trained, tmp_path):
    """Neither of one that is done, which will do, nor of one that is begun."""
    changes = {"tokenizer_from": str(trained / "tokenizer"), "init_from": str(trained / "generator")}
    few = changes | {"sample__num_images": 0, "sample__images_per_class": 1}
    toy.run(tmp_path, "sample", **few)
    recipe = json.loads((tmp_path / "samples.json").read_text())
    assert (recipe["num_images"], recipe["classes"]) == (10, list(range(10)))
    with Image.open(tmp_path / "samples.png") as picture:
        assert picture.size == (10 * 66 - 2, 64 + 17)
    toy.run(tmp_path, "sample", **changes)
    stamp = (tmp_path / "samples.npz").stat().st_mtime_ns
    toy.run(tmp_path, "sample", **few)
    assert (tmp_path / "samples.npz").stat().st_mtime_ns == stamp
    (tmp_path / "samples.partial").mkdir()
    (tmp_path / "samples.json").rename(tmp_path / "samples.partial" / "recipe.json")
    with pytest.raises(RearError, match=r"the beginning of 24 images, which 10 would replace"):
        toy.run(tmp_path, "sample", **few)
