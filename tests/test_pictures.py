"""What a number in a picture file means, which pages become pictures, and what is said of files that cannot be read."""
import os
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, PngImagePlugin

from ppo_ddpm.engine.pictures import load_pictures

ramp = np.linspace(0, 1, 32 * 32).reshape(32, 32)
wanted = torch.tensor(ramp * 255).round()[None, None]   # what every ramp from black to white must become


def load(folder, size=32, channels=1, **kwargs):
    "The pictures, and all that was said."
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        pictures = load_pictures(folder, size, channels, **kwargs)
    return pictures, [str(w.message) for w in said]


def same(x, expected=wanted, tolerance=1.01): return (x.float() - expected).abs().max() <= tolerance


def chunk(name, data): return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png(width, height, depth, colour, rows):
    "A PNG by hand: Pillow writes none of 16 bits in colour, nor one that lies about its size."
    head = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def deep_png(a):
    "uint16 (H, W, C) as PNG of 16 bits; C = 2 is grey with opacity, 3 colour, 4 colour with opacity."
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in a)
    return png(a.shape[1], a.shape[0], 16, {1: 0, 2: 4, 3: 2, 4: 6}[a.shape[2]], rows)


def tiff(a, photometric=1, sample_format=1, order="<"):
    "An uncompressed TIFF by hand, (H, W) or (H, W, C)."
    h, w, c = *a.shape[:2], a.shape[2] if a.ndim == 3 else 1
    bits, data = a.dtype.itemsize * 8, a.astype(a.dtype.newbyteorder(order)).tobytes()
    after = 8 + 2 + 10 * 12 + 4
    tags = [(256, 4, 1, w), (257, 4, 1, h), (258, 3, c, bits), (259, 3, 1, 1), (262, 3, 1, photometric),
            (273, 4, 1, after + 16), (277, 3, 1, c), (278, 4, 1, h), (279, 4, 1, len(data)), (339, 3, c, sample_format)]
    extra, entries = b"", b""
    for tag, kind, count, value in tags:
        if count > 2:
            entries += struct.pack(order + "HHII", tag, kind, count, after + len(extra))
            extra += struct.pack(order + "H", value) * count
        else: entries += struct.pack(order + ("HHIHH" if kind == 3 else "HHII"), tag, kind, count, *([value, 0] if kind == 3 else [value]))
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(order + "I", 8)
    return head + struct.pack(order + "H", len(tags)) + entries + struct.pack(order + "I", 0) + extra.ljust(16, b"\0") + data


# --- what a number means ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize("suffix", ["tif", "png"])
@pytest.mark.parametrize("bits", [1, 4, 8, 10, 12, 14, 16])
def test_bits_in_16_bit_files(tmp_path, bits, suffix):
    Image.fromarray((ramp * (2**bits - 1)).round().astype(np.uint16)).save(tmp_path / f"a.{suffix}")
    x, said = load(tmp_path)
    assert same(x.x, tolerance=1.01 if bits >= 8 else 128 / (2**bits - 1) + .5)
    assert len(said) == 1 and f"{2**bits - 1} is white" in said[0] and "value_range" in said[0]


@pytest.mark.parametrize("dtype", [np.int32, np.uint32, np.int16, np.uint16])
@pytest.mark.parametrize("order", "<>")
def test_8_bits_in_wider_tiff(tmp_path, dtype, order):
    if dtype == np.uint32 and order == ">": pytest.skip("Pillow does not read it")
    (tmp_path / "a.tif").write_bytes(tiff((ramp * 255).round().astype(dtype), sample_format=1 + (np.dtype(dtype).kind == "i"), order=order))
    assert same(load(tmp_path)[0].x)


def test_unsigned_32_bits(tmp_path):
    (tmp_path / "a.tif").write_bytes(tiff((ramp * (2**32 - 1)).astype(np.uint32)))
    x, said = load(tmp_path)
    assert same(x.x) and "0 to 4.29497e+09" in said[0]


def test_signed_8_bits(tmp_path):
    (tmp_path / "a.tif").write_bytes(tiff((ramp * 255 - 128).round().astype(np.int8), sample_format=2))
    assert same(load(tmp_path)[0].x)


def test_negative_numbers(tmp_path):
    "Computed tomography: from air, -1000, to bone."
    Image.fromarray((ramp * 3000 - 1000).round().astype(np.int32)).save(tmp_path / "a.tif")
    x, said = load(tmp_path)
    assert same(x.x) and "-1000 is black, 2000 is white" in said[0]


@pytest.mark.parametrize("dtype", [np.uint16, np.uint8])
def test_white_is_zero(tmp_path, dtype):
    top = 4095 if dtype == np.uint16 else 255
    (tmp_path / "a.tif").write_bytes(tiff(((1 - ramp) * top).round().astype(dtype), photometric=0))
    assert same(load(tmp_path)[0].x)


def test_white_is_zero_in_floats(tmp_path):
    (tmp_path / "a.tif").write_bytes(tiff((1 - ramp).astype(np.float32), photometric=0, sample_format=3))
    assert same(load(tmp_path)[0].x)


def test_one_range_for_the_set(tmp_path):
    "A dark picture stays darker than its neighbours, and a set is read as one whatever order it comes in."
    for name, scale in dict(a=1, b=.5, c=.25).items():
        Image.fromarray((ramp * 4095 * scale).round().astype(np.uint16)).save(tmp_path / f"{name}.png")
    x, said = load(tmp_path)
    for i, scale in enumerate((1, .5, .25)): assert same(x.x[i], wanted[0] * scale)
    assert len(said) == 1 and "3 pictures hold integers from 0 to 4095" in said[0]


def test_range_does_not_depend_on_the_size(tmp_path):
    a = np.zeros((64, 64), np.uint16)
    a[5, 5] = 4095
    Image.fromarray(a + 1000).save(tmp_path / "a.png")
    assert load(tmp_path, 64)[1] == load(tmp_path, 4)[1]


@pytest.mark.parametrize("top", [1, 1.001, 1.05, 255, 256])
def test_floats_and_overshoots(tmp_path, top):
    "Resampling overshoots a little; neighbours are not changed by it."
    unit = 1 if top < 2 else 255
    Image.fromarray(np.float32(ramp * unit)).save(tmp_path / "a.tif")
    Image.fromarray(np.float32(ramp * top)).save(tmp_path / "b.tif")
    Image.fromarray(np.float32(ramp * top - .01 * unit)).save(tmp_path / "c.tif")
    x, said = load(tmp_path)
    assert same(x.x[0]) and x.x[1:, 0, -1, -1].min() >= 252
    assert len(said) == 1 and f"0 is black, {unit} is white" in said[0]


@pytest.mark.parametrize("low, high", [(0, 1 / 16), (-1, 1), (0, 3.7), (280, 310), (0, 4095)])
def test_floats_of_another_range(tmp_path, low, high):
    Image.fromarray(np.float32(low + ramp * (high - low))).save(tmp_path / "a.tif")
    x, said = load(tmp_path)
    assert same(x.x) and f"{low:g} is black, {high:g} is white" in said[0]


def test_value_range_fixes_it(tmp_path):
    Image.fromarray((ramp * 1000).round().astype(np.uint16)).save(tmp_path / "a.png")
    Image.fromarray((ramp * 255).round().astype(np.uint8)).save(tmp_path / "b.png")
    x, _ = load(tmp_path, value_range=(0, 4000))
    assert same(x.x[0], wanted[0] / 4) and same(x.x[1], wanted[0])
    assert load(tmp_path, value_range=(0, 500))[0].x[0].eq(255).float().mean() > .45   # more than white is white
    for wrong in (1, 1), (2, 1), (0, float("nan")):
        with pytest.raises(ValueError, match="value_range must be .black, white."): load_pictures(tmp_path, value_range=wrong)


def test_dark_bytes_are_said(tmp_path):
    "Four bits in files of eight: the files say that they are dark, so they are; the sentence says what can be done."
    Image.fromarray((ramp * 15).round().astype(np.uint8)).save(tmp_path / "a.png")
    x, said = load(tmp_path)
    assert x.x.max() == 15 and "hold bytes from 0 to 15: 0 is black, 255 is white; value_range=" in said[0]
    x, _ = load(tmp_path, value_range=(0, 15))
    assert same(x.x, wanted, 9)


@pytest.mark.parametrize("a", [np.zeros((8, 8), np.uint16), np.zeros((8, 8), np.int32), np.zeros((8, 8), np.float32), np.full((8, 8), 7., np.float32)])
def test_constant_pictures(tmp_path, a):
    Image.fromarray(a).save(tmp_path / "a.tif")
    assert load(tmp_path)[0].x.max() == 0


def test_numbers_that_are_none(tmp_path):
    for name, v in dict(a=np.nan, b=np.inf, c=.5).items():
        a = np.float32(ramp)
        a[3, 3] = v
        Image.fromarray(a).save(tmp_path / f"{name}.tif")
    x, said = load(tmp_path)
    assert len(x) == 1 and "skipped 2 of 3 files" in said[0] and "a.tif (holds NaN or infinite numbers)" in said[0]


@pytest.mark.parametrize("bits", [10, 12, 16])
@pytest.mark.parametrize("order", [None, "<", ">"])
def test_deep_colour(tmp_path, bits, order):
    a = (np.stack([ramp, ramp.T, 1 - ramp], -1) * (2**bits - 1)).round().astype(np.uint16)
    (tmp_path / "a").write_bytes(tiff(a, photometric=2, order=order) if order else deep_png(a))
    x, said = load(tmp_path, channels=3)
    assert same(x.x, torch.tensor(a / (2**bits - 1) * 255).permute(2, 0, 1)) and f"{2**bits - 1} is white" in said[0]
    assert same(load(tmp_path)[0].x[0, 0], torch.tensor((a / (2**bits - 1) * 255) @ [.299, .587, .114]), 1.1)


def test_deep_colour_that_is_compressed_or_turned(tmp_path):
    a = (np.stack([ramp] * 3, -1) * 4095).round().astype(np.uint16)
    data, turn = deep_png(a), Image.Exif()
    turn[0x0112] = 3
    (tmp_path / "a.png").write_bytes(data[:33] + chunk(b"eXIf", turn.tobytes()[6:]) + data[33:])
    x, _ = load(tmp_path)
    assert same(x.x, wanted.flip(2, 3))


@pytest.mark.parametrize("channels", [2, 4])
def test_deep_transparency(tmp_path, channels):
    "Pillow reads the upper bytes of it: right where all bits are used, and refused where they are not."
    def a(bits): return np.concatenate([np.stack([ramp] * (channels - 1), -1) * (2**bits - 1), np.full((32, 32, 1), 65535)], -1).round().astype(np.uint16)
    (tmp_path / "a.png").write_bytes(deep_png(a(16)))
    (tmp_path / "b.png").write_bytes(deep_png(a(12)))
    x, said = load(tmp_path)
    assert len(x) == 1 and same(x.x)
    assert "b.png (dark colour of 16 bits with transparency" in said[0]


@pytest.mark.parametrize("mode", ["1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr"])
@pytest.mark.parametrize("channels", [1, 3])
def test_modes_of_8_bits(tmp_path, monkeypatch, mode, channels):
    "All modes that Pillow has for files give the same picture, and nothing has to be said."
    picture = Image.fromarray((ramp > .5).astype(np.uint8) * 255)
    if mode in ("LA", "La", "PA", "RGBA", "RGBa"): picture = picture.convert("LA" if mode[0] in "LP" else "RGBA")
    picture = picture.convert(mode)
    picture.save(tmp_path / ("a.tif" if mode in ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr") else "a.png")) if mode not in ("La", "RGBa") else picture.convert(mode.upper()).save(tmp_path / "a.png")
    x, said = load(tmp_path, channels=channels)
    assert not said and x.x.shape == (1, channels, 32, 32)
    assert same(x.x, torch.tensor(ramp > .5) * 255., 3)


def test_transparent_is_white(tmp_path):
    a = np.zeros((8, 8, 4), np.uint8)
    a[:4, :, 3] = 255
    Image.fromarray(a).save(tmp_path / "rgba.png")
    Image.fromarray(a[..., [0, 3]]).save(tmp_path / "la.png")
    grey = Image.fromarray(np.where(a[..., 3] > 0, 0, 9).astype(np.uint8))
    grey.save(tmp_path / "key.png", transparency=9)
    grey.convert("P").save(tmp_path / "palette.gif", transparency=9)
    x, _ = load(tmp_path, 8)
    for p in x.x: assert p[0, :4].eq(0).all() and p[0, 4:].eq(255).all()


# --- pages ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["a.tif", "a.gif", "a.png", "a.webp"])
def test_pages_are_pictures(tmp_path, name):
    noise = np.random.default_rng(0).integers(0, 256, (20, 16, 16), np.uint8)
    pages = [Image.fromarray(a) for a in noise]
    pages[0].save(tmp_path / name, save_all=True, append_images=pages[1:], **({"lossless": True} if "webp" in name else {}))
    x, said = load(tmp_path, 16)
    assert len(x) == 20 and not said
    assert same(x.x[:, 0], torch.tensor(noise))


def test_pages_share_the_class_and_the_range(tmp_path):
    for folder in "ab":
        (tmp_path / folder).mkdir()
        pages = [Image.fromarray((ramp * 4095 / (1 + i)).astype(np.uint16)) for i in range(3)]
        pages[0].save(tmp_path / folder / "stack.tif", save_all=True, append_images=pages[1:])
    x, said = load(tmp_path)
    assert x.y.tolist() == [0, 0, 0, 1, 1, 1] and x.classes == ("a", "b") and len(said) == 1
    for i in range(6): assert same(x.x[i], wanted[0] / (1 + i % 3), 1.1)


def test_pages_of_different_size_and_turn(tmp_path):
    pages = [Image.fromarray((ramp * 255).round().astype(np.uint8)), Image.new("RGB", (9, 5), "white"), Image.new("1", (40, 4))]
    pages[0].save(tmp_path / "a.tif", save_all=True, append_images=pages[1:])
    x, said = load(tmp_path)
    assert not said and same(x.x[0], wanted[0]) and x.x[1].min() == 255 and x.x[2].max() == 0


def test_a_page_that_is_broken_costs_itself_and_those_after(tmp_path):
    pages = [Image.fromarray(np.random.default_rng(i).integers(0, 256, (64, 64), np.uint8)) for i in range(5)]
    pages[0].save(tmp_path / "a.tif", save_all=True, append_images=pages[1:])
    data = (tmp_path / "a.tif").read_bytes()
    (tmp_path / "a.tif").write_bytes(data[:len(data) * 3 // 5 + 100])
    x, said = load(tmp_path)
    assert 0 < len(x) < 5 and f"a.tif from page {len(x) + 1} on" in said[0]


def test_previews_are_no_pictures(tmp_path):
    a, small = Image.new("RGB", (64, 64), "red"), Image.new("RGB", (16, 16))
    a.save(tmp_path / "a.mpo", save_all=True, append_images=[small])
    Image.new("L", (64, 64)).save(tmp_path / "b.tif", save_all=True, append_images=[Image.new("L", (16, 16))], tiffinfo={254: 1})
    x, said = load(tmp_path)
    assert len(x) == 2 and said == [f"left out 2 previews, layers and thumbnails in {tmp_path}"]


# --- what surrounds the pixels ----------------------------------------------------------------------------------------
def test_broken_exif(tmp_path):
    im, info = Image.fromarray((ramp * 255).round().astype(np.uint8)), PngImagePlugin.PngInfo()
    info.add_text("Raw profile type exif", "\nexif\n    9999\n45786966zz")
    im.save(tmp_path / "sound.png")
    im.save(tmp_path / "a.png", exif=b"garbage")
    im.save(tmp_path / "b.png", pnginfo=info)
    im.save(tmp_path / "c.webp", exif=b"Exif\0\0garbage!", lossless=True)
    im.save(tmp_path / "d.jpg", exif=b"Exif\0\0garbage!", quality=100)
    im.save(tmp_path / "e.tif", tiffinfo={34665: 10**9})
    x, said = load(tmp_path)
    assert len(x) == 6 and not said and same(x.x, wanted, 4)


@pytest.mark.parametrize("turn", range(1, 9))
@pytest.mark.parametrize("suffix", ["png", "tif", "webp"])
def test_orientation(tmp_path, turn, suffix):
    a = torch.arange(48, dtype=torch.uint8).view(6, 8) * 5
    upright = a[:, 1:7]   # the largest centred square
    stored = {1: a, 2: a.flip(1), 3: a.flip(0, 1), 4: a.flip(0), 5: a.T, 6: a.rot90(1), 7: a.T.flip(0, 1), 8: a.rot90(-1)}[turn]
    exif = Image.Exif()
    exif[0x0112] = turn
    im = Image.fromarray(stored.contiguous().numpy())
    im.save(tmp_path / f"a.{suffix}", exif=exif, **({"lossless": True} if suffix == "webp" else {}))
    assert same(load(tmp_path, 6)[0].x[0, 0], upright)


# --- folders ----------------------------------------------------------------------------------------------------------
def test_what_cannot_be_read_is_said_once(tmp_path):
    sizes = [("L", (9, 8)), ("RGB", (20, 31)), ("RGBA", (8, 8)), ("P", (40, 10)), ("1", (16, 16)), ("I;16", (12, 12))]
    for i, (mode, size) in enumerate(sizes): Image.new(mode, size).save(tmp_path / f"{i}.png")
    (tmp_path / "notes.txt").write_text("no picture")
    (tmp_path / "bomb.png").write_bytes(png(60_000, 60_000, 8, 0, b"\0" * 100))
    (tmp_path / "empty.jpg").touch()
    (tmp_path / ".hidden.png").write_text("")
    x, said = load(tmp_path, 8, 3)
    assert x.x.shape == (6, 3, 8, 8)
    assert said[0] == (f"skipped 3 of 9 files in {tmp_path}: bomb.png (more than 89 million pixels), "
                       "empty.jpg (not a picture that Pillow reads), notes.txt (not a picture that Pillow reads)")


def test_many_bad_files_are_one_line(tmp_path):
    for i in range(20): (tmp_path / f"{i:02}.txt").write_text("text")
    Image.new("L", (8, 8)).save(tmp_path / "a.png")
    assert "skipped 20 of 21 files" in load(tmp_path)[1][0] and load(tmp_path)[1][0].endswith("and 15 more")
    (tmp_path / "a.png").unlink()
    with pytest.raises(FileNotFoundError, match="there is no picture in .*skipped 20 of 20.*give another"): load_pictures(tmp_path)


def test_order_is_that_of_the_names(tmp_path):
    names = ["b/2.png", "a/9.png", "b/10.png", "a/1.png", "a b/1.png", "Ü/1.png"]
    for i, name in enumerate(names):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("L", (8, 8), i).save(tmp_path / name)
    x, _ = load(tmp_path, 8)
    assert x.x[:, 0, 0, 0].tolist() == [names.index(n) for n in sorted(names)]
    assert x.classes == ("a", "a b", "b", "Ü") and x.y.tolist() == [1, 0, 0, 2, 2, 3]
    assert torch.equal(load(tmp_path, 8, workers=1)[0].x, x.x)


def test_linked_folders_are_followed_once(tmp_path):
    (tmp_path / "p/q").mkdir(parents=True)
    Image.new("L", (8, 8)).save(tmp_path / "p/q/1.png")
    (tmp_path / "p/q/loop").symlink_to(tmp_path / "p")
    (tmp_path / "r").mkdir()
    (tmp_path / "r/link").symlink_to(tmp_path / "p")
    assert len(load(tmp_path / "r")[0]) == len(load(tmp_path / "p")[0]) == 1


def test_files_that_change_are_read_again(tmp_path):
    "Same name, size and time; the pixels count."
    for value in 10, 200:
        Image.fromarray(np.full((8, 8), value, np.uint8)).save(tmp_path / "a.bmp")
        os.utime(tmp_path / "a.bmp", (1, 1))
        assert load(tmp_path, 8)[0].x.unique().tolist() == [value]


def test_names(tmp_path, monkeypatch):
    folder = tmp_path / "Läufe, 第一 ü/Bilder ✓"
    folder.mkdir(parents=True)
    for i in range(3): Image.effect_noise((9, 9), 50).save(folder / f"Bild {i} é.png")
    assert len(load(folder)[0]) == 3
    monkeypatch.setenv("HOME", str(folder.parent))
    assert len(load("~/Bilder ✓")[0]) == 3
    monkeypatch.chdir(folder)
    assert load(".")[0].name == "Bilder ✓"


@pytest.mark.parametrize("call, error, said", [
    (dict(source="digit"), FileNotFoundError, "digit is not a folder; give a folder of pictures, or one of digits, FashionMNIST, CIFAR10, CelebA"),
    (dict(source="file"), NotADirectoryError, "file is not a folder"),
    (dict(source="empty"), FileNotFoundError, "there is no picture in empty"),
    (dict(source=None), TypeError, "got None; give its name"),
    (dict(source=""), TypeError, "got ''; give its name"),
    (dict(source="digits", size="8"), ValueError, "whole number of pixels, at least 1, got '8'"),
    (dict(source="digits", size=0), ValueError, "at least 1, got 0"),
    (dict(source="digits", channels=4), ValueError, "1 (grey) or 3 (RGB), got 4"),
    (dict(source="CIFAR10", root="none", download=False), FileNotFoundError, "set download=True"),
    (dict(source="CelebA", root="none", download=False), FileNotFoundError, "set download=True"),
])
def test_refusals(tmp_path, monkeypatch, call, error, said):
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    Path("file").touch()
    with pytest.raises(error) as e: load_pictures(**call)
    assert said in str(e.value) and "\n" not in str(e.value)


def test_digits():
    assert load_pictures("digits").x.shape == (1797, 1, 8, 8) and load_pictures("digits").levels == 17
    assert load_pictures("digits", 16, 3).x.shape == (1797, 3, 16, 16)


def test_a_file_without_layers_is_one_picture(tmp_path):
    "Photoshop's files count layers, which may be none."
    rows = bytes(range(64))
    head = b"8BPS" + struct.pack(">H6xHIIHH", 1, 1, 8, 8, 8, 1)
    (tmp_path / "a.psd").write_bytes(head + struct.pack(">III", 0, 0, 0) + struct.pack(">H", 0) + rows)
    x, said = load(tmp_path, 8)
    assert not said and x.x.flatten().tolist() == list(rows)
