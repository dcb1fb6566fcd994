/**
 * The engine on the page: the counts, the two pictures with the words for what the pointer or the
 * keyboard is at, and the table of sequences. It shows one step of a history and changes nothing.
 */

import { BlockMap, ownership } from "./engine-blocks.js";
import { ExpertMap } from "./engine-experts.js";
import { SequenceTable, setText } from "./engine-sequences.js";
import { describeStep, grouped, plural } from "./engine-step.js";
import { Timeline } from "./engine-timeline.js";

/** @typedef {import("./engine-player.js").Player} Player */
/** @typedef {import("./engine-state.js").EngineState} EngineState */

const LEGENDS = /** @type {const} */ (["vain", "reserved", "ended", "shared"]); // those not shown from the start

/** @param {string} id @returns {any} */
const byId = (id) => document.getElementById(id);

export class EngineView {
  /** @type {HTMLCanvasElement} */
  #steps = byId("engine-steps");
  /** @type {HTMLCanvasElement} */
  #blocks = byId("engine-blocks");
  #timeline;
  #map;
  #sequences;
  #experts;
  #player;
  /** @type {number | null} position under the pointer */
  #pointed = null;
  /** @type {number | null} cell under the pointer */
  #pointedCell = null;
  /** @type {number | null} cell reached by keys, while the map has the focus */
  #focusedCell = null;
  #onChange;

  /**
   * @param {Player} player
   * @param {import("./engine-canvas.js").Colours} colours
   * @param {() => void} onChange the view wants to be painted
   */
  constructor(player, colours, onChange) {
    this.#player = player;
    this.#onChange = onChange;
    this.#timeline = new Timeline(this.#steps, colours);
    this.#map = new BlockMap(this.#blocks, colours);
    this.#sequences = new SequenceTable(byId("engine-sequences"), byId("engine-rest"), colours);
    this.#experts = new ExpertMap(byId("engine-experts"), colours, onChange);
    this.#watchSteps();
    this.#watchBlocks();
  }

  paint() {
    const { history, position, isPlaying, isFile } = this.#player;
    const state = history.stateAfter(position);
    const entry = history.entry(position);
    const owned = ownership(state);
    const follows = isPlaying && !isFile;
    this.#showCounts(state, owned.numUsed, entry?.numTokens ?? 0);
    this.#timeline.paint(history, position, this.#pointed ?? (follows ? null : position));
    const lines = describeStep(history.entry(this.#pointed ?? position));
    lines.forEach((line, index) => setText(byId("engine-step").children[index], line));
    byId("engine-map").hidden = state.numBlocks === 0;
    byId("engine").classList.toggle("has-blocks", state.numBlocks > 0);
    byId("engine").classList.toggle("has-cache", history.seen.has("cached"));
    if (state.numBlocks > 0) {
      this.#map.paint(state, owned, history.owners, this.#cell);
      this.#showMapWords(state, owned);
    }
    this.#showLegends(history);
    this.#experts.paint();
    this.#sequences.update(state, history.owners);
    this.#showSlider(history.begin, history.end, position, lines[0]);
  }

  /**
   * What this engine never does needs no legend.
   * @param {import("./engine-history.js").History} history
   */
  #showLegends({ seen }) {
    if (this.#map.hasReserved) seen.add("reserved");
    if (this.#map.hasEnded) seen.add("ended");
    if (this.#map.hasShared) seen.add("shared");
    for (const kind of LEGENDS) byId(`engine-${kind}`).hidden = !seen.has(kind);
  }

  /** @param {EngineState} state @param {number} numUsed @param {number} numTokens */
  #showCounts(state, numUsed, numTokens) {
    const counts = {
      running: grouped(state.running.size),
      waiting: grouped(state.waiting.size),
      blocks: `${grouped(numUsed)} / ${grouped(state.numBlocks)}`,
      steps: grouped(state.step + 1),
      tokens: grouped(numTokens),
    };
    for (const [name, text] of Object.entries(counts)) setText(byId(`engine-${name}-count`), text);
  }

  /** @param {import("./engine-experts.js").Experts} experts as they come, the newest */
  set experts(experts) {
    this.#experts.update(experts);
  }

  /** The cell to speak of. */
  get #cell() {
    return this.#pointedCell ?? this.#focusedCell;
  }

  /** The counts in a sentence, for who does not see them. */
  get summary() {
    const { history, position } = this.#player;
    const state = history.stateAfter(position);
    const counts = [`${state.running.size} running`, `${state.waiting.size} waiting`];
    if (state.numBlocks > 0) {
      counts.push(`${ownership(state).numUsed} of ${plural(state.numBlocks, "block")} used`);
    }
    return `${counts.join(", ")}.`;
  }

  /** @param {EngineState} state @param {import("./engine-blocks.js").Ownership} owned */
  #showMapWords(state, owned) {
    const { scale, numCells } = this.#map;
    const size = `${plural(state.numBlocks, "block")} of ${plural(state.blockSize, "token")}`;
    const many = `a cell is ${grouped(scale)} blocks, filled as far as they are used`;
    const unit = scale === 1 ? "a cell is a block" : many;
    setText(byId("engine-scale"), `${size}; ${unit}`);
    const isThere = this.#cell !== null && this.#cell < numCells;
    const words = isThere ? this.#map.describe(state, owned, /** @type {number} */ (this.#cell)) : "";
    setText(byId("engine-block"), words || "Point at a cell, or use the arrow keys on the map.");
    this.#blocks.title = words;
  }

  /** @param {number} begin @param {number} end @param {number} position @param {string} words */
  #showSlider(begin, end, position, words) {
    const slider = byId("engine-slider");
    slider.min = String(begin);
    slider.max = String(Math.max(begin, end - 1));
    slider.value = String(position);
    slider.disabled = end === begin;
    slider.setAttribute("aria-valuetext", words);
  }

  #watchSteps() {
    const canvas = this.#steps;
    /** @param {PointerEvent | MouseEvent} event */
    const pointedAt = (event) => {
      const position = this.#timeline.positionAt(event.offsetX);
      return this.#player.history.entry(position) ? position : null;
    };
    canvas.addEventListener("pointermove", (event) => {
      this.#pointed = pointedAt(event);
      this.#onChange();
    });
    canvas.addEventListener("pointerleave", () => {
      this.#pointed = null;
      this.#onChange();
    });
    canvas.addEventListener("click", (event) => {
      const position = pointedAt(event);
      if (position !== null) this.#player.seek(position);
      this.#onChange();
    });
  }

  #watchBlocks() {
    const canvas = this.#blocks;
    canvas.addEventListener("pointermove", (event) => {
      this.#pointedCell = this.#map.cellAt(event.offsetX, event.offsetY);
      this.#onChange();
    });
    canvas.addEventListener("pointerleave", () => {
      this.#pointedCell = null;
      this.#onChange();
    });
    canvas.addEventListener("focus", () => {
      this.#focusedCell = 0;
      this.#onChange();
    });
    canvas.addEventListener("blur", () => {
      this.#focusedCell = null;
      this.#onChange();
    });
    canvas.addEventListener("keydown", (event) => this.#onMapKey(event));
  }

  /** @param {KeyboardEvent} event */
  #onMapKey(event) {
    const { columns, numCells } = this.#map;
    const ways = new Map([
      ["ArrowLeft", -1],
      ["ArrowRight", 1],
      ["ArrowUp", -columns],
      ["ArrowDown", columns],
      ["Home", -Infinity],
      ["End", Infinity],
    ]);
    const way = ways.get(event.key);
    if (way === undefined || event.altKey || event.ctrlKey || event.metaKey) return;
    event.preventDefault();
    this.#focusedCell = Math.min(Math.max((this.#focusedCell ?? 0) + way, 0), numCells - 1);
    this.#pointedCell = null; // what was done last counts
    this.#onChange();
  }
}
