/**
 * The block map: a cell a block, in the colour of its owner. Many blocks make small cells, and where
 * even those do not fit a cell is several blocks, which the caption then says.
 *
 * A block is full once its owner's tokens have come so far, and pale while it is only reserved. The
 * blocks of a request that has ended, which its batch still holds, are hatched. One that several have
 * has stripes in their colours.
 */

import { hatching, prepareCanvas } from "./engine-canvas.js";
import { listed } from "./engine-step.js";

/** @typedef {import("./engine-state.js").EngineState} EngineState */

const TALLEST = 224; // pixels that the map may take
const LARGEST = 24; // pixels of a cell with its gap, as the next
const SMALLEST = 4;
const SCALES = [1, 2, 5]; // times a power of ten: blocks of a cell
const MOST_STRIPES = 4; // of a cell; more would not be told apart

/**
 * Who has which block.
 *
 * @typedef {object} Ownership
 * @property {string[]} ids of the owners
 * @property {Int32Array} owner by block: index of its first owner, -1 where it is free
 * @property {Int32Array} place by block: which of its owner's blocks it is
 * @property {Map<number, number[]>} others by block: its other owners, where it has any
 * @property {number} numUsed
 */

/** @param {EngineState} state @returns {Ownership} */
export function ownership(state) {
  const ids = [...state.blocks.keys()];
  const owner = new Int32Array(state.numBlocks).fill(-1);
  const place = new Int32Array(state.numBlocks);
  /** @type {Map<number, number[]>} */
  const others = new Map();
  let numUsed = 0;
  ids.forEach((id, index) => {
    state.blocks.get(id)?.forEach((block, at) => {
      if (block >= state.numBlocks) return;
      if (owner[block] >= 0) {
        others.set(block, [...(others.get(block) ?? []), index]);
        return;
      }
      numUsed += 1;
      owner[block] = index;
      place[block] = at;
    });
  });
  return { ids, owner, place, others, numUsed };
}

/**
 * @param {number} numBlocks @param {number} width in pixels
 * @returns {{scale: number, size: number, columns: number, rows: number}} blocks a cell; pixels of one
 */
export function layOut(numBlocks, width) {
  for (let power = 1; ; power *= 10) {
    for (const times of SCALES) {
      const scale = times * power;
      const cells = Math.ceil(numBlocks / scale);
      for (let size = LARGEST; size >= SMALLEST; size--) {
        const columns = Math.max(1, Math.floor(width / size));
        const rows = Math.ceil(cells / columns);
        if (rows * size <= TALLEST) return { scale, size, columns: Math.min(columns, cells), rows };
      }
    }
  }
}

export class BlockMap {
  #canvas;
  #colours;
  #layout = layOut(1, LARGEST);
  #numBlocks = 0;
  /** Whether the last picture had blocks that are reserved, shared, or whose request has ended. */
  hasReserved = false;
  hasShared = false;
  hasEnded = false;

  /** @param {HTMLCanvasElement} canvas @param {import("./engine-canvas.js").Colours} colours */
  constructor(canvas, colours) {
    this.#canvas = canvas;
    this.#colours = colours;
  }

  /** Blocks that one cell stands for. */
  get scale() {
    return this.#layout.scale;
  }

  get numCells() {
    return Math.ceil(this.#numBlocks / this.#layout.scale);
  }

  get columns() {
    return this.#layout.columns;
  }

  /** @param {number} x @param {number} y @returns {number | null} the cell there */
  cellAt(x, y) {
    const { size, columns } = this.#layout;
    const [column, row] = [Math.floor(x / size), Math.floor(y / size)];
    const cell = row * columns + column;
    return column < 0 || column >= columns || row < 0 || cell >= this.numCells ? null : cell;
  }

  /**
   * @param {EngineState} state @param {Ownership} owned
   * @param {import("./engine-owners.js").Owners} owners
   * @param {number | null} marked the cell to mark, if any
   */
  paint(state, owned, owners, marked) {
    const width = this.#canvas.clientWidth;
    this.#numBlocks = state.numBlocks;
    this.#layout = layOut(state.numBlocks, width);
    const { size, columns, rows } = this.#layout;
    const context = prepareCanvas(this.#canvas, width, rows * size);
    const looks = owned.ids.map((id) => {
      const colour = this.#colours.owners[owners.colourOf(id) ?? 0];
      const numFull = Math.ceil((state.running.get(id) ?? 0) / state.blockSize);
      return { colour, numFull, hasEnded: !state.isUnfinished(id) };
    });
    this.hasReserved = false;
    this.hasShared = owned.others.size > 0;
    this.hasEnded = looks.some((look) => look.hasEnded);
    for (let cell = 0; cell < this.numCells; cell++) {
      const [x, y] = [(cell % columns) * size, Math.floor(cell / columns) * size];
      this.#paintCell(context, owned, looks, cell, x, y);
    }
    if (marked !== null && marked < this.numCells) {
      const [x, y] = [(marked % columns) * size, Math.floor(marked / columns) * size];
      context.strokeStyle = this.#colours.named.ink;
      context.lineWidth = 2; // around the cell, which may be hardly larger than that
      context.strokeRect(x - 1, y - 1, size + 1, size + 1);
    }
  }

  /**
   * @param {CanvasRenderingContext2D} context @param {Ownership} owned
   * @param {{colour: string, numFull: number, hasEnded: boolean}[]} looks by owner
   * @param {number} cell @param {number} x @param {number} y
   */
  #paintCell(context, owned, looks, cell, x, y) {
    const inner = this.#layout.size - 1; // a gap between cells
    context.fillStyle = this.#colours.named.free;
    context.fillRect(x, y, inner, inner);
    const counts = this.countsIn(owned, cell);
    const [index, numUsed] = mostOf(counts);
    if (index < 0) return;
    const look = looks[index];
    const height = this.scale === 1 ? inner : Math.max(1, Math.round((inner * numUsed) / this.scale));
    const isReserved = this.scale === 1 && !look.hasEnded && owned.place[cell] >= look.numFull;
    this.hasReserved ||= isReserved;
    context.fillStyle = look.hasEnded ? hatching(context, look.colour) : look.colour;
    context.globalAlpha = isReserved ? 0.3 : 1;
    context.fillRect(x, y + inner - height, inner, height);
    context.globalAlpha = 1;
    const others = this.scale === 1 ? (owned.others.get(cell) ?? []).slice(0, MOST_STRIPES - 1) : [];
    others.forEach((other, at) => {
      const left = Math.round((inner * (at + 1)) / (others.length + 1));
      context.fillStyle = looks[other].colour;
      context.fillRect(x + left, y, inner - left, inner);
    });
    if (!isReserved || inner < 6) return;
    context.strokeStyle = look.colour;
    context.lineWidth = 1;
    context.strokeRect(x + 0.5, y + 0.5, inner - 1, inner - 1);
  }

  /**
   * @param {Ownership} owned @param {number} cell
   * @returns {Map<number, number>} owner -> its blocks there
   */
  countsIn(owned, cell) {
    const counts = new Map();
    const end = Math.min((cell + 1) * this.scale, this.#numBlocks);
    for (let block = cell * this.scale; block < end; block++) {
      const owner = owned.owner[block];
      if (owner >= 0) counts.set(owner, (counts.get(owner) ?? 0) + 1);
    }
    return counts;
  }

  /**
   * @param {EngineState} state @param {Ownership} owned @param {number} cell
   * @returns {string} the cell in words
   */
  describe(state, owned, cell) {
    const first = cell * this.scale;
    const last = Math.min(first + this.scale, this.#numBlocks) - 1;
    const counts = this.countsIn(owned, cell);
    if (this.scale > 1) {
      const shares = [...counts].map(([index, count]) => `${owned.ids[index]} ${count}`);
      const numFree = last - first + 1 - [...counts.values()].reduce((sum, count) => sum + count, 0);
      return `Blocks ${first} to ${last}: ${[...shares, `free ${numFree}`].join(", ")}`;
    }
    const index = owned.owner[first];
    if (index < 0) return `Block ${first}: free`;
    const id = owned.ids[index];
    const place = owned.place[first];
    const from = place * state.blockSize;
    const tokens = state.running.get(id) ?? 0;
    const use = !state.isUnfinished(id)
      ? "held until its batch ends"
      : tokens <= from
        ? "reserved, empty"
        : `${Math.min(tokens - from, state.blockSize)} of ${state.blockSize} tokens`;
    const others = (owned.others.get(first) ?? []).map((other) => owned.ids[other]);
    const also = others.length > 0 ? `; also ${listed(others)}` : "";
    const count = state.blocks.get(id)?.length;
    return `Block ${first}: ${id}, block ${place + 1} of its ${count}, ${use}${also}`;
  }
}

/**
 * @param {Map<number, number>} counts
 * @returns {[owner: number, sum: number]} the most frequent owner, -1 for none; the counts of all
 */
function mostOf(counts) {
  let [most, owner, sum] = [0, -1, 0];
  for (const [index, count] of counts) {
    sum += count;
    if (count > most) [most, owner] = [count, index];
  }
  return [owner, sum];
}
