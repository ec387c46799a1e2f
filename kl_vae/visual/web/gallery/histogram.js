// The distribution of a metric over the pictures whose names match.

const BINS = 60;  // at most
const FOOT = {plot: 17, "small-plot": 7};  // room below the bars: for the ends of the axis, the mark
const plots = new Map();  // what was drawn, by the id of its svg

function makeBins(values) {
  // edges at round numbers, so that a bar filters to a range that can be said
  let low = Infinity, high = -Infinity;
  for (const value of values) {
    low = Math.min(low, value);
    high = Math.max(high, value);
  }
  const least = (high - low) / BINS || 10 ** -4;
  const power = 10 ** Math.floor(Math.log10(least));
  const step = power * [1, 2, 2.5, 5, 10].find((factor) => factor * power >= least * 0.999);
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
  const bar = svg.width.baseVal.value / counts.length, most = Math.max(...counts);
  const base = svg.height.baseVal.value - FOOT[id];
  counts.forEach((count, i) => {
    const height = count && Math.max(1, (count / most) * (base - 1));
    const within = !(low !== "" && edge(i) < Number(low)) && !(high !== "" && edge(i + 1) > Number(high));
    const chosen = within && (low !== "" || high !== "") ? "chosen" : "";
    const width = Math.max(bar - 1, 1);
    svg.append(drawing("rect", {x: i * bar, y: base - height, width, height, class: chosen}));
  });
  svg.append(drawing("path", {class: "axis", d: `M0,${base}.5h${bar * counts.length}`}));
  if (id === "plot") {
    for (const [i, anchor] of [[0, "start"], [counts.length, "end"]]) {
      const text = drawing("text", {x: i * bar, y: base + 14, "text-anchor": anchor});
      text.textContent = edge(i);
      svg.append(text);
    }
  }
  const text = `Distribution of ${metrics[metric].label} over ${counted(values.length)} pictures`;
  svg.setAttribute("aria-label", text);
  plots.set(id, {edge, binOf, counts, bar, base});
}

function markPicture(id, index) {
  const plot = plots.get(id), svg = byId(id);
  svg.querySelector(".mark")?.remove();
  const value = pictures[index]?.values[state.metric];
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
