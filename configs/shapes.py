"""The embedded data set, drawn by the code: bright objects of two shapes a colour on plain grey, with exact classes, boxes and masks."""
import numpy as np

SHAPES_CLASSES = ["red disc", "red star", "yellow ring", "yellow square", "green triangle", "green disc", "blue star", "blue ring",
                  "violet square", "violet triangle"]
SHAPES = ["disc", "square", "triangle", "ring", "star"]
HUES = np.array([0.0, 0.14, 0.33, 0.58, 0.80])            # of the five colour families: two classes each


def _hash(key, counter):
    """Mix two uint64 arrays (broadcast) into uniform uint64: the splitmix64 generator, entered at position `counter`."""
    z = key + counter * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def _signed_distance(shape, x, y, reach):
    """Distance in pixels to a shape's outline, negative inside; x, y [N, H, W] from its centre, reach [N, 1, 1] to its farthest point."""
    if shape == 0:  # disc
        return np.sqrt(x * x + y * y) - reach
    if shape == 1:  # square
        return np.maximum(np.abs(x), np.abs(y)) - 0.70710678 * reach
    if shape == 2:  # triangle: behind all of its three sides
        return np.maximum(y, 0.8660254 * np.abs(x) - 0.5 * y) - 0.5 * reach
    if shape == 3:  # ring
        return np.abs(np.sqrt(x * x + y * y) - 0.74 * reach) - 0.26 * reach
    first = second = np.float32(-1e9)  # star: behind all of its five lines but one, so the second largest distance decides
    for a, b in [(0, -1), (0.95105652, -0.30901699), (-0.95105652, -0.30901699), (0.58778525, 0.80901699), (-0.58778525, 0.80901699)]:
        line = a * x + b * y
        first, second = np.maximum(first, line), np.maximum(second, np.minimum(first, line))
    return second - 0.30901699 * reach


def _rgb(hue, saturation, value):
    """HSV in [0, 1], each [...], to RGB [..., 3]."""
    k = (np.array([5.0, 3.0, 1.0]) + 6 * hue[..., None]) % 6  # [..., 3]
    return value[..., None] * (1 - saturation[..., None] * np.clip(np.minimum(k, 4 - k), 0, 1))


def _scene(seed, index, size, two):
    """What images `index` show: (hash key [B, 1], uniform numbers [B, 32], classes, shape, is there a second object [B]; of both objects reach [B, 2] in pixels,
    centre [B, 2, xy] and tangent of the turn [B, 2])."""
    index, B = np.asarray(index).astype(np.uint64), len(index)
    key = _hash(_hash(np.array([seed], np.uint64), np.uint64(0)), index)[:, None]  # [B, 1]
    u = (_hash(key, np.arange(1, 33, dtype=np.uint64)) >> np.uint64(11)) * 2.0 ** -53  # [B, 32] uniform in [0, 1)
    classes = (u[:, 0] * 10).astype(np.int64)  # [B]
    shape = np.array([SHAPES.index(name.split()[1]) for name in SHAPES_CLASSES])[classes]  # [B]
    paired = u[:, 1] < two  # [B]

    # Where objects go. Axis 1 holds the main object and the second one, which is drawn only where `paired`.
    stretch = np.array([0.78, 0.90, 1.05, 0.86, 1.10])[shape]  # [B] gives all shapes similar areas: size is no clue to the class
    widest = np.where(paired, np.minimum(12, 15.5 / 1.6 / stretch), 12)  # [B] a pair must fit side by side
    reach = (stretch * (8.2 + (widest - 8.2) * u[:, 2]) * size / 32)[:, None] * np.array([1, 0.6])  # [B, 2]
    centre = reach[..., None] + (size - 2 * reach[..., None]) * u[:, 3:7].reshape(B, 2, 2)  # [B, 2, xy] wholly inside the image
    free = size - 2 * reach.sum(1)  # [B] room left along the line of a pair: some before it, some between the two, the rest behind
    near = reach[:, 0] + free * u[:, 7]
    line = np.stack([near, near + reach.sum(1) + free * (1 - u[:, 7]) * u[:, 8]], 1)  # [B, 2]
    line = np.where(u[:, 9:10] < 0.5, line, size - line)
    lined = paired[:, None] & (np.arange(2) == (u[:, 10:11] < 0.5))  # [B, xy] a pair stands side by side or one above the other
    centre = np.where(lined[:, None], line[..., None], centre)
    tilt = 0.9 * u[:, 11:13] - 0.45  # [B, 2] tangent of the angle, at most 24 degrees: a square never stands on its corner
    return key, u, classes, shape, paired, reach, centre, tilt


def shape_parts(seed, index, size=32, two=0.2):
    """Where the parts of the main objects of images `index` are: (origin [B, 2], axes [B, 2, 2]), in pixels.

    The point origin + axes @ p shows the same part of all objects of one class, for any p in [-1, 1]^2. Discs and rings are taken as upright: nobody sees their turn.
    """
    _, _, _, shape, _, reach, centre, tilt = _scene(seed, index, size, two)
    t = np.where((shape == 0) | (shape == 3), 0, tilt[:, 0])
    turn = np.stack([np.ones_like(t), -t, t, np.ones_like(t)], 1).reshape(-1, 2, 2)
    return centre[:, 0], turn * (reach[:, 0] / np.sqrt(1 + t * t))[:, None, None]


def draw_shapes(seed, index, size=32, two=0.2):
    """Draw images `index` of the endless set `seed`: a bright shape (or two of one class) on a plain grey ground.

    Image i depends on (seed, i) only, whatever is drawn with it. Every step is integer arithmetic or one of + - * / sqrt, which
    IEEE 754 rounds in one way only (sin or exp may differ between machines), so the bits are the same everywhere.

    index: ints [B]; two: share of images with a second, smaller object of the same class. Returns images uint8 [B, 3, size, size],
    classes int64 [B] (positions in SHAPES_CLASSES), boxes float32 [B, 4] (x0 y0 x1 y1 in pixels of the larger object, right and bottom
    exclusive), masks uint8 [B, size, size] (0 on the background, 1 + class on an object). An image shows the same scene at every size.
    """
    index = np.asarray(index).astype(np.uint64)
    if len(index) > 128:  # small pieces stay in the processor's cache, which is faster, and need little memory
        pieces = [draw_shapes(seed, index[i:i + 128], size, two) for i in range(0, len(index), 128)]
        return tuple(np.concatenate(p) for p in zip(*pieces))

    B = len(index)
    key, u, classes, shape, paired, reach, centre, tilt = _scene(seed, index, size, two)
    cos = 1 / np.sqrt(1 + tilt * tilt)
    hue = (HUES[classes // 2][:, None] + 0.10 * u[:, 13:15] - 0.05) % 1  # [B, 2] varies inside its family
    colour = _rgb(hue, 0.65 + 0.25 * u[:, 15:17], 0.75 + 0.25 * u[:, 17:19])  # [B, 2, 3]
    ground = 0.16 + 0.08 * u[:, 19:20] + 0.03 * u[:, 20:23]  # [B, 3] varies little: the object must be what tells images apart

    f32 = np.float32  # from here on pixels, where speed counts
    steps = np.arange(size, dtype=f32) + f32(0.5)  # [W] pixel centres
    image = np.zeros((B, 3, size, size), f32) + ground.astype(f32)[..., None, None]
    masks, boxes = np.zeros((B, size, size), np.uint8), np.zeros((B, 4), f32)
    for o in (0, 1):
        for s in range(5):
            n = np.nonzero((shape == s) & (paired | (o == 0)))[0]  # [N] the images with this shape
            cx, cy, c, t, r = np.stack([centre[n, o, 0], centre[n, o, 1], cos[n, o], tilt[n, o], reach[n, o]]).astype(f32)[..., None, None]
            x, y = c * (steps - cx), c * (steps[:, None] - cy)  # [N, 1, W], [N, H, 1]
            distance = _signed_distance(s, x + t * y, y - t * x, r)  # [N, H, W]
            cover = np.clip(f32(0.5) - distance, 0, 1)[:, None]  # [N, 1, H, W] soft over one pixel: smooth edges
            image[n] += cover * (colour[n, o].astype(f32)[..., None, None] - image[n])
            inside = distance < 0
            masks[n] = np.maximum(masks[n], inside * (1 + classes[n]).astype(np.uint8)[:, None, None])
            if o == 0:
                cols, rows = inside.any(1), inside.any(2)  # [N, W], [N, H]
                boxes[n] = np.stack([cols.argmax(1), rows.argmax(1), size - cols[:, ::-1].argmax(1), size - rows[:, ::-1].argmax(1)], 1)

    slope = (0.16 * u[:, 23:25] - 0.08).astype(f32)[..., None, None]  # [B, 2, 1, 1] soft light from one side
    light = slope[:, 0] * (steps / size - f32(0.5)) + slope[:, 1] * (steps[:, None] / size - f32(0.5))  # [B, H, W]
    bits = _hash(key, np.arange(64, 64 + size * size, dtype=np.uint64)).reshape(B, size, size)  # one draw holds the noise of 3 channels
    for channel in range(3):
        grain = ((bits >> np.uint64(16 * channel)) & np.uint64(0xFFFF)).astype(f32) * f32(0.02 / 65535) - f32(0.01)
        image[:, channel] += light + grain
    return np.clip(image * 255 + f32(0.5), 0, 255).astype(np.uint8), classes, boxes, masks
