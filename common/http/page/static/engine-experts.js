/**
 * The experts of a mixture: a row a layer, a column an expert, the darker the more of the layer's
 * choices fell on it lately. A dot marks an expert that several ranks have.
 */

import { prepareCanvas } from "./engine-canvas.js";
import { grouped, plural } from "./engine-step.js";
import { setText } from "./engine-sequences.js";

/**
 * @typedef {object} Experts
 * @property {number[]} expert_layers
 * @property {number[][]} expert_load choices since the start, by layer and expert
 * @property {number[][]} expert_copies
 * @property {number} expert_balancedness the mean rank's tokens over the busiest's
 * @property {number} num_expert_moves
 */

const TALLEST = 224; // pixels that the map may take
const LARGEST = 24; // pixels of a cell with its gap, as the next
const SMALLEST = 2;
const KEPT = 0.7; // of what came before, at each event: "lately" is some three seconds
const DARKEST = 3; // times an even share

export class ExpertMap {
  #figure;
  #canvas;
  #colours;
  #onChange;
  /** @type {Experts | null} */
  #experts = null;
  /** @type {number[][]} */
  #lately = [];
  #width = LARGEST;
  #height = LARGEST;
  /** @type {{row: number, column: number} | null} */
  #pointed = null;
  /** @type {{row: number, column: number} | null} */
  #focused = null;

  /**
   * @param {HTMLElement} figure @param {import("./engine-canvas.js").Colours} colours
   * @param {() => void} onChange the map wants to be painted
   */
  constructor(figure, colours, onChange) {
    this.#figure = figure;
    this.#canvas = /** @type {HTMLCanvasElement} */ (figure.querySelector("canvas"));
    this.#colours = colours;
    this.#onChange = onChange;
    this.#listen();
  }

  /** @param {Experts} experts */
  update(experts) {
    const before = this.#experts?.expert_load;
    this.#lately = experts.expert_load.map((load, row) =>
      load.map((count, column) => {
        const more = count - (before?.[row]?.[column] ?? 0);
        return more < 0 ? count : more + KEPT * (this.#lately[row]?.[column] ?? 0);
      }),
    );
    this.#experts = experts;
  }

  paint() {
    const experts = this.#experts;
    this.#figure.hidden = experts === null;
    if (experts === null) return;
    const [numRows, numColumns] = [this.#lately.length, this.#lately[0].length];
    const width = this.#canvas.clientWidth;
    const fitting = (/** @type {number} */ room) => Math.min(LARGEST, Math.max(SMALLEST, Math.floor(room)));
    this.#width = fitting(width / numColumns);
    this.#height = fitting(TALLEST / numRows);
    const context = prepareCanvas(this.#canvas, width, numRows * this.#height);
    this.#lately.forEach((load, row) => this.#paintRow(context, load, experts.expert_copies[row], row));
    const at = this.#pointed ?? this.#focused;
    if (at !== null) {
      context.strokeStyle = this.#colours.named.ink;
      context.lineWidth = 2;
      const [x, y] = [at.column * this.#width, at.row * this.#height];
      context.strokeRect(x - 1, y - 1, this.#width + 1, this.#height + 1);
    }
    const size = `${plural(numRows, "layer")} of ${plural(numColumns, "expert")}`;
    const even = experts.expert_balancedness.toFixed(2);
    const moves = experts.num_expert_moves ? `; ${grouped(experts.num_expert_moves)} moved` : "";
    const scale = /** @type {HTMLElement} */ (this.#figure.querySelector(".experts-scale"));
    setText(scale, `${size}; balance of the ranks ${even}${moves}`);
    const words = at === null ? "" : this.#describe(experts, at.row, at.column);
    const line = /** @type {HTMLElement} */ (this.#figure.querySelector(".words"));
    setText(line, words || "Point at a cell, or use the arrow keys on the map.");
    this.#canvas.title = words;
  }

  /**
   * @param {CanvasRenderingContext2D} context @param {number[]} load @param {number[]} copies
   * @param {number} row
   */
  #paintRow(context, load, copies, row) {
    const total = load.reduce((sum, count) => sum + count, 0);
    const [width, height] = [this.#width - 1, this.#height - 1]; // a gap between cells
    load.forEach((count, column) => {
      const [x, y] = [column * this.#width, row * this.#height];
      context.fillStyle = this.#colours.named.free;
      context.fillRect(x, y, width, height);
      context.globalAlpha = total > 0 ? Math.min(1, (count * load.length) / total / DARKEST) : 0;
      context.fillStyle = this.#colours.named.accent;
      context.fillRect(x, y, width, height);
      context.globalAlpha = 1;
      if (copies[column] < 2 || Math.min(width, height) < 4) return;
      context.fillStyle = this.#colours.named.ink;
      context.fillRect(x + width / 2 - 1, y + height / 2 - 1, 2, 2);
    });
  }

  /** @param {Experts} experts @param {number} row @param {number} column @returns {string} */
  #describe(experts, row, column) {
    const load = this.#lately[row];
    const total = load.reduce((sum, count) => sum + count, 0);
    const share = total > 0 ? (100 * load[column]) / total : 0;
    const copies = experts.expert_copies[row][column];
    const chosen = `${grouped(experts.expert_load[row][column])} choices, ${share.toFixed(1)}% lately`;
    const also = copies > 1 ? `, on ${copies} ranks` : "";
    return `Layer ${experts.expert_layers[row]}, expert ${column}: ${chosen}${also}`;
  }

  #listen() {
    const canvas = this.#canvas;
    /** @param {() => void} act */
    const change = (act) => {
      act();
      this.#onChange();
    };
    canvas.addEventListener("pointermove", (event) =>
      change(() => {
        const row = Math.floor(event.offsetY / this.#height);
        const column = Math.floor(event.offsetX / this.#width);
        const isThere = this.#lately[row]?.[column] !== undefined;
        this.#pointed = isThere ? { row, column } : null;
      }),
    );
    canvas.addEventListener("pointerleave", () => change(() => (this.#pointed = null)));
    canvas.addEventListener("focus", () => change(() => (this.#focused = { row: 0, column: 0 })));
    canvas.addEventListener("blur", () => change(() => (this.#focused = null)));
    canvas.addEventListener("keydown", (event) => this.#onKey(event));
  }

  /** @param {KeyboardEvent} event */
  #onKey(event) {
    const ways = new Map([
      ["ArrowLeft", [0, -1]],
      ["ArrowRight", [0, 1]],
      ["ArrowUp", [-1, 0]],
      ["ArrowDown", [1, 0]],
    ]);
    const way = ways.get(event.key);
    if (way === undefined || event.altKey || event.ctrlKey || event.metaKey) return;
    event.preventDefault();
    const from = this.#focused ?? { row: 0, column: 0 };
    const within = (/** @type {number} */ place, /** @type {number} */ end) =>
      Math.min(Math.max(place, 0), end - 1);
    this.#focused = {
      row: within(from.row + way[0], this.#lately.length),
      column: within(from.column + way[1], this.#lately[0].length),
    };
    this.#pointed = null; // what was done last counts
    this.#onChange();
  }
}
