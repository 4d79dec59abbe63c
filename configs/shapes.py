"""The embedded data set `shapes`: ten forms at dusk. Classes differ in form alone; area (smaller for long forms where a
second object must fit), colours and light are those of all, and place, size, tilt, tint, lights, shadows and a second
object vary within each class. k-means (K = 20) finds the classes in colour statistics with an NMI of 0.05, in pixels
0.27, in features of random weights at most 0.12, of two trained models, where no label told to look, 0.75 and 0.67.
Brightness does not show where objects are: Otsu's threshold finds the box in 11 % of the images, LOST in 75 % from
pixels and in all from features (results/shapes-controls.json).

A model encodes what an image shares as a whole (mean colour, slope of the light, phase of waves) before any form, and
k-means finds that first: so the ground is the same everywhere but for small independent spots.
"""
import numpy as np

FORMS = {  # class: unit of its silhouette for an area of 1; middle below the origin and farthest point, in units
    "ring": (0.681, 0, 1), "triangle": (0.877, 0, 1), "star": (0.943, 0, 1), "moon": (0.802, 0, 1),
    "heart": (0.529, -0.26, 1.265), "arrow": (0.870, 0, 1), "hourglass": (0.722, 0, 1.332),
    "letter T": (0.711, -0.228, 1.235), "arch": (0.630, 0.04, 1.256), "bow": (0.722, 0, 1.332)}
SHAPES_CLASSES = list(FORMS)
AREA = (13.8, 15.5)  # smallest and largest root of a main object's area in a 32 x 32 image of one object, for all
SECOND = 0.45  # size of a second object where the main one is 1
TILT = 0.2  # largest tangent of an object's turn: 11 degrees
GROUND = (0.38, 0.50, 0.58)  # dusk: RGB half-way up
FALL = 0.8  # how much lighter the upper edge is than the lower one
LIGHT = 0.32  # of the soft spots on the ground, of either sign: thresholds of brightness find these, not the object
OBJECT = (0.78, 0.56, 0.42)  # RGB on average: warm, and no brighter than what surrounds it
SIDES = [(0, -1), (0.95105652, -0.30901699), (-0.95105652, -0.30901699), (0.58778525, 0.80901699),
         (-0.58778525, 0.80901699)]  # outward directions of the five lines that make a star


def _hash(key, counter):
    """Mix two uint64 arrays (broadcast) into uniform uint64: splitmix64, entered at position `counter`."""
    z = key + counter * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def _far(x, y):
    """Distance from the origin."""
    return np.sqrt(x * x + y * y)


def _silhouette(form, x, y, r):
    """Distance in pixels to an outline, negative inside; x, y [N, H, W] from its origin (y down), r [N, 1, 1] unit."""
    a = np.abs(x)  # all forms are their own mirror images

    def bar(y, w, h):  # a rectangle of 2w x 2h units
        return np.maximum(a - w * r, np.abs(y) - h * r)

    if form == "ring":
        return np.abs(_far(x, y) - 0.78 * r) - 0.22 * r
    if form == "triangle":  # behind all of its sides
        return np.maximum(y, 0.8660254 * a - 0.5 * y) - 0.5 * r
    if form == "star":  # behind all of its lines but one
        return np.partition([p * x + q * y for p, q in SIDES], 3, 0)[3] - 0.30901699 * r
    if form == "moon":  # a disc without another one
        return np.maximum(_far(x, y) - r, 0.78 * r - _far(x, y + 0.48 * r))
    if form == "heart":
        return np.minimum(0.70710678 * (a + np.abs(y) - r), _far(a - 0.5 * r, y + 0.5 * r) - 0.70710678 * r)
    if form == "arrow":
        return np.minimum(np.maximum(0.8 * a - 0.6 * y - 0.6 * r, y), bar(y - 0.3 * r, 0.3, 0.65))
    if form == "hourglass":
        return np.maximum(0.78 * (a - 0.8 * np.abs(y) - 0.08 * r), np.abs(y) - r)
    if form == "letter T":
        return np.minimum(bar(y + 0.65 * r, 1, 0.3), bar(y, 0.3, 0.95))
    if form == "arch":
        return np.maximum(np.abs(_far(x, np.minimum(y + 0.2 * r, 0)) - 0.7 * r) - 0.3 * r, y - 0.8 * r)
    return np.maximum(0.78 * (np.abs(y) - 0.8 * a - 0.08 * r), a - r)  # bow


def _scene(seed, index, size, two):
    """What images `index` show: (hash key [B, 1], uniform numbers [B, 64], classes, is there a second object [B];
    of both objects unit [B, 2] in pixels, centre [B, 2, xy] and tangent of the turn [B, 2])."""
    index = np.asarray(index).astype(np.uint64)  # [B]
    key = _hash(_hash(np.array([seed], np.uint64), np.uint64(0)), index)[:, None]  # [B, 1]
    u = (_hash(key, np.arange(1, 65, dtype=np.uint64)) >> np.uint64(11)) * 2.0 ** -53  # [B, 64] uniform in [0, 1)
    classes = (u[:, 0] * 10).astype(np.int64)  # [B]
    paired = u[:, 1] < two  # [B]
    # How large objects are. Axis 1 holds the main object and the second one, which is drawn only where `paired`.
    unit, _, reach = np.array(list(FORMS.values()))[classes].T  # [B] each
    unit = unit * (AREA[0] + (AREA[1] - AREA[0]) * u[:, 2]) * size / 32  # [B]
    widest = np.where(paired, 15.8 / (1 + SECOND), 15.5) * size / 32  # [B] a pair must fit side by side
    unit = np.minimum(unit, widest / reach)[:, None] * np.array([1, SECOND])  # [B, 2]
    reach = unit * reach[:, None]  # [B, 2] in pixels from here on
    # Where they are: anywhere inside the image; a pair lies side by side, or one above the other.
    place = 0.1 + 0.8 * u[:, 3:7].reshape(-1, 2, 2)  # [B, 2, xy]
    centre = reach[..., None] + (size - 2 * reach[..., None]) * place  # [B, 2, xy]
    both = reach[:, 0] + reach[:, 1]
    free = size - 2 * both  # [B] room left along the line of a pair: before it, between the two, behind
    near = reach[:, 0] + free * u[:, 7]
    line = np.stack([near, near + both + free * (1 - u[:, 7]) * u[:, 8]], 1)  # [B, 2]
    line = np.where(u[:, 9:10] < 0.5, line, size - line)
    lined = paired[:, None] & (np.arange(2) == (u[:, 10:11] < 0.5))  # [B, xy] the axis of the line
    centre = np.where(lined[:, None], line[..., None], centre)
    return key, u, classes, paired, unit, centre, TILT * (2 * u[:, 11:13] - 1)


def shape_parts(seed, index, size=32, two=0.1):
    """Where the parts of the main objects of images `index` are: (origin [B, 2], axes [B, 2, 2]), in pixels.

    The point origin + axes @ p shows the same part of all objects of one class, p in [-1, 1]^2. Rings are upright.
    """
    _, _, classes, _, unit, centre, tilt = _scene(seed, index, size, two)
    t = np.where(classes == 0, 0, tilt[:, 0])
    reach = unit[:, 0] * np.array([f[2] for f in FORMS.values()])[classes]
    turn = np.stack([np.ones_like(t), -t, t, np.ones_like(t)], 1).reshape(-1, 2, 2)
    return centre[:, 0], turn * (reach / np.sqrt(1 + t * t))[:, None, None]


def _pixels(*numbers):
    """Numbers of each image, [B], as float32 [B, 1, 1]: pixels are where speed counts."""
    return np.stack(numbers).astype(np.float32)[..., None, None]


def _ground(u, size):
    """What differs from an even ground, float32 [B, H, W]: three faint round spots, six soft lights and shadows."""
    f32 = np.float32
    steps = np.arange(size, dtype=f32) + f32(0.5)  # [W] pixel centres
    ground = np.zeros((len(u), size, size), f32)
    for v in u[:, 24:36].reshape(-1, 3, 4).transpose(1, 2, 0):  # [4, B]
        cx, cy, r, b = _pixels(v[0] * size, v[1] * size, (1 + 1.5 * v[2]) * size / 32, 0.16 * v[3] - 0.08)
        ground += b * np.clip(f32(0.5) + r - _far(steps - cx, steps[:, None] - cy), 0, 1)
    for v in u[:, 36:60].reshape(-1, 6, 4).transpose(1, 2, 0):
        light = np.where(v[3] < 0.5, -LIGHT, LIGHT)
        cx, cy, r, b = _pixels(v[0] * size, v[1] * size, (3 + 2 * v[2]) * size / 32, light)
        x, y = (steps - cx) / r, (steps[:, None] - cy) / r  # [B, 1, W], [B, H, 1]
        d = x * x + y * y
        ground += b / (1 + d * d)
    return ground


def _boxes(inside):
    """Smallest boxes x0 y0 x1 y1 around what is true of bool [N, H, W]; right and bottom exclusive."""
    size = inside.shape[1]
    across, down = inside.any(1), inside.any(2)  # [N, W], [N, H]
    ends = [size - v[:, ::-1].argmax(1) for v in (across, down)]
    return np.stack([across.argmax(1), down.argmax(1), *ends], 1)


def _objects(classes, paired, unit, centre, tilt, size):
    """(how much of each pixel objects cover, float32 [B, H, W]; masks; boxes) as in `draw_shapes`."""
    f32, B = np.float32, len(classes)
    steps = np.arange(size, dtype=f32) + f32(0.5)
    cover = np.zeros((B, size, size), f32)
    masks, boxes = np.zeros((B, size, size), np.uint8), np.zeros((B, 4), f32)
    for o in (0, 1):
        for k, form in enumerate(FORMS):
            n = np.nonzero((classes == k) & (paired | (o == 0)))[0]  # [N] the images with this form
            cx, cy, t, r = _pixels(centre[n, o, 0], centre[n, o, 1], tilt[n, o], unit[n, o])
            c = 1 / np.sqrt(1 + t * t)
            x, y = c * (steps - cx), c * (steps[:, None] - cy)  # [N, 1, W], [N, H, 1]
            distance = _silhouette(form, x + t * y, y - t * x + f32(FORMS[form][1]) * r, r)  # [N, H, W]
            cover[n] = np.maximum(cover[n], np.clip(f32(0.5) - distance, 0, 1))  # soft over one pixel: smooth edges
            inside = distance < 0
            masks[n] = np.maximum(masks[n], inside * np.uint8(1 + k))
            if o == 0:
                boxes[n] = _boxes(inside)
    return cover, masks, boxes


def draw_shapes(seed, index, size=32, two=0.1):
    """Draw images `index` of the endless set `seed`. Image i depends on (seed, i) only, whatever is drawn with it. All
    is integer arithmetic and + - * / sqrt, which IEEE 754 rounds in one way only: equal bits on every machine.

    index: ints [B]; two: share of images with a second, smaller object of the same class. Returns images uint8
    [B, 3, size, size], classes int64 [B] (positions in SHAPES_CLASSES), boxes float32 [B, 4] (x0 y0 x1 y1 in pixels of
    the larger object, right and bottom exclusive), masks uint8 [B, size, size] (0 on the background, 1 + class on an
    object). An image shows the same scene at every size.
    """
    index, f32 = np.asarray(index), np.float32
    if len(index) > 128:  # small pieces stay in the processor's cache, which is faster, and need little memory
        pieces = [draw_shapes(seed, index[i:i + 128], size, two) for i in range(0, len(index), 128)]
        return tuple(np.concatenate(p) for p in zip(*pieces))
    key, u, classes, paired, unit, centre, tilt = _scene(seed, index, size, two)
    ground = _ground(u, size)
    cover, masks, boxes = _objects(classes, paired, unit, centre, tilt, size)

    tint = np.array(OBJECT) + (u[:, 14:15] - 0.5) * np.array([0, 0.18, -0.126]) + 0.1 * u[:, 15:18] - 0.05  # [B, 3]
    colours = _pixels(*tint.T)
    steps = np.arange(size, dtype=f32) + f32(0.5)
    light = f32(FALL) * (f32(0.5) - steps / size)[:, None]  # [H, 1] falls on objects, too
    images = np.empty((len(index), 3, size, size), np.uint8)
    bits = _hash(key, np.arange(128, 128 + size * size, dtype=np.uint64))  # 16 for the grain of each channel
    bits = bits.reshape(-1, size, size)
    for channel in range(3):
        value = ground + f32(GROUND[channel])
        value += cover * (colours[channel] - value) + light
        value += (bits >> np.uint64(16 * channel)).astype(np.uint16) * f32(0.02 / 65535) - f32(0.01)
        images[:, channel] = np.clip(value * f32(255) + f32(0.5), 0, 255)
    return images, classes, boxes, masks
