"""The curves of a run as one small picture, for a model card: SVG, nothing but shapes and text."""

from __future__ import annotations

from dataclasses import dataclass
from xml.sax.saxutils import escape

from sapo.report.charts import thin
from sapo.report.summary import number_text
from sapo.runs.reading import RunData

_WIDTH, _HEIGHT, _GAP = 380, 210, 20
_BLUE, _GREEN, _RED, _INK, _SOFT, _RULE = "#2a5fc4", "#14795a", "#a94117", "#1d1f24", "#5d616b", "#e2e2dc"
_POINTS = 200


@dataclass(frozen=True, slots=True)
class _Panel:
    title: str
    lines: list[tuple[str, str, str]]
    """Metric, name in the legend, colour."""


_PANELS = [
    _Panel("Loss, nats", [("loss", "training", _BLUE)]),
    _Panel("Rewards", [("rewards/chosen", "chosen", _GREEN), ("rewards/rejected", "rejected", _RED)]),
    _Panel("Share of pairs in which the chosen is preferred", [("rewards/accuracies", "training", _BLUE)]),
    _Panel("Log-probability of good answers since the start", [("self_play/chosen_logp_change", "nats", _GREEN)]),
]


def curves_svg(run: RunData) -> str:
    """Loss, rewards, preferences and the likelihood of good answers over the steps; those that were logged."""
    names = [metric for panel in _PANELS for metric, _, _ in panel.lines]
    data = thin(run.train, names, _POINTS)
    panels = [panel for panel in _PANELS if any(metric in data["series"] for metric, _, _ in panel.lines)]
    drawn = []
    for place, panel in enumerate(panels):
        x, y = (place % 2) * (_WIDTH + _GAP) + _GAP, (place // 2) * (_HEIGHT + _GAP) + _GAP
        drawn.append(f'<g transform="translate({x} {y})">{_panel(panel, data)}</g>')
    width = 2 * (_WIDTH + _GAP) + _GAP
    height = (len(panels) + 1) // 2 * (_HEIGHT + _GAP) + _GAP
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        f'font-family="system-ui, sans-serif" font-size="12" role="img"><title>Training curves</title>'
        f'<rect width="100%" height="100%" fill="#ffffff"/>{"".join(drawn)}</svg>\n'
    )


def _panel(panel: _Panel, data: dict) -> str:
    left, top, right, bottom = 46, 42, _WIDTH - 6, _HEIGHT - 22
    steps = data["steps"]
    columns = {metric: data["series"][metric]["mean"] for metric, _, _ in panel.lines if metric in data["series"]}
    values = [value for column in columns.values() for value in column if value is not None]
    low, high = min(values), max(values)
    if high - low <= 1e-9 * max(abs(high), abs(low)):
        low, high = low - 0.5, high + 0.5
    first, last = steps[0], max(steps[-1], steps[0] + 1)

    def at(step: float, value: float) -> str:
        x = left + (step - first) / (last - first) * (right - left)
        y = bottom - (value - low) / (high - low) * (bottom - top)
        return f"{x:.1f},{y:.1f}"

    parts = [f'<text x="0" y="12" fill="{_INK}" font-weight="600">{escape(panel.title)}</text>']
    for tick in (low, (low + high) / 2, high):
        y = bottom - (tick - low) / (high - low) * (bottom - top)
        parts.append(f'<path d="M{left} {y:.1f}H{right}" stroke="{_RULE}"/>')
        parts.append(
            f'<text x="{left - 6}" y="{y + 4:.1f}" text-anchor="end" fill="{_SOFT}">{number_text(tick)}</text>'
        )
    parts.append(f'<text x="{left}" y="{_HEIGHT - 6}" fill="{_SOFT}">step {first:,}</text>')
    parts.append(f'<text x="{right}" y="{_HEIGHT - 6}" text-anchor="end" fill="{_SOFT}">{last:,}</text>')
    legend = left
    for metric, name, colour in panel.lines:
        if metric not in columns:
            continue
        pairs = zip(steps, columns[metric], strict=True)
        points = " ".join(at(step, value) for step, value in pairs if value is not None)
        parts.append(f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="1.8"/>')
        parts.append(f'<path d="M{legend} 26h12" stroke="{colour}" stroke-width="3"/>')
        parts.append(f'<text x="{legend + 17}" y="30" fill="{_SOFT}">{escape(name)}</text>')
        legend += 34 + 7 * len(name)
    return "".join(parts)
