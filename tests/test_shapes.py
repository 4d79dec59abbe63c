"""The embedded data set: equal bits everywhere, exact boxes and masks, classes that only form tells apart."""
import zlib

import numpy as np
import pytest
from sklearn.cluster import KMeans
from sklearn.metrics import normalized_mutual_info_score

from configs.shapes import SHAPES_CLASSES, draw_shapes


def mask_bounds(mask):
    """Smallest box around the nonzero pixels of mask [H, W]: x0 y0 x1 y1, right and bottom exclusive."""
    y, x = np.nonzero(mask)
    return [x.min(), y.min(), x.max() + 1, y.max() + 1]


def test_shapes_and_types():
    images, classes, boxes, masks = draw_shapes(0, np.arange(5), size=24)
    assert images.shape == (5, 3, 24, 24) and images.dtype == np.uint8
    assert classes.shape == (5,) and classes.dtype == np.int64
    assert boxes.shape == (5, 4) and boxes.dtype == np.float32
    assert masks.shape == (5, 24, 24) and masks.dtype == np.uint8
    assert len(SHAPES_CLASSES) == len(set(SHAPES_CLASSES)) == 10
    assert [len(part) for part in draw_shapes(0, [])] == [0, 0, 0, 0]


def test_an_image_does_not_depend_on_its_batch():
    whole = draw_shapes(3, np.arange(300))
    order = np.random.default_rng(0).permutation(300)
    for part, shuffled in zip(whole, draw_shapes(3, order)):
        assert np.array_equal(part[order], shuffled)
    for i in (0, 127, 128, 299):
        for part, alone in zip(whole, draw_shapes(3, [i])):
            assert np.array_equal(part[i], alone[0])


def test_bits_are_the_same_on_every_machine():
    parts = draw_shapes(0, np.arange(200))
    sums = [zlib.crc32(np.ascontiguousarray(part).tobytes()) for part in parts]
    assert sums == [3374352525, 511133474, 3888551970, 1112338877]


def test_seeds_and_indices_differ():
    images = np.concatenate([draw_shapes(seed, np.arange(100))[0] for seed in range(3)])
    assert len(np.unique(images.reshape(300, -1), axis=0)) == 300


@pytest.mark.parametrize("size", [32, 64])
def test_box_bounds_the_mask_of_a_single_object(size):
    _, _, boxes, masks = draw_shapes(1, np.arange(300), size=size, two=0)
    share = (masks > 0).mean((1, 2))
    assert np.array_equal(boxes, [mask_bounds(mask) for mask in masks])
    assert (0.16 < share).all() and (share < 0.26).all()


def test_second_object_is_smaller_and_apart():
    _, classes, boxes, masks = draw_shapes(1, np.arange(300), two=1)
    for k, box, mask in zip(classes, boxes.astype(int), masks):
        main, rest = np.zeros_like(mask), mask.copy()
        main[box[1]:box[3], box[0]:box[2]] = mask[box[1]:box[3], box[0]:box[2]]
        rest[main > 0] = 0
        assert mask_bounds(main) == list(box)
        assert 0 < (rest > 0).sum() < 0.6 * (main > 0).sum()
        assert set(np.unique(mask)) == {0, 1 + k}


def test_share_of_pairs():
    one, some = draw_shapes(2, np.arange(2000), two=0)[3], draw_shapes(2, np.arange(2000))[3]
    assert 0.07 < (one != some).any((1, 2)).mean() < 0.14


def test_objects_are_set_off_by_their_hue_and_not_by_brightness():
    images, classes, _, masks = draw_shapes(4, np.arange(500))
    assert np.array_equal(masks.max((1, 2)), 1 + classes)
    inside = np.array([x[:, m > 0].mean(1) for x, m in zip(images, masks)])      # [500, 3]
    outside = np.array([x[:, m == 0].mean(1) for x, m in zip(images, masks)])
    warmer = (inside - outside)[:, 0] - (inside - outside)[:, 2]
    brighter = (inside - outside).mean(1)
    assert (warmer > 60).all()
    assert (brighter < 0).sum() > 25 and (brighter > 0).sum() > 25


def test_nothing_but_form_tells_the_classes():
    """Nothing without form may cluster as the classes do: colours, area; and laid-out pixels hardly."""
    images, classes, _, masks = draw_shapes(6, np.arange(3000), two=0)
    x = images.astype(np.float32)
    colours = np.concatenate([x.mean((2, 3)), x.std((2, 3))], 1)
    area = (masks > 0).mean((1, 2))[:, None]
    pixels = x.reshape(3000, 3, 8, 4, 8, 4).mean((3, 5)).reshape(3000, -1)
    for told, limit in ((colours, 0.08), (area, 0.05), (pixels, 0.2)):
        found = KMeans(20, n_init=1, random_state=0).fit_predict((told - told.mean(0)) / told.std(0))
        assert normalized_mutual_info_score(classes, found) < limit
    per_class = np.array([area[classes == k].mean() for k in range(10)])
    assert np.ptp(per_class) < 0.03 * per_class.mean()


def test_classes_are_balanced_and_without_order():
    classes = draw_shapes(5, np.arange(5000), size=8)[1]
    assert (abs(np.bincount(classes, minlength=10) - 500) < 100).all()
    assert abs((classes[1:] == classes[:-1]).mean() - 0.1) < 0.02
