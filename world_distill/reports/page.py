"""The frame of the project's HTML pages, and the data of the pieces that they are built of.

A page is one file without outside resources. It needs no script: short inline ones add a button that stops the clips,
and to a report's clips a filter and a slider through their frames. Clips are sprite strips moved by CSS in steps, so
every pixel stays crisp. All tags stand in `templates/`: a template is given plain text and numbers, and escapes them;
drawings and rendered parts come to it as `Markup`.
"""

import base64
import dataclasses
import io
import pathlib
from collections.abc import Sequence
from typing import Any

import jinja2
import numpy as np
from markupsafe import Markup
from PIL import Image

from world_distill.reports import charts
from world_distill.storage import video_files

_SHOWN = 150  # CSS pixels that a small clip is wide at most
_CRISP_SIDE, _CRISP_FRAMES = 100, 24  # clips up to this size are kept without loss, and enlarged to whole squares
_MOVING = 0.7  # share of a round in which a film moves; then its last frame is held (`play` in style.css)


def _finish(value: object) -> object:
    """What is put out for a value: text without the characters that HTML cannot hold."""
    return charts.clean(value) if isinstance(value, str) and not isinstance(value, Markup) else value


TEMPLATES = jinja2.Environment(
    loader=jinja2.FileSystemLoader(pathlib.Path(__file__).parent / "templates"),
    autoescape=True,
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
    keep_trailing_newline=True,
    finalize=_finish,
)


def render(template: str, **data: Any) -> Markup:
    """A page or a part of one, from the template of that name."""
    return Markup(TEMPLATES.get_template(template).render(data))


@dataclasses.dataclass(frozen=True)
class Section:
    """A part of a page; `anchor` is where links lead to."""

    anchor: str
    heading: str
    body: Markup


@dataclasses.dataclass(frozen=True)
class Cell:
    """A figure in a table, and what stands small below it."""

    text: object
    small: str = ""


@dataclasses.dataclass(frozen=True)
class TableRow:
    """A row of a table; with a colour, its name has a swatch."""

    name: str
    cells: Sequence[Cell]
    colour: str = ""


@dataclasses.dataclass(frozen=True)
class Table:
    """A table that scrolls in its own box, its first column in view.

    Attributes:
      label: what it is called, for screen readers.
      head: column headings.
      groups: the name of each group of rows, or "", and its rows.
    """

    label: str
    head: Sequence[str]
    groups: Sequence[tuple[str, Sequence[TableRow]]]


@dataclasses.dataclass(frozen=True)
class Tile:
    """A card with one large figure."""

    name: str
    note: str
    figure: str
    meaning: str
    more: str
    colour: str


@dataclasses.dataclass(frozen=True)
class Key:
    """A line of a legend; its swatch is a stroke, or "dot" or "dashed"."""

    label: str
    colour: str
    kind: str = ""


@dataclasses.dataclass(frozen=True)
class Chart:
    """A card with a drawing, its caption, and a legend."""

    caption: str
    svg: Markup
    note: str = ""
    legend: Sequence[Key] = ()


@dataclasses.dataclass(frozen=True)
class Sprite:
    """An image of all frames side by side, ready for a page."""

    uri: str
    frames: int
    width: int  # of one frame, as embedded
    height: int
    crisp: bool  # its pixels are shown as squares

    @property
    def shown_width(self) -> int:
        """CSS pixels of a frame; if it is crisp, a whole multiple of its own, so that all of them look alike."""
        return self.width * max(1, _SHOWN // self.width) if self.crisp else max(self.width, _SHOWN)


@dataclasses.dataclass(frozen=True)
class Film:
    """A sprite that moves; `seconds` from its first to its last frame."""

    sprite: Sprite
    description: str
    seconds: float

    @property
    def moves(self) -> bool:
        return self.sprite.frames > 1

    @property
    def cycle(self) -> str:
        """Seconds until it begins again."""
        return f"{self.seconds / _MOVING:.2f}"


@dataclasses.dataclass(frozen=True)
class Detail:
    """How much of a clip goes into a page: a frame's longer side in pixels, the number of frames, WebP's quality."""

    side: int
    frames: int
    quality: int


# From the finest: a page with many clips takes a coarser one.
DETAILS = (Detail(240, 16, 70), Detail(208, 12, 62), Detail(160, 9, 56), Detail(128, 7, 50), Detail(96, 5, 40))


def is_small(clip: np.ndarray) -> bool:
    """Whether a clip [F H W 3] is kept and shown without loss."""
    return max(clip.shape[1:3]) <= _CRISP_SIDE and len(clip) <= _CRISP_FRAMES


def sprite(clip: np.ndarray, detail: Detail = DETAILS[0]) -> Sprite:
    """A clip [F H W 3] uint8 as a sprite: with the finest detail exact if it is small, else reduced and compressed."""
    crisp = is_small(clip)
    if crisp and detail == DETAILS[0]:
        kind, options = "png", {"optimize": True}
    else:
        clip = video_files.reduced(clip, detail.side, detail.frames)
        kind, options = "webp", {"quality": detail.quality, "method": 4}
    strip = Image.fromarray(np.concatenate(list(clip), axis=1))
    return Sprite(data_uri(strip, kind, **options), len(clip), clip.shape[2], clip.shape[1], crisp)


def data_uri(image: Image.Image, kind: str, **options: Any) -> str:
    """An image as an address that holds it."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"
