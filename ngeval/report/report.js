"use strict";
(() => {
  const charts = JSON.parse(document.getElementById("chart-data").textContent);
  const darkPage = matchMedia("(prefers-color-scheme: dark)");
  const touch = matchMedia("(pointer: coarse)").matches;
  const PAPER = 660; // width of a printed A4 page in CSS pixels
  let printing = false;

  // Names in charts carry entities, because plotly reads some HTML in labels.
  const ENTITIES = { "&lt;": "<", "&gt;": ">", "&#36;": "$", "&#37;": "%", "&amp;": "&" };
  const plain = (text) => String(text ?? "").replace(/&(lt|gt|#36|#37|amp);/g, (e) => ENTITIES[e]);
  const shown = (value) =>
    typeof value !== "number" ? plain(value)
      : String(Number.isInteger(value) ? value : Number(value.toPrecision(4))); // steps in full

  // The chosen entry of a list, as it is printed.
  const chosen = ({ labels, selectedOptions }) =>
    `${labels[0].firstChild.textContent.trim()}: ${selectedOptions[0].text}`;

  function painted(trace, dark, ink) {
    const { points, colours, band } = trace.meta;
    if (points) {
      const marker = { ...trace.marker, color: points.map((pair) => pair[+dark]) };
      return { ...trace, marker, error_x: { ...trace.error_x, color: ink, thickness: 1.5 } };
    }
    const color = colours[+dark];
    const line = { ...trace.line, color };
    return band
      ? { ...trace, line, fillcolor: color + "30" }
      : { ...trace, line, marker: { ...trace.marker, color } };
  }

  // Ticks of a logarithmic axis: powers of ten alone, or with twos and fives, or as plotly has it.
  function decades(traces, name, width) {
    const values = traces.flatMap((trace) => trace[name]).filter((value) => value > 0);
    const span = Math.log10(values.reduce((a, b) => Math.max(a, b), 1e-300)) -
      Math.log10(values.reduce((a, b) => Math.min(a, b), 1e300));
    const room = name === "x" ? Math.max(2, Math.floor(width / 80)) : 7;
    if (span > 2.5) return { dtick: Math.ceil(span / room) };
    return span > 0.8 ? { dtick: "D2" } : { nticks: 7 };
  }

  function layoutOf(chart, traces, width, dark, ink) {
    const grid = dark ? "#363d45" : "#e3e6ea";
    const axis = (options, name) => ({
      gridcolor: grid,
      zerolinecolor: grid,
      ...options,
      ...(options.type === "log" ? decades(traces, name, width) : {}),
    });
    const names = traces.filter((trace) => trace.name && trace.showlegend !== false);
    const longest = Math.max(0, ...names.map((trace) => plain(trace.name).length));
    const inLine = Math.max(1, Math.floor((width - 70) / (longest * 7.5 + 50)));
    const hasLegend = names.length > 1 && chart.layout.showlegend !== false;
    const lines = hasLegend ? Math.ceil(names.length / inLine) : 0;
    const layout = {
      ...chart.layout,
      height: (printing ? 290 : 360) + lines * 22,
      margin: { l: 56, r: 12, t: printing ? 8 : 30, b: 48 + lines * 22 },
      paper_bgcolor: "rgba(0,0,0,0)",
      plot_bgcolor: "rgba(0,0,0,0)",
      font: { color: ink, size: 13, family: getComputedStyle(document.body).fontFamily },
      hoverlabel: { align: "left" },
      hovermode: "closest",
      dragmode: touch ? false : "zoom",
      showlegend: hasLegend,
      legend: { orientation: "h", x: 0, xanchor: "left", yref: "container", y: 0, yanchor: "bottom" },
      modebar: { bgcolor: "rgba(0,0,0,0)", color: dark ? "#8b949e" : "#6e7781", activecolor: ink },
      xaxis: axis(chart.layout.xaxis, "x"),
      yaxis: axis(chart.layout.yaxis, "y"),
    };
    if (chart.sideways) {
      const { y, text } = traces[0];
      layout.height = 120 + y.length * (chart.layout.barmode ? 34 : 26) + lines * 22;
      layout.yaxis = { ...layout.yaxis, tickvals: y, ticktext: text, zeroline: false };
    }
    if (printing) layout.width = width;
    return layout;
  }

  function draw(figure) {
    const chart = charts[figure.id];
    const select = figure.querySelector("select");
    const traces = chart.traces[Number(select?.value ?? 0)];
    const dark = darkPage.matches && !printing;
    const ink = dark ? "#e6e8eb" : "#1b1f24";
    const plot = figure.querySelector(".plot");
    const width = printing ? PAPER : plot.clientWidth;
    const layout = layoutOf(chart, traces, width, dark, ink);
    const config = { displaylogo: false, responsive: true, displayModeBar: !printing && !touch };
    config.modeBarButtons = [["toImage", "zoom2d", "pan2d", "resetScale2d"]];
    plot.style.minHeight = `${layout.height}px`;
    Plotly.react(plot, traces.map((trace) => painted(trace, dark, ink)), layout, config);
    if (select) figure.querySelector(".chosen").textContent = chosen(select);
    if (figure.querySelector("details").open) fill(figure, chart, traces);
  }

  function fill(figure, chart, traces) {
    const table = figure.querySelector("details table");
    table.replaceChildren();
    const head = table.createTHead().insertRow();
    for (const textContent of [...chart.columns, "low", "high"])
      head.append(Object.assign(document.createElement("th"), { scope: "col", textContent }));
    const body = table.createTBody();
    for (const trace of traces.filter((entry) => !entry.meta.band)) {
      trace.x.forEach((x, i) => {
        const extra = trace.customdata ? trace.customdata[i] : [];
        const where = chart.sideways
          ? trace.name ? [trace.name, trace.text[i]] : [trace.text[i], extra[2]]
          : [trace.name, placeOf(chart, x)];
        const row = body.insertRow();
        const values = [...where, chart.sideways ? x : trace.y[i], extra[0], extra[1]];
        values.forEach((value, place) => {
          const look = { textContent: shown(value), className: place > 1 ? "number" : "" };
          Object.assign(row.insertCell(), look);
        });
      });
    }
  }

  function placeOf(chart, x) {
    const { tickvals, ticktext } = chart.layout.xaxis;
    return tickvals ? ticktext[tickvals.indexOf(x)] : x;
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

  async function save(button) {
    const text = button.parentElement.querySelector("script").textContent;
    const packed = Uint8Array.from(atob(text), (character) => character.charCodeAt(0));
    const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"));
    const content = new Blob([await new Response(stream).arrayBuffer()], { type: "text/csv" });
    const link = Object.assign(document.createElement("a"), { download: button.dataset.name });
    link.href = URL.createObjectURL(content);
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 60_000);
  }

  const figures = [...document.querySelectorAll("figure.chart")];
  const drawAll = () => figures.forEach(draw);
  for (const figure of figures) {
    figure.querySelector("select")?.addEventListener("change", () => draw(figure));
    figure.querySelector("details").addEventListener("toggle", () => draw(figure));
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
  darkPage.addEventListener("change", drawAll);
  const folded = [...document.querySelectorAll("#measured details")];
  let closed = [];
  addEventListener("beforeprint", () => {
    printing = true;
    closed = folded.filter((part) => !part.open);
    for (const part of closed) part.open = true;
    drawAll();
  });
  addEventListener("afterprint", () => {
    printing = false;
    for (const part of closed) part.open = false;
    drawAll();
  });
  drawAll();
})();
