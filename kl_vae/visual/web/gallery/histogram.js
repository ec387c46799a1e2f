// The distribution of a metric over the images whose names match.

const BINS = [5, 40];  // at least and at most, where values differ
const FOOT = {plot: 17, "small-plot": 7};  // room below the bars: for the ends of the axis, the mark
const plots = new Map();  // what was drawn, by the id of its svg

/** The width of a bin: Freedman and Diaconis 1981, or Sturges where half of the values agree. */
function binWidth(sorted) {
  const number = sorted.length, range = sorted[number - 1] - sorted[0];
  if (!range) return 1;
  const quartiles = [0.25, 0.75].map((share) => sorted[Math.floor(share * (number - 1))]);
  const spread = quartiles[1] - quartiles[0];
  const rule = spread ? 2 * spread / Math.cbrt(number) : range / (Math.log2(number) + 1);
  const wanted = Math.min(range / BINS[0], Math.max(range / BINS[1], rule));
  const power = 10 ** Math.floor(Math.log10(wanted));
  // the round number nearest to it; they are so dense that one of them has so many bins
  const bins = (step) => Math.floor(sorted[number - 1] / step) - Math.floor(sorted[0] / step) + 1;
  const miss = (step) => Math.abs(Math.log(step / wanted));
  return [0.5, 1, 2, 2.5, 5, 10, 20].map((factor) => factor * power)
    .filter((step) => bins(step) >= BINS[0] && bins(step) <= BINS[1])
    .reduce((best, step) => (miss(step) < miss(best) ? step : best));
}

function makeBins(values) {
  // edges at round numbers, so that a bar filters to a range that can be said
  const sorted = [...values].sort((a, b) => a - b);
  const low = sorted[0], high = sorted[sorted.length - 1], step = binWidth(sorted);
  const start = Math.floor(low / step);
  const edge = (i) => Number(((start + i) * step).toPrecision(10));
  const binOf = (value) => {
    const i = Math.floor(value / step) - start;  // may miss by one: the quotient is rounded
    return value < edge(i) ? i - 1 : value >= edge(i + 1) ? i + 1 : i;
  };
  const counts = new Array(Math.max(binOf(high), 0) + 1).fill(0);
  for (const value of values) counts[Math.max(binOf(value), 0)] += 1;
  return {edge, binOf, counts};
}

function drawHistogram(id) {
  const {metric, low, high} = state, svg = byId(id);
  const values = metric ? finite(matching, metric) : [];
  svg.replaceChildren();
  plots.delete(id);
  if (!values.length) return;
  const {edge, binOf, counts} = makeBins(values);
  const width = svg.clientWidth || svg.width.baseVal.value;  // 0 of a dialog that is closed
  const bar = width / counts.length, most = Math.max(...counts);
  const base = svg.height.baseVal.value - FOOT[id];
  counts.forEach((count, i) => {
    const height = count && Math.max(1, (count / most) * (base - 1));
    const within = !(low !== "" && edge(i) < Number(low)) && !(high !== "" && edge(i + 1) > Number(high));
    const chosen = within && (low !== "" || high !== "") ? "chosen" : "";
    const place = {x: i * bar, y: base - height, width: Math.max(bar - 1, 1), height};
    svg.append(drawing("rect", {...place, class: chosen}));
  });
  svg.append(drawing("path", {class: "axis", d: `M0,${base}.5h${bar * counts.length}`}));
  if (id === "plot") {
    for (const [i, anchor] of [[0, "start"], [counts.length, "end"]]) {
      const text = drawing("text", {x: i * bar, y: base + 14, "text-anchor": anchor});
      text.textContent = edge(i);
      svg.append(text);
    }
  }
  const text = `Distribution of ${metrics[metric].label} over ${counted(values.length)} images`;
  svg.setAttribute("aria-label", text);
  plots.set(id, {edge, binOf, counts, bar, base});
}

function markImage(id, index) {
  const plot = plots.get(id), svg = byId(id);
  svg.querySelector(".mark")?.remove();
  const value = images[index]?.values[state.metric];
  if (!plot || !Number.isFinite(value)) return;
  const {edge, binOf, bar, base} = plot, i = binOf(value);
  const x = (i + (value - edge(i)) / (edge(i + 1) - edge(i))) * bar;
  svg.append(drawing("path", {class: "mark", d: `M${x - 4},${base + 7}h8l-4,-7zM${x - 0.5},0h1v${base}h-1z`}));
}

function connectPlot() {
  // a bar is chosen by its whole column, however low it is; dragging chooses several
  const svg = byId("plot");
  let from = null, before = "";
  const range = () => `${state.low} ${state.high}`;
  const barAt = (event, {bar, counts}) => {
    const i = Math.floor((event.clientX - svg.getBoundingClientRect().left) / bar);
    return Math.min(counts.length - 1, Math.max(0, i));
  };
  const choose = (i, {edge}) => {
    changeList({low: String(edge(Math.min(i, from))), high: String(edge(Math.max(i, from) + 1))});
  };
  svg.addEventListener("pointerdown", (event) => {
    const plot = plots.get("plot");
    if (!plot || event.button) return;
    svg.setPointerCapture(event.pointerId);
    before = range();
    from = barAt(event, plot);
    choose(from, plot);
  });
  svg.addEventListener("pointermove", (event) => {
    const plot = plots.get("plot");
    if (!plot) return;
    const i = barAt(event, plot);
    byId("plot-text").textContent = `${plot.edge(i)} to ${plot.edge(i + 1)}: ${counted(plot.counts[i])}`;
    if (from !== null) choose(i, plot);
  });
  svg.addEventListener("pointerup", () => {
    if (from !== null && before === range()) changeList({low: "", high: ""});  // chosen twice
    from = null;
  });
  svg.addEventListener("pointercancel", () => { from = null; });
  svg.addEventListener("pointerleave", () => { byId("plot-text").textContent = ""; });
}
