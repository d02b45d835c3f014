// The pair browser: filters, a list, both responses side by side, and the history of a prompt.

// Split a text for comparison: words, runs of white space, and single other characters.
const pieces = (text) => text.match(/\s+|[\p{L}\p{N}_]+|[^]/gu) || [];

// Pieces that two lists do not share: longest common subsequence, without the common prefix and suffix.
function differences(one, other) {
  const only = [new Array(one.length).fill(false), new Array(other.length).fill(false)];
  let start = 0;
  while (start < one.length && start < other.length && one[start] === other[start]) start++;
  let a = one.length, b = other.length;
  while (a > start && b > start && one[a - 1] === other[b - 1]) { a--; b--; }
  const n = a - start, m = b - start;
  if (n * m > 4e6) {
    only[0].fill(true, start, a);
    only[1].fill(true, start, b);
    return only;
  }
  const width = m + 1, table = new Uint16Array((n + 1) * width);
  for (let i = n - 1; i >= 0; i--) {
    for (let j = m - 1; j >= 0; j--) {
      table[i * width + j] = one[start + i] === other[start + j]
        ? table[(i + 1) * width + j + 1] + 1
        : Math.max(table[(i + 1) * width + j], table[i * width + j + 1]);
    }
  }
  let i = 0, j = 0;
  while (i < n && j < m) {
    if (one[start + i] === other[start + j]) { i++; j++; }
    else if (table[(i + 1) * width + j] >= table[i * width + j + 1]) only[0][start + i++] = true;
    else only[1][start + j++] = true;
  }
  while (i < n) only[0][start + i++] = true;
  while (j < m) only[1][start + j++] = true;
  return only;
}

// A text as spans that mark the pieces missing from the other text; neighbours and the space between share one mark.
function marked(list, own, tag) {
  const only = own.map((lacking, place) => lacking || (/^\s+$/.test(list[place]) && Boolean(own[place - 1] && own[place + 1])));
  const nodes = [];
  let from = 0;
  for (let to = 1; to <= list.length; to++) {
    if (to < list.length && only[to] === only[from]) continue;
    const text = list.slice(from, to).join("");
    nodes.push(only[from] ? h(tag, {}, text) : text);
    from = to;
  }
  return nodes;
}

class PairBrowser {
  constructor(place, announce) {
    this.place = place;
    this.announce = announce;
    this.filters = { search: "", kind: "all", from: "", to: "", least: "", most: "", short: "", long: "", differ: false, sort: "step" };
    this.chosen = null;
    this.whole = true;
  }

  setRun(run) {
    const packed = run.pairs;
    const texts = packed.texts;
    this.limit = packed.limit;
    this.pairs = packed.pairs.map((pair, index) => {
      const [prompt, a, b, c, d, e, f] = pair.x.map((text) => texts[text]);
      return { ...pair, index, prompt, chosen: [a, b, c], rejected: [d, e, f], find: null };
    });
    if (this.chosen !== null && this.chosen >= this.pairs.length) this.chosen = null;
    this.build();
  }

  build() {
    if (!this.pairs.length) {
      this.place.replaceChildren(h("p", { class: "empty" },
        "No pairs were kept: report_pairs=0, or the run predates this option."));
      return;
    }
    const field = (key, label, attributes) => {
      const input = h("input", { ...attributes, value: this.filters[key], "aria-label": attributes["aria-label"] || label,
        oninput: () => { this.filters[key] = input.value.trim(); this.refresh(); } });
      return input;
    };
    const number = (key, label) => field(key, label, { class: "short", inputmode: "decimal", placeholder: label, "aria-label": this.names[key] });
    const choice = (key, label, options) => {
      const select = h("select", { onchange: () => { this.filters[key] = select.value; this.refresh(); } },
        Object.entries(options).map(([value, text]) => h("option", { value, selected: this.filters[key] === value }, text)));
      return h("label", {}, `${label} `, select);
    };
    const differ = h("input", { type: "checkbox", onchange: () => { this.filters.differ = differ.checked; this.refresh(); } });
    differ.checked = this.filters.differ;
    this.search = field("search", "Search", { type: "search", id: "pair-search", placeholder: "Search prompts and responses  ( / )", "aria-label": "Search prompts and responses" });
    this.count = h("p", { class: "count", role: "status" });
    this.list = h("ul", { class: "pair-list", role: "listbox", "aria-label": "Pairs", tabindex: "0", onkeydown: (event) => this.key(event),
      onclick: (event) => { const item = event.target.closest("[role=option]"); if (item) this.show(Number(item.dataset.index), true); } });
    this.detail = h("div", { class: "pair-detail", tabindex: "-1", role: "region", "aria-label": "The pair", "aria-live": "off" });
    const filters = h("div", { class: "filters", role: "search" },
      this.search,
      choice("kind", "Show", { all: "all pairs", f: "tracked prompts", l: "pairs trained on" }),
      choice("sort", "Sort by", { step: "step", margin: "margin, lowest first", "-margin": "margin, highest first", length: "longest regenerated segment", row: "row of the data" }),
      h("fieldset", {}, h("legend", {}, "Step"), number("from", "from"), number("to", "to")),
      h("fieldset", {}, h("legend", {}, "Margin"), number("least", "from"), number("most", "to")),
      h("fieldset", {}, h("legend", {}, "Regenerated tokens"), number("short", "from"), number("long", "to")),
      h("label", { class: "check" }, differ, " Hide identical pairs"),
      h("button", { type: "button", onclick: () => this.clear() }, "Reset filters"));
    const note = this.limit ? h("p", { class: "hint" }, `Texts over ${wholeText(this.limit)} characters are shortened in the middle, with a note; pairs.jsonl has the full texts.`) : null;
    this.place.replaceChildren(filters, note || "", h("div", { class: "pair-columns" }, h("div", { class: "pair-side" }, this.count, this.list), this.detail));
    this.refresh();
  }

  get names() {
    return { from: "First step", to: "Last step", least: "Minimum margin", most: "Maximum margin", short: "Minimum regenerated tokens", long: "Maximum regenerated tokens" };
  }

  clear() {
    Object.assign(this.filters, { search: "", kind: "all", from: "", to: "", least: "", most: "", short: "", long: "", differ: false, sort: "step" });
    this.build();
    this.search.focus();
  }

  matching() {
    const f = this.filters;
    const bound = (text, otherwise) => (text === "" || Number.isNaN(Number(text)) ? otherwise : Number(text));
    const between = (value, low, high) => (low === "" && high === "") || (value !== undefined && value >= bound(low, -Infinity) && value <= bound(high, Infinity));
    const words = f.search.toLowerCase();
    const found = this.pairs.filter((pair) => {
      if (f.kind !== "all" && pair.k !== f.kind) return false;
      if (f.differ && pair.i) return false;
      if (!between(pair.s, f.from, f.to) || !between(pair.m, f.least, f.most) || !between(pair.g[1], f.short, f.long)) return false;
      if (!words) return true;
      if (pair.find === null) pair.find = [pair.prompt, ...pair.chosen, "\n", ...pair.rejected].join("").toLowerCase();
      return pair.find.includes(words);
    });
    const margin = (pair) => (pair.m === undefined ? Infinity : pair.m);
    const orders = {
      step: (a, b) => a.s - b.s || a.index - b.index,
      margin: (a, b) => margin(a) - margin(b),
      "-margin": (a, b) => margin(b) - margin(a),
      length: (a, b) => b.g[1] - a.g[1],
      row: (a, b) => a.r - b.r || a.s - b.s,
    };
    return found.sort(orders[f.sort]);
  }

  refresh() {
    this.shown = this.matching();
    const total = this.pairs.length;
    this.count.textContent = this.shown.length === total ? `${total} pairs` : `${this.shown.length} of ${total} pairs`;
    const end = (text) => (text.length > 88 ? `…${text.slice(-88)}` : text);
    const from = (text) => text.replace(/\s+/g, " ").trim();
    this.list.replaceChildren(...this.shown.map((pair) => h("li", {
      role: "option", id: `pair-${pair.index}`, "data-index": pair.index, "aria-selected": "false",
    },
    h("span", { class: "pair-line" }, h("b", {}, `step ${wholeText(pair.s)}`), h("span", { class: "pair-margin" }, pair.i ? "identical" : pair.m === undefined ? "" : `margin ${numberText(pair.m)}`)),
    h("span", { class: "pair-prompt" }, end(from(pair.prompt))),
    h("span", { class: "pair-snippet" }, from(pair.rejected[1]).slice(0, 90) || "(empty)"))));
    const still = this.shown.some((pair) => pair.index === this.chosen);
    if (still) this.show(this.chosen, false);
    else if (this.shown.length) this.show((this.shown.find((pair) => !pair.i) || this.shown[0]).index, false);
    else {
      this.chosen = null;
      this.list.removeAttribute("aria-activedescendant");
      this.detail.replaceChildren(h("p", { class: "empty" }, "No pair matches."));
    }
  }

  key(event) {
    const place = this.shown.findIndex((pair) => pair.index === this.chosen);
    const moves = { ArrowDown: place + 1, j: place + 1, ArrowUp: place - 1, k: place - 1, Home: 0, End: this.shown.length - 1, PageDown: place + 10, PageUp: place - 10 };
    if (event.key === "Enter") { this.detail.focus(); event.preventDefault(); return; }
    if (!(event.key in moves) || !this.shown.length || event.ctrlKey || event.metaKey || event.altKey) return;
    event.preventDefault();
    this.show(this.shown[Math.min(this.shown.length - 1, Math.max(0, moves[event.key]))].index, true);
  }

  show(index, scroll) {
    this.chosen = index;
    for (const item of this.list.children) {
      const own = Number(item.dataset.index) === index;
      item.setAttribute("aria-selected", own ? "true" : "false");
      if (own) {
        this.list.setAttribute("aria-activedescendant", item.id);
        if (scroll) item.scrollIntoView({ block: "nearest" });
      }
    }
    const pair = this.pairs[index];
    const [one, other] = [pieces(pair.chosen[1]), pieces(pair.rejected[1])];
    const only = differences(one, other);
    const fact = (name, value) => (value === undefined || value === null ? null : h("div", {}, h("dt", {}, name), h("dd", {}, value)));
    const change = (now, before) => (now === undefined ? null : `${numberText(now)}${before === undefined ? "" : ` (reference ${numberText(before)})`}`);
    const toggle = h("button", { type: "button", "aria-pressed": this.whole ? "false" : "true",
      onclick: () => { this.whole = !this.whole; this.show(index, false); this.detail.querySelector("button").focus(); } }, "Show segment only");
    this.detail.replaceChildren(
      h("div", { class: "detail-head" },
        h("h3", {}, `Step ${wholeText(pair.s)}, row ${wholeText(pair.r)}`, pair.t ? `, turn ${pair.t}` : ""),
        h("span", { class: `chip ${pair.k === "f" ? "followed" : "trained"}` }, pair.k === "f" ? "tracked prompt" : "trained on at this step"),
        pair.i ? h("span", { class: "chip same" }, "identical: no signal") : null,
        this.link ? h("a", { class: "link", href: this.link(index) }, "Link to this pair") : null, toggle),
      h("h4", {}, "Prompt"),
      h("pre", { class: "text prompt", tabindex: "0" }, pair.prompt),
      h("div", { class: "responses" },
        this.response("Chosen", "chosen", pair.chosen, marked(one, only[0], "ins"), pair.g[0]),
        this.response("Rejected", "rejected", pair.rejected, marked(other, only[1], "del"), pair.g[1])),
      h("dl", { class: "facts" },
        fact("margin", pair.m === undefined ? null : numberText(pair.m)),
        fact("loss", pair.l === undefined ? null : numberText(pair.l)),
        fact("log p chosen", change(pair.c, pair.cr)),
        fact("log p rejected", change(pair.j, pair.jr)),
        fact("tokens", `${pair.n[0]} prompt, ${pair.n[1]} chosen, ${pair.n[2]} rejected`),
        fact("regenerated", `${pair.g[0]} → ${pair.g[1]} tokens`),
        fact("buffer age", pair.a === undefined ? null : `${wholeText(pair.a)} steps`),
        fact("times drawn", pair.d === undefined ? null : wholeText(pair.d))),
      this.through(pair) || "");
  }

  response(title, kind, parts, segment, tokens) {
    const cut = (text, end) => (this.whole || text.length <= 120 ? text : end ? `…${text.slice(-120)}` : `${text.slice(0, 120)}…`);
    const empty = tokens === 0 ? h("span", { class: "nothing" }, "(nothing)") : null;
    return h("div", { class: `response ${kind}` },
      h("h4", {}, h("span", { class: `key ${kind}` }), title),
      h("pre", { class: "text", tabindex: "0" },
        h("span", { class: "around" }, cut(parts[0], true)),
        h("span", { class: "unseen" }, " [segment: "),
        h("mark", {}, segment, empty),
        h("span", { class: "unseen" }, " end of segment] "),
        h("span", { class: "around" }, cut(parts[2], false))));
  }

  // All kept versions of this reply of this row, by step.
  through(pair) {
    const same = this.pairs.filter((other) => other.r === pair.r && other.t === pair.t).sort((a, b) => a.s - b.s || a.index - b.index);
    if (same.length < 2) return null;
    const rows = same.map((other) => {
      const list = pieces(other.rejected[1]);
      const text = other.i ? [h("span", { class: "nothing" }, "the original")] : marked(list, differences(pieces(other.chosen[1]), list)[1], "del");
      const current = other.index === pair.index;
      return h("tr", { class: current ? "current" : "", "aria-current": current ? "true" : null },
        h("th", { scope: "row" }, h("button", { type: "button", class: "link", onclick: () => { this.show(other.index, true); this.detail.focus({ preventScroll: true }); } }, wholeText(other.s))),
        h("td", { class: "written" }, text),
        h("td", { class: "num" }, numberText(other.m)), h("td", { class: "num" }, numberText(other.c)), h("td", { class: "num" }, numberText(other.j)));
    });
    return h("div", { class: "through" },
      h("h4", {}, "The same prompt over the run"),
      pair.k === "f" ? h("p", { class: "hint" }, "The opponent regenerates the same segment with the same random numbers: only the opponent changes.") : null,
      h("div", { class: "scroll" }, h("table", { class: "numbers written-table" },
        h("thead", {}, h("tr", {}, ["step", "generated by the opponent", "margin", "log p chosen", "log p rejected"].map((name) => h("th", { scope: "col" }, name)))),
        h("tbody", {}, rows))));
  }
}
