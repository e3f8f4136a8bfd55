/* Hits, timings and notices as elements. Text from the corpus reaches the page only as text nodes, never as markup. */

/** An element: el("p", {className: "muted"}, "text", otherElement, ...). */
export function el(tag, properties = {}, ...children) {
  const { dataset, ...rest } = properties;
  const element = Object.assign(document.createElement(tag), rest);
  Object.assign(element.dataset, dataset);
  element.append(...children);
  return element;
}

/** One result. `onFilter(field, value)` is called when a metadata chip is pressed, `onPicture(picture)` when its picture
    is to be searched with; `why` are elements that stand below the text. */
export function hitElement(hit, rank, onFilter, onPicture, why = []) {
  const text = [...hit.text]; // the server counts highlights in code points, JavaScript strings in UTF-16 units
  const { title: inTitle = [], text: inText = [], snippet = [0, text.length] } = hit.highlights ?? {};
  const textId = `text-${rank}`;
  const body = el("p", { className: "text", id: textId });
  const name = hit.title ? marked([...hit.title], inTitle) : [hit.id];
  const title = el("button", { type: "button", className: "open" }, ...name);
  const show = (open) => {
    title.setAttribute("aria-expanded", open);
    body.classList.toggle("full", open);
    body.tabIndex = open ? 0 : -1; // a long text scrolls, so the keyboard must be able to reach it
    body.replaceChildren(...(open ? marked(text, inText) : stretch(text, inText, snippet)));
  };
  title.setAttribute("aria-controls", textId);
  title.addEventListener("click", () => show(title.getAttribute("aria-expanded") !== "true"));
  show(false);
  const head = el("div", { className: "head" }, el("span", { className: "rank" }, String(rank)), el("h2", {}, title),
    el("span", { className: "score", title: scoreTitle(hit) }, formatScore(hit.score)));
  const id = hit.title && !hit.title.startsWith(hit.id) ? [el("p", { className: "id" }, hit.id)] : [];
  const below = chips(hit.metadata ?? {}, onFilter);
  const item = el("li", { className: "hit", dataset: { id: hit.id } }, head, ...id, body, ...why, below);
  if (hit.image) {
    item.classList.add("pictured");
    item.prepend(pictureOf(hit));
    below.prepend(searchWith({ data: hit.image, name: hit.title || hit.text || hit.id }, onPicture));
  }
  return item;
}

function pictureOf({ image, text, title, id }) {
  const picture = el("img", { loading: "lazy", decoding: "async", alt: text || title || `Picture ${id}` });
  picture.src = image; // after `loading`, which it would not wait for otherwise
  return el("div", { className: "picture" }, picture);
}

function searchWith(picture, onPicture) {
  const button = el("button", { type: "button", className: "with" }, "Search with this picture");
  button.addEventListener("click", () => onPicture(picture));
  return button;
}

/** The bar of stages and its legend. `timings` maps stages to milliseconds; what no stage claims of `total` is "other".
    In a hybrid search the word side runs while the dense one does, so it takes no length of the bar. */
export function showTimings(bar, legend, { total, ...timings }) {
  const inTurn = Object.entries(timings).filter(([stage]) => stage !== "bm25" || !("encode" in timings));
  const other = total - inTurn.reduce((sum, [, ms]) => sum + ms, 0);
  if (other > 0) inTurn.push(["other", other]);
  bar.replaceChildren(...inTurn.map(([stage, ms]) => {
    const part = el("i", { dataset: { stage }, title: `${stage}: ${formatMs(ms)}` });
    part.style.flexGrow = ms;
    return part;
  }));
  const alongside = "encode" in timings && "bm25" in timings ? [["bm25", timings.bm25]] : [];
  legend.replaceChildren(...[...inTurn, ...alongside].map(([stage, ms], i) => {
    const name = i < inTurn.length ? stage : `${stage}, meanwhile`;
    return el("div", { dataset: { stage } }, el("dt", {}, name), el("dd", {}, formatMs(ms)));
  }));
}

/** A message where results would stand: a heading, a sentence, and what can be done about it. */
export function notice(section, heading, sentence, action = null, look = "") {
  section.className = look;
  section.replaceChildren(el("h2", {}, heading), el("p", {}, sentence), ...(action ? [action] : []));
  section.hidden = false;
}

export function formatMs(ms) {
  return ms < 10 ? `${ms.toFixed(1)} ms` : ms < 1000 ? `${Math.round(ms)} ms` : `${(ms / 1000).toFixed(2)} s`;
}

function scoreTitle({ retrieval_score: first }) {
  return first === undefined ? "score" : `reranker's score; found with ${formatScore(first)}`;
}

function formatScore(score) {
  return Math.abs(score) < 10 ? score.toFixed(4) : score.toFixed(2);
}

function chips(metadata, onFilter) {
  const fields = Object.entries(metadata).filter(([, value]) => value !== null && value !== "" && typeof value !== "object");
  return el("div", { className: "chips" }, ...fields.map(([field, value]) => {
    const chip = el("button", { type: "button", title: `Only ${field}: ${value}` }, `${field}: ${value}`);
    chip.addEventListener("click", () => onFilter(field, value));
    return chip;
  }));
}

/** `characters` as text nodes and <mark>s; `spans` are [start, end), ascending and apart from one another. */
function marked(characters, spans) {
  const nodes = [];
  let end = 0;
  for (const [from, to] of spans) {
    nodes.push(characters.slice(end, from).join(""), el("mark", {}, characters.slice(from, to).join("")));
    end = to;
  }
  return [...nodes, characters.slice(end).join("")];
}

/** The part of a text that is shown before it is opened. */
function stretch(characters, spans, [start, end]) {
  const inside = spans.filter(([from, to]) => from >= start && to <= end).map(([from, to]) => [from - start, to - start]);
  const before = start > 0 ? "… " : "";
  const after = end < characters.length ? " …" : "";
  return [before, ...marked(characters.slice(start, end), inside), after];
}
