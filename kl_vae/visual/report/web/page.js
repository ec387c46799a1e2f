// Put the page together from its content.

const content = JSON.parse(byId("content").textContent);
const runs = content.runs || [content]; // a page of several runs draws each in a colour

/** The class of a run's colour. */
function colorOf(i) {
  return `run${i % 8}${i < 8 ? "" : " dashed"}`;
}

/** A series as the plot draws it. */
function curveOf(key, panel, names, { scalars, axes }) {
  let series = scalars[key];
  let times = (list) => list;
  if (series.of) {
    const { factor } = series; // of another series, in another unit
    series = scalars[series.of];
    times = (list) => list && list.map((x) => (x === null ? null : x * factor));
  }
  const axis = axes[series.axis];
  const split = ["train", "val", "val_ema"].find((name) => key.startsWith(`${name}/`));
  const name = split ? key.slice(split.length + 1) : key;
  if (!names.includes(name)) names.push(name);
  return {
    ...{ key, name, kind: split || "train", second: names.indexOf(name) > 0 },
    ...{ steps: axis.steps, counts: axis.counts, broken: series.broken },
    ...{ mean: times(series.mean), low: times(series.low), high: times(series.high) },
    latest: scalars[key].latest,
    smooth: panel.smooth && (!split || split === "train"), // a validation is of all its images
  };
}

function addPlots(view) {
  for (const panel of content.panels) {
    const names = [];
    const curves = runs.flatMap((run, i) =>
      panel.keys.filter((key) => key in run.scalars).map((key) => {
        const curve = curveOf(key, panel, names, run);
        if (!content.runs) return curve;
        return { ...curve, key: `${run.name}: ${key}`, label: run.name, kind: colorOf(i) };
      }));
    for (const curve of curves) curve.label ??= names.length > 1 ? curve.name : curve.kind;
    byId("plots").append(new Plot(panel, curves, view).root);
  }
  if (content.runs) return;
  for (const [key, value] of content.constants) {
    const text = element("span", {}, `${key} `, element("b", {}, shown(value)));
    byId("constants").append(text);
  }
  if (content.constants.length) byId("constants").prepend(element("span", {}, "never changed:"));
  byId("constants").hidden = !content.constants.length;
}

/** Tables with a column per run. */
function addTables() {
  for (const [place, title, rows] of content.tables) {
    if (!rows.length) continue;
    const table = element("table", { class: "numbers" });
    const heads = runs.map(({ name }, i) => element("th", { class: `name ${colorOf(i)}` }, name));
    table.append(element("tr", {}, element("th", {}, title), ...heads));
    for (const [label, ...cells] of rows) {
      const line = cells.map((text) => element("td", {}, text));
      table.append(element("tr", {}, element("th", {}, label), ...line));
    }
    byId(place).append(element("div", { class: "scroll" }, table));
  }
  byId("differences-section").hidden = !byId("differences").children.length;
  byId("config-section").hidden = true;
}

/** Each vector as a heat map and as lines, of which one is shown. */
function addLatents(view) {
  byId("latents-section").hidden = !content.vectors.length;
  const maps = [];
  const lines = [];
  for (const vector of content.vectors) {
    const { steps } = content.axes[vector.axis];
    maps.push(new HeatMap(vector, steps, view));
    const number = vector.values[0].length;
    const curves = Array.from({ length: number }, (_, channel) => ({
      ...{ key: `${vector.key}/${channel}`, label: String(channel), steps, smooth: false },
      mean: vector.values.map((values) => values[channel]),
      color: `hsl(${Math.round((360 * channel) / number)} 60% 50%)`,
    }));
    const panel = { title: vector.key, unit: "", log: false, quietLegend: true };
    lines.push(new Plot(panel, curves, view));
  }
  const show = () => {
    const shownNow = view.lines ? lines : maps;
    view.plots = view.plots.filter((plot) => !maps.includes(plot) && !lines.includes(plot));
    view.plots.push(...shownNow);
    byId("latents").replaceChildren(...shownNow.map(({ root }) => root));
    byId("as-map").setAttribute("aria-pressed", !view.lines);
    byId("as-lines").setAttribute("aria-pressed", view.lines);
  };
  const choose = (asLines) => {
    view.lines = asLines;
    show();
    view.change();
  };
  byId("as-map").addEventListener("click", () => choose(false));
  byId("as-lines").addEventListener("click", () => choose(true));
  show();
}

function addToolbar(view) {
  const smooth = byId("smooth");
  const showSmooth = () => {
    byId("smooth-value").textContent = view.smooth.toFixed(2);
  };
  smooth.value = view.smooth;
  smooth.addEventListener("input", () => {
    view.smooth = Number(smooth.value);
    showSmooth();
    view.change();
  });
  showSmooth();
  byId("outliers").checked = view.outliers;
  byId("outliers").addEventListener("change", (event) => {
    view.outliers = event.target.checked;
    view.change();
  });
  for (const [id, on] of [["log-all", true], ["log-none", false]]) {
    byId(id).addEventListener("click", () => {
      for (const plot of view.plots) if (plot.name) view.log.set(plot.name, on);
      view.change();
    });
  }
  byId("reset").addEventListener("click", () => view.zoom(null));
  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape" && view.zoomed) view.zoom(null);
  });
  byId("reload-label").hidden = content.run.state !== "running";
  byId("reload").checked = view.reload;
  let timer = null;
  const plan = () => {
    clearTimeout(timer);
    const wanted = view.reload && content.run.state === "running";
    timer = wanted ? setTimeout(() => location.reload(), 60000) : null;
  };
  byId("reload").addEventListener("change", (event) => {
    view.reload = event.target.checked;
    view.change();
    plan();
  });
  plan();
}

function addTheme(view) {
  const system = matchMedia("(prefers-color-scheme: dark)");
  const show = () => {
    const dark = view.theme ? view.theme === "dark" : system.matches;
    document.documentElement.classList.toggle("dark", dark);
  };
  const theme = byId("theme");
  theme.value = ["light", "dark"].includes(view.theme) ? view.theme : "";
  theme.addEventListener("change", () => {
    view.theme = theme.value;
    show();
    view.change();
  });
  system.addEventListener("change", show);
  show();
}

const used = runs.flatMap(({ axes }) => axes.flatMap(({ steps }) => steps));
const first = used.reduce((a, b) => Math.min(a, b), Infinity);
const last = used.reduce((a, b) => Math.max(a, b), 0);
const view = new View(used.length ? [Math.min(first, last - 1), last] : [0, 1]);
addTheme(view);
addHead(content);
if (content.runs) addTables();
else addFacts(content);
byId("empty").hidden = content.panels.length > 0;
byId("toolbar").hidden = !content.panels.length;
addPlots(view);
addSamples(content);
if (!content.runs) {
  addLatents(view);
  addBadImages(content);
  addConfig(content.config);
}
addToolbar(view);
view.showRange();

let width = 0;
new ResizeObserver(() => {
  if (document.body.clientWidth === width) return;
  width = document.body.clientWidth;
  for (const plot of view.plots) plot.draw();
}).observe(document.body);
