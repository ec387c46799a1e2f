// Curves over steps, with their values at the pointer below.

class Plot extends Frame {
  constructor(panel, curves, view) {
    super(panel.title, panel.unit, view);
    this.curves = curves;
    this.panel = panel;
    this.root.dataset.title = `${panel.title} ${panel.unit}`.trim();
    this.name = this.root.dataset.title;
    this.button = element("button", { title: "logarithmic scale" }, "log");
    this.button.addEventListener("click", () => {
      view.log.set(this.name, !this.log);
      view.change();
    });
    this.header.append(this.button);
    this.numbers = new Map();
    const readout = element("div", { class: "readout" });
    if (panel.quietLegend) {
      this.summary = element("span", { class: "number" });
      readout.append(element("span"), element("span", { class: "label" }, "channels"), this.summary);
    } else {
      for (const curve of curves) {
        const number = element("span", { class: "number", "data-key": curve.key });
        const label = element("span", { class: "label", title: curve.key }, curve.label);
        readout.append(this.swatch(curve), label, number);
        this.numbers.set(curve, number);
      }
    }
    this.root.append(readout);
  }

  get log() {
    const chosen = this.view.log.get(this.name);
    return chosen === undefined ? this.panel.log : chosen;
  }

  swatch(curve) {
    const svg = svgElement("svg", { class: "swatch", viewBox: "0 0 18 8" });
    const line = { class: this.classes("line", curve), x1: 0, x2: 18, y1: 4, y2: 4 };
    svg.append(svgElement("line", line));
    return svg;
  }

  classes(name, curve) {
    return `${name} ${curve.color ? "thin" : curve.kind}${curve.second ? " second" : ""}`;
  }

  draw() {
    this.clear();
    this.button.setAttribute("aria-pressed", this.log);
    this.setScale();
    this.drawStepAxis();
    this.svg.append(this.inside, this.marks);
    // later curves lie on top: values of training first
    for (const curve of this.curves) this.drawCurve(curve);
    this.read(this.view.cursor);
  }

  setScale() {
    let values = [];
    for (const curve of this.curves) {
      const [first, last] = visible(curve, this.view.range);
      for (const list of [curve.mean, curve.low, curve.high]) {
        if (list) for (let i = first; i < last; i++) if (list[i] !== null) values.push(list[i]);
      }
    }
    if (this.log) values = values.filter((x) => x > 0);
    values.sort((a, b) => a - b);
    if (this.view.outliers && values.length > 20) {
      const rest = Math.floor(values.length * 0.02);
      values = values.slice(rest, values.length - rest);
    }
    let low = values.length ? values[0] : this.log ? 0.1 : 0;
    let high = values.length ? values[values.length - 1] : 1;
    const to = this.log ? Math.log10 : (x) => x;
    const back = this.log ? (x) => 10 ** x : (x) => x;
    let pad = (to(high) - to(low)) * 0.05;
    if (!(pad > 0)) pad = this.log ? 0.1 : Math.abs(high) * 0.1 || 0.1;
    [low, high] = [to(low) - pad, to(high) + pad];
    const height = this.bottom - MARGIN.top;
    this.y = (x) => this.bottom - ((to(x) - low) / (high - low)) * height;
    const ticks = this.log ? logTicks(back(low), back(high), 6) : linearTicks(low, high, 4);
    let above = Infinity;
    for (const tick of ticks) {
      const y = this.y(tick);
      if (above - y < 13) continue;
      above = y;
      this.drawValueTick(y, tickText(tick));
    }
  }

  drawCurve(curve) {
    let [first, last] = visible(curve, this.view.range);
    const number = last - first;
    first = Math.max(0, first - 1);
    last = Math.min(curve.steps.length, last + 1);
    const add = (tag, name, attributes) => {
      const made = svgElement(tag, { class: this.classes(name, curve), ...attributes });
      if (curve.color) made.style.setProperty("--color", curve.color);
      this.inside.append(made);
      return made;
    };
    if (curve.low) add("path", "band", { d: bandPath(this, curve, first, last) });
    const smooth = curve.smooth && this.view.smooth > 0;
    curve.smoothed = smooth ? smoothed(curve.mean, this.view.smooth) : null;
    const line = smooth ? curve.smoothed : curve.mean;
    if (smooth) add("path", "raw", { d: linePath(this, curve.steps, curve.mean, first, last) });
    add("path", "line", { d: linePath(this, curve.steps, line, first, last), "data-key": curve.key });
    const sparse = smooth || curve.kind !== "train" ? 40 : 2; // a validation's points are to be seen
    if (number <= sparse && !curve.color) {
      for (let i = first; i < last; i++) {
        const value = curve.mean[i];
        if (value === null || (this.log && value <= 0)) continue;
        const at = { cx: this.x(curve.steps[i]), cy: this.y(value), r: smooth ? 2 : 2.5 };
        add("circle", smooth ? "dot raw" : "dot", at);
      }
    }
    for (const [i, number, kinds] of curve.broken || []) {
      const x = this.x(curve.steps[i]);
      const top = MARGIN.top;
      const shape = { class: "broken", d: `M${x - 4} ${top}h8l-4 7z` };
      const mark = svgElement("path", { ...shape, "data-key": curve.key });
      const title = svgElement("title");
      title.textContent = `${curve.key}, step ${curve.steps[i]}: ${number} x ${kinds}`;
      mark.append(title);
      this.inside.append(mark);
    }
  }

  /** The step of a point that is nearest to a step. */
  nearestStep(step) {
    let best = null;
    for (const { steps } of this.curves) {
      const i = nearest(steps, step);
      if (i < 0) continue;
      if (best === null || Math.abs(steps[i] - step) < Math.abs(best - step)) best = steps[i];
    }
    return best === null ? Math.round(step) : best;
  }

  /** Show the values at a step; null: the last. */
  read(step) {
    if (!this.y) return;
    this.drawCursor(step);
    const values = [];
    for (const curve of this.curves) {
      const i = step === null ? curve.steps.length - 1 : nearest(curve.steps, step);
      if (i < 0) continue;
      values.push(curve.mean[i]);
      const number = this.numbers.get(curve);
      if (!number) continue;
      number.replaceChildren(...this.readPoint(curve, i, step));
      if (step !== null) this.mark(curve, i);
    }
    if (this.summary) {
      const finite = values.filter((x) => x !== null);
      const [low, high] = [Math.min(...finite), Math.max(...finite)];
      this.summary.textContent = `${shown(low)} … ${shown(high)}`;
    }
  }

  readPoint(curve, i, step) {
    const extra = (text) => element("span", { class: "extra" }, text);
    const parts = [];
    if (step === null && curve.latest) {
      const [at, value] = curve.latest;
      return [element("span", { class: "value", "data-step": at }, shown(value))];
    }
    const broken = (curve.broken || []).find(([index]) => index === i);
    if (step !== null && curve.steps[i] !== step) parts.push(extra(`at ${whole(curve.steps[i])}  `));
    if (broken) {
      const number = curve.counts ? `${broken[1]} x ` : "";
      parts.push(element("span", { class: "wrong" }, `${number}${broken[2]}  `));
    }
    if (step !== null && curve.counts && curve.low[i] < curve.high[i]) {
      parts.push(extra(`${shown(curve.low[i], 3)} … ${shown(curve.high[i], 3)}  `));
    }
    if (curve.mean[i] !== null) {
      const value = { class: "value", "data-step": curve.steps[i] };
      parts.push(element("span", value, shown(curve.mean[i])));
    }
    return parts;
  }

  mark(curve, i) {
    const value = curve.smoothed ? curve.smoothed[i] : curve.mean[i];
    const [from, to] = this.view.range;
    const step = curve.steps[i];
    if (value === null || (this.log && value <= 0) || step < from || step > to) return;
    const at = { cx: this.x(step), cy: this.y(value), r: 3.5 };
    this.marks.append(svgElement("circle", { class: this.classes("at", curve), ...at }));
  }
}
