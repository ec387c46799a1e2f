// The data of the page: an image is known by its index; `order` is what the page lists.

const KNOWN = {
  psnr: {label: "PSNR", unit: " dB", digits: 2},
  ssim: {label: "SSIM"},
  lpips: {label: "LPIPS", lowIsGood: true},
};
const LOW_IS_GOOD = ["mse", "rmse", "mae", "l1", "dists"];

const byId = (id) => document.getElementById(id);
const data = JSON.parse(byId("data").textContent);
const metrics = Object.fromEntries(data.metrics.map((name) => [
  name, {label: name, unit: "", digits: 4, lowIsGood: LOW_IS_GOOD.includes(name), ...KNOWN[name]},
]));

const indexByKey = new Map();
const images = data.images.map((row, index) => {
  const [name, original, reconstruction, thumbnail, width, height, ...numbers] = row;
  let key = name;
  while (indexByKey.has(key)) key += "'";  // what links say; a name may be there twice
  indexByKey.set(key, index);
  const values = {size: width * height};
  data.metrics.forEach((metric, i) => {
    values[metric] = numbers[i] === null ? null : Number(numbers[i]);  // Number: of "Infinity"
  });
  return {name, key, original, reconstruction, thumbnail, width, height, values};
});

// names are compared once: sorting by them is sorting by rank
const collator = new Intl.Collator("en", {numeric: true});
images.map((_, index) => index)
  .sort((i, k) => collator.compare(images[i].name, images[k].name) || i - k)
  .forEach((index, rank) => { images[index].values.name = rank; });

const defaults = {
  sort: data.metrics[0] ?? "name", metric: data.metrics[0] ?? "", reversed: "",
  filter: "", low: "", high: "",
  image: null, view: "slider", gain: 8, split: 0.5, zoom: "fit", x: null, y: null,
};
const state = {...defaults};
let order = [];     // indices, filtered and sorted
let matching = [];  // indices, filtered by name alone: those of the histogram

function arrange() {
  const {sort, metric, low, high} = state;
  const part = state.filter.toLowerCase();
  matching = images.map((_, index) => index)
    .filter((index) => images[index].name.toLowerCase().includes(part));
  order = matching.filter((index) => {
    const value = images[index].values[metric];
    if (low === "" && high === "") return true;
    return value !== null && !(low !== "" && value < Number(low)) && !(high !== "" && value >= Number(high));
  });
  const descending = sort === "size" || metrics[sort]?.lowIsGood;  // the worst first, by default
  const sign = Boolean(descending) === Boolean(state.reversed) ? 1 : -1;
  order.sort((i, k) => {
    const a = images[i].values[sort], b = images[k].values[sort];
    if (a === null || b === null) return (a === null) - (b === null) || i - k;  // without: last
    return a === b ? i - k : sign * (a < b ? -1 : 1);
  });
}

function finite(indices, metric) {
  return indices.map((index) => images[index].values[metric]).filter(Number.isFinite);
}
