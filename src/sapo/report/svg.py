"""The curves of a run as a small SVG image for its model card."""

from __future__ import annotations

from typing import Any
from xml.sax.saxutils import escape

from sapo.report.charts import CHARTS, Chart, curves
from sapo.runs.metrics import EVAL
from sapo.runs.reading import Run
from sapo.text.numbers import number_text, share_text

_WIDTH, _HEIGHT, _GAP = 380, 210, 20
_INK, _SOFT, _RULE = "#1d1f24", "#5d616b", "#e2e2dc"
_TONES = {"order": ("#2a5fc4", "#14795a", "#a94117"), "pair": ("#14795a", "#a94117", "#14795a", "#a94117")}
_POINTS = 200


def curves_svg(run: Run) -> str:
    """The charts marked `on_card` that have logged values."""
    data = curves(run, [chart for chart in CHARTS if chart.on_card], _POINTS)
    panels = [panel for chart in CHARTS if chart.on_card and (panel := _panel(chart, data))]
    drawn = []
    for place, panel in enumerate(panels):
        x, y = (place % 2) * (_WIDTH + _GAP) + _GAP, (place // 2) * (_HEIGHT + _GAP) + _GAP
        drawn.append(f'<g transform="translate({x} {y})">{panel}</g>')
    width = 2 * (_WIDTH + _GAP) + _GAP
    height = (len(panels) + 1) // 2 * (_HEIGHT + _GAP) + _GAP
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        f'font-family="system-ui, sans-serif" font-size="12" role="img"><title>Training curves</title>'
        f'<rect width="100%" height="100%" fill="#ffffff"/>{"".join(drawn)}</svg>\n'
    )


def _panel(chart: Chart, data: dict[str, Any]) -> str:
    left, top, right, bottom = 46, 42, _WIDTH - 6, _HEIGHT - 22
    lines = []
    for metric, legend in chart.metrics.items():
        part = data["eval" if metric.startswith(EVAL) else "train"]
        if series := part["series"].get(metric):
            steps = [part["steps"][place] for place in series.get("at", range(len(part["steps"])))]
            column = zip(steps, series["mean"], strict=True)
            lines.append((legend, [(step, value) for step, value in column if value is not None]))
    if not lines:
        return ""
    values = [value for _, points in lines for _, value in points]
    low, high = min(values), max(values)
    if high - low <= 1e-9 * max(abs(high), abs(low)):
        low, high = low - 0.5, high + 0.5
    steps = [step for _, points in lines for step, _ in points]
    first, last = min(steps), max(*steps, min(steps) + 1)
    spell = share_text if chart.unit == "share" else number_text

    def at(step: float, value: float) -> str:
        x = left + (step - first) / (last - first) * (right - left)
        y = bottom - (value - low) / (high - low) * (bottom - top)
        return f"{x:.1f},{y:.1f}"

    title = f"{chart.title}, {chart.unit}" if chart.unit not in ("", "share") else chart.title
    parts = [f'<text x="0" y="12" fill="{_INK}" font-weight="600">{escape(title)}</text>']
    for tick in (low, (low + high) / 2, high):
        y = bottom - (tick - low) / (high - low) * (bottom - top)
        parts.append(f'<path d="M{left} {y:.1f}H{right}" stroke="{_RULE}"/>')
        parts.append(f'<text x="{left - 6}" y="{y + 4:.1f}" text-anchor="end" fill="{_SOFT}">{spell(tick)}</text>')
    parts.append(f'<text x="{left}" y="{_HEIGHT - 6}" fill="{_SOFT}">step {first:,}</text>')
    parts.append(f'<text x="{right}" y="{_HEIGHT - 6}" text-anchor="end" fill="{_SOFT}">{last:,}</text>')
    x = left
    for (legend, points), colour in zip(lines, _TONES[chart.tone], strict=False):
        drawn = " ".join(at(step, value) for step, value in points)
        parts.append(f'<polyline points="{drawn}" fill="none" stroke="{colour}" stroke-width="1.8"/>')
        parts.append(f'<path d="M{x} 26h12" stroke="{colour}" stroke-width="3"/>')
        parts.append(f'<text x="{x + 17}" y="30" fill="{_SOFT}">{escape(legend)}</text>')
        x += 34 + 7 * len(legend)
    return "".join(parts)
