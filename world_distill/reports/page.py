"""The look of the project's HTML pages: one style sheet, a frame, and the pieces that pages are built of.

A page is one file without outside resources. It needs no script: a short inline one only adds a button that stops the
clips. Clips are sprite strips moved by CSS in steps, so every pixel stays crisp. Functions take plain text and escape
it, except those arguments that are called `body` or `cells`, which are HTML.
"""

import base64
import dataclasses
import io
from collections.abc import Iterable, Sequence

import numpy as np
from PIL import Image

from world_distill.reports.charts import escape

_SHOWN = 150  # CSS pixels that a small clip is wide at most
_CRISP_WIDTH, _CRISP_FRAMES = 100, 24  # clips up to this size are kept without loss, and enlarged to whole squares
_MAX_WIDTH, _MAX_FRAMES = 240, 16  # what is embedded of larger ones

_STYLE = """
:root{color-scheme:light dark;--paper:#faf9f5;--card:#fff;--ink:#1f2328;--soft:#5b6169;--line:#e3e0d7;--wash:#f1efe8;
--base:#8a9099;--demonstrator:#2c6fb7;--executor:#d1541b;--extra:#7a5ab8;--yes:#1a7440;--no:#b3302a}
@media(prefers-color-scheme:dark){:root{--paper:#14171b;--card:#1b1f24;--ink:#e8e6e1;--soft:#a5abb2;--line:#30353c;
--wash:#22272d;--base:#8e959e;--demonstrator:#66a3e0;--executor:#ee8548;--extra:#ab91e0;--yes:#63c98a;--no:#f08279}}
*{box-sizing:border-box}
html{-webkit-text-size-adjust:100%;scroll-behavior:smooth}
body{margin:0;background:var(--paper);color:var(--ink);font:16px/1.6 system-ui,-apple-system,"Segoe UI",Roboto,
"Helvetica Neue","Liberation Sans",sans-serif;overflow-wrap:break-word}
main,footer{max-width:1120px;margin:0 auto;padding:0 16px}
h1,h2{font-family:"Iowan Old Style","Palatino Linotype",Palatino,Georgia,"Liberation Serif",serif;font-weight:600;
line-height:1.2;letter-spacing:-.01em;text-wrap:balance}
h1{font-size:clamp(1.9rem,5vw,2.9rem);margin:0 0 1rem}
h2{font-size:1.6rem;margin:0 0 .4rem}
h3{font-size:1rem;margin:1.8rem 0 .5rem}
p{max-width:70ch;margin:.5rem 0 1rem}
a{color:inherit;text-underline-offset:3px}
code,pre{font-family:ui-monospace,"SF Mono",Menlo,Consolas,"Liberation Mono",monospace;font-size:.86em}
header{padding:3rem 0 .5rem}
section{padding:2.2rem 0 0;margin-top:2.4rem;border-top:1px solid var(--line)}
footer{padding-top:2rem;padding-bottom:3rem}
.kicker{margin:0 0 .8rem;color:var(--soft);font-size:.86rem}
.lede{font-size:1.12rem;max-width:64ch}
.soft,footer{color:var(--soft);font-size:.92rem}
nav{display:flex;flex-wrap:wrap;gap:.3rem 1.2rem;font-size:.92rem;margin:1.2rem 0 0}
.grid{display:grid;gap:16px;grid-template-columns:repeat(auto-fill,minmax(min(100%,300px),1fr));margin:1.2rem 0}
.card{background:var(--card);border:1px solid var(--line);border-radius:10px;padding:16px;min-width:0}
figure{margin:0}
figcaption{font-size:.92rem}
.card>figure{height:100%;display:flex;flex-direction:column;justify-content:space-between}
.card>figure>figcaption{font-weight:600;margin-bottom:6px}
.card figcaption small{display:block;font-weight:400;color:var(--soft);font-size:.82rem}
svg{display:block;width:100%;height:auto;font-family:inherit;overflow:visible}
.legend{display:flex;flex-wrap:wrap;gap:2px 14px;font-weight:400;color:var(--soft);font-size:.82rem}
.key{display:inline-block;width:14px;height:3px;border-radius:2px;background:var(--c);margin-right:6px;
vertical-align:middle}
.key.dashed{background:repeating-linear-gradient(90deg,var(--c) 0 4px,transparent 4px 7px)}
.key.dot{width:8px;height:8px;border-radius:50%}
.tile{border-top:4px solid var(--c)}
.tile b{display:block;font-size:1.02rem}
.tile span{display:block;color:var(--soft);font-size:.92rem}
.tile strong{display:block;font-size:2.7rem;line-height:1.15;font-weight:600;letter-spacing:-.02em;margin-top:.5rem;
font-variant-numeric:tabular-nums}
.scroll{overflow-x:auto;border:1px solid var(--line);border-radius:10px;background:var(--card);margin:1rem 0}
table{border-collapse:collapse;width:100%;font-size:.92rem;font-variant-numeric:tabular-nums}
th,td{padding:9px 14px;text-align:right;border-top:1px solid var(--line);white-space:nowrap;vertical-align:top}
thead th{border-top:0;color:var(--soft);font-weight:500;font-size:.84rem}
th:first-child{text-align:left;position:sticky;left:0;background:var(--card)}
tbody th{font-weight:600}
th.group{color:var(--soft);font-weight:500}
th.group span{position:sticky;left:14px}
tbody th .key{width:10px;height:10px;border-radius:3px}
td small{display:block;color:var(--soft);font-size:.78rem}
ul.changes{list-style:none;padding:0;margin:1rem 0;max-width:80ch}
ul.changes li{padding:.45rem 0 .45rem 1.9rem;position:relative;border-top:1px solid var(--line)}
ul.changes li:first-child{border-top:0}
ul.changes i{position:absolute;left:.2rem;font-style:normal;color:var(--soft)}
ul.changes .up i{color:var(--yes)}ul.changes .down i{color:var(--no)}
.task{display:flex;flex-wrap:wrap;gap:12px 28px;margin:14px 0}.task>div:first-child{flex:1 1 260px;min-width:0}
.task h3{margin:0;font-weight:500;font-size:1.12rem;line-height:1.5}
.agent{background:var(--wash);border-radius:6px;padding:1px 7px;font-weight:600}
.hero{flex:0 0 auto;max-width:100%}
.hero figcaption{margin-top:8px;line-height:1.45}.hero small{display:block;color:var(--soft);margin-top:2px}
.top{display:flex;flex-wrap:wrap;gap:24px 56px;align-items:flex-start;justify-content:space-between}
.top>div{flex:1 1 480px;min-width:0}
.quiet{background:none;border-style:dashed}.quiet p{margin:0;color:var(--soft);font-size:.92rem}
.films{flex:0 1 calc(4*var(--w) + 36px);display:grid;
gap:12px;grid-template-columns:repeat(auto-fill,minmax(0,var(--w)))}
.films figcaption{font-size:.8rem;line-height:1.35;margin-top:6px}
.films figcaption b{display:block;font-size:.86rem}
.frame{display:block;width:100%;height:auto;border-radius:4px;background-color:var(--wash);background-size:100% 100%}
.crisp{image-rendering:pixelated}
.film{background-size:calc(100%*var(--n)) 100%;background-repeat:no-repeat;
animation:play calc(var(--s)*1s) steps(var(--n),jump-none) infinite}
@keyframes play{from{background-position:0 0}70%,to{background-position:100% 0}}
.films:focus .film,.still .film{animation-play-state:paused}
@media(hover:hover){.films:hover .film{animation-play-state:paused}}
@media(prefers-reduced-motion:reduce){html{scroll-behavior:auto}
html:not(.moving) .film{animation:none;background-position:100% 0}}
.marks{list-style:none;margin:5px 0 0;padding:0;font-size:.8rem;line-height:1.45}
.yes::before,.no::before,.none::before{display:inline-block;width:1.2em;font-weight:700}
.yes::before{content:"\\2713";color:var(--yes)}.no::before{content:"\\2717";color:var(--no)}
.none::before{content:"\\2013";color:var(--soft)}
.no{color:var(--soft)}
.aloud{position:absolute;width:1px;height:1px;overflow:hidden;clip-path:inset(50%);white-space:nowrap}
details{margin:.6rem 0}
summary{cursor:pointer;color:var(--soft);font-size:.92rem}
details[open]>summary{margin-bottom:.4rem}
.task details p{margin:.2rem 0;font-size:.95rem}
pre{margin:.6rem 0;padding:14px 16px;overflow-x:auto;background:var(--card);border:1px solid var(--line);
border-radius:10px;line-height:1.5;max-height:32rem}
button{font:inherit;font-size:.92rem;color:inherit;background:var(--card);border:1px solid var(--line);
border-radius:99px;padding:6px 16px;cursor:pointer}
:focus-visible{outline:2px solid var(--demonstrator);outline-offset:2px}
@media(max-width:520px){main,footer{padding:0 14px}.card{padding:12px}
.task.card{padding:14px 10px}th,td{padding:8px 10px}
header{padding-top:2rem}.lede{font-size:1.03rem}h2{font-size:1.45rem}.grid{gap:12px}
.tile{display:flex;justify-content:space-between;gap:12px}.tile strong{font-size:1.9rem;margin:0}
.tile div+div{text-align:right;white-space:nowrap}.films{justify-content:center;gap:12px 10px}}
@media(max-width:340px){.tile{display:block}.tile div+div{text-align:left}}
@media(min-width:1000px){.task.card{padding:20px}}
@media print{.film{animation:none;background-position:100% 0}section{break-inside:avoid-page}}
"""

# Motion is stopped by hovering or focus without this; it adds one switch for all clips.
_SCRIPT = """
(()=>{const root=document.documentElement,button=document.getElementById('motion');if(!button)return;
let still=matchMedia('(prefers-reduced-motion: reduce)').matches;
const show=()=>{root.classList.toggle('still',still);button.textContent=still?'Play the clips':'Stop the clips'};
button.hidden=false;show();
button.onclick=()=>{still=!still;if(!still)root.classList.add('moving');show()}})()
"""


def document(title: str, body: str, *, footer: str = "") -> str:
    """A whole page."""
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width,initial-scale=1">\n'
        # Nothing from elsewhere is ever loaded, whatever the data holds.
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; img-src data:; '
        "style-src 'unsafe-inline'; script-src 'unsafe-inline'\">\n"
        f"<title>{escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n<main>\n{body}\n</main>\n"
        f"<footer>{escape(footer)}</footer>\n<script>{_SCRIPT}</script>\n</body>\n</html>\n"
    )


def section(anchor: str, heading: str, body: str) -> str:
    """A part of the page; `anchor` is where links lead to."""
    heading = escape(heading)
    return f'<section id="{escape(anchor)}" aria-label="{heading}">\n<h2>{heading}</h2>\n{body}\n</section>'


def paragraph(text: str, kind: str = "") -> str:
    """A paragraph; `kind` is "soft", "lede" or nothing."""
    return f'<p class="{kind}">{escape(text)}</p>' if kind else f"<p>{escape(text)}</p>"


def details(summary: str, body: str) -> str:
    """A part that opens on request."""
    return f"<details><summary>{escape(summary)}</summary>\n{body}\n</details>"


def code(text: str) -> str:
    """Lines in a fixed-width font, in a box that scrolls."""
    return f'<pre tabindex="0">{escape(text)}</pre>'


def table(head: Sequence[str], groups: Iterable[tuple[str, Iterable[str]]]) -> str:
    """A table that scrolls in its own box, its first column in view.

    Args:
      head: column headings.
      groups: the name of each group of rows, or "", and its rows as `<tr>...</tr>`.
    """
    cells = "".join(f'<th scope="col">{escape(text)}</th>' for text in head)
    bodies = []
    for name, rows in groups:
        title = f'<th class="group" scope="rowgroup" colspan="{len(head)}"><span>{escape(name)}</span></th>'
        bodies.append(f"<tbody>{f'<tr>{title}</tr>' if name else ''}{''.join(rows)}</tbody>")
    return f'<div class="scroll" tabindex="0"><table><thead><tr>{cells}</tr></thead>{"".join(bodies)}</table></div>'


def tile(name: str, note: str, figure: str, meaning: str, more: str, colour: str) -> str:
    """A card with one large figure."""
    who = f"<div><b>{escape(name)}</b><span>{escape(note)}</span></div>"
    return (
        f'<div class="card tile" style="--c:{escape(colour)}">{who}'
        f"<div><strong>{escape(figure)}</strong><span>{escape(meaning)}</span><span>{escape(more)}</span></div></div>"
    )


def key(colour: str, kind: str = "") -> str:
    """The swatch of a colour: a stroke, or "dot" or "dashed"."""
    return f'<span class="key {kind}" style="--c:{escape(colour)}"></span>'


def chart(caption: str, svg: str, *, note: str = "", legend: Sequence[tuple[str, str, str]] = ()) -> str:
    """A card with a chart, its caption, and a legend of (label, colour, kind of swatch)."""
    small = f"<small>{escape(note)}</small>" if note else ""
    labels = "".join(f"<span>{key(colour, kind)}{escape(label)}</span>" for label, colour, kind in legend)
    labels = f'<span class="legend">{labels}</span>' if labels else ""
    return f'<div class="card"><figure><figcaption>{escape(caption)}{small}{labels}</figcaption>{svg}</figure></div>'


@dataclasses.dataclass(frozen=True)
class Sprite:
    """An image of all frames side by side, ready for a page."""

    uri: str
    frames: int
    width: int  # of one frame, as embedded
    height: int
    crisp: bool

    @property
    def shown_width(self) -> int:
        """CSS pixels of a frame; a whole multiple of its own pixels, so that all of them look alike."""
        return self.width * max(1, _SHOWN // self.width) if self.crisp else self.width


def sprite(clip: np.ndarray) -> Sprite:
    """A clip [F H W 3] uint8 as a sprite: exact if it is small, else fewer and smaller frames, compressed."""
    crisp = clip.shape[2] <= _CRISP_WIDTH and len(clip) <= _CRISP_FRAMES
    if len(clip) > _MAX_FRAMES and not crisp:
        clip = clip[np.linspace(0, len(clip) - 1, _MAX_FRAMES).round().astype(int)]
    frames = [Image.fromarray(frame) for frame in clip]
    width, height = frames[0].size
    if width > _MAX_WIDTH:
        width, height = _MAX_WIDTH, max(1, round(height * _MAX_WIDTH / width))
        frames = [frame.resize((width, height), Image.Resampling.LANCZOS) for frame in frames]
    strip = Image.new("RGB", (width * len(frames), height))
    for i, frame in enumerate(frames):
        strip.paste(frame, (i * width, 0))
    buffer = io.BytesIO()
    kind, options = ("png", {"optimize": True}) if crisp else ("webp", {"quality": 70, "method": 4})
    strip.save(buffer, kind, **options)
    uri = f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"
    return Sprite(uri, len(frames), width, height, crisp)


def hero(image: Sprite, film: str, body: str) -> str:
    """A film at twice the usual size, with a caption."""
    return (
        f'<figure class="hero" style="width:{2 * image.shown_width}px">{film}<figcaption>{body}</figcaption></figure>'
    )


def film(image: Sprite, description: str, seconds: float) -> str:
    """A moving sprite; `seconds` from its first to its last frame."""
    moves = image.frames > 1
    classes = " ".join(["frame", *(["crisp"] if image.crisp else []), *(["film"] if moves else [])])
    style = f"aspect-ratio:{image.width}/{image.height};background-image:url({image.uri})"
    if moves:
        style += f";--n:{image.frames};--s:{seconds / 0.7:.2f}"
    return f'<div class="{classes}" role="img" aria-label="{escape(description)}" style="{style}"></div>'
