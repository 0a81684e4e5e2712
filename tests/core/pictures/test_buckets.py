"""Sizes pictures are trained at, and the windows they are cropped to."""

import random
from collections import Counter

import pytest

from sara_core.pictures.buckets import SizeRule, choose_sizes, crop_windows

PHONE, TALL, SQUARE, SCREEN = (4000, 3000), (3000, 4000), (2000, 2000), (1920, 1080)


def mixed(count, seed=0):
    dice = random.Random(seed)
    return [(dice.randint(400, 4000), dice.randint(400, 4000)) for _ in range(count)]


def test_usual_shapes_get_the_usual_sizes():
    found = choose_sizes([PHONE, TALL, SQUARE, SCREEN], SizeRule(512))
    assert found == [(576, 448), (448, 576), (512, 512), (640, 384)]
    assert choose_sizes([SQUARE, PHONE], SizeRule(1024)) == [(1024, 1024), (1152, 896)]
    assert choose_sizes([(64, 64)], SizeRule(64)) == [(64, 64)]


@pytest.mark.parametrize("side", [64, 256, 512, 768, 1024])
@pytest.mark.parametrize("max_buckets", [1, 3, 5, 12])
def test_sixty_odd_pictures_share_a_few_sizes_of_one_area(side, max_buckets):
    sizes = choose_sizes(
        [(w + 2000, h + 2000) for w, h in mixed(60)], SizeRule(side, max_buckets=max_buckets)
    )
    assert 1 <= len(set(sizes)) <= max_buckets
    for width, height in sizes:
        assert width % 16 == height % 16 == 0
        assert 0.7 * side**2 <= width * height <= side**2
        assert max(width, height) <= 2 * min(width, height)


def test_the_sizes_kept_are_those_that_crop_least():
    pictures = [SQUARE] * 30 + [SCREEN] * 20 + [(2000, 1990)] + [(1800, 2000)]
    found = Counter(choose_sizes(pictures, SizeRule(512, max_buckets=2)))
    assert found == {(512, 512): 32, (640, 384): 20}


def test_small_pictures_are_not_blown_up():
    rule = SizeRule(512, max_upscale=1.25)
    assert choose_sizes([(420, 420), (400, 400), (300, 300), (210, 210), (104, 104), (100, 100)], rule) == [
        (512, 512), (384, 384), (256, 256), (256, 256), (128, 128), None,
    ]  # fmt: skip
    assert choose_sizes([(100, 100)], SizeRule(512, max_upscale=6.0)) == [(512, 512)]


def test_without_cropping_every_picture_keeps_its_shape():
    pictures = mixed(50)
    for (w, h), (width, height) in zip(
        pictures, choose_sizes(pictures, SizeRule(512, crop="none")), strict=True
    ):
        assert width % 16 == height % 16 == 0
        shrink = min(1, 512 / (w * h) ** 0.5)
        assert abs(width - w * shrink) <= 8.01
        assert abs(height - h * shrink) <= 8.01
        assert list(crop_windows((w, h), (width, height), "none", 3, 0)) == [(0, 0, w, h)]


def test_windows_have_the_shape_of_the_size_and_lie_within_the_picture():
    for crop in ("centre", "random"):
        for picture in mixed(20):
            for left, top, right, bottom in crop_windows(picture, (640, 384), crop, 4, seed=3):
                assert 0 <= left < right <= picture[0] + 1e-6
                assert 0 <= top < bottom <= picture[1] + 1e-6
                assert (right - left) / (bottom - top) == pytest.approx(640 / 384, rel=1e-6)


def test_centre_windows_by_hand():
    assert list(crop_windows((300, 100), (64, 64), "centre", 1, 0)) == [(100, 0, 200, 100)]
    assert list(crop_windows((300, 100), (64, 64), "centre", 3, 0)) == [
        (0, 0, 100, 100), (100, 0, 200, 100), (200, 0, 300, 100),
    ]  # fmt: skip
    assert len(list(crop_windows((100, 100), (64, 64), "centre", 3, 0))) == 1  # all the same


def test_random_windows_follow_the_seed_and_never_enlarge_more():
    def windows(seed, picture=(1000, 700), count=5):
        return list(crop_windows(picture, (512, 512), "random", count, seed))

    assert windows(1) == windows(1) != windows(2)
    assert len(windows(1)) == 5
    sides = [right - left for left, _, right, _ in windows(1)]
    assert sides[0] == pytest.approx(700)
    assert all(0.75 * 700 - 1e-6 <= side <= 700 + 1e-6 for side in sides)
    small = [right - left for left, _, right, _ in windows(1, (600, 520))]
    assert min(small) >= 512 - 1e-6


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"side": 8}, "at least 16"),
        ({"side": 512, "step": 24}, "divisible by 24, but this VAE needs multiples of 16"),
        ({"side": 512, "crop": "left"}, "'left'; expected one of centre, random, none"),
        ({"side": 512, "max_buckets": 0}, "max_buckets"),
    ],
)
def test_rules_that_cannot_be_followed_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        SizeRule(**settings)


def test_windows_never_stick_out_by_rounding():
    for side in (512, 1024, 1280):
        for picture in [(1200, 900), (5184, 3456), (4032, 3024), *mixed(400, side)]:
            (size,) = choose_sizes([picture], SizeRule(side))
            for crop in ("centre", "random"):
                for window in crop_windows(picture, size, crop, 2, 0) if size else ():
                    assert window[0] >= 0
                    assert window[1] >= 0
                    assert window[2] <= picture[0]
                    assert window[3] <= picture[1]


def test_the_limit_holds_for_elongated_pictures_too():
    for picture in [(2000, 200), (4000, 200), (200, 3000), *mixed(300)]:
        (size,) = choose_sizes([picture], SizeRule(1024, max_upscale=1.25))
        if size is not None:
            assert max(size[0] / picture[0], size[1] / picture[1]) <= 1.26
    pictures = mixed(100) + [(2000, 200)]
    for picture, size in zip(pictures, choose_sizes(pictures, SizeRule(512)), strict=True):
        assert size is None or max(size[0] / picture[0], size[1] / picture[1]) <= 1.26


def test_sides_are_divisible_as_asked():
    for crop in ("centre", "none"):
        for step in (64, 256, 512):
            for picture in [(130, 130), (200, 200), (500, 333), *mixed(30)]:
                (size,) = choose_sizes([picture], SizeRule(512, step=step, crop=crop))
                assert size is None or (size[0] % step, size[1] % step) == (0, 0)
    assert choose_sizes([(2000, 2000)], SizeRule(640, step=256)) == [(512, 512)]
    assert choose_sizes([(130, 130), (600, 600)], SizeRule(512, step=512)) == [None, (512, 512)]
    with pytest.raises(ValueError, match="divisible by 512, more than the size of 256"):
        SizeRule(256, step=512)
