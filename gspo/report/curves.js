// Panels with one curve each, every run in its colour.

const COLOURS = 6; // classes run-0 ... run-5 of page.css
const LOGARITHMIC = new Set(["kl_divergence"]);
const TENDENCY = { reward_mean: "rises", reward_max: "rises", ranking_loss: "falls" };
const SIZE = { width: 320, height: 170, left: 44, right: 6, top: 8, bottom: 22 };

/** Return the round (from 1) of a step. */
function roundAt(step, rounds) {
  return rounds.reduce((found, [first, number]) => (first <= step ? number : found), 1);
}

/** Return the running mean over up to `span` neighbours of the same round, without those that are missing. */
function smooth(steps, values, rounds, span = 9) {
  const half = (span - 1) / 2;
  const ofRound = steps.map((step) => roundAt(step, rounds));
  return values.map((value, i) => {
    if (value === null) return null;
    let [sum, count] = [0, 0];
    for (let k = Math.max(0, i - half); k <= Math.min(values.length - 1, i + half); k += 1) {
      if (values[k] === null || ofRound[k] !== ofRound[i]) continue;
      [sum, count] = [sum + values[k], count + 1];
    }
    return sum / count;
  });
}

/** Return about `count` round numbers between two numbers. */
function ticks(low, high, count = 4) {
  const rough = (high - low) / count;
  const unit = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((x) => x * unit).find((x) => x >= rough);
  const found = [];
  for (let k = Math.ceil(low / step - 1e-9); k * step <= high + step * 1e-9; k += 1) found.push(Number((k * step).toPrecision(12)));
  return found;
}

/** Return the function from values to pixels of an axis, with its ticks and its ends: [place, ticks, low, high]. */
function axis(low, high, from, to, logarithmic) {
  if (logarithmic) {
    const [a, b] = [Math.floor(Math.log10(low)), Math.max(Math.ceil(Math.log10(high)), Math.floor(Math.log10(low)) + 1)];
    const every = Math.ceil((b - a) / 4);
    const marks = [];
    for (let k = a; k <= b; k += every) marks.push(10 ** k);
    const place = (x) => from + ((Math.log10(x) - a) / (b - a)) * (to - from);
    return [place, marks, 10 ** a, 10 ** b];
  }
  const room = (high - low) * 0.05 || Math.abs(high) * 0.1 || 1;
  const [a, b] = [low - room, high + room];
  return [(x) => from + ((x - a) / (b - a)) * (to - from), ticks(a, b), a, b];
}

/** Return the ends of the values' axis: all values, and the healthy limits that are not far from them. */
function extent(values, range, logarithmic) {
  const usable = values.filter((x) => x !== null && (!logarithmic || x > 0));
  if (!usable.length) return null;
  let [low, high] = [Infinity, -Infinity];
  for (const x of usable) [low, high] = [Math.min(low, x), Math.max(high, x)];
  const far = Math.max(high - low, Math.abs(high) * 0.5);
  for (const limit of range.filter((x) => x !== null && (!logarithmic || x > 0))) {
    if (logarithmic || (limit > low - far && limit < high + far)) [low, high] = [Math.min(low, limit), Math.max(high, limit)];
  }
  return [low, high];
}

/** Return the path of a curve, interrupted where a value is missing. */
function pathOf(steps, values, x, y, usable) {
  let [path, pen] = ["", "M"];
  values.forEach((value, i) => {
    if (value === null || !usable(value)) {
      pen = "M";
      return;
    }
    path += `${pen}${x(steps[i]).toFixed(1)} ${y(value).toFixed(1)}`;
    pen = "L";
  });
  return path;
}

/** Return the words for a healthy range. */
function rangeWords(metric, range) {
  const [low, high] = range;
  if (low === null && high === null) return metric in TENDENCY ? word(TENDENCY[metric]) : "";
  return word(low === null ? "below" : high === null ? "above" : "between", { low, high });
}

/** Return a figure with the curve of a metric in all runs; an empty one where no run has it. */
function panel(metric, data) {
  const range = data.ranges[metric] || [null, null];
  const healthy = rangeWords(metric, range);
  const meaning = (data.meaning[language] || {})[metric] || data.meaning.en[metric] || "";
  const caption = element("figcaption", { title: meaning }, element("b", {}, metric));
  if (healthy) caption.append(" ", element("span", { class: "soft" }, word("healthy", { range: healthy })));
  const readout = element("div", { class: "readout" });
  const figure = element("figure", {}, caption);
  const picture = draw(metric, data, range, readout);
  if (picture) figure.append(picture, readout, element("p", { class: "meaning soft" }, meaning));
  return figure;
}

/** Draw a metric's picture; null where no run has a value of it. */
function draw(metric, data, range, readout) {
  const logarithmic = LOGARITHMIC.has(metric);
  const usable = (value) => !logarithmic || value > 0;
  const curves = data.runs.map((run, i) => ({ run, i, steps: [], values: [], ...named(run.curves[metric]) }));
  const ends = extent(curves.flatMap((c) => c.values), range, logarithmic);
  if (!ends) return null;
  const last = Math.max(...data.runs.map((run) => run.last_step));
  const { width, height, left, right, top, bottom } = SIZE;
  const [x, xTicks] = axis(1, Math.max(last, 2), left, width - right, false);
  const [y, yTicks, low, high] = axis(...ends, height - bottom, top, logarithmic);
  const picture = drawn("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": metric });
  picture.append(...band(range, low, high, y), ...grid(xTicks, yTicks, x, y));
  for (const { run, i, steps, values } of curves) {
    const colour = `run-${i % COLOURS}`;
    for (const [step] of run.rounds.slice(1)) {
      picture.append(drawn("path", { class: `begin ${colour}`, d: `M${x(step)} ${top}V${height - bottom}` }));
    }
    if (values.length < 12) {
      steps.forEach((step, k) => {
        if (values[k] !== null && usable(values[k])) {
          picture.append(drawn("circle", { class: `dot ${colour}`, cx: x(step), cy: y(values[k]), r: 2.5 }));
        }
      });
    }
    picture.append(drawn("path", { class: `thin ${colour}`, d: pathOf(steps, values, x, y, usable) }));
    picture.append(drawn("path", { class: `bold ${colour}`, d: pathOf(steps, smooth(steps, values, run.rounds), x, y, usable) }));
  }
  readable(picture, curves, x, readout);
  return picture;
}

function named(curve) {
  return curve ? { steps: curve[0], values: curve[1] } : {};
}

/** Draw the healthy range, as far as the axis shows it. */
function band(range, low, high, y) {
  if (range[0] === null && range[1] === null) return [];
  const [bottom, top] = [Math.max(range[0] ?? low, low), Math.min(range[1] ?? high, high)];
  if (bottom >= top) return [];
  const place = { x: SIZE.left, width: SIZE.width - SIZE.left - SIZE.right, y: y(top), height: y(bottom) - y(top) };
  return [drawn("rect", { class: "band", ...place })];
}

/** Draw lines and numbers of both axes. */
function grid(xTicks, yTicks, x, y) {
  const { width, height, left, right, bottom } = SIZE;
  const inside = xTicks.filter((t) => Number.isInteger(t) && x(t) >= left && x(t) <= width - right - 4);
  return [
    ...yTicks.flatMap((t) => [
      drawn("path", { class: "line", d: `M${left} ${y(t)}H${width - right}` }),
      drawn("text", { x: left - 4, y: y(t) + 3.5, "text-anchor": "end" }, short(t)),
    ]),
    ...inside.map((t) => drawn("text", { x: x(t), y: height - bottom + 14, "text-anchor": "middle" }, short(t))),
  ];
}

/** Show the values at the step that a pointer is over. */
function readable(picture, curves, x, readout) {
  const mark = drawn("path", { class: "pointer" });
  picture.append(mark);
  picture.addEventListener("pointermove", (event) => {
    const box = picture.getBoundingClientRect();
    const at = ((event.clientX - box.left) / box.width) * SIZE.width;
    const shown = [];
    for (const { run, steps, values } of curves) {
      if (!steps.length) continue;
      const k = steps.reduce((best, step, i) => (Math.abs(x(step) - at) < Math.abs(x(steps[best]) - at) ? i : best), 0);
      if (!shown.length) mark.setAttribute("d", `M${x(steps[k])} ${SIZE.top}V${SIZE.height - SIZE.bottom}`);
      shown.push(`${curves.length > 1 ? `${run.name}: ` : ""}${short(values[k])} (${word("step")} ${steps[k]})`);
    }
    readout.textContent = shown.join(" · ");
  });
  picture.addEventListener("pointerleave", () => {
    mark.removeAttribute("d");
    readout.textContent = "";
  });
}

/** Show the main curves, and all others by the part of their name before the slash, drawn when they are opened. */
function showCurves(data) {
  const names = [...new Set(data.runs.flatMap((run) => Object.keys(run.curves)))];
  document.getElementById("main-curves").replaceChildren(...data.main.map((metric) => panel(metric, data)));
  const groups = new Map();
  for (const name of names.filter((name) => !data.main.includes(name))) {
    const group = name.includes("/") ? name.slice(0, name.indexOf("/")) : "";
    groups.set(group, [...(groups.get(group) || []), name]);
  }
  const parts = [...groups].sort().map(([group, metrics]) => {
    const inside = element("div", { class: "grid" });
    const part = element("details", {}, element("summary", {}, `${group || word("others")} (${metrics.length})`), inside);
    part.addEventListener("toggle", () => {
      if (part.open && !inside.children.length) inside.append(...metrics.map((metric) => panel(metric, data)));
    });
    return part;
  });
  document.getElementById("more-curves").replaceChildren(...parts);
}
