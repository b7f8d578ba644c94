// Puts the page together, and draws again when its width changes.

function buildCharts() {
  const host = document.getElementById("charts");
  const shown = DATA.charts.filter((chart) => linesOf(chart).length);
  const phases = h("div", {});
  host.append(
    h("div", { class: "tools" }, armKey(), axisChoice()),
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
