/* The server's side of the page: one call, one kind of error, and the API key where the server asks for one.
   The contract is docs/serving_api.md; the key stays in this tab (sessionStorage) and goes nowhere but to this host. */

const KEY = "raydr-api-key";

export const apiKey = {
  get: () => sessionStorage.getItem(KEY) ?? "",
  set: (key) => sessionStorage.setItem(KEY, key),
};

export class ApiError extends Error {
  /** status 0: the server was not reached. retryAfterS: how long the server asks to wait, in seconds. */
  constructor(status, message, { retryAfterS = null, requestId = null } = {}) {
    super(message);
    Object.assign(this, { status, retryAfterS, requestId });
  }
}

/** The answer of POST /v1/search to one query. */
export async function search({ query, picture, instruction, mode, k, rerank, explain, filters }, signal) {
  const body = { mode, k, on_shard_failure: "partial", fields: ["title", "text", "highlights", "metadata", "image"] };
  if (query) body.query = query;
  if (picture) body.image = picture.data;
  if (instruction && mode !== "bm25") body.instruction = instruction;
  if (rerank) Object.assign(body, { rerank: true, reranker: rerank, on_rerank_failure: "keep_order" });
  if (explain && mode !== "bm25") body.explain = true;
  if (Object.keys(filters).length) body.filters = filters;
  return call("v1/search", { method: "POST", body: JSON.stringify(body), signal });
}

/** What the server searches, {index_version, num_passages, modes, modalities, ...} or null, and its rerankers' names. */
export async function served() {
  const { data } = await call("v1/models", {});
  const able = (capability) => data.filter((model) => model.capabilities.includes(capability));
  return { model: able("search")[0] ?? null, rerankers: able("rerank").map((model) => model.id) };
}

async function call(path, options) {
  const headers = { "Content-Type": "application/json" };
  if (apiKey.get()) headers.Authorization = `Bearer ${apiKey.get()}`;
  let response;
  try {
    response = await fetch(path, { ...options, headers });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError(0, "The server did not answer.");
  }
  const text = await response.text();
  let body;
  try {
    body = JSON.parse(text);
  } catch {
    throw new ApiError(response.status, text.trim() || `The server answered ${response.status} without a message.`);
  }
  if (response.ok) return body;
  throw new ApiError(response.status, body.error?.message ?? `The server answered ${response.status}.`, {
    retryAfterS: Number(response.headers.get("Retry-After")) || null,
    requestId: response.headers.get("X-Request-ID"),
  });
}
