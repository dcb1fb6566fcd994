/**
 * Server-sent events out of a fetch body.
 *
 * EventSource cannot POST and cannot send a header, so the page reads the body itself. The network
 * cuts it anywhere: inside a line, between CR and LF, inside a character. The parser keeps what is
 * unfinished and gives out an event when its blank line has come.
 */

/** @typedef {{type: string, data: string}} SseEvent */

export class SseParser {
  #line = ""; // the line that has no end yet
  #endedInCr = false; // an LF that comes next belongs to the CR before it
  #type = "";
  /** @type {string[]} */
  #data = [];

  /**
   * @param {string} text the next piece of the stream, cut anywhere
   * @returns {SseEvent[]} the events that this piece completed
   */
  push(text) {
    if (text === "") return [];
    const piece = this.#endedInCr && text.startsWith("\n") ? text.slice(1) : text;
    this.#endedInCr = text.endsWith("\r");
    const lines = (this.#line + piece).split(/\r\n|\r|\n/);
    this.#line = lines.pop() ?? "";
    return lines.flatMap((line) => this.#endLine(line));
  }

  /** @param {string} line @returns {SseEvent[]} one event when the line is the blank one that ends it */
  #endLine(line) {
    if (line === "") return this.#endEvent();
    const colon = line.indexOf(":");
    if (colon === 0) return []; // a comment: servers send them as pings
    const field = colon < 0 ? line : line.slice(0, colon);
    const value = colon < 0 ? "" : line.slice(colon + 1).replace(/^ /, "");
    if (field === "data") this.#data.push(value);
    if (field === "event") this.#type = value;
    return []; // id and retry serve reconnection; an answer is never resumed
  }

  /** @returns {SseEvent[]} */
  #endEvent() {
    const events =
      this.#data.length > 0
        ? [{ type: this.#type || "message", data: this.#data.join("\n") }]
        : [];
    this.#type = "";
    this.#data = [];
    return events;
  }
}

/**
 * The events of a body, each as soon as it is whole. An event without its blank line at the end of
 * the body is dropped, as the specification says.
 *
 * @param {ReadableStream<Uint8Array>} body
 * @returns {AsyncGenerator<SseEvent, void, void>}
 */
export async function* readEvents(body) {
  const parser = new SseParser();
  const decoder = new TextDecoder(); // holds back the first bytes of a character that was cut
  const reader = body.getReader();
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      yield* parser.push(decoder.decode(value, { stream: true }));
    }
  } finally {
    reader.cancel().catch(() => {}); // a broken body rejects; its error has already been thrown
  }
}
