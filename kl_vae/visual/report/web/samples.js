// The pictures of validations, through time.

function addSamples({ images: pictures, runs }) {
  const steps = [...new Set(pictures.flatMap(({ steps }) => steps.map(Number)))];
  steps.sort((a, b) => a - b);
  if (!steps.length) return;
  byId("samples-section").hidden = false;
  const slider = byId("sample");
  slider.max = steps.length - 1;
  slider.value = steps.length - 1;
  if (runs) slider.parentElement.hidden = true; // these are the last of each run
  if (runs) byId("samples-hint").textContent = "the last of each run";

  const address = (picture, i) =>
    picture.content ? picture.content[i] : `${picture.base}${picture.steps[i]}.png`;
  const figures = pictures.map((picture) => {
    const image = element("img", { alt: picture.name });
    image.addEventListener("load", () => enlarge(image));
    const caption = element("figcaption", {}, picture.name);
    byId("samples").append(element("figure", { "data-name": picture.name }, caption, image));
    return { picture, image, caption, numbers: picture.steps.map(Number) };
  });

  const show = () => {
    const step = steps[Number(slider.value)];
    byId("sample-step").textContent = `step ${whole(step)}`;
    for (const { picture, image, caption, numbers } of figures) {
      const i = nearest(numbers, step);
      const at = numbers[i] === step && !runs ? "" : `, step ${whole(numbers[i])}`;
      caption.textContent = picture.name + at;
      image.alt = `${picture.name} at step ${numbers[i]}`;
      image.src = address(picture, i);
      if (i + 1 < numbers.length && !picture.content) new Image().src = address(picture, i + 1);
    }
  };
  slider.addEventListener("input", show);
  document.addEventListener("keydown", (event) => {
    const move = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    const typing = /^(INPUT|SELECT|TEXTAREA)$/.test(event.target.tagName);
    if (!move || typing || event.ctrlKey || event.metaKey || event.altKey) return;
    slider.value = Number(slider.value) + move;
    show();
    event.preventDefault();
  });
  show();
}

/** Show a small picture in whole multiples of its pixels. */
function enlarge(image) {
  const times = Math.max(1, Math.floor(560 / image.naturalWidth));
  image.width = image.naturalWidth * times;
  image.classList.toggle("large", times > 1);
}
