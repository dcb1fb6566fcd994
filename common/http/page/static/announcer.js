/**
 * Speaks the answer to a screen reader in whole sentences, a few seconds apart. The transcript itself
 * is no live region: announced token by token, it would drown its reader.
 */

const INTERVAL = 3000; // milliseconds between two announcements

export class Announcer {
  #region;
  #said = 0; // characters of the answer
  #saidAt = 0;

  /** @param {HTMLElement} region an aria-live region out of sight */
  constructor(region) {
    this.#region = region;
  }

  start() {
    this.#said = 0;
    this.say("Sent.");
  }

  /** @param {string} answer the answer so far */
  follow(answer) {
    if (performance.now() - this.#saidAt < INTERVAL) return;
    const fresh = answer.slice(this.#said);
    const end = Math.max(...[". ", "? ", "! ", "\n"].map((mark) => fresh.lastIndexOf(mark)));
    if (end < 0) return;
    this.#said += end + 1;
    this.say(fresh.slice(0, end + 1));
  }

  /** @param {string} answer the whole answer @param {string} summary how it ended */
  finish(answer, summary) {
    this.say(`${answer.slice(this.#said)}\n${summary}`);
    this.#said = answer.length;
  }

  /** @param {string} text */
  say(text) {
    this.#saidAt = performance.now();
    this.#region.textContent = text;
  }
}
