/* What is being searched for, as an object and as the address of the page: a link to the page is a link to its results.

   {query, mode, k, rerank, explain, instruction, filters}  <->  ?q=...&mode=hybrid&k=20&rerank=first&explain=1&filters={...}
   (defaults are left out). A picture is too long for an address: it is kept with the entry in the browser's history. */

export const MODES = ["dense", "bm25", "hybrid"];
const DEFAULTS = { query: "", mode: "dense", k: 10, rerank: "", explain: false, instruction: "", filters: {} };

export function fromAddress(search) {
  const params = new URLSearchParams(search);
  const mode = params.get("mode");
  const k = Number.parseInt(params.get("k"), 10);
  return {
    query: params.get("q") ?? DEFAULTS.query,
    mode: MODES.includes(mode) ? mode : DEFAULTS.mode,
    k: k > 0 ? k : DEFAULTS.k,
    rerank: params.get("rerank") ?? DEFAULTS.rerank,
    explain: params.get("explain") === "1",
    instruction: params.get("instruction") ?? DEFAULTS.instruction,
    filters: parseFilters(params.get("filters")),
  };
}

export function toAddress({ query, mode, k, rerank, explain, instruction, filters }) {
  const params = new URLSearchParams();
  if (query) params.set("q", query);
  if (mode !== DEFAULTS.mode) params.set("mode", mode);
  if (k !== DEFAULTS.k) params.set("k", k);
  if (rerank) params.set("rerank", rerank);
  if (explain) params.set("explain", "1");
  if (instruction) params.set("instruction", instruction);
  if (Object.keys(filters).length) params.set("filters", JSON.stringify(filters));
  return params.size ? `?${params}` : location.pathname;
}

/** Whether a mode can be searched in with what is asked: only words are searched by words. */
export function fits(mode, { query, picture }) {
  return picture === null || mode === "dense" || (mode === "hybrid" && query !== "");
}

function parseFilters(text) {
  try {
    const filters = JSON.parse(text ?? "{}");
    return filters !== null && typeof filters === "object" && !Array.isArray(filters) ? filters : {};
  } catch {
    return {}; // a hand-edited address: search without the filters and show none
  }
}
