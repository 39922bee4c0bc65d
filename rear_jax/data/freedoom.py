"""Freedoom scenes: small pictures with perspective, objects and textures, rendered from the game that vizdoom ships.

    python -m rear_jax.data.freedoom --output=freedoom

writes `freedoom/freedoom.npz`, which the source `arrays` reads, and `freedoom/freedoom.png`, a sheet to look at. The
class of a picture is its map, one of 68. The same seed gives the same pictures, bit for bit, with the same vizdoom.

A map lists its things: monsters, lamps, ammunition. The player is put in the place of a random one and looks in a
random direction. Frames of one place or of neighbours look alike, so places are held out, not frames: a map is divided
into squares, and all places in a square are of one split.

Source: the Freedoom project, https://freedoom.github.io, under its BSD licence; ViZDoom, arXiv 1605.02097.
"""

import argparse
import contextlib
import re
import struct
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import numpy as np
from PIL import Image
from tqdm import tqdm

from rear_jax.errors import RearError
from rear_jax.runtime.atomic import atomic_file
from rear_jax.runtime.pictures import grid, labelled, save_png

GAMES = ("freedoom1.wad", "freedoom2.wad")
MAP = re.compile(r"E[1-9]M[1-9]|MAP[0-9][0-9]")  # name of the lump that begins a map
HEADER, ENTRY = struct.Struct("<4sii"), struct.Struct("<ii8s")  # of a WAD: its directory; a lump's offset, size, name
THING = np.dtype([("x", "<i2"), ("y", "<i2"), ("angle", "<i2"), ("kind", "<i2"), ("flags", "<i2")])

SPLITS = ("train", "test")
SQUARE = 512  # map units along each side; a corridor is about 128 wide
HELD_OUT = 0.2  # share of a map's squares
GAMMA = 0.7  # exponent that lightens the frames
DULL = 14.0  # largest standard deviation, of 255, of a frame that is left out
MOST_TRIES = 20  # for each frame that is kept
EPISODE = 50  # frames until the map begins anew: a monster in whose place the player is put is gone for the rest
FIRST_TICS = 10  # of an episode, in which the player cannot turn
LARGEST = 240  # pixels along each side
SHEET_COLUMNS, SHEET_PER_MAP = 17, 2
SETTINGS = "+sv_cheats 1 +cl_showsecretmessage 0 +con_midtime 0 +con_notifytime 0"  # no text over the picture
CHEATS = ("god", "notarget", "noclip")  # unhurt, unseen, and nothing is picked up
HIDDEN = ("hud", "weapon", "crosshair", "messages", "particles", "decals", "screen_flashes")

View = Callable[[np.ndarray, float], np.ndarray]  # place [2] in map units, turn in degrees -> frame [S, S, 3]


class Map(NamedTuple):
    """A map of a game.

    Attributes:
      game: the WAD that it is in.
      name: such as 'E1M1' or 'MAP01'.
      places: int [n, 2], where its things stand, in map units.
    """

    game: Path
    name: str
    places: np.ndarray


def places_of_maps(wad: bytes, name: str) -> dict[str, np.ndarray]:
    """Where the things of each map in a WAD stand, int [n, 2] in map units, each place once and in order.

    Args:
      wad: the file's bytes.
      name: names it in messages.

    Raises RearError: it is no whole WAD, or a map in it has no things.
    """
    lumps, found = _lumps(wad, name), {}
    for number, (lump, _) in enumerate(lumps):
        if MAP.fullmatch(lump):
            after, content = lumps[number + 1] if number + 1 < len(lumps) else ("", b"")
            if after != "THINGS" or not content or len(content) % THING.itemsize:
                raise RearError(f"{name}: map {lump} has no list of things; install vizdoom again")
            things = np.frombuffer(content, THING)
            found[lump] = np.unique(np.stack([things["x"], things["y"]], axis=1).astype(int), axis=0)
    return found


def _lumps(wad: bytes, name: str) -> list[tuple[str, bytes]]:
    """Names and contents of what a WAD holds, in its order."""
    broken = RearError(f"{name} is no whole WAD file; install vizdoom again")
    try:
        magic, count, directory = HEADER.unpack_from(wad)
        entries = list(ENTRY.iter_unpack(wad[directory:][: count * ENTRY.size]))
    except struct.error:
        raise broken from None
    whole = all(min(start, size) >= 0 and start + size <= len(wad) for start, size, _ in entries)
    if magic not in (b"IWAD", b"PWAD") or directory < 0 or len(entries) != count or not whole:
        raise broken
    return [(raw.rstrip(b"\0").decode("latin-1"), wad[start : start + size]) for start, size, raw in entries]


def divide(places: np.ndarray, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Divides places [n, 2] into those of 'train' and of 'test': a share `HELD_OUT` of the squares is for tests.

    Raises RearError: all are in one square.
    """
    squares, square_of = np.unique(places // SQUARE, axis=0, return_inverse=True)
    if len(squares) < 2:
        raise RearError(f"all {len(places)} places of a map are in one square of {SQUARE} units: none can be held out")
    held_out = rng.permutation(len(squares))[: max(1, round(HELD_OUT * len(squares)))]
    test = np.isin(square_of.reshape(-1), held_out)
    return {"train": places[~test], "test": places[test]}


def is_dull(frame: np.ndarray) -> bool:
    """Whether next to nothing is to be seen in a uint8 frame, as in the dark or in front of a plain wall."""
    return float(frame.std()) <= DULL


def finished(screen: np.ndarray, size: int) -> np.ndarray:
    """The middle of a uint8 screen [H, W, 3], W >= H, made lighter and `size` pixels along each side."""
    height, width, _ = screen.shape
    left = (width - height) // 2
    curve = (255 * (np.arange(256) / 255) ** GAMMA).astype(np.uint8)
    square = Image.fromarray(curve[screen[:, left : left + height]])
    return np.asarray(square.resize((size, size), Image.Resampling.BOX))


def frames(view: View, places: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    """`count` frames near random places, uint8 [count, S, S, 3]; dull ones are drawn again.

    Raises RearError: nearly all are dull.
    """
    kept: list[np.ndarray] = []
    for _ in range(MOST_TRIES * count):
        frame = view(places[rng.integers(len(places))], float(rng.uniform(-180, 180)))
        if not is_dull(frame):
            kept.append(frame)
        if len(kept) == count:
            return np.stack(kept)
    raise RearError(f"only {len(kept)} of {MOST_TRIES * count} frames are not dull; choose another --seed")


class Player:
    """Looks around in a map; a context manager, which runs the game in a temporary folder, as the game writes there."""

    def __init__(self, vizdoom: ModuleType, scene: Map, size: int, seed: int):
        self._size, self._stack, self._left = size, contextlib.ExitStack(), 0
        self._game = game = vizdoom.DoomGame()
        game.set_doom_game_path(str(scene.game))
        game.set_doom_map(scene.name)
        resolutions = vizdoom.ScreenResolution
        game.set_screen_resolution(resolutions.RES_160X120 if size <= 120 else resolutions.RES_320X240)
        game.set_screen_format(vizdoom.ScreenFormat.RGB24)
        game.set_window_visible(False)
        game.set_sound_enabled(False)
        game.set_mode(vizdoom.Mode.PLAYER)
        for part in HIDDEN:
            getattr(game, f"set_render_{part}")(False)
        game.set_available_buttons([vizdoom.Button.TURN_LEFT_RIGHT_DELTA])
        game.add_game_args(SETTINGS)
        game.set_seed(seed)

    def __enter__(self) -> "Player":
        self._stack.enter_context(contextlib.chdir(self._stack.enter_context(tempfile.TemporaryDirectory())))
        self._stack.callback(self._game.close)
        self._game.init()
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def begin(self) -> None:
        """Starts the map anew, with all its things."""
        self._game.new_episode()
        for command in CHEATS:
            self._game.send_game_command(command)
        self._game.make_action([0.0], FIRST_TICS)
        self._left = EPISODE

    def view(self, place: np.ndarray, turn: float) -> np.ndarray:
        """Puts the player at `place` [2], in map units, turns him by `turn` degrees, and gives the frame [S, S, 3]."""
        if not self._left or self._game.is_episode_finished():
            self.begin()
        self._left -= 1
        self._game.send_game_command(f"warp {place[0]} {place[1]}")
        self._game.make_action([turn])
        state = self._game.get_state()  # None where the player has just left the map
        screen = np.zeros((self._size, self._size, 3), np.uint8) if state is None else state.screen_buffer
        return finished(screen, self._size)


def _import_vizdoom() -> ModuleType:
    try:
        import vizdoom
    except ImportError:
        raise RearError("Freedoom scenes need the package vizdoom: pip install vizdoom==1.3.2") from None
    return vizdoom


def maps_of(folder: Path) -> list[Map]:
    """The maps of both games in vizdoom's folder: the position of a map is its class.

    Raises RearError: a game is missing or damaged.
    """
    found = []
    for name in GAMES:
        game = folder / name
        if not game.is_file():
            raise RearError(f"{game} is missing: install vizdoom again, version 1.3.2")
        found += [Map(game, one, places) for one, places in places_of_maps(game.read_bytes(), name).items()]
    return found


def render(scene: Map, label: int, counts: dict[str, int], size: int, seed: int) -> dict[str, np.ndarray]:
    """Frames of one map, for each split uint8 [count, S, S, 3]; they depend on no other map.

    Args:
      scene: the map.
      label: its class.
      counts: number of frames in each split.
      size: S, pixels along each side.
      seed: with another one, other places are held out.

    Raises RearError: vizdoom is not installed, or nearly all of the map is dull.
    """
    vizdoom = _import_vizdoom()
    rng = np.random.default_rng((seed, label))
    places, made = divide(scene.places, rng), {}
    with Player(vizdoom, scene, size, seed) as player:
        for split in SPLITS:
            player.begin()
            made[split] = frames(player.view, places[split], counts[split], rng)
    return made


def build(output: Path, counts: dict[str, int], size: int, seed: int) -> None:
    """Renders all maps; writes `freedoom.npz` for the source `arrays`, and the sheet `freedoom.png`.

    Args:
      output: folder for both files.
      counts: number of frames of each map in each split.
      size: pixels along each side of a frame.
      seed: of places, directions and the game.

    Raises RearError: as `render`, or a number is out of its range.
    """
    if min(counts.values()) < 1 or not 8 <= size <= LARGEST or not 0 <= seed < 2**31:
        raise RearError(f"choose 1 or more images of each map, --size from 8 to {LARGEST}, --seed from 0 to 2147483647")
    scenes = maps_of(Path(_import_vizdoom().__file__).parent)
    output.mkdir(parents=True, exist_ok=True)
    arrays = {}
    for split in SPLITS:
        arrays[f"{split}_images"] = np.zeros((len(scenes), counts[split], size, size, 3), np.uint8)
        arrays[f"{split}_labels"] = np.repeat(np.arange(len(scenes)), counts[split])
    for label, scene in enumerate(tqdm(scenes, unit="map")):
        for split, images in render(scene, label, counts, size, seed).items():
            arrays[f"{split}_images"][label] = images
    examples = arrays["train_images"][:, :SHEET_PER_MAP]
    for split in SPLITS:
        arrays[f"{split}_images"] = arrays[f"{split}_images"].reshape(-1, size, size, 3)
        print(f"{split}: {len(arrays[f'{split}_images'])} images, {counts[split]} of each of {len(scenes)} maps")
    with atomic_file(output / "freedoom.npz") as temporary, temporary.open("wb") as file:
        np.savez_compressed(file, num_classes=np.array(len(scenes)), **arrays)
    names = np.repeat([scene.name for scene in scenes], examples.shape[1])
    save_png(output / "freedoom.png", grid(labelled(examples.reshape(-1, size, size, 3), names), SHEET_COLUMNS))
    print(f"wrote {output / 'freedoom.npz'} and {output / 'freedoom.png'}")


def main(arguments: list[str]) -> int:
    """Reads the flags and renders; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m rear_jax.data.freedoom", description="Render Freedoom scenes.")
    parser.add_argument("--output", type=Path, required=True, help="folder for freedoom.npz and freedoom.png")
    parser.add_argument("--images", type=int, default=300, help="training images of each of the 68 maps")
    parser.add_argument("--test_images", type=int, default=75, help="held-out images of each map")
    parser.add_argument("--size", type=int, default=64, help="pixels along each side")
    parser.add_argument("--seed", type=int, default=0, help="of places, directions and the game")
    given = parser.parse_args(arguments)
    try:
        build(given.output, {"train": given.images, "test": given.test_images}, given.size, given.seed)
    except RearError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
