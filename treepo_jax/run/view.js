"use strict";

// Pointing at a card or an outcome shows its segment; a click keeps it open. All text is set as
// text, never as markup.

const detail = document.getElementById("detail");
const index = document.getElementById("index");
const trees = new Map(); // section -> Map from row to node, read when first needed
let pinned = null; // {section, row} that stays open
let whole = false; // the path from the prompt, or the segment alone

function nodesOf(section) {
  if (!trees.has(section)) {
    const data = JSON.parse(section.querySelector('script[type="application/json"]').textContent);
    const nodes = new Map(data.nodes.map((node) => [node.row, { ...node, children: [] }]));
    for (const node of nodes.values()) nodes.get(node.parent)?.children.push(node.row);
    nodes.get(0).question = data.question;
    trees.set(section, nodes);
  }
  return trees.get(section);
}

function pathTo(nodes, row) {
  const path = [];
  for (let node = nodes.get(row); node; node = nodes.get(node.parent)) path.unshift(node);
  return path;
}

function below(nodes, row) {
  return [row, ...nodes.get(row).children.flatMap((child) => below(nodes, child))];
}

function cardOf(section, row) {
  return section.querySelector(`.card[data-row="${row}"]`);
}

function element(name, text, parent) {
  const made = document.createElement(name);
  made.textContent = text;
  parent.append(made);
  return made;
}

function highlight(section, row) {
  clearHighlight();
  const nodes = nodesOf(section);
  const rows = new Set([...pathTo(nodes, row).map((node) => node.row), ...below(nodes, row)]);
  for (const part of section.querySelectorAll("[data-row]")) {
    const own = Number(part.dataset.row);
    part.classList.toggle("on", rows.has(own));
    part.classList.toggle("source", own === nodes.get(row).source && !part.closest("svg"));
  }
  cardOf(section, row).classList.add("at");
  section.querySelector(".scroll").classList.add("focus");
}

function clearHighlight() {
  for (const part of document.querySelectorAll(".focus")) part.classList.remove("focus");
  for (const part of document.querySelectorAll(".at")) part.classList.remove("at");
}

function writePieces(node, parent) {
  node.pieces.forEach((piece, i) => {
    const chip = element("span", piece, parent);
    const heat = node.heat[i];
    if (heat === null) return;
    chip.style.setProperty("--s", `${Math.round(70 * (1 - Math.exp(heat / 100)))}%`);
    chip.title = `log-prob ${(heat / 100).toFixed(2).replace("-", "\u2212")}`;
  });
}

function fill(section, row) {
  const nodes = nodesOf(section);
  const node = nodes.get(row);
  const path = pathTo(nodes, row);
  detail.replaceChildren();
  const header = element("header", "", detail);
  element("span", row ? `Segment ${path.length - 1} of its path, row ${row}` : "Prompt", header);
  const toggle = element("button", "whole path", header);
  toggle.setAttribute("aria-pressed", String(whole));
  toggle.onclick = () => { whole = !whole; fill(section, row); };
  element("button", "\u00d7", header).onclick = unpin;
  const figures = element("dl", "", detail);
  for (const [name, value] of node.figures) {
    const pair = element("div", "", figures);
    element("dt", name, pair);
    element("dd", value, pair);
  }
  const text = element("pre", "", detail);
  text.dir = "auto";
  if (whole || row === 0) element("em", nodes.get(0).question, text);
  for (const part of whole ? path : [node]) {
    const run = element("div", "", text);
    run.style.display = "inline";
    if (part !== node) run.className = "other";
    writePieces(part, run);
    if (part === node) text.scrollTop = run.offsetTop - text.offsetTop - 40;
  }
}

function show(section, row, beside) {
  detail.hidden = false;
  fill(section, row);
  highlight(section, row);
  place(beside);
}

// Under what it tells of, or over it where there is no room, so that its path stays in sight.
function place(beside) {
  const at = beside.getBoundingClientRect();
  const { offsetWidth: width, offsetHeight: height } = detail;
  const fits = at.bottom + 10 + height < innerHeight;
  const top = fits ? at.bottom + 10 : at.top - 10 - height;
  detail.style.left = `${Math.max(8, Math.min(at.left, innerWidth - width - 8))}px`;
  detail.style.top = `${Math.max(8, Math.min(top, innerHeight - height - 8))}px`;
}

function hide() {
  detail.hidden = true;
  clearHighlight();
}

function pin(section, row) {
  const card = cardOf(section, row);
  pinned = { section, row };
  card.scrollIntoView({ block: "nearest", inline: "nearest" });
  card.focus({ preventScroll: true });
  detail.classList.add("pinned");
  show(section, row, card);
  history.replaceState(null, "", `#${section.id}n${row}`);
}

function unpin() {
  pinned = null;
  whole = false;
  detail.classList.remove("pinned");
  hide();
}

function target(event) {
  const part = event.target.closest(".card, .end");
  return part && { part, section: part.closest("section"), row: Number(part.dataset.row) };
}

addEventListener("pointerover", (event) => {
  if (pinned) return;
  const found = target(event);
  if (!found) hide();
  else if (!found.part.classList.contains("at")) show(found.section, found.row, found.part);
});

addEventListener("click", (event) => {
  if (!event.target.isConnected || detail.contains(event.target)) return;
  const found = target(event);
  if (found) pin(found.section, found.row);
  else if (pinned) unpin();
});

function walk(section, row, key) {
  const nodes = nodesOf(section);
  const node = nodes.get(row);
  if (key === "ArrowLeft") return nodes.has(node.parent) ? node.parent : row;
  if (key === "ArrowRight") return node.children.length ? node.children[0] : row;
  const depth = pathTo(nodes, row).length;
  const level = [...nodes.keys()].filter((other) => pathTo(nodes, other).length === depth);
  return level[level.indexOf(row) + (key === "ArrowUp" ? -1 : 1)] ?? row;
}

function nextPrompt(by) {
  const shown = [...index.children].filter((entry) => !entry.hidden);
  const here = shown.findIndex((entry) => entry.classList.contains("here"));
  shown[Math.max(0, Math.min(shown.length - 1, here + by))]?.querySelector("a").click();
}

addEventListener("keydown", (event) => {
  if (event.target.closest("select") || event.ctrlKey || event.metaKey || event.altKey) return;
  const card = document.activeElement.closest(".card");
  if (event.key === "Escape") unpin();
  else if (event.key === "j" || event.key === "k") nextPrompt(event.key === "j" ? 1 : -1);
  else if (card && event.key.startsWith("Arrow")) {
    const section = card.closest("section");
    pin(section, walk(section, Number(card.dataset.row), event.key));
  } else if (card && event.key === "Enter") pin(card.closest("section"), Number(card.dataset.row));
  else return;
  event.preventDefault();
});

// The index: sorted, filtered, and marking the prompt that is being read.
document.getElementById("sort").onchange = (event) => {
  const key = event.target.value;
  const sign = key === "order" ? 1 : -1;
  const entries = [...index.children];
  entries.sort((a, b) => sign * (a.dataset[key] - b.dataset[key]));
  index.append(...entries);
};

document.getElementById("show").onchange = (event) => {
  for (const entry of index.children) {
    entry.hidden = event.target.value !== "" && entry.dataset.kind !== event.target.value;
  }
};

function mark() {
  const sections = [...document.querySelectorAll("section")];
  const here = sections.findLast((s) => s.getBoundingClientRect().top < innerHeight / 3) ?? sections[0];
  for (const entry of index.children) {
    entry.classList.toggle("here", entry.querySelector("a").hash === `#${here?.id}`);
  }
}

document.getElementById("theme").onclick = () => {
  const root = document.documentElement;
  const now = root.style.colorScheme || (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light");
  root.style.colorScheme = now === "dark" ? "light" : "dark";
};

// Captured: trees scroll in boxes of their own, and what is kept open stays beside its card.
addEventListener("scroll", (event) => {
  if (detail.contains(event.target)) return;
  if (event.target === document) mark();
  if (pinned) place(cardOf(pinned.section, pinned.row));
}, { passive: true, capture: true });
mark();

const link = /^#(t\d+)n(\d+)$/.exec(location.hash);
if (link && cardOf(document.getElementById(link[1]), Number(link[2]))) {
  document.getElementById(link[1]).scrollIntoView();
  pin(document.getElementById(link[1]), Number(link[2]));
}
