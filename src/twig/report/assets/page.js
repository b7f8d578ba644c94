// Puts the page together, and draws again when its width changes.

function buildCharts() {
  const host = document.getElementById("charts");
  const shown = DATA.charts.filter((chart) => linesOf(chart).length);
  const phases = h("div", {});
  host.append(
    h("div", { class: "tools" }, armKey(), axisChoice(), smoothChoice()),
    h("div", { class: "multiples" }, shown.map(addChart)),
    h("div", { class: "phases" }, h("h3", {}, "Where a step's time goes"), phases),
  );
  return phases;
}

const accuracy = document.getElementById("accuracy");
const phaseHost = buildCharts();
buildCredit(document.getElementById("credit-map"));

let width = 0;
function layout() {
  if (width === document.documentElement.clientWidth) return;
  width = document.documentElement.clientWidth;
  drawAccuracy(accuracy);
  drawAll();
  phaseBars(phaseHost);
  drawPanels();
}
addEventListener("resize", layout);
layout();

// The page of a run that trains looks for a newer one, unless something on it is in use.
function watch() {
  const written = document.getElementById("written");
  const minutes = Math.round(Date.now() / 60000 - DATA.written / 60);
  const old = 60 * minutes > 10 * DATA.live;
  written.textContent = "Written " + (minutes < 1 ? "just now" : minutes === 1 ? "a minute ago" : `${group3(minutes)} minutes ago`) +
    (old ? ". If nothing trains, the run has ended: twig report writes its page again." : ".");
  const idle = document.activeElement === document.body || document.activeElement === null;
  if (idle && Date.now() - opened > 1000 * DATA.live) location.reload();
}
const opened = Date.now();
if (DATA.live) {
  watch();
  setInterval(watch, 5000);
}
