"""The header of a folder of codes: what it holds, and whether that is what is wanted."""

import dataclasses
import itertools
import json
from pathlib import Path
from typing import Any

from rear_jax.errors import RearError

FORMAT_VERSION = 1
HEADER = "header.json"
UNFINISHED_HEADER = "header.json.partial"
LIMIT = 2**16  # what a uint16 counts
LIMITS = {
    **dict.fromkeys(("codebook_size", "num_augmentations", "codes_per_image", "num_shards"), LIMIT),
    "num_classes": LIMIT**2,
    "num_images": LIMIT**3,
}


@dataclasses.dataclass(frozen=True)
class CodesHeader:
    """What a folder of codes holds.

    Attributes:
      num_images: n, before augmentation.
      num_augmentations: A, views per image.
      augmentation: their name, a key of `crops.AUGMENTATIONS`; 'imported' where the codes came without one.
      codes_per_image: N.
      codebook_size: K; codes are in [0, K).
      image_size: side in pixels of the square views that were encoded.
      num_classes: labels are in [0, num_classes).
      fingerprint: identifies the tokenizer and its weights.
      source: name of the image source.
      split: which split of it.
      num_shards: S.
      dtype, precision: in which the tokenizer multiplied, see `runtime.precision`; '' where nobody said.
      images: the `contents` of the image source; '' where the codes came without images, or before these were noted.

    Raises RearError: a value is of another type, or a number is out of its range.
    """

    num_images: int
    num_augmentations: int
    augmentation: str
    codes_per_image: int
    codebook_size: int
    image_size: int
    num_classes: int
    fingerprint: str
    source: str
    split: str
    num_shards: int
    dtype: str = ""
    precision: str = ""
    images: str = ""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            name, value = field.name, getattr(self, field.name)
            if type(value) is not field.type:
                raise RearError(f"codes header: {name} is {value!r}; it must be of the type {field.type.__name__}")
            if isinstance(value, int) and value < 1:
                raise RearError(f"codes header: {name} is {value}; it must be at least 1")
            if name in LIMITS and value > LIMITS[name]:
                raise RearError(f"codes header: {name} {value} does not fit the format; at most {LIMITS[name]} does")
        if self.num_shards > self.num_images:
            raise RearError(f"codes header: {self.num_shards} shards for {self.num_images} images; use fewer shards")

    @property
    def num_records(self) -> int:
        return self.num_images * self.num_augmentations

    @property
    def label_columns(self) -> int:
        """Numbers of a record that its label takes: numbers of captions may take two."""
        return 1 if self.num_classes <= LIMIT else 2

    @property
    def image_ranges(self) -> list[tuple[int, int]]:
        """Images [start, stop) of each shard."""
        bounds = [shard * self.num_images // self.num_shards for shard in range(self.num_shards + 1)]
        return list(itertools.pairwise(bounds))

    @property
    def shard_sizes(self) -> list[int]:
        """Records of each shard."""
        return [(stop - start) * self.num_augmentations for start, stop in self.image_ranges]

    def shard_path(self, directory: Path, shard: int) -> Path:
        return directory / f"codes-{shard:05d}-of-{self.num_shards:05d}.array_record"


def check_codes(
    header: CodesHeader, *, fingerprint: str | None, codebook_size: int, codes_per_image: int, num_classes: int | None
) -> None:
    """Makes sure that codes fit the tokenizer and the generator that are to use them; None fits any.

    Raises RearError: one of the four differs; names both values.
    """
    pairs = {
        "fingerprint": (header.fingerprint, fingerprint),
        "codebook_size": (header.codebook_size, codebook_size),
        "codes_per_image": (header.codes_per_image, codes_per_image),
        "num_classes": (header.num_classes, num_classes),
    }
    for name, (stored, wanted) in pairs.items():
        if wanted not in (stored, None):
            raise RearError(
                f"the codes have {name} {stored!r}, this run has {wanted!r}; tokenize again into a new folder"
            )


def check_share(max_corrupt_share: float) -> None:
    """Raises RearError unless `config.codes.max_corrupt_share` is a share."""
    if not 0 <= max_corrupt_share < 1:
        raise RearError(f"codes.max_corrupt_share = {max_corrupt_share}: choose a share from 0 to below 1")


def refuse_other_plan(directory: Path, header: CodesHeader, *, but: tuple[str, ...] = ()) -> bool:
    """Whether the folder of codes was begun, by this plan; entries named in `but` may differ.

    Raises RearError: it was begun by another plan or of other images, or holds shards without a plan.
    """
    for path in (directory / HEADER, directory / UNFINISHED_HEADER):
        if path.is_file():
            stored = dataclasses.asdict(read_header(path))
            for name, value in dataclasses.asdict(header).items():
                if stored[name] not in (value, "") and name not in (*but, "images"):  # what is not said is trusted
                    raise RearError(
                        f"{directory} was begun with {name} {stored[name]!r}, not {value!r}; "
                        "name another folder or delete this one"
                    )
            if "images" not in but:
                _refuse_other_images(directory, stored["images"], header.images)
            return True
    if any(directory.glob("codes-*.array_record")):
        raise RearError(f"{directory} holds shards without a header; name another folder or delete them")
    return False


def _refuse_other_images(directory: Path, stored: str, wanted: str) -> None:
    """Raises RearError unless codes are of the images that are there now."""
    if stored == wanted:
        return
    remedy = "delete it to tokenize again, or leave the job `tokenize` out to train on it as it is"
    if wanted and not stored:
        raise RearError(f"{directory} was written before codes noted of which images they are; {remedy}")
    raise RearError(f"{of_other_images(directory)}; {remedy}")


def of_other_images(directory: Path) -> str:
    """What to say of codes whose images are not those that are there now."""
    return f"{directory} holds codes of other images: a file or label has been added, removed or changed since"


def as_json(header: CodesHeader) -> dict[str, Any]:
    """The header as it is stored: all fields that were said, and for other readers what follows from them."""
    derived = {"num_records": header.num_records, "shard_sizes": header.shard_sizes}
    values = {field.name: (getattr(header, field.name), field.default) for field in dataclasses.fields(header)}
    said = {name: value for name, (value, unsaid) in values.items() if value != unsaid}
    return {"format_version": FORMAT_VERSION, **said, **derived}


def read_header(path: Path) -> CodesHeader:
    """The header in a file; raises RearError where it is damaged or of another version."""
    try:
        content = json.loads(path.read_text())
        fields = [field.name for field in dataclasses.fields(CodesHeader)]
        header = CodesHeader(**{name: content[name] for name in fields if name in content})
        sizes_listed = len(content["shard_sizes"])
    except (OSError, ValueError, LookupError, TypeError, RecursionError, RearError) as error:
        raise RearError(f"{path} is damaged ({error}); tokenize again into a new folder") from None
    if sizes_listed != header.num_shards or as_json(header) != content:  # the former bounds what the latter makes
        raise RearError(f"{path} is not of format version {FORMAT_VERSION} or was altered; tokenize again")
    return header
