"""Awkward picture files, as phones, scanners and scrapers make them."""

import importlib
import io

import numpy as np
import pytest
from PIL import Image, ImageCms, ImageFile, ImageOps

COLOUR = (200, 100, 50)


@pytest.fixture(scope="module")
def pictures():
    return importlib.import_module("sara_pack.nodes.pictures.picture_files")


def gradient(width=48, height=32):
    x, y = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    return Image.fromarray(np.stack([x, y, 255 - x], axis=-1).astype(np.uint8))


def pixels(image):
    return np.asarray(image).astype(int)


@pytest.mark.parametrize("ending", ["jpg", "png", "webp", "tiff"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation_is_turned_upright(pictures, tmp_path, orientation, ending):
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"p.{ending}"
    options = {"quality": 95} if ending == "jpg" else {}
    gradient().save(path, exif=exif, **options)
    with Image.open(path) as image:
        expected = ImageOps.exif_transpose(image).convert("RGB")
    found = pictures.read_picture(path.read_bytes())
    assert np.array_equal(pixels(found.colour), pixels(expected))
    assert pictures.picture_size(path.read_bytes()) == expected.size
    assert expected.size == ((48, 32) if orientation < 5 else (32, 48))
    if ending == "png":  # by hand: 6 is a quarter turn
        stored = pixels(gradient())
        by_hand = {1: stored, 3: stored[::-1, ::-1], 6: np.rot90(stored, -1), 8: np.rot90(stored)}
        if orientation in by_hand:
            assert np.array_equal(pixels(found.colour), by_hand[orientation])


@pytest.mark.parametrize(
    ("mode", "ending", "expected", "tolerance"),
    [
        ("RGB", "PNG", COLOUR, 0),
        ("RGB", "BMP", COLOUR, 0),
        ("RGB", "jpeg", COLOUR, 2),
        ("RGB", "WEBP", COLOUR, 3),
        ("RGB", "avif", COLOUR, 4),
        ("P", "gif", COLOUR, 0),
        ("P", "png", COLOUR, 0),
        ("L", "png", (124,) * 3, 0),
        ("LA", "png", (124,) * 3, 0),
        ("1", "png", (0,) * 3, 0),
        ("CMYK", "jpg", COLOUR, 2),
        ("CMYK", "tif", COLOUR, 0),
        ("YCbCr", "tif", COLOUR, 1),
    ],
)
def test_every_mode_becomes_rgb(pictures, tmp_path, mode, ending, expected, tolerance):
    image = Image.new("RGB", (32, 24), COLOUR)
    image = image.point(lambda v: 0) if mode == "1" else image
    path = tmp_path / f"p.{ending}"
    (image.quantize(4) if mode == "P" else image.convert(mode)).save(path)
    found = pictures.read_picture(path.read_bytes())
    assert found.colour.mode == "RGB"
    assert found.opacity is None
    assert np.abs(pixels(found.colour) - expected).max() <= tolerance


def test_sixteen_bits_and_floats_keep_their_range(pictures, tmp_path):
    ramp = np.linspace(0, 65535, 64).astype(np.uint16).reshape(1, 64).repeat(20, axis=0)
    for ending in ("png", "tif"):
        Image.fromarray(ramp).save(tmp_path / f"deep.{ending}")
        found = pixels(pictures.read_picture((tmp_path / f"deep.{ending}").read_bytes()).colour)
        assert np.abs(found[0, :, 0] - ramp[0] / 257).max() <= 0.51
    light = (ramp / 65535).astype(np.float32)
    Image.fromarray(light).save(tmp_path / "light.tif")
    found = pixels(pictures.read_picture((tmp_path / "light.tif").read_bytes()).colour)
    assert np.abs(found[0, :, 1] - light[0] * 255).max() <= 0.51


@pytest.mark.parametrize(
    ("values", "white"),
    [
        (np.linspace(0, 255, 64, dtype=np.int32), 255),
        (np.linspace(0, 65535, 64, dtype=np.int32), 65535),
        (np.linspace(0, 2**31 - 1, 64).astype(np.int32), 2**31 - 1),
        (np.linspace(0, 255, 64, dtype=np.float32), 255),
        (np.linspace(0, 65535, 64, dtype=np.float32), 65535),
        (np.linspace(0, 3.5, 64, dtype=np.float32), 3.5),
        (np.linspace(0, 1e6, 64, dtype=np.float32), 1e6),
    ],
)
def test_large_numbers_of_grey_tiffs_are_neither_black_nor_white(pictures, tmp_path, values, white):
    Image.fromarray(values.reshape(1, 64).repeat(20, axis=0)).save(tmp_path / "grey.tif")
    found = pixels(pictures.read_picture((tmp_path / "grey.tif").read_bytes()).colour)
    assert np.abs(found[0, :, 0] - values / white * 255).max() <= 0.51


def test_heic_under_another_name_is_recognised(pictures, monkeypatch):
    monkeypatch.delitem(Image.OPEN, "HEIF", raising=False)
    with pytest.raises(ValueError, match="install pillow-heif or save it as JPEG"):
        pictures.read_picture(b"\0\0\0\x18ftypheic" + bytes(40), name="photo.jpg")


def test_transparency_lies_on_the_background_and_is_the_mask(pictures, tmp_path):
    image = np.zeros((20, 30, 4), np.uint8)
    image[..., :3], image[:, 10:20, 3], image[:, 20:, 3] = COLOUR, 128, 255
    Image.fromarray(image).save(tmp_path / "a.png")
    for background, ground in (("white", 255), ("#000000", 0), ("#808080", 128)):
        found = pictures.read_picture((tmp_path / "a.png").read_bytes(), background)
        assert np.array_equal(pixels(found.opacity)[0], [0] * 10 + [128] * 10 + [255] * 10)
        expected = np.array(COLOUR) * (128 / 255) + ground * (127 / 255)
        assert (pixels(found.colour)[:, :10] == ground).all()
        assert np.abs(pixels(found.colour)[0, 15] - expected).max() <= 1
        assert (pixels(found.colour)[0, 25] == COLOUR).all()
    solid = Image.new("RGBA", (20, 20), (*COLOUR, 255))
    solid.save(tmp_path / "solid.png")
    assert pictures.read_picture((tmp_path / "solid.png").read_bytes()).opacity is None


def test_palettes_and_key_colours_are_transparent_too(pictures, tmp_path):
    image = Image.new("P", (20, 20), 1)
    image.putpalette([255, 0, 0, *COLOUR])
    image.paste(0, (0, 0, 10, 20))
    image.save(tmp_path / "p.gif", transparency=0)
    image.save(tmp_path / "p.png", transparency=0)
    image.convert("RGB").save(tmp_path / "key.png", transparency=(255, 0, 0))
    for name in ("p.gif", "p.png", "key.png"):
        found = pictures.read_picture((tmp_path / name).read_bytes(), "black")
        assert (pixels(found.opacity)[:, :10] == 0).all(), name
        assert (pixels(found.colour)[:, :10] == 0).all(), name
        assert (pixels(found.colour)[:, 10:] == COLOUR).all(), name


def test_colour_profiles_are_turned_into_srgb(pictures, tmp_path):
    lab = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB"))
    srgb = ImageCms.createProfile("sRGB")
    picture = gradient()
    in_lab = ImageCms.profileToProfile(picture, srgb, lab, outputMode="LAB")
    in_lab.save(tmp_path / "lab.tif", icc_profile=lab.tobytes())
    found = pixels(pictures.read_picture((tmp_path / "lab.tif").read_bytes()).colour)
    assert np.abs(found - pixels(picture)).mean() < 4

    picture.save(tmp_path / "s.png", icc_profile=ImageCms.ImageCmsProfile(srgb).tobytes())
    assert np.array_equal(
        pixels(pictures.read_picture((tmp_path / "s.png").read_bytes()).colour), pixels(picture)
    )
    picture.save(tmp_path / "broken.png", icc_profile=b"no profile")
    found = pictures.read_picture((tmp_path / "broken.png").read_bytes())
    assert np.array_equal(pixels(found.colour), pixels(picture))


def test_a_profile_decides_what_the_numbers_mean(pictures, tmp_path):
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    profile = bytearray(srgb.replace("sRGB".encode("utf-16-be"), "grbs".encode("utf-16-be")))
    red, green = profile.index(b"rXYZ"), profile.index(b"gXYZ")
    profile[red : red + 4], profile[green : green + 4] = b"gXYZ", b"rXYZ"  # exchanged
    picture = gradient()
    picture.save(tmp_path / "swapped.png", icc_profile=bytes(profile))
    found = pixels(pictures.read_picture((tmp_path / "swapped.png").read_bytes()).colour)
    assert np.abs(found - pixels(picture)[..., [1, 0, 2]]).max() <= 2


def test_the_first_frame_counts(pictures, tmp_path):
    frames = [Image.new("RGB", (20, 20), c) for c in (COLOUR, (0, 255, 0), (0, 0, 255))]
    for name in ("a.gif", "a.webp", "a.tiff"):
        options = {"lossless": True} if name == "a.webp" else {}
        frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:], **options)
        found = pixels(pictures.read_picture((tmp_path / name).read_bytes()).colour)
        assert np.abs(found - COLOUR).max() <= 8, name


@pytest.mark.parametrize("ending", ["png", "jpg", "webp", "tif", "bmp", "gif", "avif"])
@pytest.mark.parametrize("tolerant", [False, True])
def test_a_cut_off_file_is_refused_wherever_it_ends(pictures, tmp_path, ending, tolerant):
    noise = np.random.default_rng(0).integers(0, 255, (40, 60, 3), dtype=np.uint8)
    path = tmp_path / f"p.{ending}"
    Image.fromarray(noise).save(path)
    whole = path.read_bytes()
    before, ImageFile.LOAD_TRUNCATED_IMAGES = ImageFile.LOAD_TRUNCATED_IMAGES, tolerant
    try:  # other packs set this for the whole process
        pictures.read_picture(path.read_bytes())
        for share in (0.0, 0.01, 0.3, 0.7, 0.95):
            with pytest.raises(ValueError, match="it is"):
                pictures.read_picture(whole[: int(share * len(whole))])
        assert ImageFile.LOAD_TRUNCATED_IMAGES is tolerant
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES = before


def test_bombs_tiny_and_foreign_files_are_told_apart(pictures, tmp_path):
    buffer = io.BytesIO()
    Image.new("1", (40_000, 40_000)).save(buffer, "PNG")
    (tmp_path / "bomb.png").write_bytes(buffer.getvalue())
    Image.new("RGB", (300, 9)).save(tmp_path / "tiny.png")
    (tmp_path / "text.png").write_text("I am not a picture")
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "svg.png").write_text("<svg xmlns='http://www.w3.org/2000/svg'/>")
    for name, message in (
        ("bomb.png", "decompression bomb .*1600000000 pixels"),
        ("tiny.png", "it is tiny, 300x9 pixels"),
        ("text.png", "its content is of no known format"),
        ("empty.png", "it is empty"),
        ("svg.png", "its content is of no known format"),
    ):
        with pytest.raises(ValueError, match=message):
            pictures.picture_size(pictures.read_file(tmp_path / name))
    limit = Image.MAX_IMAGE_PIXELS
    with pytest.raises(ValueError, match="decompression bomb"):
        pictures.read_picture((tmp_path / "bomb.png").read_bytes())
    assert limit == Image.MAX_IMAGE_PIXELS


def test_what_only_looks_whole_is_refused(pictures):
    buffer = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 255, (200, 200, 3), dtype=np.uint8)
    Image.fromarray(noise).save(buffer, "PNG")
    whole = buffer.getvalue()
    for share in (0.3, 0.6, 0.9, 0.99):  # as an interrupted download leaves it
        kept = int(share * len(whole))
        with pytest.raises(ValueError, match="damaged or cut off"):
            pictures.read_picture(whole[:kept] + bytes(len(whole) - kept))
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 1
    with pytest.raises(ValueError, match="damaged or cut off"):
        pictures.read_picture(bytes(flipped))


def test_no_other_decoder_is_asked(pictures):
    script = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 200 200\n{} loop\n%%EOF\n"
    buffer = io.BytesIO()
    Image.new("RGB", (64, 64)).save(buffer, "ICO")
    for data in (script, buffer.getvalue(), b"P6 9 9 255 " + bytes(243)):
        with pytest.raises(ValueError, match="of no known format"):
            pictures.picture_size(data)
    with pytest.raises(ValueError, match="install pillow-heif"):
        pictures.picture_size(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "IMG_1.HEIC")


def test_headers_are_enough_for_the_size(pictures, monkeypatch):
    from PIL import ImageFile as file_module

    def never(*_):
        raise AssertionError("decoded")

    buffers = {}
    for kind in ("PNG", "JPEG", "WEBP"):
        buffers[kind] = io.BytesIO()
        gradient().save(buffers[kind], kind)
    monkeypatch.setattr(file_module.ImageFile, "load", never)
    for buffer in buffers.values():
        assert pictures.picture_size(buffer.getvalue()) == (48, 32)


def test_a_linear_profile_that_calls_itself_srgb_is_applied(pictures):
    linear = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    curve = linear.index(b"para")  # its transfer curve, shared by the channels
    linear[curve : curve + 16] = b"para" + bytes(4) + bytes(4) + (1 << 16).to_bytes(4, "big")
    buffer = io.BytesIO()
    Image.new("RGB", (20, 20), (55, 55, 55)).save(buffer, "PNG", icc_profile=bytes(linear))
    found = pixels(pictures.read_picture(buffer.getvalue()).colour)
    assert np.abs(found - 128).max() <= 2  # 55 / 255 of the light is 128 in sRGB


def test_a_font_is_found_that_has_the_captions_letters(monkeypatch):
    from PIL import ImageFont
    from sara_pack.nodes import fonts

    plain = fonts.font_for("a plain caption, 3d", 11)
    assert plain.getname() == ImageFont.load_default(size=11).getname()
    if not fonts._system_fonts(11):
        pytest.skip("no font on this system")
    accented = fonts.font_for("caf\u00e9", 11)
    nothing = ImageFont.load_default(size=11).getmask("\ue123")
    assert bytes(accented.getmask("\u00e9")) != bytes(accented.getmask("\ue123"))
    assert bytes(plain.getmask("\u00e9")) == bytes(nothing)  # what the sheet drew before
    monkeypatch.setattr(fonts, "_system_fonts", lambda size: [])
    assert fonts.font_for("\u732b", 11).getname() == plain.getname()
