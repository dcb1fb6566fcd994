/**
 * The sequences as a table, which is also the legend of the pictures' colours: those that run, those
 * that wait, and those that have ended but whose batch still holds their blocks.
 */

import { grouped } from "./engine-step.js";

/** @typedef {import("./engine-state.js").EngineState} EngineState */

const MOST_ROWS = 64; // of hundreds that wait the first are enough

/**
 * @typedef {object} Row
 * @property {string} id
 * @property {"running" | "waiting" | "ended"} state
 * @property {string} tokens run for it
 * @property {string} cached tokens that were found
 * @property {string} blocks
 */

/** @param {EngineState} state @returns {Row[]} */
function rowsOf(state) {
  /** @param {Row["state"]} name @returns {(entry: [id: string, tokens: number | null]) => Row} */
  const row = (name) => ([id, tokens]) => ({
    id,
    state: name,
    tokens: tokens === null ? "–" : grouped(tokens - (state.cached.get(id) ?? 0)),
    cached: state.cached.has(id) ? grouped(state.cached.get(id) ?? 0) : "–",
    blocks: grouped(state.blocks.get(id)?.length ?? 0),
  });
  const ended = [...state.blocks.keys()].filter((id) => !state.isUnfinished(id));
  return [
    ...[...state.running].map(row("running")),
    ...ended.map((id) => row("ended")([id, null])),
    ...[...state.waiting].map(row("waiting")),
  ];
}

export class SequenceTable {
  #table;
  #body;
  #rest;
  #colours;

  /**
   * @param {HTMLTableElement} table @param {HTMLElement} rest says what it leaves out
   * @param {import("./engine-canvas.js").Colours} colours
   */
  constructor(table, rest, colours) {
    this.#table = table;
    this.#body = table.tBodies[0];
    this.#rest = rest;
    this.#colours = colours;
  }

  /** @param {EngineState} state @param {import("./engine-owners.js").Owners} owners */
  update(state, owners) {
    const rows = rowsOf(state);
    const shown = rows.slice(0, MOST_ROWS);
    while (this.#body.rows.length > shown.length) this.#body.deleteRow(-1);
    while (this.#body.rows.length < shown.length) this.#body.append(makeRow());
    shown.forEach((row, index) => this.#fill(this.#body.rows[index], row, owners.colourOf(row.id)));
    this.#table.hidden = rows.length === 0;
    const numLeftOut = rows.length - shown.length;
    setText(this.#rest, rows.length === 0 ? "None." : numLeftOut > 0 ? `and ${numLeftOut} more` : "");
  }

  /** @param {HTMLTableRowElement} element @param {Row} row @param {number | undefined} colour */
  #fill(element, row, colour) {
    const [swatch, id] = element.cells[0].children;
    if (element.dataset.state !== row.state) element.dataset.state = row.state;
    const value = colour === undefined ? "" : this.#colours.owners[colour];
    /** @type {HTMLElement} */ (swatch).style.color = value; // the stylesheet knows what to make of it
    setText(id, row.id);
    setText(element.cells[1], row.state);
    setText(element.cells[2], row.tokens);
    setText(element.cells[3], row.cached);
    setText(element.cells[4], row.blocks);
  }
}

function makeRow() {
  const template = /** @type {HTMLTemplateElement} */ (document.getElementById("sequence-template"));
  return /** @type {HTMLTableRowElement} */ (template.content.firstElementChild?.cloneNode(true));
}

/** Spare the page the work where nothing has changed. @param {Element} element @param {string} text */
export function setText(element, text) {
  if (element.textContent !== text) element.textContent = text;
}
