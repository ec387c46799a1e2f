// What the reader has chosen, for all plots alike; kept in the address, so that a reload keeps it.

/** An element with attributes and children; text is never read as HTML. */
function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...children);
  return made;
}

function svgElement(tag, attributes = {}) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  return made;
}

const byId = (id) => document.getElementById(id);

class View {
  constructor(full) {
    this.full = full; // [first step, last step] of all values
    this.plots = [];
    this.cursor = null; // the step that is read
    this.waiting = false;
    const kept = new URLSearchParams(location.hash.slice(1));
    const number = (key, otherwise) => {
      const x = Number(kept.get(key));
      return kept.has(key) && Number.isFinite(x) ? x : otherwise;
    };
    this.smooth = Math.min(0.99, Math.max(0, number("smooth", 0.6)));
    this.outliers = kept.get("outliers") === "no";
    this.reload = kept.get("reload") === "yes";
    this.theme = kept.get("theme") || "";
    this.lines = kept.get("latents") === "lines";
    this.log = new Map(); // title -> whether, where the reader chose
    for (const title of kept.getAll("log")) this.log.set(title, true);
    for (const title of kept.getAll("linear")) this.log.set(title, false);
    const [from, to] = [number("from", null), number("to", null)];
    this.zoomed = from !== null && to !== null && to > from ? [from, to] : null;
  }

  get range() {
    return this.zoomed || this.full;
  }

  /** Write the choices into the address, and draw all plots. */
  change() {
    const kept = new URLSearchParams();
    if (this.smooth !== 0.6) kept.set("smooth", this.smooth);
    if (this.outliers) kept.set("outliers", "no");
    if (this.reload) kept.set("reload", "yes");
    if (this.theme) kept.set("theme", this.theme);
    if (this.lines) kept.set("latents", "lines");
    for (const [title, on] of this.log) kept.append(on ? "log" : "linear", title);
    if (this.zoomed) {
      kept.set("from", this.zoomed[0]);
      kept.set("to", this.zoomed[1]);
    }
    const text = kept.toString();
    history.replaceState(null, "", text ? `#${text}` : location.pathname + location.search);
    for (const plot of this.plots) plot.draw();
    this.showRange();
  }

  zoom(range) {
    this.zoomed = range;
    this.change();
  }

  showRange() {
    byId("range").textContent = this.zoomed
      ? `steps ${whole(Math.ceil(this.zoomed[0]))} to ${whole(Math.floor(this.zoomed[1]))}`
      : "";
    byId("reset").hidden = !this.zoomed;
  }

  /** Read all plots at a step; null: at the end. */
  point(step) {
    this.cursor = step;
    if (this.waiting) return;
    this.waiting = true;
    requestAnimationFrame(() => {
      this.waiting = false;
      byId("at").textContent = this.cursor === null ? "" : `step ${whole(this.cursor)}`;
      for (const plot of this.plots) plot.read(this.cursor);
    });
  }
}
