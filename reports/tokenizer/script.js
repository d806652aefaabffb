"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const tree = document.getElementById("tree");
const PAGE = 32;

// Whatever comes from the catalogue becomes text, never markup.
function element(tag, className, ...children) {
  const made = document.createElement(tag);
  if (className) made.className = className;
  made.append(...children);
  return made;
}

const codeOf = (item, level) => data.codes[item * data.width + level];
const nameOf = (item) => data.titles[item] || data.keys[item];
const count = (number) => `${number.toLocaleString("en")} item${number === 1 ? "" : "s"}`;

function boxes(codes) {
  const made = element("span", "codes", ...codes.map((code, level) =>
    element("span", level < data.levels ? `l${level % 8}` : "dedup", String(code))));
  made.setAttribute("role", "img");
  made.setAttribute("aria-label", `codes ${codes.join(", ")}`);
  return made;
}

function describe(item) {
  const codes = [];
  for (let level = 0; level < data.width; level++) codes.push(codeOf(item, level));
  const facts = element("div", "facts", boxes(codes));
  if (data.titles[item]) facts.append(element("span", "", data.keys[item]));
  const category = data.categories[data.category[item]];
  if (category) facts.append(element("span", "", category));
  return element("li", "", element("div", "title", nameOf(item)), facts);
}

// The most frequent category of some items, and its share of them.
function labelOf(items) {
  const counts = new Map();
  for (const item of items) {
    const category = data.categories[data.category[item]];
    if (category) counts.set(category, (counts.get(category) || 0) + 1);
  }
  let best = "", most = 0;
  for (const [category, number] of counts) if (number > most) [best, most] = [category, number];
  if (!best) return "";
  return `${best.split(" > ").slice(-2).join(" > ")} ${Math.round(100 * most / items.length)}%`;
}

// Rows appear some at a time; a prefix is built when it is opened.
function fill(parent, entries, make) {
  let shown = 0;
  const more = element("button", "");
  more.type = "button";
  const add = () => {
    for (const entry of entries.slice(shown, shown + PAGE)) parent.append(make(entry));
    shown = Math.min(shown + PAGE, entries.length);
    more.textContent = `Show more (${(entries.length - shown).toLocaleString("en")} left)`;
    if (shown < entries.length) parent.after(more); else more.remove();
  };
  more.addEventListener("click", add);
  add();
}

function children(items, depth) {
  const groups = new Map();
  for (const item of items) {
    const code = codeOf(item, depth);
    if (!groups.has(code)) groups.set(code, []);
    groups.get(code).push(item);
  }
  return [...groups.entries()].sort((one, other) => one[0] - other[0]);
}

function open(box, items, depth, path) {
  if (depth === data.levels || items.length === 1) {
    const list = element("ul", "items");
    box.append(list);
    fill(list, items, describe);
    return;
  }
  const rows = element("div", "");
  box.append(rows);
  fill(rows, children(items, depth), ([code, group]) => branch(group, depth + 1, [...path, code]));
}

function branch(items, depth, path) {
  const label = items.length === 1 ? nameOf(items[0]) : labelOf(items);
  const row = element("span", "row", boxes(path), element("span", "soft", count(items.length)),
    element("span", "label title", label));
  const made = element("details", "", element("summary", "", row));
  made.dataset.path = path.join(",");
  made.addEventListener("toggle", () => {
    if (!made.open || made.children.length > 1) return;
    const inside = element("div", "inside");
    made.append(inside);
    open(inside, items, depth, path);
  });
  return made;
}

const everything = data.keys.map((_, item) => item);
open(tree, everything, 0, []);

const search = document.getElementById("search"), found = document.getElementById("found");
const texts = data.keys.map((key, item) => `${data.titles[item]} ${key}`.toLowerCase());
let timer = 0;
function look() {
  const words = search.value.trim().toLowerCase().split(/\s+/).filter(Boolean);
  const items = words.length ? everything.filter((item) => words.every((word) => texts[item].includes(word))) : [];
  document.getElementById("hits").textContent = !words.length ? "" :
    `${count(items.length)} found${items.length > 20 ? ", the first 20 shown" : ""}`;
  found.replaceChildren(...items.slice(0, 20).map(withNearby));
}

// A hit, and the prefixes that it shares with others, to be opened.
function withNearby(item) {
  const hit = describe(item), path = [];
  let group = everything;
  for (let level = 0; level < data.levels; level++) {
    path.push(codeOf(item, level));
    group = group.filter((other) => codeOf(other, level) === path[level]);
    if (group.length > 1) hit.append(branch(group, level + 1, [...path]));
  }
  return hit;
}
search.addEventListener("input", () => { clearTimeout(timer); timer = setTimeout(look, 120); });
