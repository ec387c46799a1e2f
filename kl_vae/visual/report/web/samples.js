// The images of validations, through time.

function addSamples({ images, runs }) {
  const steps = [...new Set(images.flatMap(({ steps }) => steps.map(Number)))];
  steps.sort((a, b) => a - b);
  if (!steps.length) return;
  byId("samples-section").hidden = false;
  const slider = byId("sample");
  slider.max = steps.length - 1;
  slider.value = steps.length - 1;
  if (runs) slider.parentElement.hidden = true; // these are the last of each run
  if (runs) byId("samples-hint").textContent = "the last of each run";

  const address = (sample, i) =>
    sample.content ? sample.content[i] : `${sample.base}${sample.steps[i]}.png`;
  const figures = images.map((sample) => {
    const image = element("img", { alt: sample.name });
    image.addEventListener("load", () => enlarge(image));
    const caption = element("figcaption", {}, sample.name);
    byId("samples").append(element("figure", { "data-name": sample.name }, caption, image));
    return { sample, image, caption, numbers: sample.steps.map(Number) };
  });

  const show = () => {
    const step = steps[Number(slider.value)];
    byId("sample-step").textContent = `step ${whole(step)}`;
    for (const { sample, image, caption, numbers } of figures) {
      const i = nearest(numbers, step);
      const at = numbers[i] === step && !runs ? "" : `, step ${whole(numbers[i])}`;
      caption.textContent = sample.name + at;
      image.alt = `${sample.name} at step ${numbers[i]}`;
      image.src = address(sample, i);
      if (i + 1 < numbers.length && !sample.content) new Image().src = address(sample, i + 1);
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

/** Show a small image in whole multiples of its pixels. */
function enlarge(image) {
  const times = Math.max(1, Math.floor(560 / image.naturalWidth));
  image.width = image.naturalWidth * times;
  image.classList.toggle("large", times > 1);
}
