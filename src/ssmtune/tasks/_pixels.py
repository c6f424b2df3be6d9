"""Images as text: blocks of pixels averaged, their brightness as one hexadecimal digit, a line a row of the image.

So a sequence model reads an image pixel by pixel with any tokenizer that has the digits. Sets lie as .npz files (arrays
`x_<split>`, uint8, N x H x W or N x H x W x 3, `y_<split>`, whole numbers, and `labels`, names) below `images/`, or on a hub.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ssmtune.errors import DataError
from ssmtune.tasks._hub import Row

if TYPE_CHECKING:
    import numpy as np

DIGITS = "0123456789abcdef"


def as_text(image: np.ndarray[Any, Any], block: int) -> str:
    """Return a uint8 image [H, W] or [H, W, 3] as text: mean of `block` x `block` pixels, one digit a channel.

    A coloured pixel is three digits (red, green, blue) with a space behind it; rows and columns that fill no block are cut.
    """
    height, width = (side // block for side in image.shape[:2])
    cut = image[: height * block, : width * block].reshape(height, block, width, block, -1)
    levels = (cut.mean(axis=(1, 3)) / 16).astype(int)
    space = " " if levels.shape[-1] > 1 else ""
    return "\n".join(space.join("".join(DIGITS[c] for c in pixel) for pixel in row) for row in levels.tolist())


def locate_images(pattern: str) -> Callable[[Path, str, str], tuple[Path, ...]]:
    """Return what finds the first file of that pattern below `images/` that holds a split."""

    def locate(directory: Path, folder: str, split: str) -> tuple[Path, ...]:
        import numpy as np

        for path in sorted((directory / "images").glob(pattern)):
            with np.load(path) as arrays:
                if f"x_{split}" in arrays:
                    return (path,)
        return ()

    return locate


def image_reader(block: int) -> Callable[[tuple[Path, ...], str], list[Row]]:
    """Return what reads the rows of one split of an .npz file."""

    def read(paths: tuple[Path, ...], split: str) -> list[Row]:
        import numpy as np

        with np.load(paths[0]) as arrays:
            missing = {f"x_{split}", f"y_{split}", "labels"} - set(arrays)
            if missing:
                raise DataError(f"{paths[0]}: holds no {sorted(missing)}; it has {sorted(arrays)}. See docs/tasks.md.")
            images, numbers, labels = arrays[f"x_{split}"], arrays[f"y_{split}"], [str(v) for v in arrays["labels"]]
        if images.dtype != np.uint8 or images.ndim not in (3, 4) or len(images) != len(numbers):
            raise DataError(
                f"{paths[0]}: x_{split} is {images.dtype} {images.shape} beside {len(numbers)} labels; expected uint8, "
                "N x H x W or N x H x W x 3, and as many labels."
            )
        return [
            {"id": f"{paths[0].stem}-{split}-{i}", "input": as_text(image, block), "target": labels[int(number)]}
            for i, (image, number) in enumerate(zip(images, numbers, strict=True))
        ]

    return read


def hub_row(image: str, target: Callable[[Row], str], block: int) -> Callable[[Row], Row]:
    """Return what makes a row of ours from one of the hub's, whose column `image` is a picture of Pillow's."""

    def row(found: Row) -> Row:
        import numpy as np

        return {"input": as_text(np.asarray(found[image], dtype=np.uint8), block), "target": target(found)}

    return row


def sample_image(levels: Sequence[str], colour: bool) -> str:
    """Return an invented image in the form of `as_text`: a digit a block, grey where it is coloured."""
    return "\n".join(" ".join(3 * c for c in line) if colour else line for line in levels)
