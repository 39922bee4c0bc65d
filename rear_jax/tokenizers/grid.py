"""What tokenizers of the VQGAN family have in common: a square grid of codes, halved level by level."""

from __future__ import annotations

from rear_jax.errors import RearError
from rear_jax.tokenizers.base import CodebookTokenizer


class GridTokenizer(CodebookTokenizer):
    """A `CodebookTokenizer` with the attribute `channel_mult`, one entry for each resolution.

    Raises:
      RearError: the image size cannot be halved as often as the levels ask.
    """

    def __post_init__(self) -> None:
        factor = 2 ** (len(self.channel_mult) - 1)
        if self.image_size % factor:
            raise RearError(
                f"data.image_size {self.image_size} is not a multiple of {factor}: "
                f"change it, or give tokenizer.channel_mult another number of levels than {len(self.channel_mult)}"
            )
        super().__post_init__()

    @property
    def latent_shape(self) -> tuple[int, int]:
        """Rows and columns."""
        side = self.image_size // 2 ** (len(self.channel_mult) - 1)
        return side, side
