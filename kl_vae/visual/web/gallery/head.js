// The head of the page: what was done, the values of what is listed, the order and the filter.

function drawOnce() {
  for (const [name, value] of Object.entries(data.about)) {
    byId("about").append(element("dt", {textContent: name}), element("dd", {textContent: value}));
  }
  for (const value of [...data.metrics, "name", "size"]) {
    byId("sort").append(element("option", {value, textContent: metrics[value]?.label ?? value}));
  }
  for (const value of GAINS) {
    byId("gain").append(element("option", {value, textContent: `\u00d7 ${value}`}));
  }
}

function drawSummary() {
  const all = order.length === images.length ? "" : ` of ${counted(images.length)}`;
  const count = `${counted(order.length)}${all} image${images.length === 1 ? "" : "s"}`;
  byId("count").textContent = count;
  byId("none").hidden = order.length > 0;
  byId("hint").hidden = !order.length;
  byId("none").textContent = images.length ? "No image has this name and metric." : "There are no images.";
  const heads = ["metric", "mean", "median", "worst", "best", "left out"];
  const head = element("tr", {}, ...heads.map((textContent) => element("th", {textContent})));
  const rows = data.metrics.length ? [head, ...data.metrics.map(summaryRow)] : [];
  byId("summary").replaceChildren(element("caption", {textContent: count}), ...rows);
}

function summaryRow(metric) {
  const {label, lowIsGood} = metrics[metric];
  const values = finite(order, metric).sort((a, b) => a - b), half = values.length >> 1;
  const mean = values.reduce((sum, value) => sum + value, 0) / values.length;
  const median = values.length % 2 ? values[half] : (values[half - 1] + values[half]) / 2;
  const ends = [values[0] ?? null, values.at(-1) ?? null];
  const [worst, best] = lowIsGood ? ends.reverse() : ends;
  const infinite = order.filter((i) => Math.abs(images[i].values[metric]) === Infinity).length;
  const without = order.length - values.length - infinite;
  const rest = [infinite && `${counted(infinite)} at \u221e`, without && `${counted(without)} without`];
  const button = element("button", {textContent: label, title: "Sort by it, and show its distribution"});
  press(button, metric === state.metric);
  button.addEventListener("click", () => {
    chooseSort(metric);
    byId("summary").querySelector("[aria-pressed=true]").focus();  // the table was made anew
  });
  return element("tr", {}, element("td", {}, button),
    ...[mean, median, worst, best].map((value) =>
      element("td", {className: "number", textContent: shown(metric, value)})),
    element("td", {className: "number quiet", title: "not in the mean, nor in the rest of the row",
      textContent: rest.filter(Boolean).join(", ")}));
}

function drawTools() {
  const {sort, metric, reversed} = state;
  const directions = {name: ["A\u2013Z", "Z\u2013A"], size: ["largest first", "smallest first"]};
  const direction = directions[sort] ?? ["worst first", "best first"];
  byId("direction").textContent = direction[reversed ? 1 : 0];
  for (const id of ["sort", "filter", "low", "high"]) {
    if (byId(id).value !== state[id]) byId(id).value = state[id];  // else the cursor would move
  }
  byId("range").hidden = byId("distribution").hidden = !metric;
  const {label = "", unit = ""} = metrics[metric] ?? {};
  byId("range-name").textContent = label;
  byId("plot-name").textContent = label + (unit && ` in${unit}`);
  byId("clear").hidden = !(state.filter || state.low || state.high);
}

function drawList() {
  arrange();
  drawSummary();
  drawTools();
  drawHistogram("plot");
  drawHistogram("small-plot");
  drawGrid(true);
  if (state.image !== null) drawViewer();
}

function changeList(changes) {
  Object.assign(state, changes);
  drawList();
  rememberSoon();
}

function chooseSort(sort) {
  // a range is one of a metric, and means nothing of another
  const other = sort in metrics && sort !== state.metric ? {metric: sort, low: "", high: ""} : {};
  changeList({sort, reversed: "", ...other});
}
