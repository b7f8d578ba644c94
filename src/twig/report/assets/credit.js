// The credit map: one group of completions as a trie, under several algorithms side by side.

const named = (algorithm) => DATA.algorithms[algorithm].title;
const FOLD = 4; // tokens without credit that fold to a note, to the end of a segment
const FOLD_INSIDE = 12; // and between tokens with credit
const LONG = 90; // characters of one credit that fold in the middle
const credit = { group: null, matches: [], open: new Set(), parts: {} };

const ownOf = (group) => DATA.runs[group.run].algorithm;
const score = (value) => (Number.isInteger(value) ? String(value) : value.toFixed(2));
const total = ([plus, minus]) => plus + minus;
const tokenText = (place) => DATA.strings[place];

// Colour class of a weight: its sign, and the root of its share of the largest one.
function shade(weight, largest) {
  if (weight === 0 || !largest) return "";
  const size = Math.max(1, Math.ceil(5 * Math.sqrt(Math.abs(weight) / largest) - 1e-9));
  return (weight > 0 ? "p" : "m") + Math.min(5, size);
}

const largestOf = (given) => Math.max(0, ...given.pairs.map((pair) => Math.abs(total(pair))));

// [first token, number, [plus, minus]] of each run of one credit within a segment.
function runsOf(given, segment) {
  const flat = given.runs[segment];
  const runs = [];
  let at = 0;
  for (let i = 0; i < flat.length; i += 2) {
    runs.push([at, flat[i], given.pairs[flat[i + 1]]]);
    at += flat[i];
  }
  return runs;
}

const level = (group, segment) => (group.segments[segment][0] < 0 ? 0 : 1 + level(group, group.segments[segment][0]));
const childrenOf = (group, segment) => group.segments.flatMap((each, i) => (each[0] === segment ? [i] : []));

// Completions, in the order they are drawn, that pass through each segment: [first row, rows].
function spans(group) {
  const bounds = group.segments.map(() => [Infinity, -1]);
  group.segments.forEach(([, , , , , ends], segment) => {
    for (const row of ends) {
      for (let at = segment; at >= 0; at = group.segments[at][0]) {
        bounds[at] = [Math.min(bounds[at][0], row), Math.max(bounds[at][1], row)];
      }
    }
  });
  return bounds.map(([low, high]) => [low, high - low + 1]);
}

// ---- the three pictures: across the tokens, down the completions

function icicle(group, algorithm, width) {
  const given = group.credit[algorithm];
  const largest = largestOf(given);
  const longest = Math.max(1, ...group.completions.map((each) => each[3]));
  const marks = 18;
  const [across, tall] = [(width - marks) / longest, group.completions.length > 12 ? 11 : 14];
  const rows = spans(group);
  const [parts, coloured] = [[], []]; // what has credit lies on top, and is never too narrow to be seen
  group.segments.forEach(([, depth, , , tokens], segment) => {
    const [row, number] = rows[segment];
    for (const [at, count, pair] of runsOf(given, segment)) {
      const last = at + count === tokens.length;
      const size = count * across - (last ? Math.min(1.2, across / 3) : 0);
      const colour = shade(total(pair), largest);
      (colour ? coloured : parts).push(s("rect", {
        class: colour || "empty", x: (depth - 1 + at) * across, y: row * tall,
        width: Math.max(size, colour ? 2.5 : 0.8), height: number * tall - 1.2, "data-segment": segment, "data-token": at,
      }));
    }
  });
  group.completions.forEach(([, right], row) => {
    parts.push(s("circle", { class: right ? "solid" : "ring", cx: width - 7, cy: row * tall + tall / 2 - 0.6, r: 2.7 }));
  });
  parts.push(...coloured);
  const height = group.completions.length * tall;
  const picture = s("svg", { width, height, viewBox: `0 0 ${width} ${height}`, "aria-hidden": "true", class: "icicle" }, parts);
  picture.addEventListener("pointermove", ({ target }) => {
    if (target.dataset.segment === undefined) return hideTip();
    showTip(target, ...tipOf(group, Number(target.dataset.segment), Number(target.dataset.token), algorithm));
  });
  picture.addEventListener("pointerleave", hideTip);
  return picture;
}

function panelOf(group, algorithm, column) {
  const { trained } = group.credit[algorithm];
  const count = h("span", { class: "count" }, h("b", {}, group3(trained)), ` of ${group3(group.distinct)} merged tokens get credit`);
  const own = ownOf(group) === algorithm ? " own" : "";
  const picture = h("div", { class: "picture", "data-column": column });
  const same = sameAs(group, algorithm);
  const note = [DATA.notes[group.run][algorithm], same && `These answers are so short that it trains nearly the same tokens as ${named(same)}.`].filter(Boolean).join(". ");
  return h("figure", { class: `panel${own} ${colourOf(algorithm)}` }, h("figcaption", {}, h("h3", {}, named(algorithm)), count), picture,
    note && h("p", { class: "says" }, note));
}

// An algorithm that gives credit to nearly the same tokens as one that is set to choose among them.
function sameAs(group, algorithm) {
  const tokens = (name) => group.segments.flatMap((_, segment) =>
    runsOf(group.credit[name], segment).flatMap(([, number, pair]) => Array(number).fill(pair[0] !== 0 || pair[1] !== 0)));
  const own = tokens(algorithm);
  if (!DATA.notes[group.run][algorithm] || !own.some(Boolean)) return null;
  const alike = (other) => own.filter((has, i) => has !== other[i]).length <= 0.05 * own.length;
  return Object.keys(group.credit).find((name) => name !== algorithm && alike(tokens(name))) ?? null;
}

function drawPanels() {
  const { group, parts } = credit;
  if (!group) return;
  parts.panels.querySelectorAll(".picture").forEach((host) => {
    const algorithm = Object.keys(group.credit)[host.dataset.column];
    host.replaceChildren(icicle(group, algorithm, Math.max(160, host.clientWidth)));
  });
}

// ---- the text

function tipOf(group, segment, at, algorithm) {
  const [parent, depth, count, value, tokens] = group.segments[segment];
  const flat = runsOf(group.credit[algorithm], segment).find(([from, size]) => at < from + size);
  const [from, size, pair] = flat;
  const before = at > 0 ? value : parent < 0 ? group.mean : group.segments[parent][3];
  const text = tokens.slice(from, from + Math.min(size, 12)).map(tokenText).join("");
  const both = pair[0] !== 0 && pair[1] !== 0 ? ` (${signed(pair[0])} and ${signed(pair[1])})` : "";
  const which = size > 1 ? `${size} tokens from ${depth + from}, each` : `token ${depth + from}`;
  return [
    h("div", { class: "mono" }, visible(text), size > 12 ? "…" : ""),
    h("div", {}, h("b", {}, named(algorithm) + ": " + (total(pair) || both ? "credit " + signed(total(pair)) : "no credit")), both, `, ${which}`),
    h("div", {}, `${count} of ${group.size} completions; mean reward ${from === 0 && value !== before ? score(before) + " → " : ""}${score(value)}`),
  ];
}

function piece(group, segment, algorithm, largest, [from, size, pair]) {
  const texts = group.segments[segment][4].slice(from, from + size).map(tokenText);
  const weight = total(pair);
  const key = [algorithm, segment, from].join();
  const open = credit.open.has(key) || credit.open.has("all");
  const text = texts.join("");
  const inside = from > 0 && from + size < group.segments[segment][4].length;
  if (weight === 0 && size >= (inside ? FOLD_INSIDE : FOLD) && !open) return [fold(key, `${group3(size)} tokens, no credit`)];
  const css = weight === 0 ? "" : "c " + shade(weight, largest) + (size === 1 ? " single" : "");
  const mark = (shown) => h("span", { class: css, "data-segment": segment, "data-token": from, "data-algorithm": algorithm }, visible(shown));
  if (text.length > LONG && size > 8 && !open) {
    const kept = Math.max(2, Math.floor((size * 30) / text.length));
    const hidden = size - 2 * kept;
    return [mark(texts.slice(0, kept).join("")), fold(key, `${group3(hidden)} more, ${signed(weight)} each`), mark(texts.slice(-kept).join(""))];
  }
  return [mark(text)];
}

function fold(key, text) {
  return h("button", { class: "fold", type: "button", tabindex: -1, "data-key": key }, text);
}

function cell(group, segment, algorithm, column) {
  const largest = largestOf(group.credit[algorithm]);
  const pieces = runsOf(group.credit[algorithm], segment).flatMap((run) => piece(group, segment, algorithm, largest, run));
  return h("div", { class: "text t" + column, role: "gridcell" }, pieces);
}

function marksOf(group, ends) {
  const count = (kind) => ends.filter((end) => group.completions[end][1] === kind).length;
  const kinds = [[count(true), "✓", "right"], [count(false), "✗", "wrong"]].filter(([number]) => number);
  const cut = ends.filter((end) => !group.completions[end][2]).length;
  return kinds.map(([number, sign, word]) =>
    h("span", { class: "marks" }, h(word === "right" ? "b" : "span", {}, sign + " " + word), number > 1 ? " ×" + number : "")
  ).concat(cut ? [h("span", { class: "marks" }, "cut off" + (cut > 1 ? " ×" + cut : ""))] : []);
}

function describe(group, segment) {
  const [, , count, value, tokens, ends] = group.segments[segment];
  const weights = Object.keys(group.credit).map((algorithm) => {
    const [[, size, pair]] = runsOf(group.credit[algorithm], segment);
    return `${named(algorithm)} ${total(pair) ? signed(total(pair)) + (size > 1 ? ` on ${size} tokens` : " on the first token") : "no credit"}`;
  });
  const text = plain(tokens.slice(0, 12).map(tokenText).join(""));
  const ending = ends.length ? ` ${ends.length} end here, ${ends.filter((end) => group.completions[end][1]).length} right.` : "";
  return `${text}${tokens.length > 12 ? " and so on" : ""}: ${count} of ${group.size} completions, mean reward ${score(value)}.${ending} ${weights.join("; ")}.`;
}

function rowOf(group, segment) {
  const [, , count, value, , ends] = group.segments[segment];
  const deep = level(group, segment);
  const branch = h("div", { class: "branch", role: "rowheader" },
    h("span", { class: "guides", "aria-hidden": "true" }, Array.from({ length: deep }, () => h("i", {}))),
    h("div", { class: "facts" },
      h("span", { class: "share" }, h("b", {}, String(count)), ` of ${group.size}`),
      h("span", { class: "share mean quiet" }, h("span", { class: "unit" }, "reward "), score(value)),
      marksOf(group, ends)));
  const row = h("div", {
    class: "row", role: "row", tabindex: segment === 0 ? 0 : -1, "aria-level": deep + 1,
    "aria-label": describe(group, segment), "data-row": segment,
  }, branch, Object.keys(group.credit).map((algorithm, column) => cell(group, segment, algorithm, column)));
  row.style.setProperty("--indent", deep * 0.62 + "rem");
  return row;
}

function drawTree(focus) {
  const { group, parts } = credit;
  const names = Object.keys(group.credit);
  const head = h("div", { class: "row head", role: "row" },
    h("div", { role: "columnheader" }, "Answers through it, mean reward"), names.map((name) => h("div", { role: "columnheader", class: colourOf(name) }, named(name))));
  parts.tree.replaceChildren(head, ...group.segments.map((_, segment) => rowOf(group, segment)));
  if (focus !== undefined) focusRow(focus, false);
}

function focusRow(segment, tell = true) {
  const rows = credit.parts.tree.querySelectorAll("[data-row]");
  const row = rows[segment];
  if (!row) return;
  rows.forEach((each) => each.setAttribute("tabindex", each === row ? 0 : -1));
  row.focus({ preventScroll: !tell });
}

function onKey(event) {
  const row = event.target.closest("[data-row]");
  if (!row) return;
  const { group } = credit;
  const at = Number(row.dataset.row);
  const last = group.segments.length - 1;
  const go = {
    ArrowDown: at + 1, ArrowUp: at - 1, Home: 0, End: last,
    ArrowLeft: group.segments[at][0], ArrowRight: childrenOf(group, at)[0],
  };
  if (event.key === "Enter" || event.key === " ") {
    event.preventDefault();
    toggleRow(at);
  } else if (event.key in go) {
    event.preventDefault();
    if (go[event.key] >= 0 && go[event.key] <= last) focusRow(go[event.key]);
  }
}

function toggleRow(segment) {
  const keys = Object.entries(credit.group.credit).flatMap(([algorithm, given]) =>
    runsOf(given, segment).map(([from]) => [algorithm, segment, from].join()));
  const open = keys.some((key) => credit.open.has(key));
  keys.forEach((key) => (open ? credit.open.delete(key) : credit.open.add(key)));
  drawTree(segment);
}

// On focus: what the row says under each algorithm, beside it.
function onFocus(event) {
  const row = event.target.closest("[data-row]");
  if (!row || !row.matches(":focus-visible")) return;
  const segment = Number(row.dataset.row);
  const { group } = credit;
  const [parent, , count, value] = group.segments[segment];
  const before = parent < 0 ? group.mean : group.segments[parent][3];
  const lines = Object.keys(group.credit).map((algorithm) => {
    const [[, size, pair]] = runsOf(group.credit[algorithm], segment);
    const text = total(pair) ? `${signed(total(pair))}${size > 1 ? ` on ${size} tokens` : ""}` : "no credit";
    return h("div", {}, h("b", {}, named(algorithm) + " "), text);
  });
  showTip(row, h("div", {}, `${count} of ${group.size} completions; mean reward ${score(before)} → ${score(value)}`), ...lines);
}

function onHover(event) {
  const token = event.target.closest("[data-token]");
  if (!token) return hideTip();
  const { segment, algorithm } = token.dataset;
  showTip(token, ...tipOf(credit.group, Number(segment), Number(token.dataset.token), algorithm));
}

// ---- finding a group

const step = (group) => group.step;

function cleanPrompt(text) {
  return plain(text.replace(/<\|[^|<>]*\|>/g, " ")).trim();
}

function lineOf(group) {
  const prompt = cleanPrompt(group.prompt);
  const short = prompt.length > 60 ? "…" + prompt.slice(-59) : prompt;
  const run = DATA.runs.length > 1 ? DATA.runs[group.run].name + ", " : "";
  return `${run}step ${group.step}: ${short} (${group.num_right} of ${group.size} right, reward ${score(group.mean)})`;
}

const REWARDS = {
  all: ["any reward", () => true],
  mixed: ["some right, some wrong", (group) => group.num_right > 0 && group.num_right < group.size],
  right: ["all right", (group) => group.num_right === group.size],
  wrong: ["none right", (group) => group.num_right === 0],
  low: ["mean reward below the middle", (group, middle) => group.mean < middle],
  high: ["mean reward above the middle", (group, middle) => group.mean > middle],
};

function find() {
  const { run, step, reward, search } = credit.parts;
  const middles = DATA.groups.map((group) => group.mean).sort((a, b) => a - b);
  const middle = middles[Math.floor(middles.length / 2)];
  const text = search.value.toLowerCase();
  credit.matches = DATA.groups.filter((group) =>
    (!run || run.value === "" || group.run === Number(run.value)) &&
    (step.value === "" || group.step === Number(step.value)) &&
    REWARDS[reward.value][1](group, middle) &&
    (group.prompt.toLowerCase().includes(text) || String(group.problem) === text));
  const { list, count } = credit.parts;
  list.replaceChildren(...credit.matches.map((group, i) => h("option", { value: i }, lineOf(group))));
  const { length } = credit.matches;
  count.textContent = length ? (length === 1 ? "1 group" : `${group3(length)} groups`) : "No group matches. Below is the last one that did.";
  list.disabled = length === 0;
  if (!credit.matches.length) return;
  const at = Math.max(0, credit.matches.indexOf(credit.group));
  list.value = String(at);
  show(credit.matches[at]);
}

function move(way) {
  const { list } = credit.parts;
  const at = (Number(list.value) + way + credit.matches.length) % Math.max(1, credit.matches.length);
  list.value = String(at);
  if (credit.matches[at]) show(credit.matches[at]);
}

// Its algorithms by how many tokens they train, the fewest first.
const bySize = (group) => Object.keys(group.credit).sort((a, b) => group.credit[a].trained - group.credit[b].trained);

// The group that says most at first sight: split evenly, with several forks.
function first() {
  const worth = (group) => {
    const share = group.num_right / group.size;
    const [sparsest] = bySize(group);
    const { trained } = group.credit[sparsest];
    const forks = Math.min(12, trained) + Math.min(6, group.segments.length) / 10;
    const sparse = trained < 0.05 * group.sampled ? 1.5 : 1;
    return Math.min(0.16, share * (1 - share)) * forks * sparse * (ownOf(group) === sparsest ? 1.3 : 1);
  };
  return DATA.groups.reduce((best, group) => (worth(group) > worth(best) ? group : best));
}

function lead(group) {
  const names = bySize(group);
  const most = Math.max(...names.map((name) => group.credit[name].trained));
  const [sparsest, densest] = [names[0], names.find((name) => group.credit[name].trained === most)];
  const { trained } = group.credit[sparsest];
  const answers = `${group.size} answers to one problem: ${group3(group.sampled)} tokens, ${group3(group.distinct)} after merging where they begin alike.`;
  if (!most) return `${answers} All got the same reward, so no algorithm gives credit to any token.`;
  const { title, summary } = DATA.algorithms[sparsest];
  const others = sparsest === densest ? "" : `, ${named(densest)} ${group3(most)}`;
  return `${answers} ${title}${summary ? ": " + summary + ". It" : ""} trains ${group3(trained)} of them${others}. ${DATA.runs.length > 1 ? "The run of this group" : "This run"} trained with ${named(ownOf(group))}; the other pictures are what the others would have trained.`;
}

function show(group) {
  if (credit.group !== group) credit.open.clear();
  credit.group = group;
  const { parts } = credit;
  const names = Object.keys(group.credit);
  const own = Math.max(0, names.indexOf(ownOf(group))); // it is not drawn if its code was not run
  parts.lead.textContent = lead(group);
  const long = group.prompt.length > 60;
  const left = group.size > group.completions.length ? `; ${group.completions.length} of them drawn` : "";
  const again = group.prefix ? `; continues ${group.prefix} tokens of an earlier answer` : "";
  parts.problem.replaceChildren(
    h("p", { class: "prompt" + (long ? " long" : ""), ...(long ? { tabindex: 0, role: "region", "aria-label": "The problem" } : {}) }, visible(group.prompt)),
    h("span", { class: "quiet" }, `step ${group.step}, problem ${group.problem}: ${group.num_right} of ${group.size} answers right, mean reward ${score(group.mean)}${left}${again}`));
  parts.map.dataset.columns = names.length;
  parts.panels.replaceChildren(...names.map((name, column) => panelOf(group, name, column)));
  drawPanels();
  parts.choices.replaceChildren(h("legend", {}, "Text under:"), ...names.map((name, column) =>
    h("label", {}, h("input", { type: "radio", name: "shown", checked: column === own, onchange: () => (parts.tree.dataset.show = column) }), named(name))));
  parts.tree.dataset.show = own;
  drawTree();
}

function legendOf() {
  const swatches = (letter, order) => h("span", { class: "swatches" }, order.map((size) => h("i", { class: letter + size })));
  const dot = (kind) => s("svg", { width: 8, height: 8, "aria-hidden": "true" }, s("circle", { class: kind, cx: 4, cy: 4, r: 2.9 }));
  return h("ul", { class: "scale" },
    h("li", {}, swatches("m", [5, 4, 3, 2, 1]), "made less likely"),
    h("li", {}, h("i", { class: "swatch" }), "no credit: not trained"),
    h("li", {}, swatches("p", [1, 2, 3, 4, 5]), "made more likely"),
    h("li", {}, dot("solid"), "right"), h("li", {}, dot("ring"), "wrong"),
    h("li", {}, "across: tokens; down: answers; a token that answers share is one block; stronger colour: more credit, against the largest of its picture"));
}

function options(pairs) {
  return pairs.map(([value, text]) => h("option", { value }, text));
}

function buildCredit(host) {
  if (!DATA.groups.length) {
    host.append(h("p", { class: "quiet" }, "No completions were saved (log.completions_steps)."));
    return;
  }
  const { parts } = credit;
  parts.lead = h("p", { class: "lead" });
  const steps = [...new Set(DATA.groups.map(step))].sort((a, b) => a - b);
  const field = (text, control, css) => h("label", { class: css }, text, control);
  parts.run = DATA.runs.length > 1 ? h("select", { onchange: find }, options([["", "all"], ...DATA.runs.map((run, i) => [i, run.name])])) : null;
  parts.step = h("select", { onchange: find }, options([["", "all"], ...steps.map((each) => [each, String(each)])]));
  parts.reward = h("select", { onchange: find }, options(Object.entries(REWARDS).map(([key, [text]]) => [key, text])));
  parts.search = h("input", { type: "search", oninput: find, placeholder: "text or number" });
  parts.list = h("select", { onchange: () => show(credit.matches[Number(parts.list.value)]) });
  parts.count = h("span", { class: "quiet", role: "status" });
  const controls = h("div", { class: "find", role: "search", "aria-label": "Groups" },
    parts.run && field("Run", parts.run), field("Step", parts.step), field("Reward", parts.reward), field("Problem", parts.search),
    field("Group", parts.list, "wide"),
    h("span", { class: "step-buttons" },
      h("button", { type: "button", "aria-label": "Previous group", onclick: () => move(-1) }, "‹"),
      h("button", { type: "button", "aria-label": "Next group", onclick: () => move(1) }, "›")),
    parts.count);
  parts.problem = h("div", { class: "asked" });
  parts.panels = h("div", { class: "panels" });
  parts.choices = h("fieldset", { class: "switch" });
  parts.tree = h("div", { class: "tree", role: "treegrid", "aria-label": "The answers as text, by their forks. Arrow keys move, Enter unfolds." });
  const unfold = h("label", {}, h("input", { type: "checkbox", onchange: ({ target }) => {
    credit.open.clear();
    if (target.checked) credit.open.add("all");
    drawTree();
  } }), "Unfold all");
  parts.map = h("div", { class: "map" }, controls, parts.problem, parts.panels, legendOf(),
    h("div", { class: "tools" }, h("h3", {}, "The same as text"), h("span", { class: "quiet" }, "arrow keys walk from fork to fork"), unfold),
    parts.choices, parts.tree);
  host.append(parts.lead, parts.map);
  parts.tree.addEventListener("keydown", onKey);
  parts.tree.addEventListener("focusin", onFocus);
  parts.tree.addEventListener("focusout", hideTip);
  parts.tree.addEventListener("pointerover", onHover);
  parts.tree.addEventListener("pointerleave", hideTip);
  parts.tree.addEventListener("click", ({ target }) => {
    const key = target.dataset.key;
    if (!key) return;
    credit.open.add(key);
    drawTree(Number(target.closest("[data-row]").dataset.row));
  });
  credit.group = first();
  find();
}
