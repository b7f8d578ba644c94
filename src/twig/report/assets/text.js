"use strict";
// What charts and credit maps share: elements, numbers as text, the tip. Text only ever becomes text nodes.

const DATA = JSON.parse(document.getElementById("data").textContent);
const SVG = "http://www.w3.org/2000/svg";

function fill(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes || {})) {
    if (value === false || value === null || value === undefined) continue;
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children.flat().filter((child) => child !== null && child !== undefined));
  return node;
}

function h(tag, attributes, ...children) {
  return fill(document.createElement(tag), attributes, children);
}

function s(tag, attributes, ...children) {
  return fill(document.createElementNS(SVG, tag), attributes, children);
}

const group3 = (number) => Math.round(number).toLocaleString("en-US");

function short(number) {
  const size = Math.abs(number);
  if (size >= 1e6) return trim(number / 1e6, size >= 1e7 ? 0 : 1) + "M";
  if (size >= 1e4) return trim(number / 1e3, 0) + "k";
  if (size >= 100 || number === 0) return group3(number);
  if (size >= 1) return trim(number, 2);
  if (size >= 0.001) return String(Number(number.toPrecision(2)));
  return number.toExponential(0).replace("e-", "e−");
}

const trim = (number, digits) => String(Number(number.toFixed(digits)));

function bytes(number) {
  return number >= 2 ** 30 ? trim(number / 2 ** 30, 2) + " GiB" : trim(number / 2 ** 20, 0) + " MiB";
}

function worded(value, unit) {
  if (value === null || value === undefined) return "–";
  if (unit === "share") return trim(100 * value, 1) + " %";
  if (unit === "bytes") return bytes(value);
  if (unit === "seconds") return short(value) + " s";
  return short(value);
}

const minus = (text) => text.replace(/^-/, "−");
const percent = (share) => trim(100 * share, share > 0 && share < 0.1 ? 1 : 0) + " %";

function signed(value) {
  if (value === 0) return "0";
  return (value > 0 ? "+" : "−") + Number(Math.abs(value).toPrecision(3));
}

const ODD = /[\p{C}\p{Zl}\p{Zp}\uFFFD]/u;
const written = (letter) => "\\u" + letter.codePointAt(0).toString(16).padStart(4, "0");

// Characters that would be invisible, or move others about, are written out: in a line of text,
function plain(text) {
  return Array.from(text.replace(/\s+/g, " "), (letter) => (ODD.test(letter) ? written(letter) : letter)).join("");
}

// and in elements of their own.
function visible(text) {
  const parts = [];
  let usual = "";
  const flush = () => {
    if (usual) parts.push(document.createTextNode(usual));
    usual = "";
  };
  const odd = (shown) => {
    flush();
    parts.push(h("span", { class: "odd" }, shown));
  };
  for (const letter of text) {
    if (letter === "\n") {
      odd("⏎");
      usual = "\n";
    } else if (letter === "\t") odd("⇥");
    else if (ODD.test(letter)) odd(written(letter));
    else usual += letter;
  }
  flush();
  return parts.length ? parts : [h("span", { class: "odd" }, "◌")];
}

const tip = document.getElementById("tip");
let tipTarget = null;

function showTip(target, ...children) {
  tip.replaceChildren(...children.filter(Boolean));
  tip.hidden = false;
  tipTarget = target;
  placeTip();
}

function placeTip() {
  const target = tipTarget;
  const at = target.getClientRects()[0] || target.getBoundingClientRect();
  const box = tip.getBoundingClientRect();
  // Beside what is compared, never on it: outside of a picture, and of a row of texts on its heading.
  const picture = target.closest("svg");
  const heading = target.closest("[data-row]") && target.closest("[data-row]").querySelector(".branch").getBoundingClientRect();
  const beside = heading && heading.width < window.innerWidth / 2;
  const around = picture ? picture.getBoundingClientRect() : at;
  const above = around.top - box.height - 8;
  const left = beside ? heading.left : at.left;
  tip.style.maxWidth = beside ? Math.max(heading.width, 190) + "px" : "";
  tip.style.left = Math.min(Math.max(8, left), Math.max(8, window.innerWidth - box.width - 8)) + "px";
  const below = Math.min(around.bottom + 8, window.innerHeight - box.height - 4);
  tip.style.top = (beside ? Math.min(heading.top, window.innerHeight - box.height - 4) : above > 4 ? above : below) + "px";
}

function hideTip() {
  tip.hidden = true;
}

// What has the focus keeps its tip while the page moves.
addEventListener("scroll", () => (tip.hidden || tipTarget !== document.activeElement ? hideTip() : placeTip()), { passive: true });
addEventListener("keydown", (event) => event.key === "Escape" && hideTip());
