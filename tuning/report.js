// SPDX-License-Identifier: Apache-2.0
// Draws a report from the JSON in #data; `tuning/report.py` says what it holds.
"use strict";

const data = JSON.parse(document.getElementById("data").textContent);
const main = document.querySelector("main");
const tip = document.getElementById("tip");
const SVG = "http://www.w3.org/2000/svg";
const MARGIN = { left: 52, right: 12, top: 8, bottom: 30 };
const redraws = [];

function node(name, attributes = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...children);
  return made;
}

function shape(name, attributes = {}, text = "") {
  const made = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.textContent = text;
  return made;
}

const color = (index) => `var(--c${index % 10})`;
const number = (value) =>
  value === null || value === undefined ? "–"
    : Number.isInteger(value) ? String(value)
    : Math.abs(value) >= 100 ? value.toFixed(1)
    : String(Number(value.toPrecision(3)));

function section(title, text, ...children) {
  main.append(node("h2", {}, title));
  if (text) main.append(node("p", {}, text));
  main.append(...children);
}

function table(columns, rows, kind = "") {
  const made = node("table", { class: kind });
  if (columns.length) made.append(node("tr", {}, ...columns.map((c) => node("th", {}, c))));
  for (const row of rows) made.append(node("tr", {}, ...row.map((c) => node("td", {}, String(c)))));
  return node("div", { class: "wide" }, made);
}

// Calls draw(width) now and whenever the page's width changes.
function responsive(draw) {
  const place = node("div");
  const redraw = () => place.replaceChildren(draw(place.clientWidth || 320));
  redraws.push(redraw);
  return { place, redraw };
}

function hover(target, textAt) {
  target.addEventListener("pointermove", (event) => {
    const text = textAt(event.clientX - target.getBoundingClientRect().left);
    tip.style.display = text ? "block" : "none";
    tip.textContent = text || "";
    const left = Math.min(event.clientX + 12, window.innerWidth - tip.offsetWidth - 8);
    tip.style.left = `${Math.max(8, left)}px`;
    tip.style.top = `${event.clientY + 16}px`;
  });
  target.addEventListener("pointerleave", () => { tip.style.display = "none"; });
}

function ticks(low, high, count) {
  const raw = (high - low) / count || 1;
  const unit = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 5, 10].map((m) => m * unit).find((s) => s >= raw);
  const found = [];
  for (let at = Math.ceil(low / step) * step; at <= high + step * 1e-6; at += step) found.push(Number(at.toPrecision(6)));
  return found;
}

function axes(drawn, width, height, x, y, xLabel, yLabel) {
  const toX = (v) => MARGIN.left + ((v - x[0]) / (x[1] - x[0] || 1)) * (width - MARGIN.left - MARGIN.right);
  const toY = (v) => height - MARGIN.bottom - ((v - y[0]) / (y[1] - y[0] || 1)) * (height - MARGIN.top - MARGIN.bottom);
  for (const at of ticks(...y, 4)) {
    drawn.append(shape("line", { x1: MARGIN.left, x2: width - MARGIN.right, y1: toY(at), y2: toY(at), style: "stroke:var(--line)" }));
    drawn.append(shape("text", { x: MARGIN.left - 6, y: toY(at) + 4, "text-anchor": "end" }, number(at)));
  }
  for (const at of ticks(...x, Math.max(3, width / 90))) {
    drawn.append(shape("text", { x: toX(at), y: height - MARGIN.bottom + 15, "text-anchor": "middle" }, number(at)));
  }
  drawn.append(shape("text", { x: width - MARGIN.right, y: height, "text-anchor": "end" }, xLabel));
  drawn.append(shape("text", { x: 2, y: height, "text-anchor": "start" }, yLabel));
  return { toX, toY };
}

// lines: {name: [value or null per step]}; bound: a value drawn across; cursor: a step marked.
function drawLines(width, { lines, bound = null, label, unit = "step", cursor = null, onPick = null }) {
  const height = 190;
  const drawn = shape("svg", { viewBox: `0 0 ${width} ${height}`, height, role: "img", "aria-label": `${label} per ${unit}` });
  const names = Object.keys(lines);
  const count = Math.max(...names.map((n) => lines[n].length));
  const known = names.flatMap((n) => lines[n]).filter((v) => v !== null);
  if (bound !== null) known.push(bound);
  let [low, high] = [Math.min(...known), Math.max(...known)];
  if (low >= 0 && low < high / 2) low = 0;
  const pad = (high - low) * 0.05 || 0.5;
  const { toX, toY } = axes(drawn, width, height, [0, Math.max(1, count - 1)], [low === 0 ? 0 : low - pad, high + pad], unit, label);
  names.forEach((name, index) => {
    let path = "", gap = true;
    lines[name].forEach((value, at) => {
      if (value === null) { gap = true; return; }
      path += `${gap ? "M" : "L"}${toX(at).toFixed(1)} ${toY(value).toFixed(1)}`;
      gap = false;
      drawn.append(shape("circle", { cx: toX(at), cy: toY(value), r: 2, style: `fill:${color(index)}` }));
    });
    drawn.append(shape("path", { d: path, style: `fill:none;stroke:${color(index)};stroke-width:1.3`, "stroke-dasharray": index % 2 ? "5 3" : "none" }));
  });
  if (bound !== null) drawn.append(shape("line", { class: "bound", x1: MARGIN.left, x2: width - MARGIN.right, y1: toY(bound), y2: toY(bound), style: "stroke:var(--bound)" }));
  if (cursor !== null) drawn.append(shape("line", { x1: toX(cursor), x2: toX(cursor), y1: MARGIN.top, y2: height - MARGIN.bottom, style: "stroke:var(--soft);stroke-dasharray:2 2" }));
  const nearest = (px) => {
    const share = (px - MARGIN.left) / (width - MARGIN.left - MARGIN.right);
    return Math.min(count - 1, Math.max(0, Math.round(share * Math.max(1, count - 1))));
  };
  hover(drawn, (px) => {
    const at = nearest(px);
    return [`${unit} ${at}`, ...names.map((n) => `${n}: ${number(lines[n][at])}`)].join("\n");
  });
  if (onPick) drawn.addEventListener("click", (event) => onPick(nearest(event.clientX - drawn.getBoundingClientRect().left)));
  return drawn;
}

function legend(names, bound = "") {
  const items = names.map((name, i) => node("span", {}, node("i", { style: `background:${color(i)}` }), name));
  if (bound) items.push(node("span", {}, node("i", { style: "background:var(--bound)" }), bound));
  return node("div", { class: "legend" }, ...items);
}

function lineSection(title, text, chart) {
  const names = Object.keys(chart.lines);
  if (!names.length) return;
  const { place } = responsive((width) => drawLines(width, chart));
  section(title, text, legend(names, chart.bound === null || chart.bound === undefined ? "" : "threshold"), place);
}

// strips: [{name, computed: [true, false or null per step], told: [text per step]}]
function drawStrips(width, strips) {
  const left = Math.min(150, 10 + 7 * Math.max(...strips.map((s) => s.name.length)));
  const row = 22, height = row * strips.length + 18;
  const drawn = shape("svg", { viewBox: `0 0 ${width} ${height}`, height, role: "img", "aria-label": "decisions per step" });
  const count = Math.max(...strips.map((s) => s.computed.length));
  const cell = (width - left - MARGIN.right) / count;
  strips.forEach(({ name, computed }, index) => {
    drawn.append(shape("text", { x: 0, y: index * row + 15 }, name.length > 20 ? `${name.slice(0, 19)}…` : name));
    computed.forEach((was, step) => {
      if (was === null) return;
      const kind = was ? "computed" : "reused";
      drawn.append(shape("rect", {
        class: kind, x: left + step * cell + cell * 0.06, y: index * row + 3, width: cell * 0.88, height: row - 6,
        rx: 1.5, style: `fill:${was ? "var(--c0)" : "var(--reused)"}`,
      }));
    });
  });
  for (const at of ticks(0, count - 1, Math.max(3, width / 90))) {
    if (Number.isInteger(at)) drawn.append(shape("text", { x: left + (at + 0.5) * cell, y: height - 3, "text-anchor": "middle" }, at));
  }
  hover(drawn, (px) => {
    const step = Math.floor((px - left) / cell);
    if (step < 0 || step >= count) return "";
    return [`step ${step}`, ...strips.map((s) => {
      const was = s.computed[step];
      const verdict = was === null ? "not run" : was ? "computed" : "reused";
      return `${s.name}: ${verdict}${s.told && s.told[step] ? `, ${s.told[step]}` : ""}`;
    })].join("\n");
  });
  return drawn;
}

function showStrips() {
  if (!data.strips.length) return;
  const { place } = responsive((width) => drawStrips(width, data.strips));
  section("Decisions", "Coloured steps ran the blocks, gray ones reused residuals, empty ones were not run.", place);
}

function showBars() {
  const entries = Object.entries(data.segments).sort((a, b) => b[1] - a[1]);
  if (!entries.length) return;
  const most = entries[0][1] || 1;
  const rows = entries.map(([name, seconds]) => node("tr", {}, node("td", {}, name), node("td", {}, seconds.toFixed(3)),
    node("td", { style: "width:60%" }, node("div", { style: `background:var(--c0);height:.7rem;border-radius:2px;width:${(100 * seconds) / most}%` }))));
  section("Seconds by segment", "Of the whole run.", node("table", { style: "width:100%" }, ...rows));
}

function showPareto() {
  const points = data.pareto;
  if (!points.length) return;
  const { place } = responsive((width) => {
    const height = 280;
    const drawn = shape("svg", { viewBox: `0 0 ${width} ${height}`, height, role: "img", "aria-label": "PSNR against speedup" });
    const xs = points.flatMap((p) => p.spread), ys = points.flatMap((p) => [p.psnr, p.worst]);
    const padX = (Math.max(...xs) - Math.min(...xs)) * 0.1 || 0.2, padY = (Math.max(...ys) - Math.min(...ys)) * 0.1 || 1;
    const { toX, toY } = axes(drawn, width, height, [Math.min(...xs) - padX, Math.max(...xs) + padX],
      [Math.min(...ys) - padY, Math.max(...ys) + padY], "measured speedup", "PSNR, dB");
    const front = points.filter((p) => p.front).sort((a, b) => a.speedup - b.speedup);
    drawn.append(shape("path", { class: "front", d: front.map((p, i) => `${i ? "L" : "M"}${toX(p.speedup)} ${toY(p.psnr)}`).join(""), style: "fill:none;stroke:var(--bound);stroke-dasharray:4 3" }));
    points.forEach((p, i) => {
      drawn.append(shape("line", { x1: toX(p.spread[0]), x2: toX(p.spread[1]), y1: toY(p.psnr), y2: toY(p.psnr), style: `stroke:${color(i)}` }));
      drawn.append(shape("line", { x1: toX(p.speedup), x2: toX(p.speedup), y1: toY(p.psnr), y2: toY(p.worst), style: `stroke:${color(i)}` }));
      drawn.append(shape("circle", { cx: toX(p.speedup), cy: toY(p.psnr), r: 4.5, style: `fill:${color(i)}` }));
    });
    hover(drawn, (px) => {
      const near = points.reduce((a, b) => (Math.abs(toX(b.speedup) - px) < Math.abs(toX(a.speedup) - px) ? b : a));
      return `${near.name}\nspeedup ${number(near.speedup)}\nPSNR ${number(near.psnr)} dB, worst ${number(near.worst)} dB`;
    });
    return drawn;
  });
  section("Speed against quality", "Mean PSNR against the uncached run; bars reach down to the worst pair, and from the slowest to the fastest round. No setting is both faster and better than one on the dashed line.",
    legend(points.map((p) => p.name)), place);
}

function showVideos() {
  const [reference, ...others] = data.videos;
  if (!reference || !others.length) return;
  let frame = 0, chosen = others[0], measure = "psnr", timer = null;
  const count = reference.frames.length;
  const small = reference.width < 200 ? "small" : "";
  const pictures = ["uncached", "cached", "difference"].map((alt) => node("img", { alt, class: small }));
  const names = ["uncached", chosen.name, "difference, enlarged eightfold"].map((text) => node("figcaption", {}, text));
  const slider = node("input", { type: "range", id: "frame", min: 0, max: count - 1, value: 0, "aria-label": "frame" });
  const told = node("output");
  const play = node("button", { type: "button" }, "Play");
  const measures = ["psnr", "ssim", "vmaf"].filter((m) => others.some((v) => v[m]));
  const units = { psnr: "PSNR, dB", ssim: "SSIM", vmaf: "VMAF" };
  const measureBox = node("select", { "aria-label": "measure" }, ...measures.map((m) => node("option", { value: m }, units[m])));
  const chart = responsive((width) => {
    const lines = Object.fromEntries(others.filter((v) => v[measure]).map((v) => [v.name, v[measure]]));
    if (!Object.values(lines).flat().some((v) => v !== null)) return node("p", {}, "All frames are equal.");
    return drawLines(width, { lines, label: units[measure], unit: "frame", cursor: frame, onPick: show });
  });
  function show(at) {
    frame = at;
    slider.value = at;
    pictures[0].src = reference.frames[at];
    pictures[1].src = chosen.frames[at];
    pictures[2].src = chosen.difference[at];
    names[1].textContent = chosen.name;
    told.textContent = [`frame ${at} of ${count - 1}`, ...measures.filter((m) => chosen[m]).map((m) =>
      chosen[m][at] === null ? "equal" : `${units[m].split(",")[0]} ${number(chosen[m][at])}${m === "psnr" ? " dB" : ""}`)].join(", ");
    chart.redraw();
  }
  slider.addEventListener("input", () => show(Number(slider.value)));
  measureBox.addEventListener("change", () => { measure = measureBox.value; chart.redraw(); });
  play.addEventListener("click", () => {
    play.textContent = timer ? "Play" : "Pause";
    if (timer) { clearInterval(timer); timer = null; return; }
    timer = setInterval(() => show((frame + 1) % count), 125);
  });
  const controls = node("div", { class: "controls" }, play, slider, told);
  if (others.length > 1) {
    const box = node("select", { id: "setting", "aria-label": "setting" }, ...others.map((v) => node("option", {}, v.name)));
    box.addEventListener("change", () => { chosen = others[box.selectedIndex]; show(frame); });
    controls.prepend(box);
  }
  section("Videos", data.videos_text,
    node("div", { class: "videos" }, ...pictures.map((p, i) => node("figure", {}, p, names[i]))), controls,
    node("div", { class: "controls" }, measureBox, legend(others.map((v) => v.name))), chart.place);
  show(0);
}

function showWhatIf() {
  const panels = data.what_if;
  if (!panels.length) {
    if (data.what_if_text) section("What if", data.what_if_text);
    return;
  }
  let panel = panels[0], at = panel.current;
  const box = node("select", { id: "policy", "aria-label": "policy" }, ...panels.map((p) => node("option", {}, `${p.policy}, ${p.parameter}`)));
  const slider = node("input", { type: "range", id: "value", min: 0, "aria-label": "value" });
  const names = ["value", "computed", "ideal", "loop", "error"];
  const captions = ["", "computed steps", "ideal speedup", "foretold speedup of the loop", "foretold error"];
  const outputs = Object.fromEntries(names.map((n) => [n, node("output", { id: `told-${n}` })]));
  const heads = names.map((n, i) => node("span", {}, captions[i]));
  const row = () => panel.rows[at];
  const strips = responsive((width) => drawStrips(width, Object.entries(row().computed).map(([name, computed]) => ({
    name, computed, told: (row().reached[name] || []).map((d) => (d === null ? "" : `distance ${number(d)}`)),
  }))));
  const distance = responsive((width) => {
    const lines = row().reached;
    if (!Object.values(lines).flat().some((v) => v !== null)) return node("span");
    return drawLines(width, { lines, bound: panel.values[at], label: "distance" });
  });
  const curve = responsive((width) => {
    const height = 190;
    const drawn = shape("svg", { viewBox: `0 0 ${width} ${height}`, height, role: "img", "aria-label": "error against ideal speedup" });
    const rows = panels.flatMap((p) => p.rows);
    const { toX, toY } = axes(drawn, width, height, [1, Math.max(1.5, ...rows.map((r) => r.ideal_speedup))],
      [0, Math.max(1e-6, ...rows.map((r) => r.error)) * 1.05], "ideal speedup", "foretold error");
    panels.forEach((p, i) => {
      const path = [...p.rows].sort((a, b) => a.ideal_speedup - b.ideal_speedup || a.error - b.error)
        .map((r, j) => `${j ? "L" : "M"}${toX(r.ideal_speedup).toFixed(1)} ${toY(r.error).toFixed(1)}`).join("");
      drawn.append(shape("path", { d: path, style: `fill:none;stroke:${color(i)};stroke-width:${p === panel ? 2 : 1}` }));
    });
    drawn.append(shape("circle", { cx: toX(row().ideal_speedup), cy: toY(row().error), r: 5, style: `fill:${color(panels.indexOf(panel))}` }));
    return drawn;
  });
  function loopSpeedup() {
    const { computed, reused, rest, uncached } = data.step_seconds;
    if (computed === null || reused === null) return null;
    const flags = Object.values(row().computed).flat();
    const ran = flags.filter((c) => c).length;
    return uncached / (rest + ran * computed + (flags.length - ran) * reused);
  }
  function show(index) {
    at = index;
    slider.max = panel.values.length - 1;
    slider.value = at;
    const counts = Object.values(row().computed).map((c) => c.filter((v) => v).length);
    heads[0].textContent = panel.parameter;
    outputs.value.textContent = `${number(panel.values[at])}${at === panel.current && panel === panels[0] && data.own_first ? " (this run)" : ""}`;
    outputs.computed.textContent = `${[...new Set(counts)].join(" and ")} of ${Object.values(row().computed)[0].length}`;
    outputs.ideal.textContent = row().ideal_speedup.toFixed(2);
    outputs.loop.textContent = loopSpeedup() === null ? "–" : loopSpeedup().toFixed(2);
    outputs.error.textContent = number(row().error);
    for (const part of [strips, distance, curve]) part.redraw();
  }
  slider.addEventListener("input", () => show(Number(slider.value)));
  box.addEventListener("change", () => { panel = panels[box.selectedIndex]; show(panel.current); });
  section("What if", data.what_if_text, node("div", { class: "controls" }, box, slider),
    node("div", { class: "told" }, ...names.map((n, i) => node("div", {}, heads[i], outputs[n]))),
    strips.place, distance.place, curve.place, legend(panels.map((p) => p.policy)));
  show(at);
}

document.title = data.title;
main.append(node("h1", {}, data.title), node("p", {}, data.subtitle));
for (const warning of data.warnings) main.append(node("p", { class: "warning" }, warning));
for (const part of data.tables) section(part.title, part.text, table(part.columns, part.rows));
showPareto();
showVideos();
showStrips();
lineSection("Distance", data.distance.text, { lines: data.distance.lines, bound: data.distance.bound, label: "distance" });
showWhatIf();
lineSection("Residual change per step", "mean|r − r before| / mean|r before|, of residuals that were computed or reused.", { lines: data.changes, label: "relative change" });
lineSection("Seconds per step", "Of each branch.", { lines: data.seconds, label: "seconds" });
showBars();
section("Provenance", "", table([], data.provenance, "facts"));
const redrawAll = () => redraws.forEach((redraw) => redraw());
redrawAll();
new ResizeObserver(redrawAll).observe(main);
