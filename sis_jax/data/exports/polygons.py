"""Outlines of a mask as polygons, simplified, and back, for formats without run lengths.

Coordinates are continuous, x to the right and y down, (0, 0) the corner of the first pixel; a pixel
is inside when its centre is.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Bool, Float
from scipy import ndimage

Polygon = Float[np.ndarray, "_ 2"]  # any number of corners
_TURNS = {(1, 0): (0, 1), (0, 1): (-1, 0), (-1, 0): (0, -1), (0, -1): (1, 0)}  # right turns, y down


def polygons(region: Bool[np.ndarray, "h w"], tolerance: float = 0.4) -> list[Polygon]:
    """One polygon per 4-connected piece, no vertex farther than `tolerance` pixels from the line
    that replaces it.

    A hole is joined to its outline by a cut of no width, since one polygon cannot have a hole.
    """
    labels = np.zeros(region.shape, np.int32)
    ndimage.label(region, output=labels)
    found = []
    for number, box in enumerate(ndimage.find_objects(labels), 1):
        outlines = sorted(_outlines(labels[box] == number), key=lambda p: -abs(_area(p)))
        corner = np.array([box[1].start, box[0].start], np.float64)
        simple = [_simplify(outline, tolerance) for outline in outlines]
        found.append(_join(simple) + corner)
    return found


def fill(shapes: list[Polygon], height: int, width: int) -> Bool[np.ndarray, "h w"]:
    """The pixels whose centre is inside one of the polygons (even-odd rule within each)."""
    inside = np.zeros((height, width), bool)
    for shape in shapes:
        flips = np.zeros((height, width + 1), bool)
        for (x0, y0), (x1, y1) in zip(shape, np.roll(shape, -1, axis=0)):
            if y0 == y1:
                continue
            low, high = sorted((y0, y1))
            rows = np.arange(max(int(np.ceil(low - 0.5)), 0), min(int(np.ceil(high - 0.5)), height))
            crossing = x0 + (rows + 0.5 - y0) * (x1 - x0) / (y1 - y0)
            flips[rows, np.clip(np.ceil(crossing - 0.5), 0, width).astype(int)] ^= True
        inside |= np.logical_xor.accumulate(flips, axis=1)[:, :width]
    return inside


def _outlines(piece: Bool[np.ndarray, "h w"]) -> list[Polygon]:
    """The closed borders of a region, inside on the right hand, through the middle of every pixel
    edge.

    The middles make slanted borders straight, where corners would make stairs, and cut off no
    pixel's centre.
    """
    framed = np.pad(piece, 1)
    core = framed[1:-1, 1:-1]
    steps: dict[tuple[int, int], list[tuple[int, int]]] = {}
    # A pixel's four sides, walked clockwise on the screen: where a side begins, and its direction.
    sides = [
        (framed[:-2, 1:-1], (0, 0), (1, 0)),
        (framed[1:-1, 2:], (1, 0), (0, 1)),
        (framed[2:, 1:-1], (1, 1), (-1, 0)),
        (framed[1:-1, :-2], (0, 1), (0, -1)),
    ]
    for neighbour, (dx, dy), direction in sides:
        for y, x in np.argwhere(core & ~neighbour).tolist():
            steps.setdefault((x + dx, y + dy), []).append(direction)
    closed = []
    while steps:
        start = next(iter(steps))
        closed.append(_walk(start, steps))
    return closed


def _walk(start: tuple[int, int], steps: dict[tuple[int, int], list[tuple[int, int]]]) -> Polygon:
    """Follow the border from `start` until it closes, taking the steps it uses out of `steps`."""
    at, heading, middles = start, None, []
    while at in steps:
        ways = steps[at]
        # Where two pixels touch at a corner there are two ways on; the right turn stays with the
        # own pixel.
        turn = _TURNS.get(heading) if heading and len(ways) > 1 else None
        heading = turn if turn in ways else ways[0]
        ways.remove(heading)
        if not ways:
            del steps[at]
        middles.append((at[0] + heading[0] / 2, at[1] + heading[1] / 2))
        at = (at[0] + heading[0], at[1] + heading[1])
        if at == start:
            break
    return np.array(middles, np.float64)


def _area(shape: Polygon) -> float:
    x, y = shape.T
    return float((x * np.roll(y, -1) - np.roll(x, -1) * y).sum() / 2)


def _simplify(outline: Polygon, tolerance: float) -> Polygon:
    """Douglas and Peucker 1973 on a closed line; an outline that would vanish stays as it is."""
    if len(outline) <= 4:
        return outline
    far = int(np.argmax(((outline - outline[0]) ** 2).sum(1)))
    closed = np.concatenate([outline, outline[:1]])
    keep = np.zeros(len(closed), bool)
    keep[[0, far, -1]] = True
    todo = [(0, far), (far, len(closed) - 1)]
    while todo:
        a, b = todo.pop()
        if b - a < 2:
            continue
        gaps = _distances(closed[a + 1 : b], closed[a], closed[b])
        worst = int(np.argmax(gaps))
        if gaps[worst] > max(tolerance, 1e-9):
            middle = a + 1 + worst
            keep[middle] = True
            todo += [(a, middle), (middle, b)]
    simple = outline[keep[:-1]]
    return simple if len(simple) >= 3 and abs(_area(simple)) >= 0.5 else outline


def _distances(
    points: Float[np.ndarray, "p 2"], a: Float[np.ndarray, "2"], b: Float[np.ndarray, "2"]
) -> Float[np.ndarray, "p"]:
    """From points to the segment a b."""
    along = b - a
    length = float(along @ along)
    at = np.clip((points - a) @ along / length, 0, 1) if length else np.zeros(len(points))
    return np.sqrt(((points - a - at[:, None] * along) ** 2).sum(1))


def _join(outlines: list[Polygon]) -> Polygon:
    """The outer border with every hole spliced in where the two are nearest."""
    joined = outlines[0]
    for hole in outlines[1:]:
        gaps = ((joined[:, None] - hole[None]) ** 2).sum(-1)
        i, j = np.unravel_index(int(np.argmin(gaps)), gaps.shape)
        around = np.concatenate([hole[j:], hole[: j + 1]])
        joined = np.concatenate([joined[: i + 1], around, joined[i:]])
    return joined
