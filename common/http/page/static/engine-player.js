/**
 * What is looked at: the newest step of the live engine; or, paused, any of the steps until then; or
 * those of a saved trace, in the rhythm in which they once happened.
 */

/** @typedef {import("./engine-history.js").History} History */

const IDLE = 0.5; // seconds of the reader's time that a pause between two steps takes at most

export class Player {
  #live;
  /** @type {History | null} a copy of the live one, or a file's; null while the newest step is shown */
  #still = null;
  #position = -1; // in the still one
  #time = 0; // seconds on the trace's clock
  #tickedAt = 0; // milliseconds on the reader's
  #isRunning = false; // whether the clock runs
  #isFile = false;
  /** Of the trace's clock against the reader's. */
  speed = 1;

  /** @param {History} live */
  constructor(live) {
    this.#live = live;
  }

  /** Whether a saved trace is shown. */
  get isFile() {
    return this.#isFile;
  }

  /** Whether what is shown goes on by itself. */
  get isPlaying() {
    return this.#still === null || this.#isRunning;
  }

  /** What the server says, also while something else is shown. */
  get live() {
    return this.#live;
  }

  get history() {
    return this.#still ?? this.#live;
  }

  /** Of the step that is shown; `begin - 1` where there is none. */
  get position() {
    const { begin, end } = this.history;
    if (this.#still === null) return end - 1;
    return Math.min(Math.max(this.#position, begin), end - 1);
  }

  /** Steps were missed, or this is another engine. @param {History} live */
  restart(live) {
    this.#live = live;
  }

  /** Show a saved trace. @param {History} history */
  open(history) {
    this.#still = history;
    this.#isFile = true;
    this.seek(history.begin);
  }

  backToLive() {
    this.#still = null;
    this.#isFile = false;
    this.#isRunning = false;
  }

  /** Show one step and stay there, whatever the engine does. @param {number} position */
  seek(position) {
    this.#still ??= this.#live.copy();
    this.#position = position;
    this.#isRunning = false;
  }

  pause() {
    this.seek(this.position);
  }

  /** Go on: a file from where it stands, or from its beginning; else with the newest live step. */
  play() {
    if (!this.#isFile) {
      this.backToLive();
      return;
    }
    const { begin, end } = this.history;
    if (this.position === end - 1) this.#position = begin;
    this.#time = this.history.entry(this.position)?.record.end ?? 0;
    this.#tickedAt = performance.now();
    this.#isRunning = true;
  }

  /** Go on to what the clock says, if it runs. */
  tick() {
    if (!this.#isRunning) return;
    const now = performance.now();
    this.#time += ((now - this.#tickedAt) / 1000) * this.speed;
    this.#tickedAt = now;
    let position = this.position;
    for (let next; (next = this.history.entry(position + 1)); position++) {
      this.#time = Math.max(this.#time, next.record.end - IDLE * this.speed);
      if (next.record.end > this.#time) break;
    }
    this.#position = position;
    if (position === this.history.end - 1) this.#isRunning = false;
  }
}
