// The frame of a plot: axes, the cursor, and zooming; what is in it is drawn by who extends it.

const MARGIN = { left: 54, right: 10, top: 8, bottom: 20 };
const HEIGHT = 190;
let clips = 0;

class Frame {
  constructor(title, unit, view) {
    this.view = view;
    this.title = title;
    this.svg = svgElement("svg", { role: "img", "aria-label": title });
    this.heading = element("h3", {}, title);
    this.header = element("header", {}, this.heading, element("span", { class: "unit" }, unit));
    this.root = element("section", { class: "plot" }, this.header, this.svg);
    this.clip = `clip-${clips++}`;
    this.listen();
    view.plots.push(this);
  }

  /** Empty the image, and set the scale of steps. */
  clear() {
    this.width = Math.max(160, this.svg.clientWidth || 400);
    this.right = this.width - MARGIN.right;
    this.bottom = HEIGHT - MARGIN.bottom;
    this.svg.replaceChildren();
    this.svg.setAttribute("viewBox", `0 0 ${this.width} ${HEIGHT}`);
    const inside = {
      ...{ x: MARGIN.left, y: MARGIN.top, width: this.right - MARGIN.left },
      height: this.bottom - MARGIN.top,
    };
    const clip = svgElement("clipPath", { id: this.clip });
    clip.append(svgElement("rect", inside));
    this.inside = svgElement("g", { "clip-path": `url(#${this.clip})` });
    this.marks = svgElement("g");
    this.svg.append(clip);
    const [from, to] = this.view.range;
    const span = to - from || 1;
    this.x = (step) => MARGIN.left + ((step - from) / span) * (this.right - MARGIN.left);
    this.step = (x) => from + ((x - MARGIN.left) / (this.right - MARGIN.left)) * span;
  }

  drawStepAxis() {
    const [from, to] = this.view.range;
    const number = Math.max(2, Math.floor((this.right - MARGIN.left) / 75));
    for (const step of linearTicks(from, to, number)) {
      if (!Number.isInteger(step)) continue;
      const x = this.x(step);
      const line = { class: "gridline", x1: x, x2: x, y1: MARGIN.top, y2: this.bottom };
      const end = x > this.right - 12 ? "end" : "middle";
      const text = svgElement("text", { x, y: HEIGHT - 5, "text-anchor": end });
      text.textContent = tickText(step);
      this.svg.append(svgElement("line", line), text);
    }
    const axis = { class: "axis", x1: MARGIN.left, x2: this.right, y1: this.bottom, y2: this.bottom };
    this.svg.append(svgElement("line", axis));
  }

  drawValueTick(y, label, line = true) {
    if (line) {
      const ends = { x1: MARGIN.left, x2: this.right, y1: y, y2: y };
      this.svg.append(svgElement("line", { class: "gridline", ...ends }));
    }
    const text = svgElement("text", { x: MARGIN.left - 6, y: y + 3.5, "text-anchor": "end" });
    text.textContent = label;
    this.svg.append(text);
  }

  /** The vertical line at a step, if it is in view. */
  drawCursor(step) {
    this.marks.replaceChildren();
    const [from, to] = this.view.range;
    if (step === null || step < from || step > to) return;
    const x = this.x(step);
    const ends = { x1: x, x2: x, y1: MARGIN.top, y2: this.bottom };
    this.marks.append(svgElement("line", { class: "cursor", ...ends }));
  }

  listen() {
    let start = null; // x where a drag began
    const place = (event) => {
      const x = event.clientX - this.svg.getBoundingClientRect().left;
      return Math.min(this.right, Math.max(MARGIN.left, x));
    };
    this.svg.addEventListener("pointerdown", (event) => {
      if (event.button !== 0 || event.pointerType === "touch") return;
      start = place(event);
      this.svg.setPointerCapture(event.pointerId);
    });
    this.svg.addEventListener("pointermove", (event) => {
      const x = place(event);
      this.pointer = event.clientY - this.svg.getBoundingClientRect().top;
      this.view.point(this.nearestStep(this.step(x)));
      if (start === null) return;
      if (!this.selection) this.selection = svgElement("rect", { class: "selection" });
      const shape = { x: Math.min(x, start), width: Math.abs(x - start) };
      Object.assign(shape, { y: MARGIN.top, height: this.bottom - MARGIN.top });
      for (const [key, value] of Object.entries(shape)) this.selection.setAttribute(key, value);
      this.svg.append(this.selection);
    });
    const end = (event) => {
      const from = start;
      start = null;
      if (this.selection) this.selection.remove();
      if (from === null || event.type !== "pointerup") return;
      const steps = [from, place(event)].sort((a, b) => a - b).map((x) => this.step(x));
      if (Math.abs(place(event) - from) > 4 && steps[1] > steps[0]) this.view.zoom(steps);
    };
    this.svg.addEventListener("pointerup", end);
    this.svg.addEventListener("pointercancel", end);
    this.svg.addEventListener("pointerleave", () => {
      this.pointer = undefined;
      if (start === null) this.view.point(null);
    });
    this.svg.addEventListener("dblclick", () => this.view.zoom(null));
  }
}
