// Main script: reads the data, stores the reader's settings, and polls the server of a live page.

(function () {
  let data = JSON.parse(byId("data").textContent);
  const several = () => data.runs.length > 1;
  const announce = (text) => { byId("chart-value").textContent = text; };
  const hidden = new Set();

  function memory(key, value) {
    // Storage may be unavailable for a page opened from a file.
    try {
      if (value === undefined) return localStorage.getItem(`sapo-${key}`);
      localStorage.setItem(`sapo-${key}`, value);
    } catch (error) {
      if (!(error instanceof DOMException)) throw error;
    }
    return null;
  }

  const theme = byId("theme");
  const setTheme = (value) => { document.documentElement.dataset.theme = value; theme.value = value; };
  setTheme(memory("theme") || "auto");
  theme.addEventListener("change", () => { setTheme(theme.value); memory("theme", theme.value); });

  const board = new ChartBoard(byId("chart-grid"), data.charts, data.runs, announce);
  const slider = byId("smoothing");
  const setSmoothing = (value) => { slider.value = value; board.smoothing = Number(value); byId("smoothing-value").textContent = Number(value).toFixed(2); board.draw(); };
  slider.addEventListener("input", () => setSmoothing(slider.value));
  const axis = byId("axis");
  axis.addEventListener("change", () => { board.axis = axis.value; board.draw(); });
  const possible = () => {
    for (const option of axis.options) {
      option.disabled = option.value !== "step" && !data.runs.every((run) => run.train.axes && run.train.axes[option.value]);
    }
  };
  possible();
  const log = byId("log");
  log.addEventListener("change", () => { board.log = log.checked; board.draw(); });
  const [from, to, reset] = [byId("zoom-from"), byId("zoom-to"), byId("zoom-reset")];
  board.onzoom = () => { from.value = Math.round(board.from); to.value = Math.round(board.to); reset.disabled = !board.zoomed; };
  const typed = () => board.zoom(Number(from.value.replace(/\D/g, "")), Number(to.value.replace(/\D/g, "")) || board.most);
  for (const input of [from, to]) input.addEventListener("change", () => { typed(); board.onzoom(); });
  reset.addEventListener("click", () => board.zoom(board.least, board.most));
  const noisy = data.runs.some((run) => run.train.steps.length > 80);
  board.onzoom();
  setSmoothing(noisy ? 0.6 : 0);

  const browser = new PairBrowser(byId("pairs-body"), announce);
  const options = new OptionTable(byId("options-body"), byId("options-controls"), data.runs);
  let pairRun = 0;
  browser.link = (index) => `#pair=${pairRun}.${index}`;
  const linked = () => {
    const found = /^#pair=(\d+)\.(\d+)$/.exec(location.hash);
    if (!found || !data.runs[found[1]]) return;
    if (Number(found[1]) !== pairRun) { pairRun = Number(found[1]); draw(); }
    if (!browser.pairs[found[2]]) return;
    browser.show(Number(found[2]), true);
    byId("pairs").scrollIntoView();
  };

  function draw() {
    const names = data.runs.map((run) => run.name).join(", ");
    byId("title").textContent = names;
    document.title = `${names} – SAPO report`;
    byId("summary-body").replaceChildren(...data.runs.map((run, index) => summaryOf(run, index, several())));
    byId("environment-body").replaceChildren(...data.runs.map((run, index) => environmentOf(run, index, several())));
    const written = new Date(data.written);
    byId("written").textContent = `Written ${written.toISOString().slice(0, 16).replace("T", " ")} UTC from ${data.runs.map((run) => run.path).join(", ")}.`;
    switches();
    const select = several() ? h("label", {}, "Of run ", h("select", { onchange: (event) => { pairRun = Number(event.target.value); browser.setRun(data.runs[pairRun]); } },
      data.runs.map((run, index) => h("option", { value: index, selected: index === pairRun }, run.name)))) : "";
    byId("pairs-run").replaceChildren(select);
    browser.setRun(data.runs[pairRun]);
  }

  function switches() {
    const place = byId("run-switches");
    place.hidden = !several();
    if (!several()) return;
    place.replaceChildren(...data.runs.map((run, index) => {
      const box = h("input", { type: "checkbox", onchange: () => {
        if (box.checked) hidden.delete(index); else hidden.add(index);
        board.setRuns(data.runs, shown());
      } });
      box.checked = !hidden.has(index);
      return h("label", {}, box, h("span", { class: `key r${(index % 8) + 1}` }), run.name);
    }));
  }

  const shown = () => data.runs.map((_, index) => index).filter((index) => !hidden.has(index));

  document.addEventListener("keydown", (event) => {
    const typing = ["INPUT", "SELECT", "TEXTAREA"].includes(event.target.tagName);
    if (event.key === "/" && !typing && browser.search) {
      event.preventDefault();
      browser.search.focus();
    } else if (event.key === "Escape" && event.target === browser.search) {
      browser.list.focus();
    }
  });

  draw();
  linked();
  addEventListener("hashchange", linked);
  document.documentElement.dataset.ready = "true";

  if (document.documentElement.dataset.live === "true") {
    const live = byId("live");
    const mark = (text, on) => { live.hidden = false; live.textContent = text; live.classList.toggle("on", on); };
    const going = () => data.runs.some((run) => !run.ended);
    mark(going() ? "live" : "ended", going());
    const look = async () => {
      try {
        const answer = await fetch("data.json", { cache: "no-store" });
        const text = await answer.text();
        const news = JSON.parse(text);
        if (news.version !== data.version) {
          data = news;
          board.setRuns(data.runs, shown());
          options.setRuns(data.runs);
          possible();
          draw();
        }
        mark(going() ? "live" : "ended", going());
        byId("written").classList.remove("lost");
      } catch (error) {
        byId("written").textContent = "The server no longer responds; this page shows the last data received.";
        byId("written").classList.add("lost");
        mark("no connection", false);
      }
    };
    setInterval(look, 3000);
  }
})();
