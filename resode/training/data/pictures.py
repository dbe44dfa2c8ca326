"""PNG and JPEG files as pixels: what a network trains on is what it is asked about later."""

from __future__ import annotations

import io
import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np

from resode.training.data.archives import DataError

BACKGROUND = 255
"""Grey value, of 0 to 255, that stands behind transparent pixels: white, as a page."""

_MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr")
"""Pillow's kinds of pixels with eight bits or fewer."""


@dataclass(frozen=True)
class Picture:
    """A decoded picture.

    Args:
        pixels: uint8 (H, W, 1) of a grey file, (H, W, 3) of any other.
        changes: what was done beside decoding, in words.
        format: "JPEG" or "PNG".
    """

    pixels: np.ndarray
    changes: tuple[str, ...]
    format: str


def read_picture(content: bytes, where: str, size: tuple[int, int] | None = None) -> Picture:
    r"""The pixels of a PNG or JPEG file, upright and opaque; of an animation, its first frame.

    The camera's orientation (EXIF) is undone. A transparent pixel becomes α·colour + (1 − α)·white, so
    that no hidden colour counts. Sixteen bits become eight by the high byte, which is what Pillow does
    to colours and not to grey. CMYK goes to RGB as Pillow's, without a colour profile.

    Args:
        content: the file's bytes.
        where: names the file in messages.
        size: (width, height) that it must have, read before any pixel is decoded; None takes all.

    Raises:
        DataError: no PNG or JPEG, damaged, of another size, or larger than Pillow decodes.
        ImportError: Pillow is not installed.
    """
    try:
        from PIL import Image, ImageOps
    except ImportError as error:
        raise ImportError(
            "pictures are decoded with Pillow, which is not installed: pip install 'resode[train]'"
        ) from error
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(content), formats=("JPEG", "PNG")) as opened:
                found = opened.size
                if size is None or found == size:
                    format_ = "PNG" if opened.format == "PNG" else "JPEG"  # a phone's MPO is JPEG too
                    return Picture(*_pixels(ImageOps.exif_transpose(opened)), format_)
    except Exception as error:  # decoders raise anything from SyntaxError to struct.error
        raise DataError(
            f"{where} could not be read as a PNG or JPEG picture: {type(error).__name__}: {error}. "
            "Get it again, store it with 8 bits a colour, or leave it out."
        ) from error
    raise DataError(
        f"pictures of {size[0]}x{size[1]} pixels are needed: {where} is {found[0]}x{found[1]}. Resize it."
    )


_LAID = "laid on white where it is transparent"


def _pixels(picture: Any) -> tuple[np.ndarray, tuple[str, ...]]:
    """Pixels of a decoded picture, and what was done to them."""
    from PIL import Image

    clear = picture.info.get("transparency")
    if picture.mode.startswith("I;16"):
        values = np.asarray(picture)
        pixels, changes = (values >> 8).astype(np.uint8), ("brought from 16 to 8 bits",)
        if isinstance(clear, int):  # this one grey value is transparent
            pixels, changes = np.where(values == clear, np.uint8(BACKGROUND), pixels), (*changes, _LAID)
        return pixels[..., None], changes
    if picture.mode not in _MODES:
        raise ValueError(f"pixels of a kind ({picture.mode}) that is not read")
    grey, changes = picture.mode in ("1", "L", "LA"), ()
    if picture.mode in ("LA", "PA", "RGBA") or clear is not None:
        picture = picture.convert("RGBA")
        changes = (_LAID,) if picture.getextrema()[3][0] < 255 else ()
        page = Image.new("RGBA", picture.size, (BACKGROUND, BACKGROUND, BACKGROUND, 255))
        picture = Image.alpha_composite(page, picture)
        return np.array(picture)[..., : 1 if grey else 3], changes
    pixels = np.array(picture.convert("L" if grey else "RGB"))
    return pixels[..., None] if grey else pixels, changes
