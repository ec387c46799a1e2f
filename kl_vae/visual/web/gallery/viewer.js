// The viewer: two layers, one over the other or beside it, and how they are shown together.

const GAINS = [1, 2, 4, 8, 16, 32];
const VIEWS = ["slider", "side", "difference", "toggle"];
const KINDS = ["original", "reconstruction"];
const [stage, layers, viewer, help] = ["stage", "layers", "viewer", "help"].map(byId);
const loaded = new Map();  // by index: the images in view and those beside them in the order
let held = false;          // the original is shown for as long as a key is down

function load(index) {
  if (!loaded.has(index)) {
    const {name} = images[index];
    const drawn = KINDS.map((kind) =>
      element("img", {src: images[index][kind], alt: `${kind} of ${name}`, draggable: false}));
    const ready = Promise.allSettled(drawn.map((img) => img.decode()));
    loaded.set(index, {drawn, ready});
  }
  return loaded.get(index);
}

async function showImage(index) {
  stage.classList.add("waiting");
  const {drawn, ready} = load(index);
  const lost = (await ready).map(({status}) => status === "rejected");
  if (state.image !== index) return;
  visible = index;
  boxes.forEach((box, i) => box.replaceChildren(...(lost[i] ? [] : [drawn[i]])));
  byId("note").hidden = !lost.includes(true);
  byId("note").textContent = KINDS.filter((_, i) => lost[i])
    .map((kind) => `The ${kind} cannot be loaded: ${readable(images[index][kind])}`).join("\n");
  stage.classList.toggle("incomplete", lost.includes(true));
  stage.classList.remove("waiting");
  place();
  const at = order.indexOf(index);
  const near = [index, order[at + 1], order[at - 1], order[at + 2]].filter((i) => i !== undefined);
  near.forEach(load);
  loaded.forEach((_, i) => { if (!near.includes(i)) loaded.delete(i); });
}

function readable(url) {
  try { return decodeURIComponent(url); } catch { return url; }  // bytes that are not UTF-8
}

function drawViewer() {
  const {image, view, gain} = state, {name, width, height, values} = images[image];
  if (!viewer.open) viewer.showModal();
  const at = order.indexOf(image);
  byId("caption").textContent = byId("caption").title = name;
  byId("position").textContent = at < 0 ? "not listed" : `${counted(at + 1)} / ${counted(order.length)}`;
  byId("previous").disabled = at <= 0;
  byId("next").disabled = at < 0 || at === order.length - 1;
  byId("values").replaceChildren(
    ...data.metrics.map((metric) => labelled(metrics[metric].label, shown(metric, values[metric]))),
    labelled("Size", `${width}\u00d7${height}`));
  markImage("small-plot", image);
  for (const button of byId("views").children) press(button, button.dataset.view === view);
  for (const each of document.querySelectorAll(".of")) each.hidden = !each.classList.contains(view);
  byId("gain").value = gain;
  layers.style.setProperty("--gain", gain);
  drawView();
  if (visible !== image) showImage(image);
}

function labelled(label, text) {
  return element("span", {}, element("span", {className: "quiet", textContent: `${label} `}),
    element("span", {className: "number", textContent: text}));
}

function drawView() {
  const view = held ? "toggle" : state.view;
  for (const each of VIEWS) stage.classList.toggle(each, each === view);
  stage.classList.toggle("held", held);
  byId("handle").hidden = view !== "slider";
  const [left, right] = {
    slider: KINDS,
    side: KINDS,
    difference: [`|original \u2212 reconstruction| \u00d7 ${state.gain}`, ""],
    toggle: [KINDS[held ? 0 : 1], ""],
  }[view];
  byId("left-tag").textContent = left;
  byId("right-tag").textContent = right;
  byId("right-tag").hidden = !right;
  place();
}

function changeView(changes) {
  Object.assign(state, changes);
  if (state.image !== null) drawViewer();
  rememberSoon();
}

function openViewer(index) {
  state.image = index;
  drawViewer();
  history.pushState(null, "", address());  // so that the browser's Back leads to the list
}

function closeViewer() {
  const at = order.indexOf(state.image);
  Object.assign(state, {image: null, zoom: "fit", x: null, y: null});
  visible = null;
  held = false;
  boxes.forEach((box) => box.replaceChildren());
  if (at >= 0) focusCard(at);
  rememberSoon();
}

function step(by) {
  const at = order.indexOf(state.image);
  const next = Math.min(order.length - 1, Math.max(0, at + by));
  if (at >= 0 && next !== at) changeView({image: order[next]});
}

function hold(down) {
  if (held === down || state.image === null || state.view === "side") return;
  held = down;
  drawView();
}

function changeGain(by) {
  const gain = GAINS[GAINS.indexOf(state.gain) + by];
  if (state.view === "difference" && gain) changeView({gain});
}
