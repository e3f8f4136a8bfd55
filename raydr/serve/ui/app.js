/* The search page: reads the form, asks the server, shows the answer, keeps the address in step with both.
   state.js holds what is searched for, api.js talks to the server, render.js and explain.js make elements, pictures.js
   reads pictures. */

import { ApiError, apiKey, search, served } from "./api.js";
import { explanationElements } from "./explain.js";
import { el, formatMs, hitElement, notice, showTimings } from "./render.js";
import { NoPictureError, readPicture, watchFiles } from "./pictures.js";
import { MODES, fits, fromAddress, toAddress } from "./state.js";

const $ = (id) => document.getElementById(id);
const form = $("search");
const main = document.querySelector("main");
let state = stateOfPage();
let model = null; // what the server said of its index and encoder
let pending = null; // AbortController of the search under way
let shownVersion = null; // the index version in the corner

async function run() {
  pending?.abort();
  showForm();
  if (!state.query && !state.picture) return showStart();
  const request = (pending = new AbortController());
  setBusy(true);
  const started = performance.now();
  try {
    const answer = await search(state, request.signal);
    showAnswer(answer, performance.now() - started);
  } catch (error) {
    if (error.name === "AbortError") return; // a newer search took over, and it owns the page now
    showError(error);
  }
}

function stateOfPage() {
  return { ...fromAddress(location.search), picture: history.state?.picture ?? null };
}

/** A changed search: a new entry in the history, so that Back returns to the one before. */
function go(change) {
  const before = state.picture;
  state = { ...state, ...change };
  if (!fits(state.mode, state)) state.mode = "dense";
  const address = toAddress(state);
  const moved = new URL(address, location.href).href !== location.href || state.picture !== before;
  if (moved) history.pushState({ picture: state.picture }, "", address);
  run();
}

const readsPictures = () => model?.modalities.some((modality) => modality.includes("image")) ?? false;
/** What is typed, also where it was not searched for yet. */
const typed = () => ({ query: $("q").value.trim(), instruction: $("instruction").value.trim() });

/** Searches with a picture from a file, and with the words that are there. */
async function usePicture(file) {
  try {
    go({ ...typed(), picture: await readPicture(file) });
    $("q").focus();
  } catch (error) {
    if (!(error instanceof NoPictureError)) throw error;
    notice($("notice"), "No picture", error.message, null, "error");
    $("status").textContent = error.message;
  }
}

/** What is searched for, in words. */
function asked() {
  if (!state.picture) return state.query;
  return state.query ? `${state.query} and a picture` : "a picture";
}

function showForm() {
  $("q").value = state.query;
  $("instruction").value = state.instruction;
  $("picture").hidden = state.picture === null;
  if (state.picture) $("thumbnail").src = state.picture.data;
  $("thumbnail").alt = state.picture ? `The query's picture: ${state.picture.name || "without a name"}` : "";
  $("q").placeholder = state.picture ? "Add words, such as what should differ" : "Ask in your own words";
  form.elements.mode.value = state.mode;
  showModes();
  if (![...$("k").options].some((option) => Number(option.value) === state.k)) $("k").append(new Option(state.k));
  $("k").value = state.k;
  if (![...$("rerank").options].some((option) => option.value === state.rerank)) $("rerank").append(new Option(state.rerank));
  $("rerank").value = state.rerank;
  $("explain").checked = state.explain;
  $("filters").replaceChildren(...Object.entries(state.filters).map(([field, value]) => {
    const shown = Array.isArray(value) ? value.join(", ") : typeof value === "object" ? JSON.stringify(value) : value;
    const chip = el("button", { type: "button", title: "Remove this filter" }, `${field}: ${shown}`);
    chip.addEventListener("click", () => {
      const { [field]: _, ...filters } = state.filters;
      go({ filters });
      $("q").focus();
    });
    return el("li", {}, chip);
  }));
  document.title = asked() ? `${asked()} · raydr` : "raydr";
}

function showModes() {
  for (const radio of form.elements.mode) {
    radio.disabled = !(model?.modes ?? MODES).includes(radio.value) || !fits(radio.value, state);
  }
}

function showStart() {
  clear();
  document.body.classList.add("start");
}

function showAnswer(answer, roundTripMs) {
  clear();
  const { hits, timings_ms: timings } = answer;
  $("count").textContent = hits.length === 1 ? "1 result" : `${hits.length} results`;
  $("took").textContent = `in ${formatMs(timings.total)} (${formatMs(roundTripMs)} round trip)`;
  showTimings($("stages"), $("legend"), timings);
  $("summary").hidden = false;
  if (answer.index_version !== shownVersion) showServed();
  $("status").textContent = `${$("count").textContent} for ${asked()}`;
  const onFilter = (field, value) => {
    go({ filters: { ...state.filters, [field]: value } });
    $("results").focus(); // the pressed chip goes away with its result
  };
  const onPicture = (picture) => {
    go({ query: "", picture });
    $("q").focus();
  };
  $("results").classList.toggle("gallery", hits.some((hit) => hit.image));
  $("results").replaceChildren(...hits.map((hit, i) => {
    return hitElement(hit, i + 1, onFilter, onPicture, explanationElements(hit.explanation));
  }));
  const notReranked = answer.reranking && !answer.reranking.applied
    ? `${answer.reranking.reason}. These are the hits in their first order.` : "";
  if (answer.partial) {
    const sentence = `${missing(answer.missing_shards)} ${notReranked}`.trim();
    notice($("notice"), "Not everything was searched", sentence, retryButton(0), "error");
    $("status").textContent += `. ${sentence}`;
  } else if (notReranked) {
    notice($("notice"), "Not reranked", notReranked);
  } else if (!hits.length) {
    const filtered = Object.keys(state.filters).length > 0;
    notice($("notice"), "Nothing found", filtered
      ? "Nothing passes the filters above. Take one away and search again."
      : "No passage matches this query. BM25 needs a word in common; dense mode goes by meaning.");
  }
}

/** What an answer lacks, in a sentence. */
function missing(shards) {
  const count = shards.reduce((sum, shard) => sum + shard.num_passages, 0).toLocaleString("en");
  const names = shards.length === 1 ? `Shard ${shards[0].shard}` : `Shards ${shards.map(({ shard }) => shard).join(", ")}`;
  return `${names} did not answer, so ${count} passages are not among these results.`;
}

function showError(error) {
  clear();
  if (!(error instanceof ApiError)) throw error; // a fault of this page belongs in the console
  const { status, message, retryAfterS, requestId } = error;
  const say = (heading, sentence, action, look = "error") => {
    notice($("notice"), heading, sentence, action, look);
    $("status").textContent = `${heading}. ${sentence}`;
  };
  if (status === 401) {
    const refused = apiKey.get() !== "";
    say(refused ? "This API key was refused" : "This server asks for an API key",
      "The key stays in this tab and is forgotten when you close it.", keyForm(), refused ? "error" : "");
  } else if (status === 429) {
    const waitS = retryAfterS ?? 1;
    say("Too many requests", `The server asks to wait ${waitS} s.`, retryButton(waitS));
  } else if (status === 0) {
    say("No connection", "The server did not answer. Is it still running?", retryButton(0));
  } else if (status >= 500) {
    say("The server could not answer", requestId ? `${message} (request ${requestId})` : message, retryButton(retryAfterS ?? 0));
  } else {
    say("The server refused this search", message, null);
  }
}

function keyForm() {
  const field = el("input", { type: "password", required: true, ariaLabel: "API key", placeholder: "API key", autocomplete: "off" });
  const keys = el("form", {}, field, el("button", { className: "primary" }, "Continue"));
  keys.addEventListener("submit", (event) => {
    event.preventDefault();
    apiKey.set(field.value.trim());
    run();
  });
  setTimeout(() => field.focus());
  return keys;
}

/** A button that counts down `waitS` seconds before it can be pressed. */
function retryButton(waitS) {
  const button = el("button", { type: "button", className: "primary" });
  const end = performance.now() + waitS * 1000;
  const tick = () => {
    const leftS = Math.ceil((end - performance.now()) / 1000);
    button.disabled = leftS > 0;
    button.textContent = leftS > 0 ? `Try again in ${leftS} s` : "Try again";
    if (leftS > 0) setTimeout(tick, 250);
  };
  tick();
  button.addEventListener("click", run);
  return button;
}

function clear() {
  setBusy(false);
  document.body.classList.remove("start");
  $("results").replaceChildren();
  $("summary").hidden = $("notice").hidden = true;
  $("status").textContent = "";
}

function setBusy(busy) {
  main.setAttribute("aria-busy", busy);
  $("progress").hidden = !busy;
}

/** Number of passages, index version, modes and rerankers; asked again when an answer comes from another index. */
async function showServed() {
  // Without it the page still works, and a search says what is wrong.
  const { model: live, rerankers } = await served().catch(() => ({ model: null }));
  if (!live) return;
  model = live;
  const known = new Set([...$("rerank").options].map((option) => option.value));
  $("rerank").append(...rerankers.filter((name) => !known.has(name)).map((name) => new Option(name)));
  $("rerankers").hidden = rerankers.length === 0;
  shownVersion = model.index_version;
  const passages = `${model.num_passages.toLocaleString("en")} passages`;
  $("index-info").textContent = `${passages} · index ${shownVersion}`;
  $("heading").textContent = `Search ${passages}`;
  $("choose").hidden = !readsPictures();
  document.body.classList.toggle("reads-pictures", readsPictures()); // of hits that came before this was known, too
  $("instructed").hidden = !model.reads_instructions;
  $("explains").hidden = !model.explains;
  showModes();
}

/** Moves the focus `step` results on; above the first one is the query. */
function move(step) {
  const titles = [...document.querySelectorAll(".hit .open")];
  const current = document.activeElement.closest(".hit")?.querySelector(".open");
  const target = titles.indexOf(current) + step;
  if (target < 0) return $("q").focus();
  const next = titles[Math.min(target, titles.length - 1)];
  next?.focus({ preventScroll: true });
  next?.closest(".hit").scrollIntoView({ block: "nearest" });
}

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  const { key, target } = event;
  const typing = target.matches("input:not([type=radio], [type=checkbox], [type=file]), select");
  const hasOwnArrows = target.matches("[type=radio], select, .full");
  if (key === "/" && !typing) $("q").select();
  else if (key === "Escape" && (target === $("q") || !typing)) {
    $("q").focus();
    go({ query: "", picture: null });
  } else if ((key === "ArrowDown" && !hasOwnArrows) || (key === "j" && !typing)) move(1);
  else if ((key === "ArrowUp" && !hasOwnArrows) || (key === "k" && !typing)) move(-1);
  else return;
  event.preventDefault();
});

form.addEventListener("submit", (event) => {
  event.preventDefault();
  go(typed());
});
form.addEventListener("change", (event) => {
  if ([$("q"), $("instruction"), $("file")].includes(event.target)) return;
  go({ ...typed(), mode: form.elements.mode.value, k: Number($("k").value), rerank: $("rerank").value, explain: $("explain").checked });
});
$("remove").addEventListener("click", () => {
  go({ ...typed(), picture: null });
  $("q").focus();
});
watchFiles($("choose"), $("file"), readsPictures, usePicture);
addEventListener("popstate", () => {
  state = stateOfPage();
  run();
});

run();
showServed();
