"""Freedoom scenes: what is read of a game, which places are held out, which frames stay, and what is written."""

import contextlib
import struct
import sys
import types
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from rear_jax.config.experiments import freedoom as experiment
from rear_jax.data import freedoom
from rear_jax.data.sources import open_split
from rear_jax.errors import RearError

COUNTS = {"train": 3, "test": 2}


def things(*places: tuple[int, int]) -> bytes:
    return b"".join(struct.pack("<5h", x, y, 90, 3001, 7) for x, y in places)


def wad(*lumps: tuple[str, bytes]) -> bytes:
    """A game of these lumps, in their order."""
    body = b"".join(content for _, content in lumps)
    starts = 12 + np.cumsum([0, *(len(content) for _, content in lumps)])
    entries = [
        struct.pack("<ii8s", start, len(content), name.encode())
        for start, (name, content) in zip(starts, lumps, strict=False)
    ]
    return struct.pack("<4sii", b"IWAD", len(lumps), 12 + len(body)) + body + b"".join(entries)


SPREAD = things((0, 0), (600, 0), (0, 600), (-600, 0), (1200, 1200))
GAME = wad(("PLAYPAL", b"colours"), ("MAP01", b""), ("THINGS", SPREAD), ("MAP02", b""), ("THINGS", SPREAD))


def noise(place: np.ndarray, turn: float) -> np.ndarray:
    """A frame that tells from where it was taken."""
    return np.random.default_rng((abs(hash((*place.tolist(), turn))),)).integers(0, 256, (8, 8, 3), np.uint8)


def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def test_places_are_read_of_each_map():
    game = wad(
        ("PLAYPAL", b"colours"),
        ("E1M1", b""),
        ("THINGS", things((5, -7), (-32768, 32767), (5, -7))),
        ("THINGS", b"of no map"),
        ("MAP31", b""),
        ("THINGS", things((1, 2))),
    )
    found = freedoom.places_of_maps(game, "game")
    assert {name: places.tolist() for name, places in found.items()} == {
        "E1M1": [[-32768, 32767], [5, -7]],
        "MAP31": [[1, 2]],
    }


@pytest.mark.parametrize(
    "broken",
    [
        b"",
        b"ZIP " + GAME[4:],
        GAME[:-1],
        GAME[:40],
        GAME[:4] + struct.pack("<i", -1) + GAME[8:],
        GAME[:8] + struct.pack("<i", -16) + GAME[12:],
        GAME[:-16] + struct.pack("<ii", 12, len(GAME)) + GAME[-8:],
        GAME[:-16] + struct.pack("<ii", -12, 4) + GAME[-8:],
    ],
)
def test_a_damaged_game_is_refused(broken):
    with pytest.raises(RearError, match=r"^x\.wad is no whole WAD file; install vizdoom again$"):
        freedoom.places_of_maps(broken, "x.wad")


@pytest.mark.parametrize(
    "lumps",
    [
        [("MAP01", b"")],
        [("MAP01", b""), ("LINEDEFS", SPREAD)],
        [("MAP01", b""), ("THINGS", b"")],
        [("MAP01", b""), ("THINGS", SPREAD[1:])],
    ],
)
def test_a_map_without_things_is_refused(lumps):
    with pytest.raises(RearError, match="map MAP01 has no list of things"):
        freedoom.places_of_maps(wad(*lumps), "x.wad")


def test_squares_are_held_out_whole():
    places = rng().integers(-3000, 3000, (400, 2))
    parts = freedoom.divide(places, rng())
    squares = {split: {tuple(one) for one in (part // freedoom.SQUARE).tolist()} for split, part in parts.items()}
    assert sorted(np.concatenate(list(parts.values())).tolist()) == sorted(places.tolist())
    assert not squares["train"] & squares["test"]
    share = len(squares["test"]) / len(squares["train"] | squares["test"])
    assert share == pytest.approx(freedoom.HELD_OUT, abs=0.01)
    assert np.array_equal(parts["test"], freedoom.divide(places, rng())["test"])
    assert not np.array_equal(parts["test"], freedoom.divide(places, np.random.default_rng(1))["test"])


def test_at_least_one_square_is_held_out_and_one_is_not():
    parts = freedoom.divide(np.array([[0, 0], [-1, 0]]), rng())
    assert {len(part) for part in parts.values()} == {1}
    with pytest.raises(RearError, match="all 2 places of a map are in one square"):
        freedoom.divide(np.array([[0, 0], [511, 511]]), rng())


def test_dull_frames_are_those_of_little_contrast():
    frame = np.full((8, 8, 3), 100, np.uint8)
    assert freedoom.is_dull(frame)
    frame[:4] += 28  # a standard deviation of 14
    assert freedoom.is_dull(frame)
    frame[:4] += 1
    assert not freedoom.is_dull(frame)


def test_the_middle_of_the_screen_is_lightened_and_made_small():
    screen = np.zeros((12, 16, 3), np.uint8)
    screen[:, :2] = screen[:, 14:] = 255  # the margins, which are cut off
    screen[:6, 2:8] = 255
    screen[6:, 8:14] = 64
    image = freedoom.finished(screen, 2)
    assert image.tolist() == [[[255] * 3, [0] * 3], [[0] * 3, [int(255 * (64 / 255) ** 0.7)] * 3]]
    assert freedoom.finished(screen, 1)[0, 0, 0] == pytest.approx((255 + 255 * (64 / 255) ** 0.7) / 4, abs=1)


def test_dull_frames_are_drawn_again():
    seen = []

    def every_other(place, turn):
        seen.append((tuple(place), turn))
        return noise(place, turn) if len(seen) % 2 else np.zeros((8, 8, 3), np.uint8)

    places = np.array([[0, 0], [9, 9]])
    made = freedoom.frames(every_other, places, 4, rng())
    assert made.shape == (4, 8, 8, 3)
    assert len(seen) == 7
    assert {place for place, _ in seen} <= {(0, 0), (9, 9)}
    assert all(-180 <= turn < 180 for _, turn in seen)
    assert not any(freedoom.is_dull(frame) for frame in made)


def test_a_map_in_the_dark_ends_it():
    with pytest.raises(RearError, match="only 0 of 40 frames are not dull"):
        freedoom.frames(lambda place, turn: np.zeros((8, 8, 3), np.uint8), np.zeros((3, 2), int), 2, rng())


class Noise(contextlib.nullcontext):
    """In the place of a player: wherever it looks, there is noise."""

    def __init__(self, vizdoom: object, scene: freedoom.Map, size: int, seed: int):
        super().__init__(self)
        assert size == 8

    def begin(self) -> None:
        pass

    view = staticmethod(noise)


@pytest.fixture
def games(tmp_path, monkeypatch) -> Path:
    """A folder with two small games in the place of vizdoom's, whose maps show noise."""
    folder = tmp_path / "vizdoom"
    folder.mkdir()
    for name in freedoom.GAMES:
        (folder / name).write_bytes(GAME)

    module = types.SimpleNamespace(__file__=str(folder / "__init__.py"))
    monkeypatch.setattr(freedoom, "_import_vizdoom", lambda: module)
    monkeypatch.setattr(freedoom, "Player", Noise)
    return folder


def test_the_source_reads_what_is_written(games, tmp_path, capsys):
    flags = ["--images=3", "--test_images=2", "--size=8", "--seed=1"]
    assert freedoom.main([f"--output={tmp_path / 'out'}", *flags]) == 0
    assert "train: 12 images, 3 of each of 4 maps\ntest: 8 images, 2 of each of 4 maps\n" in capsys.readouterr().out
    data = experiment().data
    data.update(path=str(tmp_path / "out" / "freedoom.npz"), image_size=8, num_classes=4)
    for split, count in COUNTS.items():
        source = open_split(data, split)
        assert [label for _, label in source] == [label for label in range(4) for _ in range(count)]
        assert source.num_classes == 4
        assert {image.shape for image, _ in source} == {(8, 8, 3)}
    with Image.open(tmp_path / "out" / "freedoom.png") as sheet:
        assert sheet.size[0] == freedoom.SHEET_COLUMNS * 65 - 1


@pytest.mark.parametrize("flag", ["--images=0", "--test_images=0", "--size=241", "--size=7", "--seed=-1"])
def test_numbers_out_of_range_are_refused(flag, games, tmp_path, capsys):
    assert freedoom.main([f"--output={tmp_path / 'out'}", flag]) == 1
    assert capsys.readouterr().err.startswith("error: choose 1 or more images of each map, --size from 8 to 240")
    assert not (tmp_path / "out").exists()


def test_a_missing_game_is_named(games, tmp_path, capsys):
    (games / "freedoom2.wad").unlink()
    assert freedoom.main([f"--output={tmp_path / 'out'}"]) == 1
    assert "freedoom2.wad is missing: install vizdoom again" in capsys.readouterr().err


def test_without_vizdoom_one_line_says_what_to_install(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "vizdoom", None)
    assert freedoom.main([f"--output={tmp_path / 'out'}"]) == 1
    error = capsys.readouterr().err
    assert error == "error: Freedoom scenes need the package vizdoom: pip install vizdoom==1.3.2\n"
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_the_same_seed_gives_the_same_frames(tmp_path, monkeypatch):
    reason = "the scenes are rendered by vizdoom: pip install vizdoom==1.3.2"
    vizdoom = pytest.importorskip("vizdoom", reason=reason)
    monkeypatch.chdir(tmp_path)
    scenes = freedoom.maps_of(Path(vizdoom.__file__).parent)
    assert len(scenes) == experiment().data.num_classes
    counts = {"train": 60, "test": 5}  # more than an episode has
    for label in (0, 40):
        first, again, other = (freedoom.render(scenes[label], label, counts, 64, seed) for seed in (3, 3, 4))
        for split, count in counts.items():
            assert first[split].shape == (count, 64, 64, 3)
            assert first[split].tobytes() == again[split].tobytes()
            assert len(np.unique(first[split], axis=0)) == count  # none stands still
            assert not np.array_equal(first[split], other[split])
    assert list(tmp_path.iterdir()) == []
