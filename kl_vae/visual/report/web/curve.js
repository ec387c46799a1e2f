// The shapes of a curve in a plot.

// A curve: {key, label, kind (its split) or color, second, steps, counts, mean, low, high, broken,
// latest, smooth}; low and high are the extremes of what a point is the mean of, broken [[index,
// number, kinds]] counts what was not finite, latest [step, value] is the last line.

/** The first index of the points in view, and the one after the last. */
function visible(curve, [from, to]) {
  let first = curve.steps.findIndex((step) => step >= from);
  if (first < 0) first = curve.steps.length;
  let last = curve.steps.length;
  while (last > first && curve.steps[last - 1] > to) last--;
  return [first, last];
}

/** A path through points, broken where there is none. */
function linePath(plot, steps, values, first, last) {
  let text = "";
  let pen = "M";
  for (let i = first; i < last; i++) {
    if (values[i] === null || (plot.log && values[i] <= 0)) {
      pen = "M";
      continue;
    }
    text += `${pen}${plot.x(steps[i]).toFixed(1)} ${plot.y(values[i]).toFixed(1)}`;
    pen = "L";
  }
  return text;
}

/** From the smallest to the largest of what the points are means of. */
function bandPath(plot, curve, first, last) {
  const floor = (x) => (plot.log && x <= 0 ? null : x);
  const upper = [];
  const lower = [];
  let text = "";
  const finish = () => {
    if (upper.length) text += `M${upper.concat(lower.reverse()).join("L")}Z`;
    upper.length = lower.length = 0;
  };
  for (let i = first; i < last; i++) {
    const [low, high] = [curve.low[i], curve.high[i]];
    if (low === null || floor(high) === null) {
      finish();
      continue;
    }
    const x = plot.x(curve.steps[i]).toFixed(1);
    upper.push(`${x} ${plot.y(high).toFixed(1)}`);
    lower.push(`${x} ${floor(low) === null ? plot.bottom : plot.y(low).toFixed(1)}`);
  }
  finish();
  return text;
}
