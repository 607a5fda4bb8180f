"""Where models come from, as a drawing: document and who wrote rows from it -> file -> job -> model -> verdict -> alias, with lines."""

from __future__ import annotations

from dataclasses import dataclass

COLUMNS = ("Sources", "Files", "Jobs", "Models", "Verdicts", "Aliases")
SOURCE, FILE, JOB, MODEL, VERDICT, ALIAS = range(len(COLUMNS))
WIDTH, HEIGHT, GAP, PITCH, HEAD = 180, 52, 38, 66, 30
LETTERS = 21  # of a line: what a box holds
MOST_ROWS = 24


@dataclass(frozen=True)
class Box:
    """One thing in the drawing."""

    key: str
    title: str  # whole
    note: str
    href: str
    look: str
    x: int
    y: int

    @property
    def short(self) -> str:
        return self.title if len(self.title) <= LETTERS else f"{self.title[: LETTERS - 8]}…{self.title[-7:]}"

    @property
    def short_note(self) -> str:
        return self.note if len(self.note) <= LETTERS + 2 else f"{self.note[: LETTERS + 1]}…"


@dataclass(frozen=True)
class Edge:
    """A line from the right side of one box to the left side of another."""

    path: str
    source: Box
    target: Box


@dataclass(frozen=True)
class Drawing:
    """All of it, ready to be written as SVG."""

    boxes: tuple[Box, ...]
    edges: tuple[Edge, ...]
    columns: tuple[tuple[str, int], ...]  # name, x
    width: int
    height: int
    left_out: int = 0  # boxes for which there was no room


class Graph:
    """Boxes and lines as they are found; what belongs together is told one after another, and comes to stand side by side."""

    def __init__(self) -> None:
        self._boxes: dict[str, tuple[int, str, str, str, str]] = {}
        self._edges: dict[tuple[str, str], None] = {}

    def add(self, column: int, key: str, title: str, note: str = "", href: str = "", look: str = "") -> str:
        """A box of COLUMNS[column], unless it is there -> its key."""
        self._boxes.setdefault(key, (column, title, note, href, look))
        return key

    def link(self, source: str, target: str) -> None:
        """What the target was made of, or stands on."""
        self._edges[source, target] = None

    def linked(self, source: str, target: str) -> bool:
        return (source, target) in self._edges

    def drawn(self) -> Drawing | None:
        """None where there is nothing to draw."""
        rows = [0] * len(COLUMNS)
        used = sorted({column for column, *_ in self._boxes.values()})
        boxes: dict[str, Box] = {}
        for key, (column, *told) in self._boxes.items():
            # Below what it is made of, where there is room: so that lines run level.
            made_of = [boxes[source].y for source, target in self._edges if target == key and source in boxes]
            row = max(rows[column], min(((y - HEAD) // PITCH for y in made_of), default=0))
            rows[column] = row + 1
            if row < MOST_ROWS:
                title, note, href, look = told
                boxes[key] = Box(key, title, note, href, look, used.index(column) * (WIDTH + GAP), HEAD + row * PITCH)
        if not boxes:
            return None
        edges = [Edge(_curve(boxes[a], boxes[b]), boxes[a], boxes[b]) for a, b in self._edges if a in boxes and b in boxes]
        columns = [(COLUMNS[column], place * (WIDTH + GAP)) for place, column in enumerate(used)]
        height = max(box.y for box in boxes.values()) + HEIGHT + 4
        width = (len(used) - 1) * (WIDTH + GAP) + WIDTH
        return Drawing(tuple(boxes.values()), tuple(edges), tuple(columns), width, height, len(self._boxes) - len(boxes))


def _curve(source: Box, target: Box) -> str:
    x, y, to_x, to_y = source.x + WIDTH, source.y + HEIGHT // 2, target.x, target.y + HEIGHT // 2
    middle = (x + to_x) // 2
    return f"M{x} {y}C{middle} {y} {middle} {to_y} {to_x} {to_y}"
