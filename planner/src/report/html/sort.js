// Sorts tables by the column whose heading is pressed: up, then down. Missing values stay last.
(() => {
  "use strict";

  function keyOf(row, at, isNumber) {
    const cell = row.cells[at];
    if (isNumber) return "v" in cell.dataset ? Number(cell.dataset.v) : null;
    const text = cell.textContent.trim();
    return text === "–" ? null : text;
  }

  function compare(a, b, isNumber) {
    return isNumber ? a - b : a.localeCompare(b, "en", { numeric: true });
  }

  function sort(body, at, isNumber, sign) {
    const rows = [...body.rows].map((row) => ({ row, key: keyOf(row, at, isNumber) }));
    rows.sort((a, b) => {
      if (a.key === null || b.key === null) return (a.key === null) - (b.key === null);
      return sign * compare(a.key, b.key, isNumber);
    });
    body.append(...rows.map(({ row }) => row));
  }

  for (const table of document.querySelectorAll("table.sortable")) {
    const heads = [...table.tHead.rows[0].cells];
    heads.forEach((head, at) => {
      const button = document.createElement("button");
      button.type = "button";
      button.append(...head.childNodes);
      head.append(button);
      head.setAttribute("aria-sort", "none");
      button.addEventListener("click", () => {
        const isUp = head.getAttribute("aria-sort") !== "ascending";
        for (const other of heads) other.setAttribute("aria-sort", "none");
        head.setAttribute("aria-sort", isUp ? "ascending" : "descending");
        sort(table.tBodies[0], at, head.dataset.kind === "number", isUp ? 1 : -1);
      });
    });
  }
})();
