// The head of the page: what the run is doing, its last metrics; and its config.

function addHead({ run }) {
  byId("name").textContent = run.name;
  byId("state").textContent = run.state;
  byId("state").className = run.state;
  byId("made").textContent = `Written ${localTime(new Date(run.made * 1000))} by kl-vae ` +
    `${run.version} from ${whole(run.lines)} lines of metrics.jsonl.`;
}

function addFacts(content) {
  const { run } = content;
  byId("path").textContent = run.path;
  byId("progress").hidden = !run.total_steps;
  if (run.total_steps) byId("progress").value = run.step / run.total_steps;
  byId("remark").textContent = run.remark;
  byId("remark").hidden = !run.remark;
  byId("remark").classList.toggle("bad", run.state === "failed" || run.state === "lost");
  for (const note of run.notes) byId("notes").append(element("li", {}, note));

  const list = byId("facts");
  const fact = (name, ...parts) => {
    const place = element("dd", {}, ...parts);
    list.append(element("dt", {}, name), place);
    return place;
  };
  const share = run.total_steps ? ` (${((100 * run.step) / run.total_steps).toFixed(1)} %)` : "";
  const total = run.total_steps ? ` of ${whole(run.total_steps)}` : "";
  fact("step", `${whole(run.step)}${total}${share}`);
  if (typeof run.last.epoch === "number") fact("epochs", run.last.epoch.toFixed(2));
  if (typeof run.last.images_seen === "number") fact("images seen", whole(run.last.images_seen));
  if (run.speed !== null) {
    const steps = typeof run.batch === "number" ? `, ${shown(run.speed / run.batch, 4)} steps/s` : "";
    fact("throughput", `${shown(run.speed, 4)} images/s${steps}`);
  }
  if (run.seconds_left !== null) {
    const end = new Date((run.made + run.seconds_left) * 1000);
    const about = `${duration(run.seconds_left)} without validations, until ${localTime(end)}`;
    fact("time left", about);
  }
  if (run.written !== null) {
    const place = fact("wrote last");
    const show = () => {
      const age = run.state === "running" ? ` (${duration(Date.now() / 1000 - run.written)} ago)` : "";
      place.textContent = localTime(new Date(run.written * 1000)) + age;
    };
    show();
    if (run.state === "running") setInterval(show, 1000);
  }
  fact("best", ...bestOf(run));
  if (run.number_checkpoints) {
    const [name, size] = run.checkpoints[0];
    const megabytes = `${shown(size / 1e6, 3)} MB`;
    fact("checkpoints", `${run.number_checkpoints}, newest ${name}, ${megabytes}`);
  } else fact("checkpoints", "none yet");
  const { skipped_steps: skipped, skipped_by_scaler: scaler } = run.last;
  const byScaler = scaler ? `, ${whole(scaler)} by the gradient scaler` : "";
  fact("steps left out", `${whole(skipped || 0)}${byScaler}`);
  fact("bad images", whole(run.number_bad));
  addLatest(content);
}

function bestOf({ best, checkpoints, number_checkpoints: number }) {
  if (!best.monitor) return ["none yet"];
  const kept = number > checkpoints.length || checkpoints.some(([name]) => name === best.checkpoint);
  const where = kept ? best.checkpoint : `${best.checkpoint}, which is gone`;
  return [`${best.monitor} ${shown(best.value)} at step ${whole(best.step)}, ${where}`];
}

function localTime(date) {
  const two = (x) => String(x).padStart(2, "0");
  const day = `${date.getFullYear()}-${two(date.getMonth() + 1)}-${two(date.getDate())}`;
  return `${day} ${two(date.getHours())}:${two(date.getMinutes())}:${two(date.getSeconds())}`;
}

/** The last values: one row per name, one column per split. */
function addLatest({ scalars, constants }) {
  const left = new Set(constants.map(([key]) => key));
  const rows = new Map();
  const splits = ["train", "val", "val_ema"];
  for (const [key, series] of Object.entries(scalars)) {
    const split = splits.find((name) => key.startsWith(`${name}/`));
    if (!split || left.has(key)) continue;
    const name = key.slice(split.length + 1);
    if (!rows.has(name)) rows.set(name, {});
    rows.get(name)[split] = series.latest;
  }
  const used = splits.filter((split) => [...rows.values()].some((row) => row[split]));
  if (!used.length) return;
  const table = byId("latest");
  const head = element("tr", {}, element("th", {}, "last values"));
  for (const split of used) head.append(element("th", {}, split));
  table.append(head);
  for (const [name, row] of [...rows].slice(0, 14)) {
    const line = element("tr", {}, element("th", {}, name));
    for (const split of used) {
      const text = row[split] ? shown(row[split][1]) : "";
      line.append(element("td", row[split] ? { title: `step ${row[split][0]}` } : {}, text));
    }
    table.append(line);
  }
}

function addBadImages({ run }) {
  if (!run.number_bad) return;
  byId("bad-section").hidden = false;
  const listed = run.bad_images.length < run.number_bad ? `, the first ${run.bad_images.length}` : "";
  byId("bad-number").textContent = whole(run.number_bad) + listed;
  for (const [name, reason] of run.bad_images) {
    byId("bad").append(element("tr", {}, element("td", {}, name), element("td", {}, reason)));
  }
}

/** The config; a search leaves the lines that match, and the keys that these stand under. */
function addConfig(text) {
  const lines = text.split("\n");
  const show = () => {
    const wanted = byId("search").value.trim().toLowerCase();
    const chosen = new Map(); // line -> whether it matches
    const above = []; // the keys that a line stands under
    lines.forEach((line, i) => {
      if (!line.trim()) return;
      const indent = line.search(/\S/);
      while (above.length && above[above.length - 1][0] >= indent) above.pop();
      above.push([indent, i]);
      if (wanted && !line.toLowerCase().includes(wanted)) return;
      for (const [, other] of above) if (!chosen.has(other)) chosen.set(other, false);
      chosen.set(i, true);
    });
    const parts = [];
    let found = 0;
    for (const [i, matches] of [...chosen].sort((a, b) => a[0] - b[0])) {
      found += matches;
      if (wanted) parts.push(matches ? marked(lines[i], wanted) : context(lines[i]), "\n");
      else parts.push(lines[i], "\n");
    }
    byId("config").replaceChildren(...parts);
    byId("found").textContent = wanted ? `${found} lines` : "";
  };
  byId("search").addEventListener("input", show);
  show();
}

function context(line) {
  return element("span", { class: "context" }, line);
}

function marked(line, wanted) {
  const start = line.toLowerCase().indexOf(wanted);
  const end = start + wanted.length;
  const mark = element("mark", {}, line.slice(start, end));
  return element("span", {}, line.slice(0, start), mark, line.slice(end));
}
