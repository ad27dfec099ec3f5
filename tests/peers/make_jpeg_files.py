"""Small JPEG files of every usual kind and what Pillow makes of them, for tests/fixtures/jpeg-files.

    python tests/peers/make_jpeg_files.py OUT     # needs pillow, simplejpeg, numpy

NAME.jpg beside NAME.png: the pixels of `Image.open(NAME.jpg).convert("RGB")`. The pictures are drawn here. simplejpeg writes the
samplings that Pillow does not; YCCK is Pillow's CMYK with another number in the Adobe segment.
"""
import io
import pathlib
import sys

import numpy as np
from PIL import Image, features


def picture(width, height, seed=0):
    """Waves and a disc with hard edges in saturated colours, so that the upsampling of colour shows."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    waves = [127 + 120 * np.sin(x * rng.uniform(.2, 1.4) + y * rng.uniform(.2, 1.4) + c) for c in range(3)]
    image = np.stack(waves, -1)
    image[(x - width / 2) ** 2 + (y - height / 2) ** 2 < (min(width, height) / 3) ** 2] = rng.choice([0, 255], 3)
    return np.clip(image + rng.normal(0, 8, image.shape), 0, 255).astype(np.uint8)


def pillow(pixels, mode="RGB", **options):
    out = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(out, "jpeg", **options)
    return out.getvalue()


def kinds():
    import simplejpeg
    odd = picture(37, 29)
    for name, code in (("444", 0), ("422", 1), ("420", 2)):
        yield name, pillow(odd, subsampling=code, quality=85)
        yield f"{name}-progressive", pillow(odd, subsampling=code, quality=75, progressive=True)
        yield f"{name}-restarts", pillow(picture(50, 33, 1), subsampling=code, quality=90, restart_marker_blocks=2)
        for width, height in ((1, 1), (2, 17), (17, 2), (16, 16), (33, 8)):
            yield f"{name}-{width}x{height}", pillow(picture(width, height, 2), subsampling=code, quality=92)
    for name in ("440", "411"):
        yield name, simplejpeg.encode_jpeg(odd, 88, colorsubsampling=name)
    yield "rough", pillow(odd, quality=3)
    yield "fine", pillow(odd, quality=100, subsampling=2, optimize=True)
    yield "grey", pillow(odd, "L", quality=80)
    yield "grey-progressive", pillow(odd, "L", quality=80, progressive=True)
    yield "rgb", pillow(odd, quality=90, keep_rgb=True)
    cmyk = np.concatenate([odd, picture(37, 29, 3)[..., :1]], -1)
    data = io.BytesIO()
    Image.fromarray(cmyk, "CMYK").save(data, "jpeg", quality=90)
    data = data.getvalue()
    yield "cmyk", data
    at = data.index(b"Adobe") + 11  # the transform's number: 0 is CMYK, 2 is YCCK
    yield "ycck", data[:at] + b"\2" + data[at + 1:]
    turned = Image.Exif()
    turned[0x0112] = 6
    yield "turned", pillow(odd, quality=85, exif=turned)
    whole = pillow(odd, quality=85)
    yield "trailing", whole + b"\xff\xd8\xff\xda and more"
    yield "extraneous", whole[:-2] + b"\0\0\0" + whole[-2:]


def main():
    out = pathlib.Path(sys.argv[1])
    out.mkdir(parents=True, exist_ok=True)
    for name, data in kinds():
        (out / f"{name}.jpg").write_bytes(data)
        Image.open(io.BytesIO(data)).convert("RGB").save(out / f"{name}.png", optimize=True)
    print(f"{len(list(out.iterdir()))} files by Pillow {Image.__version__}, libjpeg-turbo {features.version('libjpeg_turbo')}")


if __name__ == "__main__":
    main()
