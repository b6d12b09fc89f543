"""The proof of a port as a page to look at: one HTML file that needs no network and no script."""

import base64
import io
import math
from collections.abc import Mapping, Sequence
from html import escape

import numpy as np
from matplotlib.figure import Figure
from PIL import Image
from proof import FLOAT32_LIMIT, FLOAT64_LIMIT, Proof, Stage, top5
from reference import photographs

# Okabe and Ito's colours, which the colour-blind can tell apart.
SERIES = (
    ("float64", "Flax against PyTorch, both float64", "#0072B2", "o"),
    ("pytorch32", "PyTorch float32 against the truth", "#E69F00", "s"),
    ("flax32", "Flax float32 against the truth", "#009E73", "^"),
)
PHOTOGRAPHS = ("a Chinese temple", "a flower")

STYLE = """
:root { color-scheme: light dark; --line: #8884; --good: #00734f; --bad: #b3261e; --bar: #0072b244 }
@media (prefers-color-scheme: dark) { :root { --good: #4cc38a; --bad: #ff8a80; --bar: #56b4e966 } }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 0 auto; padding: 1rem }
h1 { line-height: 1.2 } h2 { margin: 2.5rem 0 .5rem }
.verdict { font-size: 1.25rem; font-weight: 600; padding: .75rem 1rem; border-left: .4rem solid }
.good { color: var(--good) } .bad { color: var(--bad) }
.plot { background: #fff; border-radius: .5rem; padding: .5rem } .plot svg { width: 100%; min-width: 40rem; height: auto; display: block }
.plot, .scroll { overflow-x: auto }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums }
th, td { padding: .25rem .6rem; border-bottom: 1px solid var(--line); text-align: left; vertical-align: top }
.stages td:nth-child(n+2), .stages th:nth-child(n+2) { text-align: right; white-space: nowrap }
.photographs { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(20rem, 100%), 1fr)); gap: 2rem }
.photographs img { width: 100%; border-radius: .5rem }
.photographs td:nth-child(n+2) { background: linear-gradient(var(--bar), var(--bar)) no-repeat left / var(--p) 100% }
.facts td { overflow-wrap: anywhere } .facts th { white-space: nowrap; font-weight: 500 }
"""


def render(proof: Proof, facts: Mapping[str, str], class_names: Sequence[str] | None) -> str:
    """The page.

    Args:
        proof: what to show.
        facts: shown as a table: the source, checksums, versions.
        class_names: of the logits, in their order; None shows numbers.
    """
    off = next((stage.name for stage in proof.stages if not stage.ok), None)
    if off is None:
        verdict = f'<p class="verdict good">Proven: all {len(proof.stages)} stages agree.</p>'
    else:
        verdict = f'<p class="verdict bad">Not proven: {escape(off)} is the first stage that is off.</p>'
    return f"""<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>The port of a GoogLeNet</title>
<style>{STYLE}</style>
<h1>The port of a GoogLeNet from torchvision to Flax</h1>
{verdict}
<p>Both networks ran on the same two photographs and three random images. An error is the largest difference in a stage,
relative to the largest value there; the truth is PyTorch in float64. A stage agrees if its float64 error is at most
{FLOAT64_LIMIT:g}, and its float32 error at most {FLOAT32_LIMIT:g} times PyTorch's own.</p>
<h2>The error by stage</h2>
<div class="plot">{_plot(proof.stages)}</div>
<div class="scroll"><table class="stages">
<thead><tr><th>stage<th>shape<th>float64:<br>Flax - PyTorch
<th>float32:<br>PyTorch - truth<th>float32:<br>Flax - truth<th></tr></thead>
<tbody>{"".join(_row(stage) for stage in proof.stages)}</tbody>
</table></div>
<h2>What both see</h2>
<div class="photographs">{"".join(_photograph(proof, i, class_names) for i in range(len(PHOTOGRAPHS)))}</div>
<h2>The facts</h2>
<table class="facts">{"".join(f"<tr><th>{escape(name)}<td>{escape(fact)}</tr>" for name, fact in facts.items())}</table>
</html>
"""


def _plot(stages: Sequence[Stage]) -> str:
    figure = Figure(figsize=(10, 4.6), layout="constrained")
    axes = figure.add_subplot()
    for field, label, colour, marker in SERIES:
        # An error of 0, infinity or NaN has no place on a logarithmic axis: the line has a gap there.
        errors = [e if math.isfinite(e) and e > 0 else math.nan for e in (getattr(stage, field) for stage in stages)]
        axes.plot(range(len(stages)), errors, color=colour, marker=marker, label=label)
    axes.axhline(FLOAT64_LIMIT, color=SERIES[0][2], linestyle="--", linewidth=1, label="limit in float64")
    axes.set_yscale("log")
    axes.set_xticks(range(len(stages)), [stage.name for stage in stages], rotation=45, ha="right")
    axes.set_ylabel("largest relative error")
    axes.grid(axis="y", alpha=0.3)
    axes.legend(ncols=2, loc="lower center", bbox_to_anchor=(0.5, 1))
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    svg = buffer.getvalue()
    return svg[svg.index("<svg") :].replace("<svg", '<svg role="img" aria-label="The errors of the table below"', 1)


def _row(stage: Stage) -> str:
    shape = "x".join(str(size) for size in stage.shape[1:])
    errors = "".join(f"<td>{_error(getattr(stage, field))}" for field, *_ in SERIES)
    verdict = '<td class="good">ok' if stage.ok else '<td class="bad">off'
    return f"<tr><td>{escape(stage.name)}<td>{shape}{errors}{verdict}</tr>"


def _error(error: float) -> str:
    if math.isnan(error):
        return "not a number"
    return "shape differs" if math.isinf(error) else f"{error:.1e}"


def _photograph(proof: Proof, i: int, class_names: Sequence[str] | None) -> str:
    buffer = io.BytesIO()
    image = Image.fromarray(photographs()[i])
    image.thumbnail((480, 480))
    image.save(buffer, "JPEG", quality=85)
    source = f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"

    def cell(logits: np.ndarray, rank: int) -> str:
        index, probability = top5(logits)[rank]
        name = class_names[index] if class_names else f"class {index}"
        return f'<td style="--p: {probability:.1%}">{escape(name)} <small>{probability:.2%}</small>'

    ranks = range(min(5, len(proof.flax_logits[i])))
    rows = "".join(
        f"<tr><td>{rank + 1}{cell(proof.pytorch_logits[i], rank)}{cell(proof.flax_logits[i], rank)}</tr>"
        for rank in ranks
    )
    head = "<tr><th><th>PyTorch<th>Flax</tr>"
    return f'<figure style="margin: 0"><img alt="{PHOTOGRAPHS[i]}" src="{source}"><table>{head}{rows}</table></figure>'
