// Elements, and numbers as text.

function element(tag, properties = {}, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
}

function drawing(tag, attributes) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  return made;
}

function press(button, pressed) {
  button.setAttribute("aria-pressed", pressed);
}

function shown(metric, value) {
  if (value === null || Number.isNaN(value)) return "\u2013";
  if (!Number.isFinite(value)) return value > 0 ? "\u221e" : "\u2212\u221e";
  return value.toFixed(metrics[metric].digits) + metrics[metric].unit;
}

function counted(number) {
  return number.toLocaleString("en");
}
