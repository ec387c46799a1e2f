// Place and zoom of the two images, which are the same for both. A zoom of 8 makes a pixel of a
// image 8 pixels of the screen; above 1 it is whole, so that all pixels are as large. state.x
// and state.y are the point of the image in the middle of its box, in pixels of the image.

const MAX_ZOOM = 64;
const boxes = [byId("original"), byId("reconstruction")];
let visible = null;      // index of the image in the boxes
let lineEnds = [0, 1];   // of the line's way over the stage, in CSS pixels

const toScreen = (length) => Math.round(length * devicePixelRatio) / devicePixelRatio;

function fitting() {
  const {width, height} = images[visible ?? state.image];
  const box = boxes[0].getBoundingClientRect();
  const zoom = Math.min(box.width / width, box.height / height) * devicePixelRatio;
  return zoom >= 1 ? Math.min(MAX_ZOOM, Math.floor(zoom)) : zoom;
}

function zoomNow() {
  return state.zoom === "fit" ? fitting() : state.zoom;
}

function limited(zoom) {
  return Math.min(MAX_ZOOM, Math.max(Math.min(1, fitting()), zoom));
}

function place() {
  if (visible === null || !viewer.open) return;
  const {width, height} = images[visible], box = boxes[0].getBoundingClientRect();
  const zoom = zoomNow(), scale = zoom / devicePixelRatio;  // CSS pixels a pixel of the image
  const left = startOf("x", width, box.width / scale) * scale;
  const top = startOf("y", height, box.height / scale) * scale;
  const [x, y] = [toScreen(left), toScreen(top)];
  for (const image of layers.querySelectorAll("img")) {
    const size = {width: `${width * scale}px`, height: `${height * scale}px`};
    Object.assign(image.style, {left: `${x}px`, top: `${y}px`, ...size});
  }
  layers.classList.toggle("pixelated", zoom >= 1);
  byId("zoom").textContent = zoom >= 1 ? `${zoom}\u00d7` : `${(zoom * 100).toFixed(0)}%`;
  for (const button of document.querySelectorAll("[data-zoom]")) {
    press(button, button.dataset.zoom === String(state.zoom));
  }
  placeLine(Math.max(0, x), Math.min(box.width, x + width * scale));
}

function startOf(key, length, room) {
  // an image smaller than its box is in its middle, another leaves none of it empty
  const half = room / 2, middle = state[key] ?? length / 2;
  state[key] = length <= room ? length / 2 : Math.min(length - half, Math.max(half, middle));
  return half - state[key];
}

function placeLine(from, to) {
  lineEnds = [from, to];
  const x = toScreen(from + state.split * (to - from));
  byId("handle").style.left = `${x}px`;
  byId("split").value = state.split;
  boxes[1].style.clipPath = stage.classList.contains("slider") ? `inset(0 0 0 ${x}px)` : "";
}

function zoomTo(zoom, dx = 0, dy = 0) {
  // dx, dy: from the middle of the box, in CSS pixels, to the point that stays where it is
  if (visible === null) return;
  const before = zoomNow() / devicePixelRatio, wanted = limited(zoom);
  state.zoom = wanted >= 1 ? Math.round(wanted) : wanted;
  const after = state.zoom / devicePixelRatio;
  state.x += dx / before - dx / after;
  state.y += dy / before - dy / after;
  place();
  rememberSoon();
}

function zoomBy(direction) {
  const now = Math.log2(zoomNow());  // to the next power of two
  zoomTo(2 ** (direction > 0 ? Math.floor(now) + 1 : Math.ceil(now) - 1));
}

function zoomToFit() {
  state.zoom = "fit";
  place();
  rememberSoon();
}
