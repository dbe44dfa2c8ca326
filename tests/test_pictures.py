"""One decoder for training and for predictions: upright, opaque, eight bits, and as Pillow sees it."""

import io

import numpy as np
import pytest
from cifar_files import CLASSES, load, make_tar, png_files
from PIL import Image, ImageOps

from resode.training.data.archives import DataError
from resode.training.data.pictures import read_picture
from resode.training.predict import _of_file, _Wanted

NOISE = np.random.default_rng(3).integers(0, 256, (32, 32, 3), dtype=np.uint8)


def stored(picture, format_="PNG", **options):
    out = io.BytesIO()
    picture.save(out, format_, **options)
    return out.getvalue()


def turned(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


def deep(values):
    """A 16-bit grey PNG."""
    return Image.fromarray(values.astype(np.uint16))


RAMP = np.arange(1024).reshape(32, 32) * 64 + 13
HIDDEN = np.dstack([np.full((32, 32, 3), (255, 0, 0), np.uint8), np.zeros((32, 32), np.uint8)])  # red, clear
HALF = np.dstack([NOISE, np.full((32, 32), 128, np.uint8)])

# name -> (a file, its upright opaque colours as they are known without the decoder)
FILES = {
    **{
        f"{kind} turned by EXIF {way}": (
            stored(picture, kind, exif=turned(way)),
            lambda content: np.asarray(
                ImageOps.exif_transpose(Image.open(io.BytesIO(content))).convert("RGB")
            ),
        )
        for kind in ("JPEG", "PNG")
        for way, picture in [(w, Image.fromarray(NOISE)) for w in range(1, 9)]
    },
    "EXIF 6 is a quarter turn": (
        stored(Image.fromarray(NOISE), "PNG", exif=turned(6)),
        lambda _: np.rot90(NOISE, -1),
    ),
    "16-bit grey": (stored(deep(RAMP)), lambda _: np.repeat((RAMP // 256)[..., None], 3, 2)),
    "16-bit grey, one value clear": (
        stored(deep(np.full((32, 32), 513)), transparency=513),
        lambda _: np.full((32, 32, 3), 255),
    ),
    "CMYK": (
        stored(Image.fromarray(NOISE).convert("CMYK"), "JPEG", quality=95),
        lambda content: np.asarray(Image.open(io.BytesIO(content)).convert("RGB")),
    ),
    "grey": (
        stored(Image.fromarray(NOISE).convert("L")),
        lambda _: np.asarray(Image.fromarray(NOISE).convert("L").convert("RGB")),
    ),
    "black and white": (
        stored(Image.fromarray(NOISE).convert("1")),
        lambda _: np.asarray(Image.fromarray(NOISE).convert("1").convert("RGB")),
    ),
    "palette": (
        stored(Image.fromarray(NOISE).quantize(16)),
        lambda _: np.asarray(Image.fromarray(NOISE).quantize(16).convert("RGB")),
    ),
    "red that is transparent": (stored(Image.fromarray(HIDDEN)), lambda _: np.full((32, 32, 3), 255)),
    "half transparent": (
        stored(Image.fromarray(HALF)),
        lambda _: np.rint((128.0 * NOISE + 127 * 255.0) / 255),
    ),
    "grey, half transparent": (
        stored(Image.merge("LA", [Image.new("L", (32, 32), 100), Image.new("L", (32, 32), 51)])),
        lambda _: np.full((32, 32, 3), 224),  # 100/5 + 255·4/5
    ),
    "one colour that is transparent": (
        stored(Image.new("RGB", (32, 32), (255, 0, 0)), transparency=(255, 0, 0)),
        lambda _: np.full((32, 32, 3), 255),
    ),
}


@pytest.mark.parametrize("case", FILES)
def test_training_and_predict_see_pillows_upright_colours(case, tmp_path):
    """Both ways to the pixels, and what they must be; compositing may round by one level."""
    content, truth = FILES[case]
    suffix = "png" if content.startswith(b"\x89PNG") else "jpg"
    files = {**png_files(), f"train/cat/9999.{suffix}": content}
    trained = load(make_tar(tmp_path / "c.tar", files)).train_images[20].transpose(1, 2, 0)
    (tmp_path / f"x.{suffix}").write_bytes(content)
    (asked,) = _of_file(tmp_path / f"x.{suffix}", _Wanted(3, 32, 32, False))
    assert CLASSES[3] == "cat" and np.array_equal(trained, np.broadcast_to(asked.pixels, trained.shape))
    assert np.abs(trained - truth(content).astype(float)).max() <= (1 if "half" in case else 0)


def test_changes_and_sizes_are_said():
    assert read_picture(stored(Image.fromarray(HIDDEN)), "x").changes == (
        "laid on white where it is transparent",
    )
    opaque = np.dstack([NOISE, np.full((32, 32), 255, np.uint8)])
    assert read_picture(stored(Image.fromarray(opaque)), "x").changes == ()
    grey = read_picture(stored(deep(RAMP)), "x")
    assert grey.pixels.shape == (32, 32, 1) and grey.changes == ("brought from 16 to 8 bits",)
    with pytest.raises(DataError, match=r"of 8x4 pixels are needed: x is 32x32. Resize"):
        read_picture(stored(Image.fromarray(NOISE)), "x", (8, 4))
    with pytest.raises(DataError, match=r"x could not be read as a PNG or JPEG.*Unidentified"):
        read_picture(stored(Image.fromarray(NOISE), "TIFF"), "x")
