"""Style and script of the report's pages. Both go into the page itself: it needs nothing from elsewhere."""

from __future__ import annotations

STYLE = """
body{font:15px/1.45 system-ui,sans-serif;margin:2rem auto;max-width:1560px;padding:0 1rem;color:#222}
h1{font-size:1.6rem}h2{font-size:1.15rem;margin:2.2rem 0 .2rem}h3{font-size:1rem;margin:1.4rem 0 .2rem}
nav{margin:.8rem 0;font-size:.9rem}nav a{margin-right:.9rem;white-space:nowrap}a{color:#00507d}
.sub,.note{color:#555;font-size:.9rem;margin:.15rem 0;overflow-wrap:anywhere}.bad{color:#a40000}
.wrap{overflow-x:auto}table{border-collapse:collapse;font-variant-numeric:tabular-nums;margin:.5rem 0;font-size:.9rem}
th,td{padding:.28rem .45rem;text-align:right;white-space:nowrap;border-bottom:1px solid #ddd}
thead th{white-space:normal;vertical-align:bottom;border-bottom:2px solid #444;background:#f4f4f4;position:sticky;top:0}
tbody th{font-weight:600}td.l,th.l{text-align:left}td.t{white-space:normal;text-align:left;max-width:46rem}
tr.dense td{background:#f7f7f2}tr.failed td{background:#fdecea;color:#a40000}
th button{all:unset;cursor:pointer;display:inline-block}
th button:focus-visible{outline:2px solid #0072B2;outline-offset:2px}
th[aria-sort=ascending] button::after{content:" \\25B2";font-size:.7em}
th[aria-sort=descending] button::after{content:" \\25BC";font-size:.7em}
.bar{display:inline-block;width:4.5rem;height:.6rem;background:#eee;margin-left:.5rem;position:relative;vertical-align:middle}
.bar i{position:absolute;top:0;bottom:0;left:0;background:#0072B2}
.bar b{position:absolute;top:-.15rem;bottom:-.15rem;height:.9rem;
border:1px solid #000;border-width:0 1px}
.bar b::before{content:"";position:absolute;left:0;right:0;top:50%;border-top:1px solid #000}
.bar.s{width:3.5rem}
figure{margin:1.5rem 0}figure img{max-width:100%;height:auto}figcaption{color:#555;font-size:.9rem}
.samples td,.samples th{text-align:center;vertical-align:top;font-size:.8rem}.samples th.l{text-align:left}
.samples img{width:80px;height:80px;object-fit:contain;image-rendering:pixelated;display:block;margin:0 auto .2rem}
.holds,.violated,.unknown,.timeout{font-weight:600}.holds{color:#005a3c}.violated{color:#9c3d00}
.unknown,.timeout{color:#555}
dt{font-weight:600}dd{margin:0 0 .3rem 1rem}
.sr{position:absolute;width:1px;height:1px;overflow:hidden;clip-path:inset(50%)}
@page{size:A4 landscape;margin:12mm}
@media print{body{margin:0;max-width:none;padding:0;font-size:11px}.wrap{overflow:visible}
table{font-size:8px;break-inside:auto}tr,figure{break-inside:avoid}thead{display:table-header-group}
th,td{padding:.15rem .25rem}thead th{position:static}nav{display:none}h2,h3{break-after:avoid}
figure img{max-height:170mm}.bar{width:3.5rem}
.bar,.bar i,tr.dense td,tr.failed td,thead th{print-color-adjust:exact;-webkit-print-color-adjust:exact}}
"""
"""Colours of text and bars keep a contrast of 4.5 to 1; nothing is said by colour alone."""

SCRIPT = """
"use strict";
for (const table of document.querySelectorAll("table.sortable")) {
  const body = table.tBodies[0];
  const heads = Array.from(table.tHead.rows[0].cells);
  const said = document.createElement("p");
  said.className = "sr";
  said.setAttribute("aria-live", "polite");
  table.parentNode.after(said);
  const missing = (value) => value === undefined || value === "";
  const compare = (a, b) => a - b || (isNaN(a - b) ? a.localeCompare(b) : 0);
  heads.forEach((head, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...head.childNodes);
    head.append(button);
    head.setAttribute("aria-sort", "none");
    button.addEventListener("click", () => {
      const value = (row) => row.cells[column].dataset.v;
      const rows = Array.from(body.rows);
      const words = rows.every((row) => missing(value(row)) || isNaN(value(row)));
      const before = head.getAttribute("aria-sort");
      const now = before === "none" ? (words ? "ascending" : "descending")
        : before === "ascending" ? "descending" : "ascending";
      const sign = now === "ascending" ? 1 : -1;
      rows.sort((a, b) => {
        const left = value(a), right = value(b);
        if (missing(left) || missing(right)) return missing(left) - missing(right);
        return sign * compare(left, right);
      });
      body.append(...rows);
      for (const other of heads) other.setAttribute("aria-sort", "none");
      head.setAttribute("aria-sort", now);
      said.textContent = `Sorted by ${button.textContent}, ${now}.`;
    });
  });
}
"""
"""Turns the headings of every table of the class ``sortable`` into buttons. Cells carry what they are sorted by in
``data-v``; those without it come last either way. Rows that are equal keep their order."""
