"use strict";

// A cell's number, or its text. Cells of neither come last in either order.
const compareText = new Intl.Collator("en", { numeric: true }).compare;

function sortBy(heading) {
  const table = heading.closest("table");
  const before = heading.getAttribute("aria-sort");
  const order = before === "none" ? heading.dataset.first : before === "ascending" ? "descending" : "ascending";
  const sign = order === "ascending" ? 1 : -1;
  const numbers = "numbers" in heading.dataset;
  const key = (row) => {
    const cell = row.cells[heading.cellIndex];
    if (!numbers) return cell.dataset.missing === undefined ? cell.textContent : null;
    return cell.dataset.value === undefined ? null : Number(cell.dataset.value);
  };
  const compare = (a, b) => {
    if (a.key === null || b.key === null) return (a.key === null) - (b.key === null);
    return sign * (numbers ? a.key - b.key : compareText(a.key, b.key));
  };
  const rows = Array.from(table.tBodies[0].rows, (row) => ({ row, key: key(row) })).sort(compare);
  table.tBodies[0].append(...rows.map(({ row }) => row));
  for (const other of table.tHead.rows[0].cells) other.setAttribute("aria-sort", "none");
  heading.setAttribute("aria-sort", order);
  document.getElementById("said").textContent =
    `${document.getElementById(table.getAttribute("aria-labelledby")).textContent}: sorted by ` +
    `${heading.textContent}, ${order}`;
}

for (const button of document.querySelectorAll("thead button")) {
  button.addEventListener("click", () => sortBy(button.parentElement));
}

// Of figures that are shown smaller than they are.
for (const button of document.querySelectorAll("figcaption button")) {
  const picture = button.closest("figure").querySelector(".picture");
  const image = picture.querySelector("img");
  const offer = () => {
    button.hidden = !picture.classList.contains("whole") && image.clientWidth >= Number(image.getAttribute("width"));
  };
  button.addEventListener("click", () => {
    button.setAttribute("aria-pressed", String(picture.classList.toggle("whole")));
  });
  addEventListener("resize", offer);
  offer();
}

// Paper cannot be clicked.
let opened = [];
addEventListener("beforeprint", () => {
  opened = Array.from(document.querySelectorAll("details:not([open])"));
  for (const details of opened) details.open = true;
});
addEventListener("afterprint", () => {
  for (const details of opened) details.open = false;
});
