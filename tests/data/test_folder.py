"""Image folders as people have them: what is listed, in which order, and how each file becomes pixels."""

import dataclasses
import errno
import json
import os
import shutil
import socket
import struct
import unicodedata
import zlib

import numpy as np
import pytest
from PIL import Image, ImageOps

from dit_jax.cli.sample import read_layouts, read_prompts
from dit_jax.config import DataConfig, LayoutConfig, TokenTransformerConfig
from dit_jax.data import sources
from dit_jax.data.folder import (
    IMAGE_FORMATS,
    IMAGE_SUFFIXES,
    describe_left_out,
    list_images,
    read_classes,
    read_image,
    read_mask,
)
from dit_jax.data.layouts import LayoutTokenizer
from dit_jax.evaluation.given import Given
from dit_jax.evaluation.reference import FolderImages
from tests.tiny import dit_config

RNG = np.random.default_rng(0)
PIXELS = RNG.integers(0, 256, (6, 8, 3), np.uint8)


def folder_config(path, num_classes=2, **kwargs):
    return DataConfig(name=str(path), image_size=8, num_classes=num_classes, **kwargs)


def save(path, pixels=PIXELS, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    image.save(path, **options)
    return path


# Listing


def test_what_is_hidden_or_no_file_is_left_out_and_counted(tmp_path):
    shown = [save(tmp_path / name) for name in ("000.png", "001.JPG", "images/002.Png", "z/deep/003.tif")]
    for name in (
        "._000.png",
        ".hidden.png",
        ".ipynb_checkpoints/000-checkpoint.png",
        "__MACOSX/000.png",
        "@eaDir/a.jpg",
    ):
        save(tmp_path / name, format="PNG")
    for name in ("Thumbs.db", ".DS_Store", "notes.txt", "more.TXT", "README", "metadata.jsonl"):
        (tmp_path / name).write_text("")
    os.mkfifo(tmp_path / "004.png")
    with socket.socket(socket.AF_UNIX) as server:
        os.chdir(tmp_path)  # a socket's path is short
        server.bind("005.png")
    (tmp_path / "006.png").symlink_to("nowhere.png")
    (tmp_path / "007.png").symlink_to("007.png")
    (tmp_path / "008.png").symlink_to("004.png")
    paths, left_out = list_images(tmp_path)
    assert paths == shown
    assert left_out == {
        "hidden": 7,
        "pipes, sockets or devices": 3,
        "links to nothing": 2,
        ".txt": 2,
        "without a suffix": 1,
    }
    assert describe_left_out(left_out).startswith("; left out: 7 hidden, 3 pipes, sockets or devices, 2 ")
    assert FolderImages(tmp_path).paths == shown
    with pytest.raises(
        ValueError, match=r"cannot read image .*004.png: it is not a file, but a folder, a pipe or a dev"
    ):
        read_image(tmp_path / "004.png")


def test_links_are_followed_and_no_folder_is_listed_twice(tmp_path):
    root = tmp_path / "images"
    save(tmp_path / "elsewhere" / "x.png")
    save(root / "a" / "000.png")
    (root / "a" / "001.png").symlink_to(tmp_path / "elsewhere" / "x.png")
    (root / "a" / "sub").symlink_to(tmp_path / "elsewhere")
    (root / "a" / "again").symlink_to(tmp_path / "elsewhere")
    (root / "a" / "itself").symlink_to(root / "a")
    (root / "a" / "above").symlink_to(root)  # must not make the images of b those of a
    (tmp_path / "elsewhere" / "back").symlink_to(root / "a")
    save(root / "real_b" / "000.png")
    (root / "b").symlink_to(root / "real_b")
    (root / "real_b").rename(tmp_path / "real_b")
    (root / "b").unlink()
    (root / "b").symlink_to(tmp_path / "real_b")
    paths, left_out = list_images(root / "a")
    assert [path.relative_to(root).as_posix() for path in paths] == ["a/000.png", "a/001.png", "a/again/x.png"]
    assert left_out == {"listed already (links)": 4}
    source = sources.open_source(folder_config(root), "train")
    assert [(path.parent.name, label) for path, label in source._files] == [("a", 0), ("a", 0), ("again", 0), ("b", 1)]


@pytest.mark.parametrize("suffix", IMAGE_SUFFIXES)
def test_every_suffix_that_is_listed_is_read_in_any_case(tmp_path, suffix):
    path = tmp_path / f"x{suffix.upper()}"
    kind = Image.registered_extensions().get(suffix) or {".mpo": "JPEG"}[suffix]
    options = {"lossless": True} if kind == "WEBP" else {"quality": 100} if kind in ("JPEG", "AVIF") else {}
    save(path, np.full((8, 8, 3), 200, np.uint8), format="JPEG" if kind == "MPO" else kind, **options)
    assert list_images(tmp_path).paths == [path]
    assert np.abs(read_image(path).astype(int) - 200).max() <= 3


def test_no_decoder_sees_a_file_that_would_run_a_program(tmp_path):
    assert not {"EPS", "WMF", "FPX", "MIC", "PDF"} & set(IMAGE_FORMATS)
    (tmp_path / "x.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n")
    with pytest.raises(ValueError, match="x.png: cannot identify image file; remove or replace it"):
        read_image(tmp_path / "x.png")


def test_too_many_open_files_is_no_reason_to_remove_an_image(tmp_path, monkeypatch):
    save(tmp_path / "x.png")

    def no_more(*_, **__):
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(os, "open", no_more)
    with pytest.raises(ValueError, match="x.png: .*Too many open files; .*raise the limit of open files"):
        read_image(tmp_path / "x.png")


def test_class_without_an_image_is_named_and_what_it_has_is_told(make_folder):
    root = make_folder({"a": 3, "b": 0})
    (root / "b" / "000.heic").write_text("")
    with pytest.raises(ValueError, match=r"class folder .*/b must hold an image .* none; left out: 1 \.heic; add") as e:
        sources.prepare(folder_config(root))
    assert "\n" not in str(e.value)


def test_images_deeper_in_a_class_are_of_it(make_folder):
    root = make_folder({"n01/images": 12, "n02/images": 12}, suffix=".JPEG")  # as Tiny ImageNet has them
    (root / "n01" / "n01_boxes.txt").write_text("")
    data = folder_config(root)
    assert sources.prepare(data) == f"22 + 2 images of 2 classes in {root}; left out: 1 .txt"
    assert [example["label"] for example in sources.open_source(data, "test")] == [0, 1]
    (root / "n01" / "images" / "000.JPEG").rename(root / "n01" / "000.JPEG")
    assert len(sources.open_source(data, "train")) == 22


def test_what_is_beside_the_classes_is_of_none_and_told(make_folder):
    root = make_folder({"a": 10, "b": 10, "__MACOSX": 3, ".ipynb_checkpoints": 1})
    save(root / "x.png")
    (root / "metadata.jsonl").write_text("")
    left_out = "; left out: 2 hidden, 1 .png outside of the class folders"
    assert sources.prepare(folder_config(root)) == f"18 + 2 images of 2 classes in {root}{left_out}"


def test_flat_folders_are_in_the_order_of_names(make_folder):
    root = make_folder({"a": 1})
    names = ["10.png", "2.png", "B.png", "a.png"]
    for name in names:
        save(root / "a" / name)
    source = sources.open_source(folder_config(root, 1), "train")
    assert [path.name for path, _ in source._files] == ["000.png", *names]


# Classes


def test_classes_are_in_the_order_in_which_people_count(make_folder):
    root = make_folder(dict.fromkeys(("10", "9", "1", "class 2", "class 10", "Class 1"), 1), "images/train").parent
    shutil.copytree(root / "train", root / "test")
    data = folder_config(root, 6)
    assert sources.class_names(data) == ["1", "9", "10", "Class 1", "class 2", "class 10"]
    assert [path.parent.name for path, _ in sources.open_source(data, "train")._files] == sources.class_names(data)
    assert sources.source_identity(data)["class_names"] == sources.class_names(data)
    chosen = dataclasses.replace(data, class_names=("class 2", "1", "9", "10", "class 10", "Class 1"))
    assert [path.parent.name for path, _ in sources.open_source(chosen, "train")._files] == list(chosen.class_names)
    with pytest.raises(ValueError, match="config.data.class_names must be those of the class folders in .* in '11'"):
        sources.open_source(dataclasses.replace(data, class_names=("11", *chosen.class_names[1:])), "train")


def test_runs_of_the_first_rule_keep_its_order_files_and_pixels(make_folder):
    root = make_folder({"10": 2, "2": 2}, "images/train").parent
    shutil.copytree(root / "train", root / "test")
    transparent = np.dstack([PIXELS, np.zeros((6, 8), np.uint8)])
    save(root / "train" / "2" / "000.png", transparent)
    save(root / "train" / "2" / "001.tif")
    save(root / "train" / "2" / "deeper" / "000.png")
    save(root / "train" / "2" / "._x.png")
    old = folder_config(root, version="names-0123456789abcdef (train 4, test 4)")
    files = sources.open_source(old, "train")._files
    assert [(f"{p.parent.name}/{p.name}", label) for p, label in files] == [
        *((f"10/{i:03}.png", 0) for i in range(2)),
        *((f"2/{name}.png", 1) for name in ("._x", "000", "001")),
    ]
    np.testing.assert_array_equal(sources.open_source(old, "train")[3]["image"], PIXELS)
    new = sources.open_source(folder_config(root), "train")
    assert new[0]["label"] == 0 and (new[0]["image"] == 255).all() and len(new) == 6
    identities = [sources.source_identity(data) for data in (old, folder_config(root))]
    assert identities[0]["version"] != identities[1]["version"] and "background" not in identities[0]


def test_names_of_classes_are_one_whatever_code_a_disk_has_them_in(make_folder):
    root = make_folder({unicodedata.normalize("NFD", "é"): 1, "f": 1})
    data = folder_config(root)
    assert sources.class_names(data) == ["f", "é"]
    assert len(sources.open_source(dataclasses.replace(data, class_names=("é", "f")), "train")) == 2


# Pixels


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", [".jpg", ".png", ".tif", ".webp"])
def test_exif_orientation_is_applied(tmp_path, orientation, suffix):
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"lossless": True} if suffix == ".webp" else {"quality": 95} if suffix == ".jpg" else {}
    path = save(tmp_path / f"x{suffix}", exif=exif, **options)
    with Image.open(path) as image:
        shown = np.asarray(ImageOps.exif_transpose(image))
    np.testing.assert_array_equal(read_image(path), shown)
    assert shown.shape[:2] == ((6, 8) if orientation < 5 else (8, 6))


def test_maps_and_masks_are_turned_as_their_image_is(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    grey = RNG.integers(0, 256, (6, 8), np.uint8)
    path = save(tmp_path / "x.png", grey, exif=exif)
    np.testing.assert_array_equal(read_classes(path), np.rot90(grey, -1))
    np.testing.assert_array_equal(read_mask(path), np.rot90(grey, -1) >= 128)
    np.testing.assert_array_equal(read_classes(path, as_stored=True), grey)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_grey_of_16_bits_is_turned_too(tmp_path, orientation):
    exif, levels = Image.Exif(), RNG.integers(0, 256, (6, 8)).astype(np.uint16)
    exif[0x0112] = orientation
    paths = [save(tmp_path / f"{x.dtype}.png", x, exif=exif) for x in (257 * levels, levels.astype(np.uint8))]
    np.testing.assert_array_equal(*map(read_image, paths))


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_broken_exif_turns_nothing(tmp_path):
    path = save(tmp_path / "x.png", exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff nothing")
    np.testing.assert_array_equal(read_image(path), PIXELS)


ALPHA = RNG.integers(0, 256, (6, 8), np.uint8)
ALPHA[0] = 0, 255, 0, 255, 0, 255, 128, 128


@pytest.mark.parametrize("background", [(255, 255, 255), (0,), (10, 200, 90)])
@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_transparency_is_composited_on_the_background(tmp_path, mode, background):
    pixels = PIXELS if mode == "RGBA" else PIXELS[..., :1]
    path = save(tmp_path / "x.png", np.dstack([pixels, ALPHA]))
    share = ALPHA[..., None] / 255
    found = read_image(path, background)
    expected = np.round(share * pixels + (1 - share) * np.array(background))[..., : found.shape[-1]]
    assert found.dtype == np.uint8 and found.shape[-1] == (1 if mode == "LA" and len(set(background)) == 1 else 3)
    np.testing.assert_allclose(found, expected, atol=0.51)
    np.testing.assert_array_equal(found[0, :6:2], np.broadcast_to(background[: found.shape[-1]], found[0, :6:2].shape))
    np.testing.assert_array_equal(found[0, 1:6:2], np.broadcast_to(pixels, found.shape)[0, 1:6:2])


def palette_image():
    image = Image.fromarray(np.array([[0, 1, 2, 1]], np.uint8), mode="P")
    image.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255])
    return image


def test_transparency_of_palettes_and_of_a_single_colour_is_composited(tmp_path):
    white, red, blue, green = (255, 255, 255), (255, 0, 0), (0, 0, 255), (0, 255, 0)
    one = save(tmp_path / "one.png", palette_image(), transparency=1)
    np.testing.assert_array_equal(read_image(one), [[red, white, blue, white]])
    half = save(tmp_path / "half.png", palette_image(), transparency=bytes([0, 128, 255]))
    np.testing.assert_array_equal(read_image(half, (0,)), [[(0, 0, 0), (0, 128, 0), blue, (0, 128, 0)]])
    gif = save(tmp_path / "x.gif", palette_image(), transparency=1)
    np.testing.assert_array_equal(read_image(gif), [[red, white, blue, white]])
    rgb = save(tmp_path / "rgb.png", np.array([[red, green]], np.uint8), transparency=green)
    np.testing.assert_array_equal(read_image(rgb), [[red, white]])
    grey = save(tmp_path / "grey.png", np.array([[3, 7]], np.uint8), transparency=7)
    np.testing.assert_array_equal(read_image(grey), [[[3], [255]]])
    bits = save(tmp_path / "bits.png", Image.fromarray(np.array([[True, False]])), transparency=0)
    np.testing.assert_array_equal(read_image(bits, (7,)), [[[255], [7]]])
    np.testing.assert_array_equal(read_classes(one), [[0, 1, 2, 1]])  # classes are not colours


def png(path, colour_type, depth, row, transparent):
    """Writes a PNG of one row as its bytes are, with one transparent level or colour, which Pillow does not write."""
    width = 8 * len(row) // depth // (3 if colour_type == 2 else 1)
    chunks = {
        b"IHDR": struct.pack(">IIBBBBB", width, 1, depth, colour_type, 0, 0, 0),
        b"tRNS": struct.pack(f">{len(transparent)}H", *transparent),
        b"IDAT": zlib.compress(b"\0" + row),
        b"IEND": b"",
    }
    coded = (
        struct.pack(">I", len(x)) + kind + x + struct.pack(">I", zlib.crc32(kind + x)) for kind, x in chunks.items()
    )
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(coded))
    return path


def test_transparent_level_of_a_png_is_of_its_own_depth(tmp_path):
    two = png(tmp_path / "2.png", 0, 2, bytes([0b00011011]), [1])
    assert read_image(two, (7,)).ravel().tolist() == [0, 7, 170, 255]
    four = png(tmp_path / "4.png", 0, 4, bytes([0x0F, 0x3F]), [15])
    assert read_mask(png(tmp_path / "mask.png", 0, 4, bytes([0x0F, 0xEF]), [15])).tolist() == [
        [False, False, True, False]
    ]
    assert read_image(four, (7,)).ravel().tolist() == [0, 7, 51, 7]
    colours = png(tmp_path / "16.png", 2, 16, struct.pack(">6H", 65535, 32768, 255, 256, 511, 65535), [256, 511, 65535])
    assert read_image(colours, (7, 8, 9)).tolist() == [[[255, 128, 0], [7, 8, 9]]]


def test_tiff_of_16_bits_whose_white_is_0_is_turned_around(tmp_path):
    path = save(tmp_path / "x.tif", np.array([[0, 257, 65535]], np.uint16), tiffinfo={262: 0})
    assert read_image(path).ravel().tolist() == [255, 254, 0]


def test_first_frame_of_an_animation_is_its_image(tmp_path):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    for name in ("x.gif", "x.webp", "x.png", "x.tif"):
        options = {"lossless": True} if name == "x.webp" else {}
        frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:], **options)
        np.testing.assert_array_equal(read_image(tmp_path / name), np.full((8, 8, 3), (255, 0, 0)))


@pytest.mark.parametrize("name", ["x.png", "x.tif", "x.pgm"])
def test_grey_of_16_bits_is_scaled_to_8(tmp_path, name):
    levels = np.array([[0, 257, 300, 128, 129, 32768, 65535]], np.uint16)
    path = save(tmp_path / name, levels)
    np.testing.assert_array_equal(read_image(path)[..., 0], [[0, 1, 1, 0, 1, 128, 255]])
    assert read_mask(path).tolist() == [[False] * 5 + [True] * 2]


def test_levels_beyond_16_bits_are_refused(tmp_path):
    path = save(tmp_path / "x.tif", np.array([[0, 70_000]], np.int32))
    with pytest.raises(ValueError, match="its levels are from 0 to 70000, not of 16 bits"):
        read_image(path)


def test_mask_is_marked_from_level_128_on_where_it_is_opaque(tmp_path):
    soft = np.array([[0, 127, 128, 255]], np.uint8)
    assert read_mask(save(tmp_path / "soft.png", soft)).tolist() == [[False, False, True, True]]
    alpha = np.array([[255, 255, 255, 255], [0, 127, 128, 255]], np.uint8).T[None]  # white, ever more opaque
    assert read_mask(save(tmp_path / "la.png", alpha)).tolist() == [[False, False, True, True]]
    rgba = np.dstack([np.full((1, 4, 3), 255, np.uint8), soft])
    assert read_mask(save(tmp_path / "rgba.png", rgba)).tolist() == [[False, False, True, True]]
    palette = palette_image()
    palette.putpalette([255, 255, 255] * 3)
    assert read_mask(save(tmp_path / "p.png", palette, transparency=1)).tolist() == [[True, False, True, False]]


@pytest.mark.parametrize("kind", ["black", "level 1", "alpha alone", "transparent white"])
def test_mask_that_marks_nothing_is_one_line(tmp_path, kind):
    pixels = np.zeros((4, 4, 4), np.uint8)
    pixels[..., 3] = 255
    if kind == "alpha alone":
        pixels[:2, :, 3] = 0
    if kind == "level 1":
        pixels[:2, :, :3] = 1
    if kind == "transparent white":
        pixels[:] = 255, 255, 255, 0
    path = save(tmp_path / "mask.png", pixels)
    with pytest.raises(ValueError, match=r"mask .*mask.png has nothing to paint: .*level 128") as error:
        read_mask(path)
    assert "\n" not in str(error.value)


# Text


@pytest.mark.parametrize("newline", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_metadata_is_read_with_any_newline_and_code_of_unicode(make_folder, newline, mark):
    root = make_folder({"a": 1, "b": 1})
    (root / "a" / "000.png").rename(root / "a" / unicodedata.normalize("NFD", "é.png"))
    rows = [
        json.dumps({"file_name": "a/é.png", "caption": unicodedata.normalize("NFD", "ö")}, ensure_ascii=False),
        "",
        '{"file_name": "b/000.png", "caption": "x"}',
    ]
    (root / "metadata.jsonl").write_bytes((mark + newline.join(rows)).encode())
    data = folder_config(root, extra_fields=("caption",))
    assert [example["caption"] for example in sources.open_source(data, "train")] == ["ö", "x"]


def test_metadata_that_is_no_utf_8_is_one_line(make_folder):
    root = make_folder({"a": 1, "b": 1})
    (root / "metadata.jsonl").write_bytes('{"file_name": "a/000.png", "caption": "é"}'.encode("latin-1"))
    with pytest.raises(ValueError, match=r"metadata.jsonl must be text in UTF-8 .*; save it so") as error:
        sources.open_source(folder_config(root, extra_fields=("caption",)), "train")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("newline", ["\n", "\r\n", "\r"])
def test_prompts_and_layouts_of_a_file_are_its_lines(tmp_path, newline, mark):
    path = tmp_path / "lines.txt"
    path.write_bytes(mark + newline.join(["cafe\u0301 ", "", "two\u2028lines", ""]).encode())
    assert read_prompts(None, str(path)) == read_layouts(str(path)) == ["café", "two\u2028lines"]
    assert read_prompts("cafe\u0301", None) == read_layouts("cafe\u0301") == ["café"]


def test_a_file_of_prompts_that_is_no_utf_8_is_one_line(tmp_path):
    path = tmp_path / "lines.txt"
    path.write_bytes("café".encode("utf-16"))
    for read in (lambda: read_prompts(None, str(path)), lambda: read_layouts(str(path))):
        with pytest.raises(ValueError, match="must be text in UTF-8, but its byte 0 is not; save it so") as error:
            read()
        assert "\n" not in str(error.value)


def test_layouts_name_classes_in_any_code_of_unicode():
    transformer = TokenTransformerConfig(width=8, depth=1)
    tokenizer = LayoutTokenizer(LayoutConfig(("dog", "cafe\u0301"), transformer))
    assert tokenizer.parse("café 0 0 1 1")[0].label == tokenizer.parse("cafe\u0301 0 0 1 1")[0].label == 1


def test_masks_of_arrays_are_marked_as_those_of_files():
    image = np.zeros((2, 2, 1), np.uint8)
    for mask in ([[0, 127], [128, 255]], [[0.0, 0.4], [0.5, 1.0]], [[False, False], [True, True]], [[0, 0], [1, 1]]):
        assert Given(image, np.array(mask)).mask.tolist() == [[[False, False], [True, True]]]


def test_a_mask_that_marks_nothing_within_the_square_is_an_error(tmp_path):
    config = dit_config(tmp_path)
    image, mask = np.zeros((2, 8, 8, 1), np.uint8), np.ones((2, 8, 8), bool)
    Given(image, mask).check(config)
    mask[1] = False
    with pytest.raises(ValueError, match="mask 1 has nothing to paint within the square") as error:
        Given(image, mask).check(config)
    assert "\n" not in str(error.value)


def test_a_background_is_of_folders_alone():
    with pytest.raises(ValueError, match=r"background=\(0,\) needs an image folder, and fashion_mnist is none"):
        sources.open_source(DataConfig("fashion_mnist", 28, background=(0,)), "train")
