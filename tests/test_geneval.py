"""GenEval and HPSv2: folders for their scorers, written whole or not at all, and the scores that GenEval's writes."""

import json
import re

import numpy as np
import pytest
from PIL import Image

from rear_jax.data.prompts import Prompt, read_prompts
from rear_jax.errors import RearError
from rear_jax.evaluation import geneval, hpsv2
from rear_jax.evaluation.geneval import PUBLISHED, TASKS, markdown, read_results, write_folder

LINES = [
    {"tag": "single_object", "include": [{"class": "dog", "count": 1}], "prompt": "a photo of a dog"},
    {
        "tag": "counting",
        "include": [{"class": "bär", "count": 2}],
        "exclude": [{"class": "bär", "count": 3}],
        "prompt": "a photo of two bärs",
    },
    {
        "tag": "position",
        "include": [{"class": "teddy bear", "count": 1}, {"class": "dog", "count": 1, "position": ["right of", 0]}],
        "prompt": "a photo of a dog right of a teddy bear",
    },
]


@pytest.fixture
def prompts(tmp_path):
    file = tmp_path / "evaluation_metadata.jsonl"
    file.write_text("\n".join(json.dumps(line, ensure_ascii=False) for line in LINES), encoding="utf-8")
    return read_prompts(file)


def images(count=12, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, 8, 8, 3), np.uint8)


def scorer_reads(folder):
    """Folder -> metadata and images, found as the official script finds them."""
    found = {}
    for place in folder.iterdir():
        if not place.is_dir() or not place.name.isdigit():
            continue
        metadata = json.loads((place / "metadata.jsonl").read_text())
        pictures = sorted(file for file in (place / "samples").iterdir() if re.match(r"\d+\.png", file.name))
        found[place.name] = metadata, np.stack([np.asarray(Image.open(file)) for file in pictures])
    return found


def test_the_scorer_finds_what_was_drawn(prompts, tmp_path):
    drawn = images()
    assert write_folder(tmp_path / "geneval", prompts, drawn, 4) == 3
    found = scorer_reads(tmp_path / "geneval")
    assert sorted(found) == ["00000", "00001", "00002"]
    for number, line in enumerate(LINES):
        metadata, stored = found[f"{number:05d}"]
        assert metadata == line
        np.testing.assert_array_equal(stored, drawn[4 * number : 4 * number + 4])
    files = {str(file.relative_to(tmp_path / "geneval" / "00001")) for file in tmp_path.glob("geneval/00001/**/*.*")}
    assert files == {"metadata.jsonl", "grid.png", *(f"samples/000{i}.png" for i in range(4))}
    assert (tmp_path / "geneval/00001/metadata.jsonl").read_text(encoding="utf-8") == prompts[1].metadata + "\n"
    with Image.open(tmp_path / "geneval" / "00000" / "grid.png") as grid:
        np.testing.assert_array_equal(np.asarray(grid)[9:, :8], drawn[2])


def spoil_image(place):
    (place / "samples" / "0002.png").write_bytes(b"\x89PNG")


def spoil_metadata(place):
    (place / "metadata.jsonl").write_text("{}")


@pytest.mark.parametrize(
    "spoil",
    [
        lambda place: (place / "samples" / "0002.png").unlink(),
        lambda place: (place / "samples" / "0004.png").write_bytes((place / "samples" / "0000.png").read_bytes()),
        lambda place: (place / "metadata.jsonl").unlink(),
        lambda place: (place / "grid.png").unlink(),
        lambda place: (place / "samples" / "0002.png").rename(place / "samples" / "0000.png"),
        lambda place: Image.fromarray(images(1, seed=9)[0]).save(place / "samples" / "0001.png"),
        spoil_image,
        spoil_metadata,
    ],
)
def test_what_is_complete_is_kept_and_what_is_not_is_redone(prompts, tmp_path, spoil):
    folder, drawn = tmp_path / "geneval", images()
    write_folder(folder, prompts, drawn, 4)
    assert write_folder(folder, prompts, drawn, 4) == 0
    spoil(folder / "00001")
    times = {n: (folder / n / "samples" / "0000.png").stat().st_ino for n in ("00000", "00002")}
    assert write_folder(folder, prompts, iter(drawn), 4) == 1
    assert {n: (folder / n / "samples" / "0000.png").stat().st_ino for n in times} == times
    np.testing.assert_array_equal(scorer_reads(folder)["00001"][1], drawn[4:8])


def test_an_interrupted_set_goes_on(prompts, tmp_path, monkeypatch):
    folder, drawn, save = tmp_path / "geneval", images(), geneval.pictures.save_png

    def full_disk(path, image):
        if "00001" in str(path):
            raise OSError("no space left on device")
        save(path, image)

    monkeypatch.setattr(geneval.pictures, "save_png", full_disk)
    with pytest.raises(OSError, match="no space"):
        write_folder(folder, prompts, drawn, 4)
    monkeypatch.setattr(geneval.pictures, "save_png", save)
    assert list(scorer_reads(folder)) == ["00000"]  # nothing of the prompt that was being written
    assert (folder / "00001.tmp").exists()
    assert write_folder(folder, prompts, drawn, 4) == 2
    assert sorted(place.name for place in folder.iterdir()) == ["00000", "00001", "00002"]


def test_another_set_replaces_the_first(prompts, tmp_path):
    folder = tmp_path / "geneval"
    write_folder(folder, prompts, images(), 4)
    (folder / "00007.tmp").mkdir()
    (folder / "results.jsonl").write_text("kept")
    other = images(4, seed=1)
    assert write_folder(folder, prompts[:2], other, 2) == 2
    assert sorted(place.name for place in folder.iterdir()) == ["00000", "00001", "results.jsonl"]
    np.testing.assert_array_equal(scorer_reads(folder)["00001"][1], other[2:])


@pytest.mark.parametrize(("count", "message"), [(11, "there are 11 images for 3 prompts"), (13, "more images than 3")])
def test_images_and_prompts_must_agree(prompts, tmp_path, count, message):
    with pytest.raises(RearError, match=message):
        write_folder(tmp_path / "geneval", prompts, images(count), 4)


def test_other_sets_than_the_benchmark_are_told(prompts, caplog):
    geneval.check_prompts(prompts, 2)
    assert "3 prompts (single_object 1, two_object 0, counting 1" in caplog.text
    assert "2 images a prompt" in caplog.text
    caplog.clear()
    full = [Prompt("x", tag, json.dumps(LINES[0] | {"tag": tag})) for tag, count in TASKS.items() for _ in range(count)]
    assert len(full) == 553
    geneval.check_prompts(full, 4)
    assert caplog.text == ""


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tag": "colour"}, "has the tag 'colour', not one of single_object"),
        ({"tag": ["colors"]}, "has the tag"),
        ({"include": []}, "include is no list of clauses"),
        ({"include": {"class": "dog"}}, "include is no list of clauses"),
        ({"exclude": 3}, "exclude is no list of clauses"),
        ({"include": ["dog"]}, r"include\[0\] names no class"),
        ({"include": [{"class": "dog"}]}, r"include\[0\] has no count"),
        ({"include": [{"class": "dog", "count": True}]}, r"include\[0\] has no count"),
        ({"exclude": [{"class": "dog", "count": 0}]}, r"exclude\[0\] has no count"),
        ({"include": [{"class": "dog", "count": 1, "color": 3}]}, "has a color that is no text"),
        ({"include": [{"class": "dog", "count": 1, "position": ["above", 0]}]}, "number of an earlier clause"),
        ({"include": [{"class": "dog", "count": 1, "position": "above"}]}, "number of an earlier clause"),
    ],
)
def test_metadata_that_the_scorer_cannot_use(changes, message):
    good = Prompt("a photo of a dog", "single_object", json.dumps(LINES[0]))
    bad = good._replace(metadata=json.dumps(LINES[0] | changes))
    with pytest.raises(RearError, match=rf"GenEval's metadata, line 2.* {message}") as refused:
        geneval.check_prompts([good, bad], 4)
    assert "\n" not in str(refused.value)


def test_prompts_without_metadata_are_refused():
    with pytest.raises(RearError, match=r"line 1 is no line of GenEval .* give its evaluation_metadata.jsonl"):
        geneval.check_prompts([Prompt("a dog")], 4)


def results(path, marks):
    """A file as the scorer writes it: slashes with backslashes, as pandas has them."""
    lines, number = [], 0
    for tag, corrects in marks.items():
        for correct in corrects:
            name = f"DIR/{number // 4:05d}/samples/{number % 4:04d}.png"
            line = {"filename": name, "tag": tag, "prompt": "x", "correct": correct, "reason": "", "metadata": "{}"}
            lines.append(json.dumps(line | {"details": '{"dog":[[0,0,1,1,0.9]]}'}).replace("/", "\\/"))
            number += 1
    path.write_text("\n".join(lines) + "\n")
    return path


MARKS = {
    "position": [True, False, False, False],
    "single_object": [True] * 4,
    "two_object": [True, True, False, False],
    "counting": [False] * 8,
    "colors": [True] * 3 + [False],
    "color_attr": [True, False] * 4,
}


def test_the_overall_score_is_the_mean_of_the_tasks(tmp_path):
    scores = read_results(results(tmp_path / "results.jsonl", MARKS))
    assert list(scores.tasks.items()) == [
        ("single_object", 1.0),
        ("two_object", 0.5),
        ("counting", 0.0),
        ("colors", 0.75),
        ("position", 0.25),
        ("color_attr", 0.5),
    ]
    assert scores.overall == 0.5  # of images, 15 of 32 are right
    assert (scores.images, scores.prompts) == (32, 8)


def test_the_table_stands_beside_published_scores(tmp_path, capsys):
    assert geneval.main([str(results(tmp_path / "mine.jsonl", MARKS))]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "| model | overall | single object | two object | counting | colors | position | color attr |"
    assert lines[2] == "| mine | 0.500 | 1.000 | 0.500 | 0.000 | 0.750 | 0.250 | 0.500 |"
    assert lines[5] == "| LlamaGen-XL + VA-π [1] | 0.339 |  | 0.328† | 0.238† | 0.606† |  |  |"
    assert "mine: 32 images of 8 prompts." in lines
    assert "The published scores are of 553 prompts with 4 images each." in lines
    assert all(line.count("|") == 9 for line in lines[: 3 + len(PUBLISHED)])


def test_published_rows_that_are_whole_have_their_mean():
    whole = [(float(total.rstrip("†")), tasks) for _, total, tasks in PUBLISHED if len(tasks) == 6]
    assert len(whole) == 2
    for total, tasks in whole:
        assert abs(np.mean([float(value.rstrip("†")) for value in tasks.values()]) - total) <= 0.0051


def test_a_missing_task_is_named(tmp_path):
    scores = read_results(results(tmp_path / "r.jsonl", {tag: MARKS[tag] for tag in ("colors", "counting")}))
    assert scores.overall is None
    text = markdown(scores, "mine")
    assert "| mine |  |  |  | 0.000 | 0.750 |  |  |" in text
    assert "single_object, two_object, position, color_attr lack images" in text


GOOD = {"filename": "DIR/00000/samples/0000.png", "tag": "colors", "correct": True}


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([], "holds no results"),
        ([GOOD, {"filename": "x", "correct": True, "why": 1}], "line 2 lacks tag: it has 'filename', 'correct', 'why'"),
        ([{}], "line 1 lacks filename, tag, correct: it has none"),
        ([GOOD | {"tag": "hue"}], "line 1 has the tag 'hue'"),
        ([GOOD | {"correct": "yes"}], "line 1: correct is 'yes', not true or false"),
        ([GOOD | {"correct": 1}], "line 1: correct is '1'"),
        ([GOOD, GOOD], "line 2 scores 'DIR/00000/samples/0000.png' again"),
        ([3], "line 1 is a int, not a JSON object"),
    ],
)
def test_results_that_are_none_are_refused(tmp_path, lines, message):
    file = tmp_path / "results.jsonl"
    file.write_text("\n".join(map(json.dumps, lines)))
    with pytest.raises(RearError, match=message):
        read_results(file)


def test_the_command_tells_faults_in_one_line(tmp_path, capsys):
    assert geneval.main([str(tmp_path / "none.jsonl")]) == 1
    told = capsys.readouterr().err
    assert told.startswith("error: There is no file")
    assert told.count("\n") == 1
    assert geneval.main([]) == 2


STYLED = [Prompt("a cow", "anime"), Prompt("a dog", "photo"), Prompt("a cat", "photo")]


def jpegs(folder):
    """Name -> bytes of every file below a folder."""
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_images_of_a_style_are_numbered_in_it(tmp_path):
    folder, drawn = tmp_path / "hpsv2", images(3)
    assert hpsv2.write_folder(folder, STYLED, drawn) == 3
    found = jpegs(folder)
    assert sorted(found) == ["anime/00000.jpg", "photo/00000.jpg", "photo/00001.jpg"]
    for name, image in zip(sorted(found), drawn, strict=True):
        Image.fromarray(image).save(tmp_path / "expected.jpg")
        assert found[name] == (tmp_path / "expected.jpg").read_bytes()


def test_files_of_hpsv2_are_kept_or_redone(tmp_path):
    folder, drawn = tmp_path / "hpsv2", images(3)
    hpsv2.write_folder(folder, STYLED, drawn)
    before = jpegs(folder)
    assert hpsv2.write_folder(folder, STYLED, iter(drawn)) == 0
    (folder / "photo" / "00000.jpg").write_bytes(b"half")
    (folder / "photo" / "00007.jpg").write_bytes(b"of an earlier set")
    (folder / "photo" / "00000.jpg.tmp0").write_bytes(b"half")
    (folder / "paintings").mkdir()
    assert hpsv2.write_folder(folder, STYLED, drawn) == 1
    assert jpegs(folder) == before
    assert sorted(place.name for place in folder.iterdir()) == ["anime", "photo"]


@pytest.mark.parametrize("count", [2, 4])
def test_hpsv2_wants_an_image_for_each_prompt(tmp_path, count):
    with pytest.raises(RearError, match="not one image for each of 3 prompts"):
        hpsv2.write_folder(tmp_path / "hpsv2", STYLED, images(count))


def test_prompts_of_no_style_are_refused_and_fewer_are_told(caplog):
    with pytest.raises(RearError, match=r"prompt 4 \('a fox'\) is of no style of HPSv2: .* anime.json"):
        hpsv2.check_prompts([*STYLED, Prompt("a fox")])
    hpsv2.check_prompts(STYLED)
    assert "3 prompts (anime 1, concept-art 0, paintings 0, photo 2), the benchmark has 800 of each" in caplog.text
