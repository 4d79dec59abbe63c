"""The embedded data set `shapes`: ten forms at dusk, drawn by the code, with exact classes, boxes and masks.
@DOC@
"""
import numpy as np

FORMS = {  # class: unit of its silhouette for an area of 1; its middle below the origin and its farthest point, in units
    "disc": (0.564, 0, 1),
    "ring": (0.681, 0, 1),
    "triangle": (0.877, 0, 1),
    "star": (0.943, 0, 1),
    "cross": (0.799, 0, 1.023),
    "moon": (0.802, 0, 1),
    "heart": (0.529, -0.26, 1.265),
    "hash": (0.625, 0, 1.175),
    "frame": (0.57, 0, 1.413),
    "plank": (0.654, 0, 1.374),
}
SHAPES_CLASSES = list(FORMS)
AREA = (10.5, 12.5)  # smallest and largest root of a main object's area in a 32 x 32 image: the same for all classes
SECOND, TILT = 0.5, 0.15  # size of a second object where the main one is 1; largest tangent of the turn: 9 degrees
GROUND, OBJECT = (0.34, 0.44, 0.54), (0.75, 0.54, 0.38)  # average RGB: cool and warm, of about equal brightness
FALL = 0.5  # how much lighter the upper edge is than the lower one, on objects too: no brightness is the objects' own
BRIGHTNESS, TINT, LIGHT = 0.02, 0.03, 0.04  # how far images differ in these, to either side
SIDES = [(0, -1), (0.95105652, -0.30901699), (-0.95105652, -0.30901699), (0.58778525, 0.80901699),
         (-0.58778525, 0.80901699)]  # outward directions of the five lines that make a star


def _hash(key, counter):
    """Mix two uint64 arrays (broadcast) into uniform uint64: splitmix64, entered at position `counter`."""
    z = key + counter * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def _silhouette(form, x, y, r):
    """Distance in pixels to an outline, negative inside; x, y [N, H, W] from its origin (y down), r [N, 1, 1] its unit."""
    a, b = np.abs(x), np.abs(y)
    far = lambda x, y: np.sqrt(x * x + y * y)
    bar = lambda x, y, w, h: np.maximum(np.abs(x) - w * r, np.abs(y) - h * r)  # a rectangle of 2w x 2h units
    u, v = 0.70710678 * (x + y), 0.70710678 * (x - y)
    return {
        "disc": lambda: far(x, y) - r,
        "ring": lambda: np.abs(far(x, y) - 0.78 * r) - 0.22 * r,
        "frame": lambda: np.abs(bar(x, y, 0.74, 0.74)) - 0.26 * r,
        "triangle": lambda: np.maximum(y, 0.8660254 * a - 0.5 * y) - 0.5 * r,  # behind all of its sides
        "star": lambda: np.partition([p * x + q * y for p, q in SIDES], 3, 0)[3] - 0.30901699 * r,  # all but one
        "cross": lambda: np.minimum(bar(x, y, 1, 0.22), bar(x, y, 0.22, 1)),
        "saltire": lambda: np.minimum(bar(u, v, 1, 0.3), bar(u, v, 0.3, 1)),
        "hash": lambda: np.minimum(bar(a - 0.42 * r, y, 0.2, 1), bar(x, b - 0.42 * r, 1, 0.2)),
        "two bars": lambda: bar(a - 0.62 * r, y, 0.32, 1),
        "plank": lambda: bar(x, y, 1.3, 0.45),
        "moon": lambda: np.maximum(far(x, y) - r, 0.78 * r - far(x, y + 0.48 * r)),  # a disc without another one
        "heart": lambda: np.minimum(0.70710678 * (a + b - r), far(a - 0.5 * r, y + 0.5 * r) - 0.70710678 * r),
        "arrow": lambda: np.minimum(np.maximum(0.8 * a - 0.6 * y - 0.6 * r, y), bar(x, y - 0.3 * r, 0.3, 0.65)),
        "hourglass": lambda: np.maximum(0.78 * (a - 0.8 * b - 0.08 * r), b - r),
        "letter T": lambda: np.minimum(bar(x, y + 0.65 * r, 1, 0.3), bar(x, y, 0.3, 0.95)),
        "arch": lambda: np.maximum(np.abs(far(x, np.minimum(y + 0.2 * r, 0)) - 0.7 * r) - 0.3 * r, y - 0.8 * r),
    }[form]()


def _scene(seed, index, size, two):
    """What images `index` show: (hash key [B, 1], uniform numbers [B, 32], classes, is there a second object [B];
    of both objects unit [B, 2] in pixels, centre [B, 2, xy] and tangent of the turn [B, 2])."""
    index = np.asarray(index).astype(np.uint64)  # [B]
    key = _hash(_hash(np.array([seed], np.uint64), np.uint64(0)), index)[:, None]  # [B, 1]
    u = (_hash(key, np.arange(1, 33, dtype=np.uint64)) >> np.uint64(11)) * 2.0 ** -53  # [B, 32] uniform in [0, 1)
    classes = (u[:, 0] * len(FORMS)).astype(np.int64)  # [B]
    paired = u[:, 1] < two  # [B]

    # Where objects go. Axis 1 holds the main object and the second one, which is drawn only where `paired`.
    unit, _, reach = np.array(list(FORMS.values()))[classes].T  # [B] each
    unit = unit * (AREA[0] + (AREA[1] - AREA[0]) * u[:, 2]) * size / 32  # [B] pixels
    widest = np.where(paired, 15.8 / (1 + SECOND), 15.5) * size / 32  # [B] a pair must fit side by side
    unit = np.minimum(unit, widest / reach)[:, None] * np.array([1, SECOND])  # [B, 2]
    reach = unit * reach[:, None]  # [B, 2] in pixels from here on
    centre = reach[..., None] + (size - 2 * reach[..., None]) * u[:, 3:7].reshape(-1, 2, 2)  # [B, 2, xy] wholly inside
    both = reach.sum(1)
    free = size - 2 * both  # [B] room left along the line of a pair: before it, between the two, behind
    near = reach[:, 0] + free * u[:, 7]
    line = np.stack([near, near + both + free * (1 - u[:, 7]) * u[:, 8]], 1)  # [B, 2]
    line = np.where(u[:, 9:10] < 0.5, line, size - line)
    lined = paired[:, None] & (np.arange(2) == (u[:, 10:11] < 0.5))  # [B, xy] side by side, or one above the other
    centre = np.where(lined[:, None], line[..., None], centre)
    return key, u, classes, paired, unit, centre, TILT * (2 * u[:, 11:13] - 1)


def shape_parts(seed, index, size=32, two=0.2):
    """Where the parts of the main objects of images `index` are: (origin [B, 2], axes [B, 2, 2]), in pixels.

    The point origin + axes @ p shows the same part of all objects of one class, for any p in [-1, 1]^2. Discs and rings
    are taken as upright: nobody sees their turn.
    """
    _, _, classes, _, unit, centre, tilt = _scene(seed, index, size, two)
    round_ = np.isin(classes, [SHAPES_CLASSES.index(name) for name in ("disc", "ring")])
    t, reach = np.where(round_, 0, tilt[:, 0]), unit[:, 0] * np.array([f[2] for f in FORMS.values()])[classes]
    turn = np.stack([np.ones_like(t), -t, t, np.ones_like(t)], 1).reshape(-1, 2, 2)
    return centre[:, 0], turn * (reach / np.sqrt(1 + t * t))[:, None, None]


def draw_shapes(seed, index, size=32, two=0.2):
    """Draw images `index` of the endless set `seed`. Image i depends on (seed, i) only, whatever is drawn with it. All is
    integer arithmetic and + - * / sqrt, which IEEE 754 rounds in one way only: the bits are the same on every machine.

    index: ints [B]; two: share of images with a second, smaller object of the same class. Returns images uint8
    [B, 3, size, size], classes int64 [B] (positions in SHAPES_CLASSES), boxes float32 [B, 4] (x0 y0 x1 y1 in pixels of
    the larger object, right and bottom exclusive), masks uint8 [B, size, size] (0 on the background, 1 + class on an
    object). An image shows the same scene at every size.
    """
    index = np.asarray(index)
    if len(index) > 128:  # small pieces stay in the processor's cache, which is faster, and need little memory
        pieces = [draw_shapes(seed, index[i:i + 128], size, two) for i in range(0, len(index), 128)]
        return tuple(np.concatenate(p) for p in zip(*pieces))
    B, f32 = len(index), np.float32
    key, u, classes, paired, unit, centre, tilt = _scene(seed, index, size, two)
    tint = np.array(OBJECT) + BRIGHTNESS * (2 * u[:, 13:14] - 1) + TINT * (2 * u[:, 14:17] - 1)  # [B, 3]

    # From here on pixels, where speed counts: a number of each image becomes float32 [B, 1, 1].
    pixels = lambda *numbers: np.stack(numbers).astype(f32)[..., None, None]
    steps = np.arange(size, dtype=f32) + f32(0.5)  # [W] pixel centres
    cover, masks, boxes = np.zeros((B, size, size), f32), np.zeros((B, size, size), np.uint8), np.zeros((B, 4), f32)
    for k, form in enumerate(FORMS):
        for o in (0, 1):
            n = np.nonzero((classes == k) & (paired | (o == 0)))[0]  # [N] the images with this form
            cx, cy, t, r = pixels(centre[n, o, 0], centre[n, o, 1], tilt[n, o], unit[n, o])
            c = 1 / np.sqrt(1 + t * t)
            x, y = c * (steps - cx), c * (steps[:, None] - cy)  # [N, 1, W], [N, H, 1]
            distance = _silhouette(form, x + t * y, y - t * x + f32(FORMS[form][1]) * r, r)  # [N, H, W]
            cover[n] = np.maximum(cover[n], np.clip(f32(0.5) - distance, 0, 1))  # soft over one pixel: smooth edges
            inside = distance < 0
            masks[n] = np.maximum(masks[n], inside * np.uint8(1 + k))
            if o == 0:
                across, down = inside.any(1), inside.any(2)  # [N, W], [N, H]
                ends = [size - v[:, ::-1].argmax(1) for v in (across, down)]
                boxes[n] = np.stack([across.argmax(1), down.argmax(1), *ends], 1)

    slope = pixels(*LIGHT * (2 * u[:, 17:19].T - 1))  # [2, B, 1, 1]
    light = slope[0] * (steps / size - f32(0.5)) + (slope[1] - f32(FALL)) * (steps[:, None] / size - f32(0.5))
    colours, ground = pixels(*tint.T), pixels(*(BRIGHTNESS / 2 * (2 * u[:, 19:22].T - 1)))
    bits = _hash(key, np.arange(64, 64 + size * size, dtype=np.uint64)).reshape(B, size, size)  # 16 for each channel
    images = np.empty((B, 3, size, size), np.uint8)
    for channel in range(3):
        value = ground[channel] + f32(GROUND[channel])  # [B, 1, 1]
        grain = (bits >> np.uint64(16 * channel)).astype(np.uint16) * f32(0.02 / 65535) - f32(0.01)
        value = value + cover * (colours[channel] - value) + light + grain
        images[:, channel] = np.clip(value * f32(255) + f32(0.5), 0, 255)
    return images, classes, boxes, masks
