"""Renders the proof of a port as one HTML page, without scripts, other files or the network."""

import base64
import io
import math
from collections.abc import Iterator, Mapping, Sequence
from html import escape

import matplotlib as mpl
import numpy as np
import reference
from matplotlib.figure import Figure  # not pyplot, which would choose a backend and keep figures alive
from PIL import Image
from proof import FLOAT32_LIMIT, FLOAT64_LIMIT, HEAD_CLASSES, Proof, Stage, float32_limit
from scipy.special import softmax

from flax_googlenet.errors import printable

# Colours of the plot -> what replaces them, because they differ in dark mode.
PAGE_COLORS = {"#000000": "currentColor", "#c5221f": "var(--red)", "#0072b2": "var(--blue)"}
BLACK, RED, BLUE = PAGE_COLORS
PLOT_RANGE = (1e-17, 1.0)  # the left edge also shows 0, and the right edge larger errors, other shapes and NaN
TABLE_HEADER = """<th>stage<th>shape<th>Flax<br>float64<br>error<th>PyTorch<br>float32<br>error
<th>Flax<br>float32<br>error<th>ratio of<br>float32<br>errors"""
HOW_TO_READ = f"""An error is the largest difference from PyTorch in float64, divided by the largest value of the stage.
In float64, the error of Flax may be at most {FLOAT64_LIMIT:.0e}: {-math.log10(FLOAT64_LIMIT):.0f} digits agree.
In float32, it may be at most {FLOAT32_LIMIT:g} times the error of PyTorch in float32, or {float32_limit(0):.0e} if that
is more. Heads with fewer than {HEAD_CLASSES} classes are widened to {HEAD_CLASSES} by copies of their classes with
random signs of the weights."""

# With this policy the browser refuses scripts and everything that is not in the file.
PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; img-src data:">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>GoogLeNet in Flax: proof of the port</title>
<style>
:root { color-scheme: light dark; --paper: #fff; --card: #f5f6f8; --ink: #1b1f24; --soft: #59626d;
  --rule: #d9dde2; --green: #1a7f37; --red: #c5221f; --blue: #0072b2 }
@media (prefers-color-scheme: dark) { :root { --paper: #14171b; --card: #1d2126; --ink: #e4e7eb; --soft: #9aa4af;
  --rule: #363c44; --green: #4ac26b; --red: #ff7b72; --blue: #3d9bd6 } }
* { box-sizing: border-box; min-width: 0 }
body { margin: 0 auto; max-width: 75rem; padding: 1.5rem 1rem 3rem; background: var(--paper); color: var(--ink);
  font: 1rem/1.5 system-ui, sans-serif; overflow-wrap: anywhere }
h1 { font-size: 1.75rem; line-height: 1.2; margin: 0 0 1rem }
h2 { font-size: 1.2rem; margin: 2.5rem 0 .75rem }
h3 { font-size: .85rem; margin: 0 0 .4rem }
p { max-width: 48rem; margin: .75rem 0 1.25rem }
p, h3, thead, .facts th { color: var(--soft) }
.verdict { max-width: none; padding: .8rem 1rem; border-left: .35rem solid; background: var(--card);
  font-size: 1.2rem; font-weight: 600 }
.ok { color: var(--green) }
.differs { color: var(--red); font-weight: 600 }
.columns, .photographs, .pair { display: grid; gap: 1.5rem 2rem }
.photographs { grid-template-columns: repeat(auto-fit, minmax(min(100%, 20rem), 1fr)) }
.pair { grid-template-columns: 1fr 1fr; gap: 1.25rem }
.plot { fill: currentColor; width: 100%; max-width: 32rem; height: auto }
.scroll { overflow-x: auto }
table { border-collapse: collapse; width: 100%; font-size: .8rem }
th, td { padding: .28rem .5rem; border-bottom: 1px solid var(--rule); text-align: left }
b, th { font-weight: 600 }
thead th { vertical-align: bottom; line-height: 1.25 }
b, .stages { font-variant-numeric: tabular-nums; white-space: nowrap }
.stages :is(th, td):not(:first-child, :last-child) { text-align: right }
.stages :is(:first-child, :last-child):is(th, td) { position: sticky; left: 0; right: 0; background: var(--paper) }
.facts td { font-family: ui-monospace, monospace }
figure { margin: 0; padding: 1rem; border-radius: .5rem; background: var(--card) }
img { display: block; width: 100%; height: auto; margin-bottom: 1rem }
ol { list-style: none; margin: 0; padding: 0; font-size: .85rem; line-height: 1.35 }
li { display: grid; grid-template-columns: 1fr auto; gap: .15rem .5rem; margin-bottom: .5rem; align-items: end }
i { grid-column: 1 / -1; height: .3rem;
  background: linear-gradient(var(--blue) 0 0) 0 / var(--share) no-repeat var(--rule) }
@media (max-width: 30rem) { .facts :is(th, td) { display: block } .facts th { border: 0; padding-bottom: 0 } }
@media (min-width: 65rem) { .columns { grid-template-columns: 2fr 3fr } }
</style>
<h1>GoogLeNet in Flax compared with PyTorch&rsquo;s</h1>
"""


def render(proof: Proof, facts: Mapping[str, str], class_names: Sequence[str] | None) -> str:
    """Return the page: verdict, errors by stage as a plot and a table, predictions for the photographs, and details.

    Args:
        proof: Proof to show; an error can be infinite (for a different shape) or NaN.
        facts: Details in the order to show them, such as the source, checksums and versions: name -> value.
        class_names: Class names in the order of the logits. A class without a name is shown as "class 17".
    """
    different = [stage.name for stage in proof.stages if not stage.ok]
    verdict = (
        f"Not proven: {_html(different[0])} is the first stage that differs"
        if different
        else "Proven: all stages agree"
    )
    header, device_note = TABLE_HEADER, ""
    if proof.device:
        header += "<th>on the<br>device"
        device_note = f" On the device, {_html(proof.device)}, Flax computes in float32, with the same limit."
    return f"""{PAGE}<p class="verdict {"differs" if different else "ok"}">{verdict}</p>
<p>Both networks ran on the same two photographs and three random images:
{len(proof.stages) - len(different)} of {len(proof.stages)} stages agree.</p>
<h2>Errors by stage</h2>
<p>{HOW_TO_READ}{device_note}</p>
<div class="columns">{_plot(proof.stages)}
<div class="scroll" tabindex="0" role="region" aria-label="Errors by stage"><table class="stages">
<thead><tr>{header}<th>verdict<tbody>{"".join(map(_stage_row, proof.stages))}</table></div></div>
<h2>The five most likely classes</h2>
<div class="photographs">{"".join(_photographs(proof, class_names))}</div>
<h2>Details</h2>
<table class="facts">{"".join(f"<tr><th>{_html(key)}<td>{_html(fact)}" for key, fact in facts.items())}</table>
"""


def _html(text: str) -> str:
    """Escape text from a file, so that neither tags nor control characters in it affect the page."""
    return escape(printable(text))


def _plot(stages: Sequence[Stage]) -> str:
    """Return the plot as inline SVG; stages run from top to bottom, so that their names fit a narrow screen."""
    series = [  # Okabe and Ito's colours, which colour-blind people can distinguish, and different markers
        ("Flax float64", BLUE, "o", 5, "full", [stage.float64 for stage in stages]),
        ("PyTorch float32", "#d55e00", "s", 8, "none", [stage.pytorch32 for stage in stages]),
        ("Flax float32", "#009e73", "D", 4, "full", [stage.flax32 for stage in stages]),
    ]
    if stages[0].device32 is not None:
        on_device = [stage.device32 or 0.0 for stage in stages]
        series.append(("Flax on the device", "#cc79a7", "^", 5, "full", on_device))
    rows = range(len(stages))
    with mpl.rc_context({"font.size": 9, "svg.hashsalt": "GoogLeNet"}):
        figure = Figure(figsize=(4.3, 6.6), layout="constrained")
        axes = figure.subplots()
        for label, color, marker, size, fill, errors in series:
            shown = np.clip(np.nan_to_num(errors, nan=np.inf), *PLOT_RANGE)
            axes.plot(shown, rows, label=label, c=color, marker=marker, ms=size, fillstyle=fill, lw=1, clip_on=False)
        axes.axvline(FLOAT64_LIMIT, color=BLACK, ls="--", lw=1, label=f"float64 limit {FLOAT64_LIMIT:.0e}")
        axes.set(xscale="log", xlim=PLOT_RANGE, ylim=(len(stages) - 0.5, -0.5), xlabel="relative error")
        axes.set_yticks(rows, [stage.name for stage in stages])
        for tick, stage in zip(axes.get_yticklabels(), stages, strict=True):
            tick.set(color=BLACK if stage.ok else RED, weight="normal" if stage.ok else "bold")
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        figure.legend(loc="outside upper center", ncols=2, frameon=False)
        buffer = io.StringIO()
        metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))  # left out: the same proof gives the same bytes
        figure.savefig(buffer, format="svg", transparent=True, metadata=metadata)
    svg = buffer.getvalue()
    for color, page_color in PAGE_COLORS.items():
        svg = svg.replace(color, page_color)
    label = "Errors of each stage on a logarithmic axis; the table has the same numbers"
    return svg[svg.index("<svg") :].replace("<svg", f'<svg class="plot" role="img" aria-label="{label}"', 1)


def _stage_row(stage: Stage) -> str:
    ratio = stage.flax32 / stage.pytorch32 if stage.pytorch32 else math.nan
    cells = (
        "&times;".join(map(str, stage.shape[1:])),
        *map(_error, (stage.float64, stage.pytorch32, stage.flax32)),
        (f"{ratio:.2f}" if ratio < 1000 else f"{ratio:.0e}") if math.isfinite(ratio) else "&ndash;",
        *([] if stage.device32 is None else [_error(stage.device32)]),
    )
    verdict = "ok" if stage.ok else "differs"
    return f'<tr><th>{_html(stage.name)}<td>{"<td>".join(cells)}<td class="{verdict}">{verdict}'


def _error(error: float) -> str:
    if math.isnan(error):
        return "not a number"
    return "shape differs" if math.isinf(error) else f"{error:.1e}"


def _photographs(proof: Proof, class_names: Sequence[str] | None) -> Iterator[str]:
    photographs = zip(("temple", "flower"), reference.photographs(), strict=True)
    for (name, photograph), pytorch, flax in zip(photographs, proof.pytorch_logits, proof.flax_logits, strict=True):
        buffer = io.BytesIO()
        Image.fromarray(photograph).save(buffer, "JPEG", quality=80)
        source = f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"
        yield f"""<figure><img alt="{name}" src="{source}">
<div class="pair"><div><h3>PyTorch</h3><ol>{_top5(pytorch, class_names)}</ol></div>
<div><h3>Flax</h3><ol>{_top5(flax, class_names)}</ol></div></div></figure>"""


def _top5(logits: np.ndarray, class_names: Sequence[str] | None) -> str:
    items = []
    with np.errstate(invalid="ignore"):  # infinite logits make every probability NaN, which the page shows
        probabilities = softmax(logits.astype(np.float64))
    for i in np.argsort(-logits, kind="stable")[:5]:
        name = _html(class_names[i]) if class_names and i < len(class_names) else f"class {i}"
        percent = "NaN" if math.isnan(probabilities[i]) else f"{probabilities[i]:.1%}"  # NaN draws no bar
        items.append(f'<li><span>{name}</span><b>{percent}</b><i style="--share: {percent}"></i>')
    return "".join(items)
