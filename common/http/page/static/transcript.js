/**
 * The turns on the page: each question, its answer as it grows, and under it what it cost. The view
 * stays at the newest line unless the reader has scrolled up.
 */

import { AnswerText } from "./answer.js";

/** @typedef {import("./chat.js").Turn} Turn */

const AT_END = 32; // pixels from the bottom that still count as the bottom

export class Transcript {
  #scroller;
  #turns;
  #jump;
  #isPinned = true;
  #lastTop = 0;

  /**
   * @param {HTMLElement} scroller
   * @param {HTMLElement} turns the list in it, empty
   * @param {HTMLButtonElement} jump leads back to the newest line
   */
  constructor(scroller, turns, jump) {
    this.#scroller = scroller;
    this.#turns = turns;
    this.#jump = jump;
    scroller.addEventListener("scroll", () => this.#onScroll(), { passive: true });
    jump.addEventListener("click", () => this.pin());
    new ResizeObserver(() => this.#follow()).observe(scroller);
    new ResizeObserver(() => this.#follow()).observe(turns);
  }

  /** @param {Turn} turn @returns {TurnView} */
  add(turn) {
    const view = new TurnView(turn);
    this.#turns.append(view.element);
    this.pin();
    return view;
  }

  clear() {
    this.#turns.replaceChildren();
    this.pin();
  }

  /** Go to the newest line and stay with it. */
  pin() {
    this.#isPinned = true;
    this.#follow();
  }

  #follow() {
    if (this.#isPinned) this.#scroller.scrollTop = this.#scroller.scrollHeight;
    this.#jump.hidden = this.#isPinned;
  }

  /** Only a move upwards unpins: text that grows between two events must not. */
  #onScroll() {
    const { scrollTop, scrollHeight, clientHeight } = this.#scroller;
    if (scrollHeight - scrollTop - clientHeight <= AT_END) this.#isPinned = true;
    else if (scrollTop < this.#lastTop) this.#isPinned = false;
    this.#lastTop = scrollTop;
    this.#jump.hidden = this.#isPinned;
  }
}

export class TurnView {
  #turn;
  #answer;
  #stats;
  #frame = 0; // the pending repaint
  #clock;

  /** @param {Turn} turn */
  constructor(turn) {
    const template = /** @type {HTMLTemplateElement} */ (document.getElementById("turn-template"));
    this.element = /** @type {HTMLElement} */ (template.content.firstElementChild?.cloneNode(true));
    this.#turn = turn;
    this.#answer = new AnswerText(this.#part(".answer-text"));
    this.#stats = {
      tokens: this.#part(".stat-tokens"),
      first: this.#part(".stat-first"),
      rate: this.#part(".stat-rate"),
      note: this.#part(".stat-note"),
    };
    this.#part(".question-text").textContent = turn.question;
    this.#clock = setInterval(() => this.update(), 100); // shows the wait; the first text ends it
    this.update();
  }

  /** False once a new chat has taken it away. */
  get isShown() {
    return this.element.isConnected;
  }

  /** Show the turn's state at the next frame, however many tokens arrive until then. */
  update() {
    this.#frame ||= requestAnimationFrame(() => this.#paint());
  }

  /** @returns {string} how the turn ended, in words */
  finish() {
    this.#paint();
    const note = noteOf(this.#turn);
    this.#stats.note.textContent = note;
    return [note, this.#stats.tokens.textContent].filter((text) => text !== "").join(" ");
  }

  remove() {
    clearInterval(this.#clock);
    this.element.remove();
  }

  #paint() {
    cancelAnimationFrame(this.#frame);
    this.#frame = 0;
    const turn = this.#turn;
    const isWaiting = turn.firstTextAt === null && turn.ending === null;
    if (!isWaiting || !this.isShown) clearInterval(this.#clock);
    this.element.dataset.state = turn.ending ?? (isWaiting ? "waiting" : "streaming");
    this.#answer.update(turn.answer);
    const count = `${turn.numTokens.toLocaleString("en")} token${turn.numTokens === 1 ? "" : "s"}`;
    this.#stats.tokens.textContent = isWaiting ? "" : `${turn.isExact ? "" : "≈ "}${count}`;
    this.#stats.first.textContent = isWaiting
      ? `${((performance.now() - turn.sentAt) / 1000).toFixed(1)} s waiting for the first token`
      : withUnit(turn.timeToFirstToken, 0, "ms to first token");
    this.#stats.rate.textContent = withUnit(turn.tokensPerSecond, 1, "tokens/s");
  }

  /** @param {string} selector @returns {HTMLElement} */
  #part(selector) {
    return /** @type {HTMLElement} */ (this.element.querySelector(selector));
  }
}

/** @param {number | null} value @param {number} digits @param {string} unit */
function withUnit(value, digits, unit) {
  if (value === null) return "";
  const number = value.toLocaleString("en", {
    minimumFractionDigits: digits,
    maximumFractionDigits: digits,
  });
  return `${number} ${unit}`;
}

/** @param {Turn} turn @returns {string} empty where there is nothing to say */
function noteOf(turn) {
  if (turn.ending === "stopped") return "Stopped.";
  if (turn.ending === "interrupted") return "Interrupted: the connection broke.";
  if (turn.ending === "failed") return `Failed: ${turn.error?.message}`;
  if (turn.finishReason === "length") return "Cut at the token limit.";
  if (turn.finishReason !== null && turn.finishReason !== "stop") {
    return `Ended by the server: ${turn.finishReason}.`;
  }
  return turn.answer === "" ? "The answer is empty." : "";
}
