"use strict";
// Sort a table by the column whose head is clicked; what has no value goes last, whichever way one sorts.
function keyOf(row, column) {
  const value = row.cells[column].dataset.value;
  return value === undefined || value === "" ? null : isNaN(value) ? value : Number(value);
}

function compare(a, b) {
  return typeof a === "string" ? a.localeCompare(b) : a - b;
}

function sortBy(table, column) {
  const heads = [...table.tHead.rows[0].cells];
  const firstTime = column === 0 ? "ascending" : "descending";
  const other = { ascending: "descending", descending: "ascending" };
  const direction = other[heads[column].getAttribute("aria-sort")] || firstTime;
  heads.forEach((head) => head.removeAttribute("aria-sort"));
  heads[column].setAttribute("aria-sort", direction);
  const sign = direction === "ascending" ? 1 : -1;
  const rows = [...table.tBodies[0].rows];
  rows.sort((a, b) => {
    const x = keyOf(a, column), y = keyOf(b, column);
    if (x === null || y === null) return (x === null) - (y === null);
    return sign * compare(x, y);
  });
  table.tBodies[0].append(...rows);
}

for (const table of document.querySelectorAll("table.sortable")) {
  [...table.tHead.rows[0].cells].forEach((head, column) => {
    head.querySelector("button").addEventListener("click", () => sortBy(table, column));
  });
}

// Name the columns that a narrow window cuts off, above the table they are of.
function tellMore(region) {
  const edge = region.getBoundingClientRect().right, table = region.querySelector("table");
  const cut = [...table.tHead.rows[0].cells].filter((head) => !head.hidden && head.getBoundingClientRect().right > edge + 1);
  const line = region.previousElementSibling;
  const names = cut.map((head) => head.firstChild.textContent.trim() || head.textContent.trim());
  line.hidden = region.scrollWidth <= region.clientWidth;
  line.textContent = names.length ? "More to the right: " + names.join(", ") + " →" : "\u00a0";
}

const regions = [...document.querySelectorAll(".scroll")];
for (const region of regions) {
  region.insertAdjacentHTML("beforebegin", '<p class="more" hidden></p>');
  region.addEventListener("scroll", () => tellMore(region), { passive: true });
  region.closest("details")?.addEventListener("toggle", () => tellMore(region));
}
window.addEventListener("resize", () => regions.forEach(tellMore));

// Show the metrics of one cut-off, beside those that have none; without JavaScript all of them stand there.
const cuts = document.querySelector(".cuts");

function showCut(cut) {
  for (const button of cuts.children) button.setAttribute("aria-pressed", String(button.dataset.cut === cut));
  for (const cell of document.querySelectorAll("#board [data-cut]")) {
    cell.hidden = cut !== "all" && cell.dataset.cut !== "" && cell.dataset.cut !== cut;
  }
  regions.forEach(tellMore);
}

for (const button of cuts.children) {
  button.hidden = button.dataset.cut !== "all" && !document.querySelector(`#board th[data-cut="${button.dataset.cut}"]`);
  button.addEventListener("click", () => showCut(button.dataset.cut));
}
const first = [...cuts.children].find((button) => !button.hidden);
if (first.dataset.cut !== "all") {
  cuts.hidden = false;
  showCut(first.dataset.cut);
}
regions.forEach(tellMore);
