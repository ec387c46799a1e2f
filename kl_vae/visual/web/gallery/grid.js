// The grid: only the cards in sight are in the page, so that the number of images costs nothing.

// a card shows original and reconstruction side by side, in a box twice as wide as high
const CARD = 250, GAP = 12, TEXT = 24;  // CSS pixels: least width, gap, height of a card's text
const TAIL = 10;  // letters of a name that are always shown
const cards = new Map();  // by place in the order

function sharedFolder() {
  // its length: cards leave out the folder that all images have in common
  let prefix = images.length > 1 ? images[0].name : "";
  for (const {name} of images) {
    while (!name.startsWith(prefix)) prefix = prefix.slice(0, -1);
  }
  return prefix.lastIndexOf("/") + 1;
}
const sharedLength = sharedFolder();

function layOut() {
  const room = byId("grid").clientWidth;
  const columns = Math.max(1, Math.floor((room + GAP) / (CARD + GAP)));
  const width = (room - GAP * (columns - 1)) / columns;
  return {columns, width, pitch: width / 2 + TEXT + GAP};
}

function drawGrid(anew = false) {
  const grid = byId("grid"), {columns, width, pitch} = layOut();
  grid.style.height = `${Math.ceil(order.length / columns) * pitch}px`;
  const top = -grid.getBoundingClientRect().top;
  const first = Math.max(0, Math.floor((top - innerHeight / 2) / pitch)) * columns;
  const end = Math.min(order.length, Math.ceil((top + innerHeight * 1.5) / pitch) * columns);
  cards.forEach((card, place) => {
    if (!anew && place >= first && place < end) return;
    card.remove();
    cards.delete(place);
  });
  let next = null;  // backwards, so that the order of the elements is that of the page
  for (let place = end - 1; place >= first; place--) {
    let card = cards.get(place);
    if (!card) {
      card = makeCard(place);
      cards.set(place, card);
      grid.insertBefore(card, next);
    }
    const left = (place % columns) * (width + GAP), y = Math.floor(place / columns) * pitch;
    Object.assign(card.style, {left: `${left}px`, top: `${y}px`, width: `${width}px`});
    next = card;
  }
}

function makeCard(place) {
  const index = order[place], {name, thumbnail} = images[index];
  const figure = cardFigure(images[index]);
  const image = element("img", {loading: "lazy", decoding: "async", alt: "", src: thumbnail});
  image.addEventListener("error", () => { image.alt = "This thumbnail cannot be loaded"; });
  const letters = [...name.slice(sharedLength)];
  const last = letters.length > TAIL + 3 ? TAIL : letters.length;
  const [start, tail] = [letters.slice(0, -last), letters.slice(-last)];
  const card = element("button", {className: "card", title: name},
    element("span", {className: "box"}, image),
    element("span", {className: "text"},
      element("span", {className: "number", textContent: figure}),
      element("span", {className: "name"},
        ...[start, tail].map((part) => element("span", {textContent: part.join("")})))));
  card.setAttribute("aria-label", `${name}, ${figure}, ${place + 1} of ${order.length}`);
  card.addEventListener("click", () => openViewer(index));
  card.addEventListener("keydown", (event) => moveFocus(event, place));
  for (const kind of ["pointerenter", "focus"]) {
    card.addEventListener(kind, () => markImage("plot", index));
  }
  for (const kind of ["pointerleave", "blur"]) {
    card.addEventListener(kind, () => markImage("plot", null));
  }
  return card;
}

function cardFigure({values, width, height}) {
  if (state.sort === "size") return `${width}\u00d7${height}`;
  return state.metric && `${metrics[state.metric].label} ${shown(state.metric, values[state.metric])}`;
}

function moveFocus(event, place) {
  const {columns} = layOut();
  const by = {ArrowLeft: -1, ArrowRight: 1, ArrowUp: -columns, ArrowDown: columns}[event.key];
  if (!by || !(place + by in order)) return;
  event.preventDefault();
  focusCard(place + by);
}

function focusCard(place) {
  const {columns, pitch} = layOut();
  const y = byId("grid").getBoundingClientRect().top + Math.floor(place / columns) * pitch;
  const above = byId("tools").offsetHeight + GAP;
  if (y < above || y + pitch > innerHeight) {
    scrollBy(0, y - Math.max(above, (innerHeight - pitch) / 2));
  }
  drawGrid();
  cards.get(place)?.focus({preventScroll: true});
}
