/**
 * One conversation: the messages so far, and the turn that is running. It knows nothing of the page;
 * it reports each change of a turn through a callback.
 */

import { ApiError, InterruptedError, streamChat } from "./api.js";

/** @typedef {import("./api.js").Message} Message */

/**
 * How a turn ended. `stopped`: by the user. `interrupted`: the connection broke. `failed`: the server
 * said so. After the last three the answer is partial, and possibly empty.
 * @typedef {"complete" | "stopped" | "interrupted" | "failed"} Ending
 */

/** One question with its answer as far as it has come. */
export class Turn {
  answer = "";
  /** Tokens of the answer: events with text while it streams, the server's count once it has come. */
  numTokens = 0;
  isExact = false;
  /** @type {Ending | null} */
  ending = null;
  /** @type {string | null} the server's reason: `stop`, `length`, … */
  finishReason = null;
  /** @type {ApiError | null} */
  error = null;

  sentAt = performance.now(); // milliseconds, as the next two
  /** @type {number | null} */
  firstTextAt = null;
  /** @type {number | null} */
  lastTextAt = null;

  /** @param {string} question */
  constructor(question) {
    this.question = question;
  }

  /** @returns {number | null} milliseconds from sending to the first text */
  get timeToFirstToken() {
    return this.firstTextAt === null ? null : this.firstTextAt - this.sentAt;
  }

  /** @returns {number | null} tokens a second after the first, or null where there is no second one */
  get tokensPerSecond() {
    if (this.firstTextAt === null || this.lastTextAt === null || this.numTokens < 2) return null;
    const seconds = (this.lastTextAt - this.firstTextAt) / 1000;
    return seconds > 0 ? (this.numTokens - 1) / seconds : null;
  }

  /** @param {import("./api.js").Chunk} chunk */
  add(chunk) {
    const choice = chunk.choices?.[0];
    const text = choice?.delta?.content;
    if (text) {
      this.lastTextAt = performance.now();
      this.firstTextAt ??= this.lastTextAt;
      this.answer += text;
      if (!this.isExact) this.numTokens += 1;
    }
    if (choice?.finish_reason) this.finishReason = choice.finish_reason;
    if (chunk.usage) {
      this.numTokens = chunk.usage.completion_tokens;
      this.isExact = true;
    }
  }
}

export class Chat {
  /** @type {Message[]} */
  #messages = [];
  /** @type {AbortController | null} */
  #running = null;

  get isRunning() {
    return this.#running !== null;
  }

  /**
   * Ask, and follow the answer to its end. The turn joins the history when it is complete or has any
   * text; a turn without an answer leaves no trace, so that roles keep alternating.
   *
   * @param {Turn} turn
   * @param {object} options the request's other fields: model, temperature, …
   * @param {string} system the system prompt, empty for none
   * @param {string} key the API key, empty for none
   * @param {() => void} onChange called after each piece of the answer
   */
  async run(turn, options, system, key, onChange) {
    const running = new AbortController();
    const history = this.#messages;
    this.#running = running;
    /** @type {Message} */
    const question = { role: "user", content: turn.question };
    const prefix = system === "" ? [] : [{ role: "system", content: system }];
    const body = { ...options, messages: [...prefix, ...history, question] };
    try {
      for await (const chunk of streamChat(body, key, running.signal)) {
        turn.add(chunk);
        onChange();
      }
      turn.ending = "complete";
    } catch (error) {
      turn.ending = endingAfter(error, running.signal);
      if (turn.ending !== "stopped") turn.error = /** @type {ApiError} */ (error);
    } finally {
      if (this.#running === running) this.#running = null;
    }
    if (turn.ending === "complete" || turn.answer !== "") {
      history.push(question, { role: "assistant", content: turn.answer });
    }
  }

  /** Abort the running request, if there is one. Its text so far is kept. */
  stop() {
    this.#running?.abort();
  }

  /** Stop, and forget everything. A turn still ending writes to the old history. */
  clear() {
    this.stop();
    this.#running = null;
    this.#messages = [];
  }
}

/** @param {unknown} error @param {AbortSignal} signal @returns {Ending} */
function endingAfter(error, signal) {
  if (signal.aborted) return "stopped";
  if (error instanceof InterruptedError) return "interrupted";
  if (error instanceof ApiError) return "failed";
  throw error; // a mistake of this page's own
}
