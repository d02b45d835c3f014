// Charts: one SVG each, one zoom and one cursor for all of them.

class ChartBoard {
  constructor(grid, specs, runs, announce) {
    this.grid = grid;
    this.announce = announce;
    this.specs = specs;
    this.smoothing = 0;
    this.axis = "step";
    this.log = false;
    this.onzoom = () => {};
    this.cursor = null;
    this.setRuns(runs, runs.map((_, index) => index));
  }

  setRuns(runs, shown) {
    const [from, to, whole] = [this.from, this.to, this.zoomed];
    this.runs = runs;
    this.shown = shown;
    const last = (part) => (part.steps.length ? part.steps[part.steps.length - 1] : 0);
    const first = (part) => (part.steps.length ? part.steps[0] : Infinity);
    const parts = shown.flatMap((index) => [runs[index].train, runs[index].eval]);
    this.least = Math.min(...parts.map(first), Infinity);
    this.most = Math.max(...parts.map(last), 0);
    if (!Number.isFinite(this.least)) this.least = 0;
    if (this.most <= this.least) this.most = this.least + 1;
    this.build();
    if (whole) this.zoom(from, to); else this.zoom(this.least, this.most);
  }

  // Where a step lies on the chosen axis, and back; each run has its own epochs, hours and tokens.
  column(run) {
    const { steps, axes } = this.runs[run].train;
    const values = axes && axes[this.axis];
    return values ? [[0, ...steps], [0, ...values]] : null;
  }

  at(run, step) {
    const column = this.column(run);
    return column ? between(column[0], column[1], step) : step;
  }

  back(run, value) {
    const column = this.column(run);
    return column ? between(column[1], column[0], value) : value;
  }

  lines(spec) {
    const found = [];
    const names = Object.keys(spec.metrics);
    for (const index of this.shown) {
      const run = this.runs[index];
      const before = found.length;
      names.forEach((name, place) => {
        const part = name.startsWith("eval_") ? run.eval : run.train;
        const series = part.series[name];
        if (!series) return;
        const several = this.runs.length > 1;
        const tone = spec.tone === "pair" ? (name.endsWith("chosen") ? "chosen" : "rejected") : `c${((found.length - before) % 8) + 1}`;
        const evaluation = spec.tone === "pair" && name.startsWith("eval_");
        const steps = series.at ? series.at.map((place) => part.steps[place]) : part.steps;
        found.push({
          ...series, steps, dots: steps.length < 60, name, run: index,
          label: several ? `${run.name} · ${spec.metrics[name]}` : spec.metrics[name],
          tone: several ? `r${(index % 8) + 1}` : tone,
          dash: several ? place : evaluation ? 1 : 0,
        });
      });
    }
    return found;
  }

  build() {
    const large = new Set((this.charts || []).filter((chart) => chart.isLarge).map((chart) => chart.spec.title));
    const open = new Set((this.charts || []).filter((chart) => chart.details.open).map((chart) => chart.spec.title));
    this.charts = [];
    const cards = [];
    for (const spec of this.specs) {
      const lines = this.lines(spec);
      if (!lines.length) continue;
      const chart = new Chart(this, spec, lines);
      this.charts.push(chart);
      cards.push(chart.card);
      if (open.has(spec.title)) chart.details.open = true;
      if (large.has(spec.title)) chart.enlarge();
    }
    const gain = gainCard(this.runs, this.shown);
    if (gain) cards.push(gain);
    this.grid.replaceChildren(...cards);
    if (!cards.length) this.grid.append(h("p", { class: "empty" }, "Nothing logged yet."));
  }

  draw() { for (const chart of this.charts) chart.draw(); }

  zoom(from, to) {
    const least = Math.max(this.least, Math.round(Math.min(from, to)));
    const most = Math.min(this.most, Math.round(Math.max(from, to)));
    if (most - least < 1) return;
    [this.from, this.to] = [least, most];
    this.zoomed = least > this.least || most < this.most;
    this.onzoom();
    this.draw();
  }

  point(step) {
    this.cursor = step;
    for (const chart of this.charts) chart.point();
  }
}

// Few points, as from evaluations, are not smoothed.
function smooth(values, weight) {
  if (!weight || values.length < 40) return values;
  let sum = 0, norm = 0;
  return values.map((value) => {
    if (value === null) return null;
    sum = weight * sum + (1 - weight) * value;
    norm = weight * norm + (1 - weight);
    return sum / norm;
  });
}

let clipCount = 0;

class Chart {
  constructor(board, spec, lines) {
    this.board = board;
    this.spec = spec;
    this.series = lines;
    const id = `chart-${spec.title.toLowerCase().replace(/\W+/g, "-")}`;
    this.clip = `clip-${clipCount++}`;
    this.legend = h("ul", { class: "legend" });
    this.values = lines.map((line) => {
      const value = h("span", { class: "value" });
      this.legend.append(h("li", {}, h("span", { class: `key ${line.tone} dash${line.dash}` }), `${line.label} `, value));
      return value;
    });
    this.at = h("span", { class: "at" });
    this.plot = h("div", {
      class: "plot", tabindex: "0", role: "group", "aria-roledescription": "chart", "aria-labelledby": `${id}-title`,
      "aria-describedby": `${id}-words`, onkeydown: (event) => this.key(event),
    });
    this.words = h("p", { class: "unseen", id: `${id}-words` });
    this.details = h("details", { ontoggle: () => this.table() }, h("summary", {}, "Table"), h("div", { class: "scroll" }));
    const unit = spec.unit && spec.unit !== "share" ? h("span", { class: "unit" }, spec.unit) : null;
    const tool = (text, label, act) => h("button", { type: "button", "aria-label": `${label}: ${spec.title}`, onclick: act }, text);
    this.enlarger = tool("Enlarge", "Enlarge", () => this.enlarge());
    this.tools = h("div", { class: "tools" }, this.enlarger,
      tool("CSV", "Save as CSV", () => this.saveCsv()), tool("PNG", "Save as PNG", () => this.savePng()));
    this.isLarge = false;
    this.card = h("section", { class: "card chart", "aria-labelledby": `${id}-title` },
      h("div", { class: "chart-head" }, h("h3", { id: `${id}-title` }, spec.title, " ", unit), this.at),
      this.legend, this.plot, this.words, h("p", { class: "reading" }, spec.reading), this.tools, this.details);
    this.watch();
    new ResizeObserver(() => this.draw()).observe(this.plot);
  }

  enlarge() {
    this.isLarge = !this.isLarge;
    this.card.classList.toggle("large", this.isLarge);
    this.enlarger.textContent = this.isLarge ? "Shrink" : "Enlarge";
    this.draw();
  }

  get fileName() { return this.spec.title.toLowerCase().replace(/\W+/g, "-"); }

  saveCsv() {
    const quoted = (text) => `"${String(text).replaceAll('"', '""')}"`;
    const at = this.series.map((line) => new Map(line.steps.map((step, index) => [step, line.mean[index]])));
    const steps = [...new Set(this.series.flatMap((line) => line.steps))].sort((a, b) => a - b);
    const rows = steps.map((step) => [step, ...at.map((values) => (values.has(step) && values.get(step) !== null ? values.get(step) : ""))].join(","));
    const head = ["step", ...this.series.map((line) => quoted(line.label))].join(",");
    save(`${this.fileName}.csv`, new Blob([[head, ...rows, ""].join("\n")], { type: "text/csv" }));
  }

  // The drawing with its styles written into it, on the card's ground, with title and legend, at twice its size.
  savePng() {
    const svg = this.plot.querySelector("svg");
    const copy = svg.cloneNode(true);
    const [from, to] = [svg, copy].map((root) => [root, ...root.querySelectorAll("*")]);
    const names = ["fill", "stroke", "stroke-width", "stroke-dasharray", "stroke-linejoin", "stroke-linecap", "stroke-opacity", "opacity", "color", "font-size", "font-family"];
    from.forEach((element, place) => {
      const style = getComputedStyle(element);
      for (const name of names) to[place].setAttribute(name, style.getPropertyValue(name));
      to[place].removeAttribute("class");
    });
    const head = 44, [width, height] = [svg.clientWidth, svg.clientHeight + head];
    copy.setAttribute("xmlns", SVG);
    const image = new Image();
    image.onload = () => {
      const canvas = document.createElement("canvas");
      [canvas.width, canvas.height] = [2 * width, 2 * height];
      const context = canvas.getContext("2d");
      context.scale(2, 2);
      const style = getComputedStyle(this.card);
      context.fillStyle = style.backgroundColor;
      context.fillRect(0, 0, width, height);
      context.fillStyle = style.color;
      context.font = "600 14px system-ui, sans-serif";
      context.fillText(this.spec.title, 8, 18);
      context.font = "12px system-ui, sans-serif";
      let x = 8;
      this.series.forEach((line, index) => {
        context.fillStyle = getComputedStyle(this.legend.children[index].firstChild).color;
        context.fillRect(x, 32, 12, 3);
        context.fillStyle = style.color;
        context.fillText(line.label, x + 17, 38);
        x += 33 + context.measureText(line.label).width;
      });
      context.drawImage(image, 0, head, width, height - head);
      canvas.toBlob((blob) => save(`${this.fileName}.png`, blob));
    };
    image.src = `data:image/svg+xml;charset=utf-8,${encodeURIComponent(new XMLSerializer().serializeToString(copy))}`;
  }

  draw() {
    const width = this.plot.clientWidth;
    if (!width) return;
    const height = this.isLarge ? 420 : 176, { board } = this, { from, to, smoothing } = board;
    this.smoothed = this.series.map((line) => smooth(line.mean, smoothing));
    let low = Infinity, high = -Infinity;
    this.series.forEach((line, index) => {
      const drawn = smoothing > 0 ? this.smoothed[index] : line.mean;
      line.steps.forEach((step, place) => {
        if (step < from || step > to) return;
        for (const value of [line.mean[place], drawn[place]]) {
          if (value === null) continue;
          low = Math.min(low, value);
          high = Math.max(high, value);
        }
      });
    });
    if (low > high) [low, high] = [0, 1];
    if (this.spec.unit === "share") [low, high] = [Math.min(0, low), Math.max(high * 1.05, 0.05)];
    if (this.spec.unit === "share" && high > 0.6) high = 1;
    // A smoothed constant stays constant except for rounding.
    if (high - low <= 1e-9 * Math.max(Math.abs(high), Math.abs(low))) { const pad = Math.abs(high) * 0.1 || 1; low -= pad; high += pad; }
    const log = board.log && this.spec.unit !== "share" && low > 0;
    this.card.classList.toggle("log", log);
    if (log) { const pad = (high / low) ** 0.06; low /= pad; high *= pad; }
    else if (this.spec.unit !== "share") { const pad = (high - low) * 0.06; low -= pad; high += pad; }
    const up = log ? Math.log10 : (value) => value;
    const decades = log ? niceTicks(Math.ceil(up(low)), Math.floor(up(high)), 4, true).map((power) => 10 ** power).filter((tick) => tick >= low && tick <= high) : [];
    const ticksY = decades.length > 1 ? decades : niceTicks(low, high, this.isLarge ? 8 : 4);
    const labels = ticksY.map((tick) => numberText(tick, this.spec.unit));
    const left = Math.max(38, 12 + 6.6 * Math.max(...labels.map((label) => label.length)));
    const box = { left, right: width - 10, top: 8, bottom: height - 22 };
    const runs = [...new Set(this.series.map((line) => line.run))];
    let [first, last] = [Math.min(...runs.map((run) => board.at(run, from))), Math.max(...runs.map((run) => board.at(run, to)))];
    if (!(last > first)) last = first + 1;
    const across = (value) => box.left + ((value - first) / (last - first)) * (box.right - box.left);
    this.span = [first, last];
    this.x = (step, run = runs[0]) => across(board.at(run, step));
    this.y = (value) => box.bottom - ((up(value) - up(low)) / (up(high) - up(low))) * (box.bottom - box.top);
    this.box = box;
    const svg = s("svg", { viewBox: `0 0 ${width} ${height}`, width, height, "aria-hidden": "true" });
    svg.append(s("clipPath", { id: this.clip },
      s("rect", { x: box.left - 4, y: box.top - 4, width: Math.max(0, box.right - box.left + 8), height: box.bottom - box.top + 8 })));
    ticksY.forEach((tick, index) => {
      const y = this.y(tick);
      svg.append(s("line", { class: tick === 0 && low < 0 ? "zero" : "grid", x1: box.left, x2: box.right, y1: y, y2: y }));
      svg.append(s("text", { class: "tick", x: box.left - 6, y: y + 4, "text-anchor": "end" }, labels[index]));
    });
    const bySteps = board.axis === "step";
    const ticksX = niceTicks(first, last, Math.max(2, Math.floor((box.right - box.left) / 90)), bySteps);
    for (const tick of ticksX) {
      const x = across(tick);
      const anchor = x > box.right - 16 ? "end" : x < box.left + 12 ? "start" : "middle";
      svg.append(s("text", { class: "tick", x, y: height - 5, "text-anchor": anchor }, bySteps ? wholeText(tick) : numberText(tick)));
    }
    svg.append(s("text", { class: "tick", x: 2, y: height - 5 }, { step: "step", epoch: "epoch", hours: "h", tokens: "M tok." }[board.axis]));
    const inside = s("g", { "clip-path": `url(#${this.clip})` });
    this.series.forEach((line, index) => {
      if (line.low) inside.append(s("path", { class: `band ${line.tone}`, d: this.area(line) }));
      if (this.smoothed[index] !== line.mean) inside.append(s("path", { class: `line raw ${line.tone}`, d: this.path(line, line.mean) }));
      inside.append(s("path", { class: `line ${line.tone} dash${line.dash}`, d: this.path(line, this.smoothed[index]) }));
      if (line.dots && this.smoothed[index] === line.mean) {
        line.steps.forEach((step, place) => {
          if (line.mean[place] === null || step < from || step > to) return;
          inside.append(s("circle", { class: `dot ${line.tone}`, cx: this.x(step, line.run), cy: this.y(line.mean[place]), r: 2.2 }));
        });
      }
    });
    this.cross = s("g", { class: "cross" });
    this.brush = s("rect", { class: "brush", y: box.top, height: box.bottom - box.top, width: 0, x: 0 });
    svg.append(inside, this.brush, this.cross);
    this.plot.replaceChildren(svg);
    this.describe();
    this.point();
    if (this.details.open) this.table();
  }

  path({ steps, run }, values) {
    let d = "", pen = "M";
    for (let place = 0; place < steps.length; place++) {
      if (values[place] === null) { pen = "M"; continue; }
      d += `${pen}${this.x(steps[place], run).toFixed(1)} ${this.y(values[place]).toFixed(1)}`;
      pen = "L";
    }
    return d;
  }

  area(line) {
    const there = [], back = [];
    line.steps.forEach((step, place) => {
      if (line.low[place] === null) return;
      there.push(`${this.x(step, line.run).toFixed(1)} ${this.y(line.high[place]).toFixed(1)}`);
      back.unshift(`${this.x(step, line.run).toFixed(1)} ${this.y(line.low[place]).toFixed(1)}`);
    });
    return there.length ? `M${there.join("L")}L${back.join("L")}Z` : "";
  }

  describe() {
    const words = this.series.map((line) => {
      const values = line.mean.filter((value) => value !== null);
      if (!values.length) return "";
      const text = (value) => numberText(value, this.spec.unit);
      return `${line.label}: ${text(values[0])} at the start, ${text(values[values.length - 1])} at the end, ` +
        `between ${text(Math.min(...values))} and ${text(Math.max(...values))}.`;
    });
    this.words.textContent = `Steps ${wholeText(this.board.from)} to ${wholeText(this.board.to)}. ${words.join(" ")} ${this.spec.reading}`;
  }

  // Show the values at the board's cursor, or the last ones in view.
  point() {
    if (!this.cross) return;
    const { cursor, to } = this.board;
    this.cross.replaceChildren();
    if (cursor !== null && cursor >= this.board.from && cursor <= to) {
      const x = this.x(cursor);
      this.cross.append(s("line", { x1: x, x2: x, y1: this.box.top, y2: this.box.bottom }));
    }
    this.series.forEach((line, index) => {
      const place = nearest(line.steps, cursor === null ? to : cursor);
      const value = this.smoothed[index][place];
      this.values[index].textContent = numberText(value, this.spec.unit);
      if (cursor !== null && value !== null && value !== undefined) {
        this.cross.append(s("circle", { class: line.tone, cx: this.x(line.steps[place], line.run), cy: this.y(value), r: 3.5 }));
      }
    });
    this.at.textContent = cursor === null ? "" : `step ${wholeText(cursor)}`;
  }

  stepAt(event) {
    const rect = this.plot.getBoundingClientRect();
    const { from, to } = this.board;
    const share = (event.clientX - rect.left - this.box.left) / (this.box.right - this.box.left);
    const value = this.span[0] + Math.min(1, Math.max(0, share)) * (this.span[1] - this.span[0]);
    return Math.min(to, Math.max(from, this.board.back(this.series[0].run, value)));
  }

  onStep(wanted) {
    const steps = this.series.reduce((most, line) => (line.steps.length > most.length ? line.steps : most), []);
    return steps[nearest(steps, wanted)];
  }

  watch() {
    let start = null;
    this.plot.addEventListener("pointerdown", (event) => {
      if (event.button !== 0 || event.pointerType === "touch") return;
      start = event.clientX;
    });
    this.plot.addEventListener("pointermove", (event) => {
      if (!this.box) return;
      this.board.point(this.onStep(this.stepAt(event)));
      if (start === null || Math.abs(event.clientX - start) < 4) return;
      if (!this.plot.hasPointerCapture(event.pointerId)) this.plot.setPointerCapture(event.pointerId);
      const edge = this.plot.getBoundingClientRect().left;
      const [a, b] = [start - edge, event.clientX - edge].sort((one, other) => one - other);
      this.brush.setAttribute("x", a);
      this.brush.setAttribute("width", b - a);
    });
    this.plot.addEventListener("pointerup", (event) => {
      if (start === null) return;
      const moved = Math.abs(event.clientX - start);
      const other = this.stepAt({ clientX: start });
      start = null;
      this.brush.setAttribute("width", 0);
      if (moved >= 8) this.board.zoom(other, this.stepAt(event));
    });
    this.plot.addEventListener("pointercancel", () => { start = null; });
    this.plot.addEventListener("pointerleave", () => { if (start === null) this.board.point(null); });
    this.plot.addEventListener("dblclick", () => this.board.zoom(this.board.least, this.board.most));
    this.plot.addEventListener("blur", () => this.board.point(null));
  }

  key(event) {
    const { from, to, cursor, least, most } = this.board;
    const steps = this.series.reduce((long, line) => (line.steps.length > long.length ? line.steps : long), []);
    const place = nearest(steps, cursor === null ? from : cursor);
    const go = (index) => {
      const step = steps[Math.min(steps.length - 1, Math.max(0, index))];
      this.board.point(step);
      const values = this.series.map((line, i) =>
        `${line.label} ${numberText(this.smoothed[i][nearest(line.steps, step)], this.spec.unit)}`);
      this.board.announce(`Step ${wholeText(step)}: ${values.join(", ")}`);
    };
    const page = Math.max(1, Math.round(steps.length / 10));
    const middle = cursor === null ? (from + to) / 2 : cursor;
    const scale = (factor) => {
      const half = ((to - from) * factor) / 2;
      this.board.zoom(middle - half, middle + half);
      this.board.announce(`Steps ${wholeText(this.board.from)} to ${wholeText(this.board.to)}`);
    };
    const actions = {
      ArrowRight: () => go(cursor === null ? place : place + 1),
      ArrowLeft: () => go(cursor === null ? place : place - 1),
      PageDown: () => go(place + page),
      PageUp: () => go(place - page),
      Home: () => go(0),
      End: () => go(steps.length - 1),
      "+": () => scale(0.5),
      "=": () => scale(0.5),
      "-": () => scale(2),
      0: () => { this.board.zoom(least, most); this.board.announce("Full run"); },
      Escape: () => this.board.point(null),
    };
    const action = actions[event.key];
    if (!action || event.ctrlKey || event.metaKey || event.altKey) return;
    event.preventDefault();
    action();
  }

  // Table of the curves' values, built on demand.
  table() {
    const place = this.details.lastElementChild;
    if (!this.details.open) return;
    const { from, to } = this.board;
    const steps = [...new Set(this.series.flatMap((line) => line.steps))].filter((step) => step >= from && step <= to);
    steps.sort((a, b) => a - b);
    const at = this.series.map((line) => new Map(line.steps.map((step, index) => [step, line.mean[index]])));
    const row = (step) => h("tr", {}, h("th", { scope: "row" }, wholeText(step)),
      at.map((values) => h("td", {}, values.has(step) ? numberText(values.get(step), this.spec.unit) : "")));
    const merged = this.series.some((line) => line.low);
    place.replaceChildren(h("table", { class: "numbers" },
      h("caption", { class: merged ? "note" : "unseen" }, merged ? "Means up to each step; metrics.jsonl has every line." : this.spec.title),
      h("thead", {}, h("tr", {}, h("th", { scope: "col" }, "step"), this.series.map((line) => h("th", { scope: "col" }, line.label)))),
      h("tbody", {}, steps.map(row))));
  }
}
