/**
 * The server's trace as it happens, for as long as somebody looks: connects, checks what comes, and
 * connects again when the connection breaks, later each time.
 */

import { ApiError, followTrace } from "./api.js";
import { readExperts, readRecord, readState } from "./engine-records.js";

/**
 * `none`: this server has no trace. `locked`: it wants another key; `start` with it.
 * @typedef {"connecting" | "live" | "away" | "locked" | "none"} FeedStatus
 */

const FIRST_WAIT = 1000; // milliseconds, doubled each time
const LONGEST_WAIT = 30000;

export class Feed {
  #events;
  #wait = FIRST_WAIT;
  #timer = 0;
  #key = "";
  #engine = "";
  /** @type {AbortController | null} */
  #running = null;

  /**
   * @param {{
   *   onState: (state: import("./engine-state.js").EngineState) => void,
   *   onRecord: (record: import("./engine-state.js").StepRecord) => void,
   *   onExperts: (experts: import("./engine-experts.js").Experts) => void,
   *   onStatus: (status: FeedStatus) => void,
   *   onEngines: (engines: string[], engine: string) => void,
   * }} events `onState` is called first, and again when steps were missed
   */
  constructor(events) {
    this.#events = events;
  }

  get isRunning() {
    return this.#running !== null || this.#timer !== 0;
  }

  /**
   * Connect, or connect anew.
   *
   * @param {string} key the API key, empty for none
   * @param {string} engine of several behind a router, empty for any
   */
  start(key, engine) {
    this.stop();
    this.#key = key;
    this.#engine = engine;
    this.#wait = FIRST_WAIT;
    this.#events.onStatus("connecting");
    this.#connect();
  }

  stop() {
    clearTimeout(this.#timer);
    this.#timer = 0;
    this.#running?.abort();
    this.#running = null;
  }

  async #connect() {
    const running = new AbortController();
    this.#running = running;
    let status = 0;
    try {
      for await (const event of this.#follow(running.signal)) {
        if (event.type === "state") {
          this.#events.onState(readState(event.data));
          this.#events.onStatus("live");
          this.#wait = FIRST_WAIT;
        } else if (event.type === "message") {
          this.#events.onRecord(readRecord(event.data));
        } else if (event.type === "experts") {
          this.#events.onExperts(readExperts(event.data));
        }
      }
    } catch (error) {
      if (error instanceof ApiError) status = error.status;
    }
    if (this.#running !== running) return; // stopped, or started anew
    running.abort();
    this.#running = null;
    this.#afterEnd(status);
  }

  /** @param {AbortSignal} signal */
  #follow(signal) {
    return followTrace(this.#key, signal, this.#engine, this.#events.onEngines);
  }

  /** @param {number} status of the server's refusal, 0 where the connection broke */
  #afterEnd(status) {
    if (status === 401 || status === 404) {
      this.#events.onStatus(status === 401 ? "locked" : "none");
      return;
    }
    this.#events.onStatus("away");
    this.#timer = setTimeout(() => {
      this.#timer = 0;
      this.#connect();
    }, this.#wait);
    this.#wait = Math.min(2 * this.#wait, LONGEST_WAIT);
  }
}
