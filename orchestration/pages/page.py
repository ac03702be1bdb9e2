"""How a report looks as HTML: its style, its frame, and the tables and chats on it.

A file of its own because it changes with the look of the page, and plots.py with what a figure shows. Every
text is escaped, and nothing is loaded from elsewhere.
"""

from base64 import b64encode
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from io import BytesIO
from math import isfinite
from string import Template
from typing import Any

from PIL import Image, ImageOps

Attributes = Mapping[str, object]

LARGEST = 640
"""Pixels of an image on a page, either way."""
IMAGES = ("image/png", "image/jpeg", "image/webp")
PAGE = Template("""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>$name</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<style>$style</style></head><body><main>
<h1>$name</h1>
$sections
</main></body></html>
""")
STYLE = """
:root{color-scheme:light dark;--page:#fff;--card:#f6f7f9;--ink:#1c2024;--soft:#5a626b;
--line:#d9dde2;--c0:#0063a6;--c1:#c04a00;--c2:#007a5a;--c3:#a23c7c;--c4:#7a6400;--c5:#4b4f9f;
--good:#006b4f;--bad:#b02a00}
@media (prefers-color-scheme:dark){:root{--page:#14171a;--card:#1d2125;--ink:#e8eaec;
--soft:#a5adb5;--line:#363c42;--c0:#5bb0ea;--c1:#ff9a4d;--c2:#3ccba0;--c3:#ea94c4;--c4:#dcc34a;
--c5:#a9acf5;--good:#4fd3a8;--bad:#ff9472}}
*{box-sizing:border-box}
body{margin:0 auto;max-width:75rem;padding:1.5rem 1.25rem 4rem;background:var(--page);
color:var(--ink);font:1rem/1.5 system-ui,sans-serif;overflow-wrap:break-word}
h1{font-size:1.7rem;line-height:1.2;margin:0 0 .5rem}h2{font-size:1.25rem;margin:2.6rem 0 .6rem}
h3{font-size:1rem;margin:1.8rem 0 .4rem}p{max-width:46rem;margin:.4rem 0}.lead{font-size:1.13rem}
.soft,figcaption,caption{color:var(--soft);font-size:.875rem}
code,pre{font:.875rem/1.5 ui-monospace,monospace}
pre{background:var(--card);padding:.8rem 1rem;border-radius:.4rem;white-space:pre-wrap;
overflow-wrap:anywhere}
.cards{display:grid;grid-template-columns:repeat(auto-fit,minmax(9.5rem,1fr));gap:.75rem;
margin:1.2rem 0}.cards div{background:var(--card);border-radius:.4rem;padding:.7rem .9rem}
.cards b{display:block;font-size:1.45rem;line-height:1.3}
.cards span{color:var(--soft);font-size:.875rem}
.grid,.chats{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,21rem),1fr));
gap:1rem 1.5rem}figure{margin:0;min-width:0}
.chart{display:block;width:100%;max-width:30rem;height:auto;font:12px system-ui,sans-serif}
.broad{max-width:60rem;min-width:44rem}
.chart text{fill:var(--soft)}.chart .title{fill:var(--ink);font-weight:600;font-size:13px}
.chart .rule{stroke:var(--line);stroke-width:1}
.chart polyline{fill:none;stroke:currentColor;stroke-width:1.8;stroke-linejoin:round}
.chart polyline.thin{stroke-width:1.2}.chart polyline.faint{opacity:.3;stroke-width:1}
.chart polyline.dash{stroke-dasharray:5 3}
.chart .band{fill:currentColor;opacity:.18}
.chart .mark{fill:currentColor;stroke:var(--page);stroke-width:1}
.chart .cross{fill:none;stroke:currentColor;stroke-width:2.2}
.c0{color:var(--c0)}.c1{color:var(--c1)}.c2{color:var(--c2)}.c3{color:var(--c3)}
.c4{color:var(--c4)}.c5{color:var(--c5)}
.legend{display:flex;flex-wrap:wrap;gap:.2rem 1.3rem;margin:.4rem 0 .8rem;font-size:.875rem}
.legend span{display:flex;align-items:center;gap:.45rem}.legend svg{width:26px;height:10px}
table{border-collapse:collapse;font-size:.925rem}
th,td{text-align:left;padding:.3rem .9rem .3rem 0;vertical-align:top}
thead th{color:var(--soft);font-weight:500;border-bottom:1px solid var(--line)}
.facts th{color:var(--soft);font-weight:400;padding-right:1.5rem}
.wide{overflow-x:auto}.matrix td,.matrix th{border-bottom:1px solid var(--line)}
.matrix tbody th{color:var(--soft);font-weight:400}
.trials{width:100%}.trials td{border-bottom:1px solid var(--line)}.trials .best{font-weight:600}
.number,.number td{text-align:right;white-space:nowrap;font-variant-numeric:tabular-nums}
.heat{width:100%;max-width:30rem;table-layout:fixed}
.heat caption{text-align:left;padding:0 0 .3rem;color:var(--ink);font-weight:600}
.heat th{color:var(--soft);font-weight:500;text-align:center;padding:.2rem;border:0;width:5rem;
vertical-align:middle}.heat thead th{width:auto}.heat thead th:first-child{width:5rem}
.heat td{text-align:center;padding:.5rem .1rem;border:2px solid var(--page);height:3.6rem;
font-variant-numeric:tabular-nums;vertical-align:middle;line-height:1.25}
.heat small{display:block}.heat .blank{color:var(--soft);box-shadow:inset 0 0 0 1px var(--line)}
.heat .best{outline:3px solid var(--c1);outline-offset:-3px;font-weight:700}
.bars{display:grid;grid-template-columns:auto 1fr;gap:.25rem .7rem;align-items:center;
font-size:.9rem;max-width:30rem;margin-top:.4rem}
.bars div{display:flex;align-items:center;gap:.5rem}
.bars i{height:1.05rem;background:currentColor;border-radius:2px;min-width:2px}
.bars b{color:var(--ink);font-weight:500;white-space:nowrap}
.chat{background:var(--card);border-radius:.4rem;padding:.8rem 1rem}
.chat dl{margin:.3rem 0 .9rem;display:grid;grid-template-columns:auto 1fr;gap:.1rem .8rem}
.chat dt{color:var(--soft)}.chat dd{margin:0;min-width:0}
.images{display:flex;flex-wrap:wrap;gap:.6rem}.images figure{max-width:100%;overflow-wrap:anywhere}
.images img,.chat img{display:block;max-width:100%;max-height:18rem;border:1px solid var(--line)}
.images .small,.chat .small{image-rendering:pixelated;width:6rem;height:auto}
.sample{margin-top:1rem}.sample h3{margin:0}.sample div{white-space:pre-wrap}
.sample figure{display:inline-block;white-space:normal;margin:.2rem .6rem .2rem 0;max-width:100%}
.sample mark{background:color-mix(in srgb,var(--c2) 22%,transparent);color:inherit;
box-shadow:0 2px var(--c2)}
.right{color:var(--good);font-weight:600}
.wrong{color:var(--bad);font-weight:600;text-decoration:underline dotted;
text-underline-offset:3px}
@media (min-width:60.01rem){.trials td:first-child{white-space:nowrap}}
@media (max-width:60rem){.trials thead{display:none}
.trials tr{display:grid;grid-template-columns:repeat(auto-fill,minmax(6rem,1fr));
padding:.5rem 0;border-bottom:1px solid var(--line)}
.trials td{border:0;padding:.1rem .5rem .1rem 0;text-align:left;white-space:normal;min-width:0}
.trials td:nth-child(-n+2){grid-column:1/-1}
.trials td:nth-child(n+3)::before{content:attr(data-label);display:block;color:var(--soft);
font-size:.78rem;font-weight:400}}
@media (max-width:40rem){body{padding:1rem .9rem 3rem}
.facts th,.facts td{display:block;padding:0}.facts td{padding-bottom:.5rem}}
"""


def document(name: str, sections: Iterable[str]) -> str:
    """A whole document."""
    return PAGE.substitute(name=escape(name), style=STYLE, sections="\n".join(sections))


def attributes(values: Attributes) -> str:
    """Attributes of an HTML tag, escaped."""
    return "".join(f' {name}="{escape(str(value))}"' for name, value in values.items())


def note(text: str) -> str:
    """A remark in small print."""
    return f'<p class="soft">{escape(text)}</p>'


def grid(figures: Iterable[str]) -> str:
    """Figures side by side, as many as there is room for."""
    return f'<div class="grid">{"".join(figures)}</div>'


def cards(*figures: tuple[str, str]) -> str:
    """(value, name) in large letters."""
    inside = "".join(f"<div><b>{value}</b><span>{name}</span></div>" for value, name in figures)
    return f'<div class="cards">{inside}</div>'


def facts(rows: Iterable[tuple[str, str]]) -> str:
    """(name, value), a line each."""
    lines = (f'<tr><th scope="row">{escape(a)}</th><td>{escape(b)}</td></tr>' for a, b in rows)
    return f'<table class="facts">{"".join(lines)}</table>'


def table(head: Sequence[str], rows: Iterable[tuple[Attributes, Sequence[str]]]) -> str:
    """Rows of cells, each row with its attributes; from the third column on they are numbers."""
    numbers = [{"class": "number"} if i > 1 else {} for i in range(len(head))]
    top = "".join(
        f"<th{attributes({'scope': 'col', **number})}>{escape(name)}</th>"
        for name, number in zip(head, numbers, strict=True)
    )
    lines = []
    for row, cells in rows:
        written = "".join(
            f"<td{attributes({'data-label': label, **number})}>{escape(text)}</td>"
            for label, number, text in zip(head, numbers, cells, strict=True)
        )
        lines.append(f"<tr{attributes(row)}>{written}</tr>")
    return f'<table class="trials"><thead><tr>{top}</tr></thead><tbody>{"".join(lines)}</tbody></table>'


def matrix(head: Sequence[str], rows: Iterable[tuple[str, Sequence[str]]]) -> str:
    """Rows with a name each over columns that may be many: what is too wide is scrolled."""
    top = "".join(f'<th scope="col">{escape(name)}</th>' for name in head)
    lines = []
    for name, cells in rows:
        written = "".join(f"<td>{escape(cell)}</td>" for cell in cells)
        lines.append(f'<tr><th scope="row">{escape(name)}</th>{written}</tr>')
    return (
        f'<div class="wide" tabindex="0"><table class="matrix"><thead><tr><td></td>{top}</tr></thead>'
        f"<tbody>{''.join(lines)}</tbody></table></div>"
    )


def chat(
    told: Mapping[str, Any],
    images: Mapping[str, Mapping[str, Any]],
    *,
    earlier: Sequence[tuple[int, Sequence[str]]] = (),
) -> str:
    """A chat with its images, and whether each answer is exactly the true one.

    `earlier` has (update, answers round by round) of the same model before.
    """
    parts = [note(told["id"])]
    for number, part in enumerate(told["rounds"]):
        figures = [picture(f"image {i + 1}", images.get(told["images"][i])) for i in part["images"]]
        parts += [f'<div class="images">{"".join(figures)}</div>'] if figures else []
        said = [
            (f"update {step:,}", answers[number])
            for step, answers in earlier
            if number < len(answers)
        ]
        answers = [
            _answer(when, one, part["answer"]) for when, one in [*said, ("model", part["model"])]
        ]
        parts.append(
            f"<dl><dt>question</dt><dd>{escape(part['question'])}</dd>"
            f"<dt>true answer</dt><dd>{escape(part['answer'])}</dd>{''.join(answers)}</dl>"
        )
    return f'<article class="chat">{"".join(parts)}</article>'


def _answer(when: str, said: str, true: str) -> str:
    right = said.strip() == true.strip()
    look, verdict = ("right", "✓ right") if right else ("wrong", "✗ wrong")
    return f'<dt>{when}</dt><dd>{escape(said)} <span class="{look}">{verdict}</span></dd>'


def sample(told: Mapping[str, Any], images: Mapping[str, Mapping[str, Any]]) -> str:
    """A training sample with its images where they stand, its trained tokens marked."""
    inside = []
    for piece in told["pieces"]:
        if "image" in piece:
            at = told["images"][piece["image"] - 1]
            name = f"image {piece['image']}: {at['path']}, {at['width']} × {at['height']}"
            inside.append(picture(f"{name}, {at['key'][:12]}", images.get(at["key"])))
        else:
            tag = "mark" if piece["trained"] else "span"
            inside.append(f"<{tag}>{escape(piece['text'])}</{tag}>")
    what = f"{told['id']}: {told['tokens']:,} tokens, {told['supervised']:,} trained"
    return (
        f'<article class="chat sample"><h3>{escape(told["blend"])}</h3>{note(what)}'
        f"<div>{''.join(inside)}</div></article>"
    )


def picture(name: str, image: Mapping[str, Any] | None) -> str:
    """A prepared image with its name, or what to say where it is not there."""
    if image is None or image["mime"] not in IMAGES:
        caption = f"<figcaption>{escape(name)}: not in the prepared data</figcaption>"
        return f"<figure>{caption}</figure>"
    small = {"class": "small"} if max(image["width"], image["height"]) < 96 else {}
    mime, content = _fit(image)
    source = f"data:{mime};base64,{b64encode(content).decode()}"
    tag = attributes({"src": source, "alt": name, **small})
    return f"<figure><img{tag}><figcaption>{escape(name)}</figcaption></figure>"


def _fit(image: Mapping[str, Any]) -> tuple[str, bytes]:
    """Kind and bytes of an image, made smaller where it is larger than a page shows it."""
    if max(image["width"], image["height"]) <= LARGEST:
        return image["mime"], image["bytes"]
    smaller = ImageOps.exif_transpose(Image.open(BytesIO(image["bytes"]))).convert("RGB")
    smaller.thumbnail((LARGEST, LARGEST))
    smaller.save(file := BytesIO(), "JPEG", quality=85)
    return "image/jpeg", file.getvalue()


def number(value: float) -> str:
    """A loss; a dash where there is none."""
    return f"{value:.3f}" if isfinite(value) else "—"


def percent(value: float) -> str:
    """A share; a dash where there is none."""
    return f"{100 * value:.1f} %" if isfinite(value) else "—"


def duration(seconds: float) -> str:
    """A time in its two largest units."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02} min"
    return f"{minutes} min {rest:02} s" if minutes else f"{rest} s"
