"use strict";
// What charts and credit maps share: elements, numbers in words, the tip. Text only ever becomes text nodes.

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

// Characters that would be invisible, or move others about, are written out.
function visible(text) {
  const parts = [];
  let plain = "";
  const flush = () => {
    if (plain) parts.push(document.createTextNode(plain));
    plain = "";
  };
  const odd = (shown) => {
    flush();
    parts.push(h("span", { class: "odd" }, shown));
  };
  for (const letter of text) {
    if (letter === "\n") {
      odd("⏎");
      plain = "\n";
    } else if (letter === "\t") odd("⇥");
    else if (/[\p{C}\p{Zl}\p{Zp}\uFFFD]/u.test(letter)) odd("\\u" + letter.codePointAt(0).toString(16).padStart(4, "0"));
    else plain += letter;
  }
  flush();
  return parts.length ? parts : [h("span", { class: "odd" }, "◌")];
}

const tip = document.getElementById("tip");

function showTip(target, ...children) {
  tip.replaceChildren(...children.filter(Boolean));
  tip.hidden = false;
  const at = target.getClientRects()[0] || target.getBoundingClientRect();
  const box = tip.getBoundingClientRect();
  const above = at.top - box.height - 8;
  const left = Math.min(Math.max(8, at.left), Math.max(8, window.innerWidth - box.width - 8));
  tip.style.left = left + "px";
  tip.style.top = (above > 4 ? above : Math.min(at.bottom + 8, window.innerHeight - box.height - 4)) + "px";
}

function hideTip() {
  tip.hidden = true;
}

addEventListener("scroll", hideTip, { passive: true });
addEventListener("keydown", (event) => event.key === "Escape" && hideTip());
