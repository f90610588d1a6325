"use strict";

function themed(layout) {
  const style = getComputedStyle(document.documentElement);
  const colour = (name) => style.getPropertyValue(name).trim();
  const made = {
    paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
    margin: { l: 56, r: 16, t: 44, b: 48 },
    hoverlabel: { bgcolor: colour("--card"), bordercolor: colour("--line"),
                  font: { color: colour("--ink") } },
    legend: { orientation: "h", x: 0, y: 1.02, yanchor: "bottom" },
    ...layout,
  };
  made.font = { family: getComputedStyle(document.body).fontFamily, size: 13,
                color: colour("--ink"), ...(layout.font || {}) };
  for (const key of new Set(["xaxis", "yaxis", ...Object.keys(layout)])) {
    if (/^[xy]axis/.test(key)) {
      made[key] = { gridcolor: colour("--grid"), linecolor: colour("--line"),
                    zerolinecolor: colour("--soft"), automargin: true, ...(made[key] || {}) };
    }
  }
  for (const note of made.annotations || []) if (note.bgcolor) note.bgcolor = colour("--card");
  return made;
}

function coloured(data) {
  const ink = getComputedStyle(document.body).color;
  return data.map((trace) => ({ ...trace, textfont: { color: ink }, insidetextfont: { color: ink } }));
}

function draw() {
  for (const place of document.querySelectorAll(".figure")) {
    const figure = JSON.parse(place.dataset.figure);
    Plotly.react(place, coloured(figure.data), themed(figure.layout),
                 { displayModeBar: false, responsive: true });
  }
}

function sortable(table) {
  table.querySelectorAll("th").forEach((head, column) => {
    head.querySelector("button").addEventListener("click", () => {
      const down = head.getAttribute("aria-sort") === "descending";
      table.querySelectorAll("th").forEach((other) => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", down ? "ascending" : "descending");
      const value = ({ rows: [row] }) => row.cells[column].dataset.value ?? row.cells[column].textContent;
      const order = (a, b) => {
        const [x, y] = [value(a), value(b)];
        if (x === "" || y === "") return (x === "") - (y === "");
        const byNumber = Number(x) - Number(y);
        return (Number.isNaN(byNumber) ? x.localeCompare(y) : byNumber) * (down ? 1 : -1);
      };
      table.append(...[...table.tBodies].sort(order));
    });
  });
}

function filterable(field) {
  const bodies = [...field.parentElement.querySelectorAll("tbody")];
  field.addEventListener("input", () => {
    const words = field.value.toLowerCase().split(/\s+/);
    for (const body of bodies) {
      const text = body.textContent.toLowerCase();
      body.hidden = !words.every((word) => text.includes(word));
    }
  });
}

draw();
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
document.querySelectorAll("table").forEach(sortable);
document.querySelectorAll(".filter").forEach(filterable);
