// Summary, options and environment.

function summaryOf(run, index, several) {
  const warnings = run.warnings.length
    ? h("ul", { class: "warnings", "aria-label": "Warnings" }, run.warnings.map((warn) => h("li", { class: warn.level },
      h("span", { class: "sign", "aria-hidden": "true" }, warn.level === "bad" ? "!" : "?"),
      h("div", {}, h("strong", {}, warn.title), h("p", {}, warn.text)))))
    : h("p", { class: "fine" }, run.unjudged || [h("span", { class: "sign", "aria-hidden": "true" }, "✓"), "No problems found."]);
  return h("article", { class: several ? "card run" : "card run alone" },
    h("div", {},
      several ? h("h3", {}, h("span", { class: `key r${(index % 8) + 1}` }), run.name) : null,
      run.sentences.map((sentence, place) => h("p", { class: place ? "" : "lead" }, sentence))),
    h("dl", { class: "tiles" }, run.figures.map((figure) => h("div", {}, h("dt", {}, figure.name), h("dd", {}, figure.value, " ", h("small", {}, figure.note))))),
    h("div", { class: "judgement" }, warnings));
}

const optionText = (value) => (value === null || value === undefined ? "unset" : typeof value === "object" ? JSON.stringify(value) : String(value));

class OptionTable {
  constructor(place, controls, runs) {
    this.place = place;
    this.all = h("input", { type: "checkbox", onchange: () => this.draw() });
    this.search = h("input", { type: "search", placeholder: "Find an option", "aria-label": "Find an option", oninput: () => this.draw() });
    controls.append(this.search, h("label", { class: "check" }, this.all, " Show defaults"));
    this.setRuns(runs);
  }

  setRuns(runs) {
    this.runs = runs;
    this.draw();
  }

  draw() {
    const names = [...new Set(this.runs.flatMap((run) => run.options.map((option) => option.name)))];
    const of = this.runs.map((run) => new Map(run.options.map((option) => [option.name, option])));
    const words = this.search.value.trim().toLowerCase();
    const rows = names.map((name) => {
      const options = of.map((map) => map.get(name));
      const some = options.find((option) => option);
      const values = options.map((option) => (option ? optionText(option.value) : "–"));
      const differs = options.some((option) => option && option.differs);
      const apart = new Set(values).size > 1;
      const key = options.some((option) => option && option.key);
      if (!this.all.checked && !differs && !key && !words) return null;
      if (words && !`${name} ${some.help}`.toLowerCase().includes(words)) return null;
      return h("tr", { class: apart ? "apart" : "" },
        h("th", { scope: "row" }, h("code", {}, name), some.help ? h("small", {}, some.help) : null),
        values.map((value, index) => h("td", { class: options[index] && options[index].differs ? "differs" : "" }, h("code", {}, value))),
        h("td", { class: "default" }, h("code", {}, optionText(some.default))));
    }).filter(Boolean);
    const heads = this.runs.length > 1 ? this.runs.map((run) => run.name) : ["this run"];
    this.place.replaceChildren(rows.length
      ? h("div", { class: "card scroll" }, h("table", { class: "options" },
        h("thead", {}, h("tr", {}, h("th", { scope: "col" }, "option"), heads.map((name) => h("th", { scope: "col" }, name)), h("th", { scope: "col" }, "default"))),
        h("tbody", {}, rows)))
      : h("p", { class: "empty" }, words ? "No option matches." : "All options have their defaults."));
  }
}

const FACTS = {
  model: "model", parameters: "parameters", trained_parameters: "trained parameters", dtype: "weights", training_rows: "training rows",
  max_steps: "planned steps", command: "command", commit: "git commit", host: "host", started: "started", ended: "ended", device: "device", processes: "processes", cpus: "CPUs", threads: "threads",
  platform: "platform", python: "Python",
};

function environmentOf(run, index, several) {
  const facts = Object.entries(FACTS).filter(([name]) => run.facts[name] !== undefined && run.facts[name] !== null);
  const shown = (name, value) => {
    if (typeof value === "number") return wholeText(value);
    // Words as they are typed: a line is not broken after a dash.
    if (name === "command") return h("code", {}, String(value).split(" ").flatMap((word) => [h("span", { class: "word" }, word), " "]));
    return ["started", "ended"].includes(name) ? String(value).replace("T", " ").replace("+00:00", " UTC") : String(value);
  };
  const row = (name, value) => h("div", { class: name === "command" ? "line" : "" }, h("dt", {}, name), h("dd", {}, shown(name, value)));
  return h("article", { class: "card" },
    several ? h("h3", {}, h("span", { class: `key r${(index % 8) + 1}` }), run.name) : null,
    h("dl", { class: "facts wide" }, row("folder", run.path), facts.map(([name, label]) => row(label, run.facts[name])),
      Object.entries(run.facts.packages || {}).map(([name, version]) => row(name, version))));
}
