// Gain against distance from the start: one curve for each run and kind of prompt, its evaluations as dots.

function gainCard(runs, shown) {
  const lines = shown.flatMap((index) => Object.entries(runs[index].gain).map(([name, points], place) => ({
    points,
    label: runs.length > 1 ? `${runs[index].name} · ${name}` : name,
    tone: runs.length > 1 ? `r${(index % 8) + 1}` : `c${place + 1}`,
    dash: runs.length > 1 ? place : 0,
  })));
  if (!lines.length) return null;
  const width = 420, height = 230, box = { left: 52, right: width - 12, top: 10, bottom: height - 38 };
  const all = lines.flatMap((line) => line.points);
  const range = (place) => {
    const values = all.map((point) => point[place]);
    const low = Math.min(0, ...values), high = Math.max(...values, low + 1e-9);
    return [low - 0.03 * (high - low), high + 0.05 * (high - low)];
  };
  const [[left, right], [low, high]] = [range(1), range(2)];
  const x = (value) => box.left + ((value - left) / (right - left)) * (box.right - box.left);
  const y = (value) => box.bottom - ((value - low) / (high - low)) * (box.bottom - box.top);
  const svg = s("svg", { viewBox: `0 0 ${width} ${height}`, width: "100%", "aria-hidden": "true" });
  for (const tick of niceTicks(low, high, 4)) {
    svg.append(s("line", { class: "grid", x1: box.left, x2: box.right, y1: y(tick), y2: y(tick) }),
      s("text", { class: "tick", x: box.left - 6, y: y(tick) + 4, "text-anchor": "end" }, numberText(tick)));
  }
  for (const tick of niceTicks(left, right, 4)) {
    svg.append(s("text", { class: "tick", x: x(tick), y: box.bottom + 16, "text-anchor": "middle" }, numberText(tick)));
  }
  svg.append(s("text", { class: "tick", x: box.right, y: height - 5, "text-anchor": "end" }, "gain on evaluation rows, nats per token"));
  for (const line of lines) {
    const d = line.points.map(([, gain, kl], place) => `${place ? "L" : "M"}${x(gain).toFixed(1)} ${y(kl).toFixed(1)}`).join("");
    svg.append(s("path", { class: `line ${line.tone} dash${line.dash}`, d }));
    for (const [, gain, kl] of line.points) svg.append(s("circle", { class: `dot ${line.tone}`, cx: x(gain), cy: y(kl), r: 2.2 }));
  }
  const words = lines.map((line) => {
    const [step, gain, kl] = line.points[line.points.length - 1];
    return `${line.label}: gain ${numberText(gain)} at a distance of ${numberText(kl)} after step ${wholeText(step)}.`;
  });
  const row = (line) => line.points.map(([step, gain, kl]) => h("tr", {}, h("th", { scope: "row" }, line.label),
    [wholeText(step), numberText(gain), numberText(kl)].map((text) => h("td", {}, text))));
  return h("section", { class: "card chart", "aria-labelledby": "chart-gain-title" },
    h("div", { class: "chart-head" }, h("h3", { id: "chart-gain-title" }, "Gain against distance from the start ", h("span", { class: "unit" }, "KL, nats per token"))),
    h("ul", { class: "legend" }, lines.map((line) => h("li", {}, h("span", { class: `key ${line.tone} dash${line.dash}` }), `${line.label} `))),
    h("div", { class: "plot" }, svg), h("p", { class: "unseen" }, words.join(" ")),
    h("p", { class: "reading" }, "The start is at the origin. Of two runs, the lower curve keeps more for the same gain."),
    h("details", {}, h("summary", {}, "Table"), h("div", { class: "scroll" }, h("table", { class: "numbers" },
      h("thead", {}, h("tr", {}, ["prompts", "step", "gain", "KL"].map((text) => h("th", { scope: "col" }, text)))),
      h("tbody", {}, lines.flatMap(row))))));
}
