"use strict";
(() => {
  // The chosen entry of a list, as it is printed.
  const chosen = ({ labels, selectedOptions }) =>
    `${labels[0].firstChild.textContent.trim()}: ${selectedOptions[0].text}`;

  // Show the chosen picture of a chart, and the values in it as a table.
  async function show(figure) {
    const select = figure.querySelector("select");
    const pictures = [...figure.querySelectorAll(".picture")];
    const choice = () => pictures[select ? Number(select.value) : 0];
    const { packed } = choice().dataset;
    if (packed) {
      const picture = choice();
      picture.innerHTML = new TextDecoder().decode(await unpacked(packed));
      delete picture.dataset.packed;
    }
    const shown = choice(); // which may be a different one by now
    for (const picture of pictures) picture.hidden = picture !== shown;
    if (select) figure.querySelector(".chosen").textContent = chosen(select);
    const body = figure.querySelector("tbody");
    body.replaceChildren();
    for (const { textContent } of shown.querySelectorAll("circle title")) {
      const row = body.insertRow();
      textContent.split("\n").forEach((line, place) => {
        Object.assign(row.insertCell(), { textContent: line, className: place < 2 ? "text" : "" });
      });
    }
  }

  function sorted(button) {
    const head = button.parentElement;
    const column = head.cellIndex;
    const up = head.getAttribute("aria-sort") !== "ascending";
    for (const other of head.parentElement.cells) other.setAttribute("aria-sort", "none");
    head.setAttribute("aria-sort", up ? "ascending" : "descending");
    const body = head.closest("table").tBodies[0];
    const keyOf = (row) => {
      const cell = row.cells[column];
      const { key } = cell.dataset;
      return key === undefined ? cell.textContent : key === "" ? NaN : Number(key);
    };
    const rows = [...body.rows].map((row) => [keyOf(row), row]);
    rows.sort(([a], [b]) => {
      if (typeof a === "string") return up ? a.localeCompare(b) : b.localeCompare(a);
      if (Number.isNaN(a) || Number.isNaN(b)) return Number.isNaN(a) - Number.isNaN(b);
      return up ? a - b : b - a;
    });
    body.append(...rows.map(([, row]) => row));
  }

  function filtered(box) {
    const selects = [...box.querySelectorAll("select[data-filter]")];
    let count = 0;
    for (const row of box.querySelectorAll("tbody tr")) {
      row.hidden = selects.some(
        ({ dataset, value }) => value && !row.dataset[dataset.filter].split(" ").includes(value),
      );
      count += !row.hidden;
    }
    box.querySelector(".chosen").textContent = selects.map(chosen).join("; ");
    box.querySelector(".count").textContent = `${count} ${count === 1 ? "row" : "rows"}`;
  }

  function unpacked(text) {
    const bytes = Uint8Array.from(atob(text), (character) => character.charCodeAt(0));
    const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
    return new Response(stream).arrayBuffer();
  }

  async function save(button) {
    const text = button.parentElement.querySelector("script").textContent;
    const content = new Blob([await unpacked(text)], { type: "text/csv" });
    const link = Object.assign(document.createElement("a"), { download: button.dataset.name });
    link.href = URL.createObjectURL(content);
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 60_000);
  }

  for (const figure of document.querySelectorAll("figure.chart")) {
    figure.querySelector("select")?.addEventListener("change", () => show(figure));
    show(figure);
  }
  const onClick = (what, done) =>
    document.querySelectorAll(what).forEach((b) => b.addEventListener("click", () => done(b)));
  onClick("th button", sorted);
  onClick(".save", save);
  for (const box of document.querySelectorAll(".sortable")) {
    if (!box.querySelector("select")) continue;
    box.addEventListener("change", () => filtered(box));
    filtered(box);
  }
  const folded = [...document.querySelectorAll("#measured details")];
  let closed = [];
  addEventListener("beforeprint", () => {
    closed = folded.filter((part) => !part.open);
    for (const part of closed) part.open = true;
  });
  addEventListener("afterprint", () => {
    for (const part of closed) part.open = false;
  });
})();
