/**
 * The calls the page makes. In OpenAI's wire format: the models, and a chat completion as a stream.
 * Of this server: its trace. What the server refuses is an `ApiError`.
 */

import { readEvents } from "./sse.js";

/** @typedef {{role: "system" | "user" | "assistant", content: string}} Message */

/**
 * @typedef {object} Chunk one event of a streamed completion
 * @property {{delta?: {content?: string | null}, finish_reason?: string | null}[]} [choices]
 * @property {{prompt_tokens: number, completion_tokens: number} | null} [usage]
 */

export class ApiError extends Error {
  /**
   * @param {string} message
   * @param {{status?: number, param?: string | null}} [details] `status` is 0 when no answer came;
   *   `param` names the field of the request that the server refused
   */
  constructor(message, { status = 0, param = null } = {}) {
    super(message);
    this.name = "ApiError";
    this.status = status;
    this.param = param;
  }
}

/** The stream ended before `[DONE]`: what came is kept, but it is not the whole answer. */
export class InterruptedError extends ApiError {
  constructor() {
    super("The connection ended before the answer did.");
    this.name = "InterruptedError";
  }
}

/**
 * @param {string} key the API key, empty for none
 * @returns {Promise<{id: string}[]>}
 */
export async function listModels(key) {
  const response = await request("/v1/models", { method: "GET" }, key);
  const list = await response.json().catch(() => null);
  if (!Array.isArray(list?.data) || typeof list.data[0]?.id !== "string") {
    throw new ApiError("The server named no model.", { status: response.status });
  }
  return list.data;
}

/**
 * @param {object} body the request, without the fields that ask for a stream
 * @param {string} key the API key, empty for none
 * @param {AbortSignal} signal aborting it ends the request, and the server then drops it
 * @returns {AsyncGenerator<Chunk, void, void>}
 */
export async function* streamChat(body, key, signal) {
  const streamed = { ...body, stream: true, stream_options: { include_usage: true } };
  const response = await request(
    "/v1/chat/completions",
    {
      method: "POST",
      headers: { "Content-Type": "application/json", Accept: "text/event-stream" },
      body: JSON.stringify(streamed),
      signal,
    },
    key,
  );
  if (!response.headers.get("Content-Type")?.startsWith("text/event-stream") || !response.body) {
    throw new ApiError("The server did not answer with a stream.", { status: response.status });
  }
  let done = false; // read on after it, to the end of the body, so that the connection can be used again
  try {
    for await (const event of readEvents(response.body)) {
      if (done) continue;
      if (event.data === "[DONE]") done = true;
      else yield parseChunk(event.data, response.status);
    }
  } catch (error) {
    if (done) return; // nothing is missing
    if (error instanceof ApiError || signal.aborted) throw error;
    throw new InterruptedError(); // fetch reports a connection cut in mid-body as a TypeError
  }
  if (!done) throw new InterruptedError();
}

/**
 * The engine's steps as they happen. Ends, or throws, when the connection does.
 *
 * @param {string} key the API key, empty for none
 * @param {AbortSignal} signal
 * @param {string} engine of several behind a router, empty for any
 * @param {(engines: string[], engine: string) => void} onEngines which there are, and which it is;
 *   none where the server is one engine's
 */
export async function* followTrace(key, signal, engine, onEngines) {
  const headers = { Accept: "text/event-stream" };
  const response = await request(ofEngine("/trace", engine), { headers, signal }, key);
  const engines = response.headers.get("X-Engines")?.split(",") ?? [];
  onEngines(engines, response.headers.get("X-Engine") ?? "");
  if (response.body) yield* readEvents(response.body);
}

/** @param {string} path @param {string} engine */
const ofEngine = (path, engine) => (engine ? `${path}?engine=${encodeURIComponent(engine)}` : path);

/**
 * @param {string} key the API key, empty for none
 * @param {string} engine of several behind a router, empty for any
 * @returns {Promise<Blob>} the steps that the server has kept, one a line
 */
export async function fetchTrace(key, engine) {
  const response = await request(ofEngine("/trace.jsonl", engine), {}, key);
  return response.blob().catch(() => {
    throw new InterruptedError();
  });
}

/** @param {string} data @param {number} status @returns {Chunk} */
function parseChunk(data, status) {
  let chunk;
  try {
    chunk = JSON.parse(data);
  } catch {
    throw new ApiError("The server sent an event that is not JSON.", { status });
  }
  if (typeof chunk !== "object" || chunk === null) {
    throw new ApiError("The server sent an event that is not an object.", { status });
  }
  if (chunk.error) throw errorFrom(chunk, status);
  return chunk;
}

/**
 * @param {string} path
 * @param {RequestInit} options
 * @param {string} key
 * @returns {Promise<Response>} an answer with a status in the 200s
 */
async function request(path, options, key) {
  const headers = new Headers(options.headers);
  if (key) headers.set("Authorization", `Bearer ${key}`);
  let response;
  try {
    response = await fetch(path, { ...options, headers, cache: "no-store" });
  } catch (error) {
    if (options.signal?.aborted) throw error;
    throw new ApiError("The server cannot be reached. Is it still running?");
  }
  if (!response.ok) throw errorFrom(await response.json().catch(() => null), response.status);
  return response;
}

/**
 * @param {any} body `{"error": {"message", "param", …}}`, or anything else
 * @param {number} status
 */
function errorFrom(body, status) {
  const error = body?.error;
  const message = typeof error === "string" ? error : error?.message;
  return new ApiError(message || `The server answered with an error (HTTP ${status}).`, {
    status,
    param: typeof error?.param === "string" ? error.param : null,
  });
}
