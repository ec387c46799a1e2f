// The address of the page, which holds its state after the #: a link opens the same again.

const OF_VIEWER = ["view", "gain", "split", "zoom", "x", "y"];
const NUMBERS = ["gain", "split", "x", "y"];
let timer = 0;

function address() {
  const kept = new URLSearchParams();
  for (const [key, value] of Object.entries(state)) {
    if (value === defaults[key] || (state.image === null && OF_VIEWER.includes(key))) continue;
    if (key === "metric" && state.sort in metrics) continue;
    if (state.zoom === "fit" && (key === "x" || key === "y")) continue;
    if (key === "image") kept.set(key, images[value].key);
    else kept.set(key, typeof value === "number" ? Number(value.toFixed(3)) : value);
  }
  return `#${kept}`;
}

function rememberSoon() {
  clearTimeout(timer);  // browsers refuse many changes of the address in a short time
  timer = setTimeout(() => history.replaceState(null, "", address()), 150);
}

function recall() {
  clearTimeout(timer);
  const given = new URLSearchParams(location.hash.slice(1));
  const oneOf = (key, values) => (values.includes(given.get(key)) ? given.get(key) : defaults[key]);
  const number = (key) => (given.get(key)?.trim() ? Number(given.get(key)) : NaN);
  Object.assign(state, defaults, {
    sort: oneOf("sort", [...data.metrics, "name", "size"]),
    metric: oneOf("metric", data.metrics),
    reversed: oneOf("reversed", ["yes"]),
    filter: given.get("filter") ?? "",
    view: oneOf("view", VIEWS),
    image: indexByKey.get(given.get("image")) ?? null,
  });
  if (state.sort in metrics) state.metric = state.sort;
  for (const key of ["low", "high"]) {
    if (Number.isFinite(number(key))) state[key] = given.get(key);
  }
  for (const key of NUMBERS) {
    if (Number.isFinite(number(key))) state[key] = number(key);
  }
  if (!GAINS.includes(state.gain)) state.gain = defaults.gain;
  state.split = Math.min(1, Math.max(0, state.split));
  if (number("zoom") > 0) {
    const zoom = Math.min(MAX_ZOOM, number("zoom"));
    state.zoom = zoom >= 1 ? Math.round(zoom) : zoom;
  }
  drawList();
  if (state.image === null && viewer.open) viewer.close();
}
