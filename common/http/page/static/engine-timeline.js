/**
 * The last steps as bars, one a step, stacked by sequence; below them who came, ended or had to wait
 * again. A prompt is hundreds of tokens and a decode step a few: the heights are square roots, so that
 * both are seen.
 */

import { hatching, prepareCanvas } from "./engine-canvas.js";
import { grouped } from "./engine-step.js";

/** @typedef {import("./engine-history.js").Entry} Entry */
/** @typedef {import("./engine-history.js").History} History */

const NUM_STEPS = 100;
const LEFT = 70; // pixels for the names of rows and ticks
const BARS = 112; // pixels, as the next four
const TOP = 8;
const ROW = 13;
const FOOT = 16;
const TICK_GAP = 15;

/** @type {{name: string, has: (entry: Entry) => boolean, colour: string, shape: Shape}[]} */
const ROWS = [
  { name: "arrived", has: ({ record }) => isSome(record.arrived), colour: "accent", shape: triangle },
  { name: "finished", has: ({ record }) => isSome(record.finished), colour: "ink", shape: square },
  { name: "preempted", has: ({ record }) => record.preempted.length > 0, colour: "warn", shape: cross },
];

export class Timeline {
  #canvas;
  #colours;
  #begin = 0; // position of the first bar
  #step = 1; // pixels from one bar to the next

  /** @param {HTMLCanvasElement} canvas @param {import("./engine-canvas.js").Colours} colours */
  constructor(canvas, colours) {
    this.#canvas = canvas;
    this.#colours = colours;
  }

  /** @param {number} x from the canvas's left edge @returns {number} the position there */
  positionAt(x) {
    return this.#begin + Math.floor((x - LEFT) / this.#step);
  }

  /**
   * @param {History} history
   * @param {number} position the step that is shown
   * @param {number | null} marked the step to mark, if any
   */
  paint(history, position, marked) {
    const begin = Math.max(history.begin, Math.min(this.#begin, position), position - NUM_STEPS + 1);
    this.#begin = Math.max(history.begin, Math.min(begin, history.end - NUM_STEPS));
    const entries = history.entries(this.#begin, this.#begin + NUM_STEPS);
    const rows = ROWS.filter((row) => row.name !== "preempted" || history.seen.has("preempted"));
    const height = TOP + BARS + rows.length * ROW + FOOT;
    const width = this.#canvas.clientWidth;
    const context = prepareCanvas(this.#canvas, width, height);
    this.#step = (width - LEFT) / NUM_STEPS;
    context.font = `11px ${getComputedStyle(this.#canvas).fontFamily}`;

    const most = Math.max(16, ...entries.map((entry) => entry.numTokens));
    /** @param {number} count */
    const heightOf = (count) => BARS * Math.sqrt(count / most);
    if (marked !== null) this.#mark(context, marked, height - FOOT);
    this.#paintAxis(context, width, most, heightOf);
    entries.forEach((entry, index) => {
      this.#paintBar(context, history, entry, LEFT + index * this.#step, heightOf);
    });
    rows.forEach((row, index) => {
      this.#paintRow(context, row, entries, TOP + BARS + (index + 0.5) * ROW + 1);
    });
    this.#paintFoot(context, entries, width, height);
  }

  /** @param {CanvasRenderingContext2D} context @param {number} position @param {number} height */
  #mark(context, position, height) {
    const x = LEFT + (position - this.#begin) * this.#step;
    context.fillStyle = this.#colours.named.line;
    context.fillRect(x - 1, 0, this.#step + 1, height);
    context.fillStyle = this.#colours.named.ink;
    context.fillRect(x - 1, 0, this.#step + 1, 2);
  }

  /**
   * @param {CanvasRenderingContext2D} context @param {number} width
   * @param {number} most @param {(count: number) => number} heightOf
   */
  #paintAxis(context, width, most, heightOf) {
    const { line, soft } = this.#colours.named;
    context.textAlign = "right";
    context.textBaseline = "middle";
    let last = Infinity;
    for (const count of ticksTo(most)) {
      const y = TOP + BARS - heightOf(count);
      if (last - y < TICK_GAP) continue;
      last = y;
      context.fillStyle = line;
      context.fillRect(LEFT, Math.round(y), width - LEFT, 1);
      context.fillStyle = soft;
      if (count > 0) context.fillText(grouped(count), LEFT - 6, y); // the rows begin at 0
    }
  }

  /**
   * @param {CanvasRenderingContext2D} context @param {History} history @param {Entry} entry
   * @param {number} x @param {(count: number) => number} heightOf
   */
  #paintBar(context, history, entry, x, heightOf) {
    const height = heightOf(entry.numTokens);
    const width = Math.max(1, this.#step - (this.#step > 3 ? 1 : 0));
    let y = TOP + BARS;
    for (const [id, count] of Object.entries(entry.record.scheduled)) {
      // The whole bar has the scale's height; within it a sequence has its share of the tokens.
      const share = (height * count) / entry.numTokens;
      const colour = this.#colours.owners[history.owners.colourOf(id) ?? 0];
      y -= share;
      context.fillStyle = entry.ended.has(id) ? hatching(context, colour) : colour;
      context.fillRect(x, y, width, share);
    }
  }

  /**
   * @param {CanvasRenderingContext2D} context @param {ROWS[number]} row
   * @param {Entry[]} entries @param {number} y of the row's middle
   */
  #paintRow(context, row, entries, y) {
    context.fillStyle = this.#colours.named.soft;
    context.textAlign = "right";
    context.textBaseline = "middle";
    context.fillText(row.name, LEFT - 6, y);
    context.fillStyle = context.strokeStyle = this.#colours.named[row.colour];
    entries.forEach((entry, index) => {
      if (row.has(entry)) row.shape(context, LEFT + (index + 0.5) * this.#step - 0.5, y);
    });
  }

  /**
   * @param {CanvasRenderingContext2D} context @param {Entry[]} entries
   * @param {number} width @param {number} height
   */
  #paintFoot(context, entries, width, height) {
    context.fillStyle = this.#colours.named.soft;
    context.textBaseline = "bottom";
    context.textAlign = "left";
    if (entries.length > 0) context.fillText(`step ${entries[0].record.step}`, LEFT, height);
    if (entries.length < NUM_STEPS / 2) return; // else the two would meet
    const x = Math.min(width, LEFT + entries.length * this.#step);
    context.textAlign = "right";
    context.fillText(String(entries[entries.length - 1].record.step), x, height);
  }
}

/** @param {object} values */
function isSome(values) {
  return Object.keys(values).length > 0;
}

/** @param {number} most @returns {number[]} 0, powers of four, and the largest itself */
function ticksTo(most) {
  const powers = [];
  for (let power = 4; power < most; power *= 4) powers.push(power);
  return [0, ...powers.filter((power) => power <= most / 1.6), most];
}

/** @typedef {(context: CanvasRenderingContext2D, x: number, y: number) => void} Shape */

/** @type {Shape} */
function triangle(context, x, y) {
  context.beginPath();
  context.moveTo(x, y - 3.5);
  context.lineTo(x + 3.5, y + 3);
  context.lineTo(x - 3.5, y + 3);
  context.fill();
}

/** @type {Shape} */
function square(context, x, y) {
  context.fillRect(x - 2.5, y - 2.5, 5, 5);
}

/** @type {Shape} */
function cross(context, x, y) {
  context.beginPath();
  context.moveTo(x - 3, y - 3);
  context.lineTo(x + 3, y + 3);
  context.moveTo(x + 3, y - 3);
  context.lineTo(x - 3, y + 3);
  context.lineWidth = 1.5;
  context.stroke();
}
