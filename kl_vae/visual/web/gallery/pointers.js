// Mouse, pen and fingers on the stage: the line is dragged by itself, and anywhere while the
// image is wholly in sight; else the image is. Two fingers or the wheel zoom.

const pointers = new Map();  // the last event of each pointer that is down

function fromMiddle({clientX, clientY}) {
  // of the box that the pointer is over
  const areas = boxes.map((box) => box.getBoundingClientRect());
  const area = areas.find(({left, right}) => clientX >= left && clientX < right) ?? areas[0];
  return [clientX - area.left - area.width / 2, clientY - area.top - area.height / 2];
}

function pinch() {
  const [a, b] = pointers.values();
  const length = Math.hypot(a.clientX - b.clientX, a.clientY - b.clientY) || 1;
  return {length, clientX: (a.clientX + b.clientX) / 2, clientY: (a.clientY + b.clientY) / 2};
}

function moveLine({clientX}) {
  const [from, to] = lineEnds, x = clientX - stage.getBoundingClientRect().left;
  state.split = Math.min(1, Math.max(0, (x - from) / (to - from)));
  placeLine(from, to);
  rememberSoon();
}

function moveImage(before, {clientX, clientY}) {
  const scale = zoomNow() / devicePixelRatio;
  state.x -= (clientX - before.clientX) / scale;
  state.y -= (clientY - before.clientY) / scale;
  place();
  rememberSoon();
}

function connectStage() {
  let withLine = false;
  let wanted = 1, wheelEnd = 0;  // the zoom before it was rounded: small steps add up
  stage.addEventListener("pointerdown", (event) => {
    if (event.button || visible === null) return;
    stage.setPointerCapture(event.pointerId);
    pointers.set(event.pointerId, event);
    wanted = zoomNow();
    const free = event.target === byId("handle") || zoomNow() <= fitting();
    withLine = state.view === "slider" && free && pointers.size === 1;
    if (withLine) moveLine(event);
  });
  stage.addEventListener("pointermove", (event) => {
    const before = pointers.get(event.pointerId);
    if (!before) return;
    const span = pointers.size === 2 ? pinch().length : 0;
    pointers.set(event.pointerId, event);
    if (span) {
      const now = pinch();
      wanted = limited(wanted * now.length / span);
      zoomTo(wanted, ...fromMiddle(now));
    } else if (withLine) {
      moveLine(event);
    } else {
      moveImage(before, event);
    }
  });
  for (const kind of ["pointerup", "pointercancel"]) {
    stage.addEventListener(kind, (event) => {
      pointers.delete(event.pointerId);
      withLine = false;
    });
  }
  stage.addEventListener("wheel", (event) => {
    event.preventDefault();
    if (visible === null) return;
    if (event.timeStamp > wheelEnd) wanted = zoomNow();
    wheelEnd = event.timeStamp + 300;
    // lines to pixels; a pinch on a touchpad is a wheel with Ctrl, in smaller steps
    const pixels = event.deltaY * (event.deltaMode === 1 ? 30 : 1) * (event.ctrlKey ? 5 : 1);
    wanted = limited(wanted * Math.exp(-pixels / 300));
    zoomTo(wanted, ...fromMiddle(event));
  }, {passive: false});
  stage.addEventListener("dblclick", (event) => {
    if (state.zoom === "fit") zoomTo(8, ...fromMiddle(event));
    else zoomToFit();
  });
}
