// Curves of the arms, small multiples with one cross-hair, and the dots of accuracy before and after.

const DASHES = ["", "7 4", "2 4", "9 3 2 3", "5 2", "1 3"];
const state = { axis: "step", at: null, charts: [], smooth: true };
const AXES = { step: "step", tokens: "tokens sampled", seconds: "seconds of training" };
const COLOURS = 10;
const FREE = 3; // the first colours are those of the algorithms that credit maps compare

// An algorithm has one colour on the whole page. Arms of one algorithm alone differ by colour too.
function colourOf(algorithm) {
  const place = DATA.order.indexOf(algorithm);
  return "a" + (place < 0 ? COLOURS - 1 : Math.min(place, COLOURS - 1));
}

const LOOKS = (() => {
  const algorithms = DATA.arms.map((arm) => arm.algorithm);
  const alone = new Set(algorithms).size === 1;
  return algorithms.map((algorithm, arm) => {
    const before = algorithms.slice(0, arm).filter((each) => each === algorithm).length;
    const colour = alone && arm ? "a" + (FREE + ((arm - 1) % (COLOURS - FREE))) : colourOf(algorithm);
    return { class: colour, dash: DASHES[before % DASHES.length] };
  });
})();
const look = (arm) => LOOKS[arm];

function ticks(low, high, count, whole = false) {
  const rough = Math.max((high - low) / count || 1, whole ? 1 : 0);
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 2.5, 5, 10].map((k) => k * power).find((k) => k >= rough - 1e-12 && (!whole || Number.isInteger(k)));
  const values = [];
  for (let k = Math.ceil(low / step - 1e-9); k * step <= high + step * 1e-9; k++) values.push(k * step || 0);
  return values;
}

const reachOf = (values) => Math.round(values.length / 24); // points on each side of one

// A centred mean over about a twelfth of the curve.
function smooth(values) {
  const reach = reachOf(values);
  if (reach < 1 || !state.smooth) return values;
  return values.map((value, i) => {
    if (value === null) return null;
    const near = values.slice(Math.max(0, i - reach), i + reach + 1).filter((v) => v !== null);
    return near.reduce((a, b) => a + b, 0) / near.length;
  });
}

function path(xs, ys, x, y) {
  let text = "";
  let pen = "M";
  xs.forEach((at, i) => {
    if (ys[i] === null) pen = "M";
    else {
      text += pen + x(at).toFixed(1) + " " + y(ys[i]).toFixed(1);
      pen = "L";
    }
  });
  return text;
}

function area(xs, low, high, x, y) {
  const measured = xs.map((_, i) => i).filter((i) => low[i] !== null);
  if (measured.length < 2) return "";
  const up = measured.map((i) => x(xs[i]).toFixed(1) + " " + y(high[i]).toFixed(1));
  const down = measured.reverse().map((i) => x(xs[i]).toFixed(1) + " " + y(low[i]).toFixed(1));
  return "M" + up.join("L") + "L" + down.join("L") + "Z";
}

// The lines of one chart, by arm: where, what, between what.
function linesOf(chart) {
  return DATA.arms.flatMap((arm, number) => {
    if (chart.metric === "eval/accuracy" || chart.metric === "eval/reward") {
      if (arm.evaluated !== chart.metric) return [];
      const place = { step: 0, tokens: 1, seconds: 2 }[state.axis];
      if (!arm.evals.length) return [];
      const xs = arm.evals.map((row) => row[place]);
      const [mean, low, high] = [3, 4, 5].map((column) => arm.evals.map((row) => row[column]));
      const steps = arm.evals.map((row) => row[0]);
      return [{ arm: number, xs, mean, low, high, steps, width: 1, value: mean, whiskers: true }];
    }
    const series = arm.series[chart.metric];
    if (!series) return [];
    const many = arm.runs > 1;
    const soft = chart.noisy ? smooth : (values) => values;
    const smoothed = chart.noisy && state.smooth && reachOf(series.mean) > 0;
    return [{
      arm: number, xs: arm.x[state.axis], steps: arm.x.step, width: arm.width,
      value: series.mean, mean: soft(series.mean), raw: smoothed ? series.mean : null,
      low: soft(many ? series.low : series.mean), high: soft(many ? series.high : series.mean), band: many,
    }];
  });
}

function domain(chart, lines) {
  if (chart.unit === "share") return [0, 1];
  const all = lines.flatMap((line) => [...line.low, ...line.high, ...(line.raw || [])]).filter((v) => v !== null);
  if (chart.metric === "memory/peak_bytes") all.push(...DATA.arms.map((arm) => arm.predicted || 0));
  const low = Math.min(0, ...all);
  const high = Math.max(...all, low + 1e-12);
  return [low, high + 0.06 * (high - low)];
}

// Labels beside the ends of lines, pushed apart: names at the height of the line, values at their own.
function labels(lines, y, height, named) {
  const placed = lines.map((line) => {
    const last = line.value.findLastIndex((v) => v !== null);
    return { line, value: line.value[last], x: line.xs[last], y: y((named ? line.mean : line.value)[last]) };
  }).sort((a, b) => a.y - b.y);
  placed.forEach((label, i) => {
    label.at = Math.max(label.y, i ? placed[i - 1].at + 14 : 8);
  });
  for (let i = placed.length - 1, most = height; i >= 0; i--, most -= 14) {
    placed[i].at = Math.min(placed[i].at, most);
  }
  return placed;
}

function draw(view) {
  const { chart, host } = view;
  const width = Math.max(220, host.clientWidth);
  const [top, bottom, left] = [10, 24, 44];
  // Of many arms, or where there is no room, only the key above has the names.
  const several = DATA.arms.length > 1;
  const named = several && DATA.arms.length <= MOST_NAMED && width >= 300;
  const room = width < 420 ? 84 : 128;
  const right = named ? Math.min(room, 16 + LETTER * Math.max(...DATA.arms.map((a) => a.label.length))) : several ? 12 : 54;
  const height = 190;
  const lines = linesOf(chart);
  const most = Math.max(1, ...lines.map((line) => line.xs[line.xs.length - 1]));
  const least = state.axis === "step" && !lines.some((line) => line.whiskers) ? 1 : 0;
  const [low, high] = domain(chart, lines);
  const x = (v) => left + ((v - least) / Math.max(most - least, 1e-9)) * (width - left - right);
  const y = (v) => top + (1 - (v - low) / (high - low)) * (height - top - bottom);
  const scale = chart.unit === "bytes" ? (high >= 2 ** 30 ? 2 ** 30 : 2 ** 20) : 1;
  const parts = ticks(low / scale, high / scale, 3).map((v) => v * scale).map((v) => [
    s("line", { class: "grid", x1: left, x2: width - right, y1: y(v), y2: y(v) }),
    s("text", { x: left - 7, y: y(v) + 4, "text-anchor": "end" }, minus(worded(v, chart.unit))),
  ]);
  const marks = ticks(least, most, width > 420 ? 5 : 3, state.axis !== "seconds");
  parts.push(marks.map((v) => s("text", { x: x(v), y: height - 4, "text-anchor": "middle" }, short(v))));
  for (const line of lines) {
    const { class: colour, dash } = look(line.arm);
    const paint = (extra) => ({ class: extra + " stroke " + colour });
    if (line.band) parts.push(s("path", { class: "band fill " + colour, d: area(line.xs, line.low, line.high, x, y) }));
    if (line.raw) parts.push(s("path", { ...paint("raw"), d: path(line.xs, line.raw, x, y) }));
    parts.push(s("path", { ...paint("line"), "stroke-dasharray": dash, d: path(line.xs, line.mean, x, y) }));
    if (line.whiskers) {
      line.xs.forEach((at, i) => parts.push(
        s("line", { ...paint("whisker"), x1: x(at), x2: x(at), y1: y(line.low[i]), y2: y(line.high[i]) }),
        s("circle", { class: "fill " + colour, cx: x(at), cy: y(line.mean[i]), r: 3.4 }),
      ));
    }
    const predicted = chart.metric === "memory/peak_bytes" ? DATA.arms[line.arm].predicted : null;
    if (predicted) {
      parts.push(s("line", { ...paint("whisker"), "stroke-dasharray": "3 4", x1: left, x2: width - right, y1: y(predicted), y2: y(predicted) }));
    }
  }
  for (const label of several && !named ? [] : labels(lines, y, height - bottom + 4, named)) {
    const { class: colour } = look(label.line.arm);
    const text = named ? fit(DATA.arms[label.line.arm].label, right - 10) : minus(worded(label.value, chart.unit));
    parts.push(s("text", { class: "fill " + colour, x: (named ? width - right : Math.min(x(label.x), width - right)) + 8, y: label.at + 4 }, text));
  }
  view.scale = { x, y, lines, left, right: width - right, top, bottom: height - bottom, least, most };
  view.cross = s("g");
  view.svg = s("svg", { width, height, viewBox: `0 0 ${width} ${height}`, "aria-hidden": "true" }, parts.flat(2), view.cross);
  host.replaceChildren(view.svg);
}

const LETTER = 7; // pixels that a letter of a label takes, at most
const MOST_NAMED = 8; // arms that have their names beside their lines

// A text of at most so many pixels, cut at its end; every name is whole in the key.
function fit(text, pixels) {
  const most = Math.max(3, Math.floor(pixels / LETTER));
  return text.length <= most ? text : text.slice(0, most - 1) + "…";
}

// The place of the measured point nearest to a place on the axis, -1 if nothing was measured.
function nearest(line, at) {
  let best = -1;
  line.xs.forEach((v, i) => {
    if (line.value[i] === null) return;
    if (best < 0 || Math.abs(v - at) < Math.abs(line.xs[best] - at)) best = i;
  });
  return best;
}

// The step that a point was measured at, or the steps that it is the mean of.
function stepOf(line, i) {
  const last = line.steps[i];
  return line.width === 1 ? group3(last) : `${group3(i * line.width + 1)} to ${group3(last)}`;
}

// Moves the cross-hair of every chart to a place on the common axis (null: takes it away).
function point(at) {
  state.at = at;
  for (const view of state.charts) {
    const { x, y, lines, top, bottom, most } = view.scale;
    if (at === null || !lines.length) {
      view.cross.replaceChildren();
      view.says.replaceChildren(view.chart.says);
      continue;
    }
    const here = snap(lines, Math.min(at, most));
    const marks = [s("line", { class: "cross", x1: x(here), x2: x(here), y1: top, y2: bottom })];
    const points = lines.map((line) => [line, nearest(line, here)]).filter(([, i]) => i >= 0);
    const steps = new Set(points.map(([line, i]) => stepOf(line, i)));
    const [common] = steps.size === 1 ? steps : [null];
    const values = [state.axis === "step" ? "" : short(here) + " " + AXES[state.axis], common === null ? "" : "step " + common];
    for (const [line, i] of points) {
      const { class: colour } = look(line.arm);
      marks.push(s("circle", { class: "fill " + colour, cx: x(line.xs[i]), cy: y(line.value[i]), r: 4 }));
      const name = DATA.arms.length > 1 ? DATA.arms[line.arm].label + " " : "";
      const value = minus(worded(line.value[i], view.chart.unit));
      values.push(h("b", { class: colour, "data-arm": line.arm, "data-step": line.steps[i] }, name + value, common === null ? ` (step ${stepOf(line, i)})` : ""));
    }
    view.cross.replaceChildren(...marks);
    view.says.replaceChildren(...values.filter(Boolean).flatMap((value, i) => (i ? [" · ", value] : [value])));
  }
}

// On the axis of steps the cross-hair stands on a whole step: that of the nearest measured point.
function snap(lines, at) {
  if (state.axis !== "step") return at;
  const places = lines.flatMap((line) => {
    const i = nearest(line, at);
    return i < 0 ? [] : [line.xs[i]];
  });
  return places.reduce((best, place) => (Math.abs(place - at) < Math.abs(best - at) ? place : best), places[0] ?? at);
}

function addChart(chart) {
  const host = h("div");
  const says = h("p", { class: "says" }, chart.says);
  const view = { chart, host, says };
  const describe = `${chart.title}: ${chart.says}. Arrow keys read values.`;
  const box = h("div", { class: "chart", tabindex: 0, role: "group", "aria-label": describe }, h("h3", {}, chart.title), says, host);
  host.addEventListener("pointermove", (event) => {
    const { left, right, least, most } = view.scale;
    const share = (event.clientX - host.getBoundingClientRect().left - left) / (right - left);
    point(least + Math.min(1, Math.max(0, share)) * (most - least));
  });
  host.addEventListener("pointerleave", () => point(null));
  box.addEventListener("blur", () => (says.removeAttribute("aria-live"), point(null)));
  box.addEventListener("keydown", (event) => {
    const { least, most, lines } = view.scale;
    const way = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (event.key === "Escape") point(null);
    if (!way || !lines.length) return;
    event.preventDefault();
    says.setAttribute("aria-live", "polite");
    const size = state.axis === "step" ? Math.max(1, Math.round((most - least) / 40)) : (most - least) / 40;
    const from = state.at === null ? (way > 0 ? least : most) : state.at + way * size;
    point(Math.min(most, Math.max(least, from)));
  });
  state.charts.push(view);
  return box;
}

function armKey() {
  const seeds = DATA.arms.some((arm) => arm.runs > 1);
  const items = DATA.arms.map((arm, number) => {
    const { class: colour, dash } = look(number);
    const swatch = s("svg", { width: 30, height: 10, "aria-hidden": "true" },
      s("line", { class: "line stroke " + colour, x1: 1, x2: 29, y1: 5, y2: 5, "stroke-dasharray": dash }));
    return h("li", {}, swatch, arm.label + (arm.runs > 1 ? ` (${arm.runs} seeds)` : ""));
  });
  if (seeds) items.push(h("li", { class: "quiet" }, "band: from the lowest to the highest seed"));
  return h("ul", { class: "key" }, items);
}

// How many steps a smoothed value is the mean of, by arm, the least and the most; null if none is smoothed.
function smoothing() {
  const sizes = DATA.arms.map((arm) => [reachOf(arm.x.step), arm.width]).filter(([reach]) => reach > 0);
  const steps = sizes.map(([reach, width]) => (2 * reach + 1) * width);
  const [low, high] = [Math.min(...steps), Math.max(...steps)];
  return steps.length ? (low === high ? group3(low) : `${group3(low)} to ${group3(high)}`) : null;
}

function smoothChoice() {
  const steps = smoothing();
  if (steps === null) return null;
  const seeds = DATA.arms.some((arm) => arm.runs > 1) ? " (mean of the seeds)" : "";
  return h("label", {}, h("input", { type: "checkbox", checked: true, onchange: ({ target }) => {
    state.smooth = target.checked;
    drawAll();
  } }), `Smooth: the thick line is a mean over ${steps} steps, the thin one as measured${seeds}; values are as measured`);
}

function axisChoice() {
  const choices = Object.entries(AXES).map(([axis, label]) =>
    h("label", {}, h("input", { type: "radio", name: "axis", value: axis, checked: axis === "step", onchange: () => {
      state.axis = axis;
      drawAll();
    } }), label));
  return h("fieldset", {}, h("legend", {}, "Across:"), choices);
}

function drawAll() {
  state.charts.forEach(draw);
  point(null);
}

// Where a step's time goes, one bar an arm.
function phaseBars(host) {
  const names = ["sample", "reward", "credit", "update", "rest"];
  const width = Math.max(260, host.clientWidth);
  const rows = DATA.arms.map((arm) => {
    const parts = names.slice(0, 4).map((name) => arm.phases[name]);
    return [...parts, Math.max(0, arm.time - parts.reduce((a, b) => a + b, 0))];
  });
  const most = Math.max(1e-9, ...rows.map((row) => row.reduce((a, b) => a + b, 0)));
  const tall = 56;
  const drawn = rows.map((row, number) => {
    let at = 0;
    const y = number * tall;
    const total = row.reduce((a, b) => a + b, 0);
    const label = DATA.arms.length > 1 ? DATA.arms[number].label + ":" : "";
    const bars = row.map((value, phase) => {
      const from = (at / most) * width;
      const size = (value / most) * width;
      at += value;
      const text = `${names[phase]} ${short(value)} s`;
      return [
        s("rect", { class: "phase" + phase, x: from, y: y + 20, width: Math.max(0, size - 1), height: 24 }),
        size > 7.2 * text.length + 8 ? s("text", { class: "inside", x: from + 7, y: y + 36 }, text) : null,
      ];
    });
    const seconds = short(total) + " s a step";
    return [s("text", { x: 0, y: y + 13, class: "value" }, fit(label, width - LETTER * seconds.length) + " " + seconds), bars.flat()];
  });
  host.replaceChildren(s("svg", { width, height: tall * rows.length, "aria-hidden": "true" }, drawn.flat(2)));
  const texts = DATA.arms.map((arm, i) => `${arm.label}: ` + names.map((name, k) => `${name} ${short(rows[i][k])} s`).join(", "));
  host.append(h("p", { class: "says" }, texts.join("; ")));
}

// ---- before and after

function accuracyRows() {
  const named = DATA.runs.length > 1;
  return DATA.arms.flatMap((arm, number) => {
    const runs = DATA.runs.filter((run) => run.arm === number && (run.before || run.after));
    if (!runs.length) return [];
    const head = named ? [{ head: arm.label, arm: number }] : [];
    return [...head, ...runs.map((run) => ({ run, arm: number, label: arm.runs > 1 ? "seed " + run.seed : "" }))];
  });
}

function drawAccuracy(host) {
  const rows = accuracyRows();
  if (!rows.length) return;
  const width = Math.max(260, host.clientWidth);
  const named = rows.some((row) => row.label);
  const left = named ? 62 : 6;
  const [right, tall, top] = [18, 34, 8];
  const height = top + rows.length * tall + 26;
  const x = (share) => left + share * (width - left - right);
  const base = height - 24;
  const parts = [0, 0.25, 0.5, 0.75, 1].map((v) => [
    s("line", { class: "grid", x1: x(v), x2: x(v), y1: top, y2: base }),
    s("text", { x: x(v), y: height - 6, "text-anchor": v === 1 ? "end" : v === 0 ? "start" : "middle" }, v === 1 ? "100 % right" : width < 500 && v % 0.5 ? "" : 100 * v),
  ]);
  rows.forEach((row, i) => {
    const y = top + (i + 0.62) * tall;
    const { class: colour } = look(row.arm);
    if (row.head) {
      parts.push([s("text", { class: "fill " + colour, x: 0, y: y + 6 }, fit(row.head, width))]);
      return;
    }
    if (row.label) parts.push([s("text", { x: 0, y: y + 4 }, row.label)]);
    parts.push(dumbbell(row.run, x, y, colour));
  });
  host.replaceChildren(
    s("svg", { width, height, "aria-hidden": "true" }, parts.flat()),
    h("p", { class: "says" }, "Greedy answers to problems that are never trained on. Hollow: before training; filled: after; broad bars: 95 % intervals."));
}

function dumbbell(run, x, y, colour) {
  const { before, after } = run;
  const parts = [];
  if (before && after) {
    parts.push(s("line", { class: "stroke " + colour, "stroke-width": 1.4, x1: x(before[0]), x2: x(after[0]), y1: y, y2: y }));
  }
  for (const [result, kind] of [[before, "hollow"], [after, "fill"]]) {
    if (!result) continue;
    parts.push(
      s("line", { class: "stroke " + colour, "stroke-width": 7, opacity: 0.25, x1: x(result[1]), x2: x(result[2]), y1: y, y2: y }),
      s("circle", { class: kind + " " + colour, cx: x(result[0]), cy: y, r: 5.5 }),
    );
  }
  const close = before && after && Math.abs(x(before[0]) - x(after[0])) < 96;
  const write = (result) => {
    const anchor = result[0] > 0.9 ? "end" : result[0] < 0.1 ? "start" : "middle";
    return s("text", { class: "value", x: x(result[0]), y: y - 10, "text-anchor": anchor }, trim(100 * result[0], 1) + " %");
  };
  if (before && !(close && after)) parts.push(write(before));
  if (after) parts.push(write(after));
  return parts;
}
