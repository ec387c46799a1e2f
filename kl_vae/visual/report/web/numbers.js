// Numbers as text, and the ticks of axes.

/** A figure for the eye: five digits; text (nan, inf) as it is. */
function shown(x, digits = 5) {
  if (x === null || x === undefined) return "–";
  if (typeof x === "string") return x;
  const size = Math.abs(x);
  if (Number.isInteger(x) && size < 1e6) return String(x);
  if (size >= 1e6 || size < 1e-3) return Number(x.toPrecision(digits - 1)).toExponential();
  return size >= 10 ** digits ? x.toFixed(0) : x.toPrecision(digits);
}

/** An integer with its thousands apart. */
function whole(x) {
  return typeof x === "number" ? x.toLocaleString("en-US") : String(x);
}

/** Such as 42 s, 3 min 05 s, 2 h 10 min or 3 d 4 h. */
function duration(seconds) {
  const two = (x) => String(Math.floor(x)).padStart(2, "0");
  const s = Math.max(0, Math.round(seconds));
  if (s < 60) return `${s} s`;
  if (s < 3600) return `${Math.floor(s / 60)} min ${two(s % 60)} s`;
  if (s < 86400) return `${Math.floor(s / 3600)} h ${two((s % 3600) / 60)} min`;
  return `${Math.floor(s / 86400)} d ${Math.floor((s % 86400) / 3600)} h`;
}

/** Round numbers 1, 2, 5 x 10^n in [low, high], about `number` of them. */
function linearTicks(low, high, number) {
  const rough = (high - low) / number;
  if (!(rough > 0)) return [low];
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].find((m) => m * power >= rough * 0.999) * power;
  const ticks = [];
  const first = Math.ceil(low / step - 1e-9);
  for (let i = first; i * step <= high + step * 1e-9 && ticks.length < 50; i++) {
    ticks.push(Number((i * step).toPrecision(12)));
  }
  return ticks;
}

/** Ticks of a logarithmic axis: powers of ten, with 2 and 5 where these are few. */
function logTicks(low, high, number) {
  const from = Math.floor(Math.log10(low));
  const to = Math.ceil(Math.log10(high));
  const every = Math.max(1, Math.ceil((to - from) / number));
  const decades = to - from <= 2 ? [1, 2, 5] : to - from <= 4 ? [1, 3] : [1];
  const ticks = [];
  for (let i = from; i <= to; i += every) {
    for (const m of decades) ticks.push(Number((m * 10 ** i).toPrecision(3)));
  }
  const inside = ticks.filter((x) => x >= low * 0.999 && x <= high * 1.001);
  return inside.length >= 2 ? inside : linearTicks(low, high, number);
}

/** The text of a tick: 1200 -> 1.2k, 0.00003 -> 3e-5. */
function tickText(x) {
  const size = Math.abs(x);
  if (size === 0) return "0";
  const short = (y) => String(Number(y.toPrecision(6)));
  if (size >= 1e15 || size < 1e-3) return short(x).includes("e") ? short(x) : exponent(x);
  if (size >= 1e9) return `${short(x / 1e9)}G`;
  if (size >= 1e6) return `${short(x / 1e6)}M`;
  if (size >= 1e4) return `${short(x / 1e3)}k`;
  return short(x);
}

function exponent(x) {
  return x.toExponential().replace("e+", "e");
}

/** Exponential moving average, without bias to its start; gaps stay gaps. */
function smoothed(values, decay) {
  let sum = 0;
  let weight = 0;
  return values.map((x) => {
    if (x === null) return null;
    sum = decay * sum + (1 - decay) * x;
    weight = decay * weight + (1 - decay);
    return sum / weight;
  });
}

/** The index of the number nearest to x in ascending numbers; -1 of none. */
function nearest(numbers, x) {
  let low = 0;
  let high = numbers.length - 1;
  while (high - low > 1) {
    const middle = (low + high) >> 1;
    if (numbers[middle] <= x) low = middle;
    else high = middle;
  }
  if (high < 0) return -1;
  return Math.abs(numbers[high] - x) < Math.abs(numbers[low] - x) ? high : low;
}
