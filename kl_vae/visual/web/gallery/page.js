// Keys and buttons, and the start.

const VIEWER_KEYS = {
  ArrowRight: () => step(1), ArrowDown: () => step(1),
  ArrowLeft: () => step(-1), ArrowUp: () => step(-1),
  Home: () => step(-order.length), End: () => step(order.length),
  s: () => changeView({view: "slider"}), b: () => changeView({view: "side"}),
  d: () => changeView({view: "difference"}), t: () => changeView({view: "toggle"}),
  f: zoomToFit, 1: () => zoomTo(1), 8: () => zoomTo(8),
  "+": () => zoomBy(1), "=": () => zoomBy(1), "-": () => zoomBy(-1),
  "[": () => changeGain(-1), "]": () => changeGain(1),
  " ": () => hold(true), "?": () => help.showModal(),
};
const LIST_KEYS = {"/": () => byId("filter").focus(), "?": () => help.showModal()};

function pressed(event) {
  const {key, target} = event;
  if (event.ctrlKey || event.metaKey || event.altKey || help.open) return;
  if (target.matches?.("select, input:not([type=range])")) return;
  if (target.type === "range" && key.length > 1) return;  // arrows move it
  if (key === " " && target.matches?.("button")) return;
  const keys = viewer.open ? VIEWER_KEYS : LIST_KEYS;
  const action = keys[key.length === 1 ? key.toLowerCase() : key];
  if (!action) return;
  event.preventDefault();
  action();
}

function on(id, kind, action) {
  byId(id).addEventListener(kind, action);
}

function connectList() {
  on("sort", "change", () => chooseSort(byId("sort").value));
  on("direction", "click", () => changeList({reversed: state.reversed ? "" : "yes"}));
  for (const id of ["filter", "low", "high"]) {
    on(id, "input", () => changeList({[id]: byId(id).value}));
  }
  on("clear", "click", () => changeList({filter: "", low: "", high: ""}));
  let drawn = 0;
  addEventListener("scroll", () => {
    cancelAnimationFrame(drawn);
    drawn = requestAnimationFrame(() => drawGrid());
  }, {passive: true});
}

function connectViewer() {
  on("back", "click", () => viewer.close());
  on("viewer", "close", closeViewer);
  on("next", "click", () => step(1));
  on("previous", "click", () => step(-1));
  on("zoom-in", "click", () => zoomBy(1));
  on("zoom-out", "click", () => zoomBy(-1));
  on("split", "input", () => changeView({split: Number(byId("split").value)}));
  on("gain", "change", () => changeView({gain: Number(byId("gain").value)}));
  on("hold", "pointerdown", () => hold(true));
  on("hold", "keydown", ({key}) => { if (key === " ") hold(true); });
  for (const kind of ["pointerup", "pointercancel", "blur"]) addEventListener(kind, () => hold(false));
  for (const {dataset: {view}} of byId("views").children) {
    document.querySelector(`[data-view=${view}]`).addEventListener("click", () => changeView({view}));
  }
  for (const button of document.querySelectorAll("[data-zoom]")) {
    const {zoom} = button.dataset;
    button.addEventListener("click", () => (zoom === "fit" ? zoomToFit() : zoomTo(Number(zoom))));
  }
  // after a click the keys are the viewer's again; who moves by keys keeps the focus
  on("viewer", "click", (event) => { if (event.detail) event.target.closest("button")?.blur(); });
  on("gain", "change", () => byId("gain").blur());
  on("split", "pointerup", () => byId("split").blur());
}

drawOnce();
connectPlot();
connectList();
connectStage();
connectViewer();
for (const button of document.querySelectorAll(".ask")) {
  button.addEventListener("click", () => help.showModal());
}
addEventListener("keydown", pressed);
addEventListener("keyup", ({key}) => { if (key === " ") hold(false); });
addEventListener("resize", () => { drawHistogram("plot"); drawGrid(); place(); });
addEventListener("hashchange", recall);
recall();
