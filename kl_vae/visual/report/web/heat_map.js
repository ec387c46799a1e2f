// A figure with a value a latent channel: a row a channel, over steps.

// red, white and blue for what is about a middle; dark to light for the rest
const DIVERGING = [[33, 82, 160], [110, 166, 215], [244, 244, 242], [226, 143, 106], [165, 32, 38]];
const SEQUENTIAL = [[36, 18, 77], [83, 40, 125], [163, 62, 110], [224, 110, 72], [250, 214, 120]];

function colorAt(colors, share) {
  const place = Math.min(1, Math.max(0, share)) * (colors.length - 1);
  const i = Math.min(colors.length - 2, Math.floor(place));
  const mixed = colors[i].map((x, c) => Math.round(x + (colors[i + 1][c] - x) * (place - i)));
  return `rgb(${mixed.join(",")})`;
}

class HeatMap extends Frame {
  constructor(vector, steps, view) {
    super(vector.key, "", view);
    this.values = vector.values; // [points][channels]
    this.steps = steps;
    this.channels = vector.values[0].length;
    this.root.dataset.key = vector.key;
    this.diverging = vector.key.endsWith("mean");
    const flat = vector.values.flat();
    let low = flat.reduce((a, b) => Math.min(a, b), Infinity);
    let high = flat.reduce((a, b) => Math.max(a, b), -Infinity);
    if (this.diverging) {
      high = Math.max(Math.abs(low), Math.abs(high)) || 1;
      low = -high;
    }
    this.scale = (x) => (high > low ? (x - low) / (high - low) : 0.5);
    this.colors = this.diverging ? DIVERGING : SEQUENTIAL;
    this.number = element("span", { class: "number" });
    const ends = [low, high].map((x) => element("span", { class: "dim" }, shown(x, 3)));
    this.root.append(
      element("div", { class: "scale" }, ends[0], this.gradient(), ends[1], this.number),
    );
  }

  gradient() {
    const canvas = element("canvas", { width: 90, height: 1 });
    const pen = canvas.getContext("2d");
    for (let i = 0; i < 90; i++) {
      pen.fillStyle = colorAt(this.colors, i / 89);
      pen.fillRect(i, 0, 1, 1);
    }
    return canvas;
  }

  draw() {
    this.clear();
    this.drawStepAxis();
    const height = this.bottom - MARGIN.top;
    this.row = height / this.channels;
    for (const channel of linearTicks(0, this.channels - 1, 5)) {
      if (!Number.isInteger(channel)) continue;
      this.drawValueTick(MARGIN.top + (channel + 0.5) * this.row, String(channel), false);
    }
    this.svg.append(this.inside, this.marks);
    const shape = { x: MARGIN.left, y: MARGIN.top, width: this.right - MARGIN.left, height };
    const image = svgElement("image", { ...shape, preserveAspectRatio: "none" });
    image.setAttribute("href", this.paint(shape.width, height));
    this.inside.append(image);
    this.read(this.view.cursor);
  }

  /** Where the column of a point begins: half way from the one before. */
  edge(i) {
    const { steps } = this;
    if (i === 0) return this.view.full[0];
    return i === steps.length ? steps[i - 1] : (steps[i - 1] + steps[i]) / 2;
  }

  paint(width, height) {
    const canvas = element("canvas", { width: Math.round(width), height: Math.round(height) });
    const pen = canvas.getContext("2d");
    this.steps.forEach((_, i) => {
      const left = Math.round(this.x(this.edge(i)) - MARGIN.left);
      const right = Math.round(this.x(this.edge(i + 1)) - MARGIN.left);
      if (right < 0 || left > width) return;
      for (let channel = 0; channel < this.channels; channel++) {
        const top = Math.round(channel * this.row);
        const bottom = Math.round((channel + 1) * this.row);
        pen.fillStyle = colorAt(this.colors, this.scale(this.values[i][channel]));
        pen.fillRect(left, top, Math.max(1, right - left), bottom - top);
      }
    });
    return canvas.toDataURL();
  }

  nearestStep(step) {
    return this.steps[nearest(this.steps, step)];
  }

  /** Show the value that is pointed at; of other plots' steps the range over the channels. */
  read(step) {
    if (!this.row) return;
    this.drawCursor(step);
    const i = step === null ? this.steps.length - 1 : nearest(this.steps, step);
    const values = this.values[i];
    if (step !== null && this.pointer !== undefined) {
      const channel = Math.floor((this.pointer - MARGIN.top) / this.row);
      const inside = Math.min(this.channels - 1, Math.max(0, channel));
      this.number.textContent = `channel ${inside}  ${shown(values[inside])}`;
      return;
    }
    this.number.textContent = `${shown(Math.min(...values), 4)} … ${shown(Math.max(...values), 4)}`;
  }
}
