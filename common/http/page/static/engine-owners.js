/**
 * A colour for each request, from when it first runs or owns a block until it is forgotten: the next
 * one round the palette that no other owner has at that time. So neighbours in time differ, and
 * stepping back shows the colours that were seen before.
 */

/** @typedef {import("./engine-state.js").EngineState} EngineState */
/** @typedef {import("./engine-state.js").StepRecord} StepRecord */

export const NUM_COLOURS = 12; // as many as the stylesheet has; more would not be told apart

export class Owners {
  /** @type {Map<string, number>} */
  #colours = new Map();
  #next = 0;

  /** @param {EngineState} [state] */
  constructor(state) {
    if (state) for (const id of ownersIn(state)) this.#add(id, state);
  }

  get size() {
    return this.#colours.size;
  }

  /** @param {string} id @returns {number | undefined} index of its colour; none while it only waits */
  colourOf(id) {
    return this.#colours.get(id);
  }

  /** @param {StepRecord} record @param {EngineState} state before it */
  note(record, state) {
    for (const id of Object.keys(record.allocated)) this.#add(id, state);
    for (const id of Object.keys(record.scheduled)) this.#add(id, state);
  }

  copy() {
    const other = new Owners();
    other.#colours = new Map(this.#colours);
    other.#next = this.#next;
    return other;
  }

  /** Forget all others. @param {Set<string>} ids */
  keep(ids) {
    for (const id of [...this.#colours.keys()]) if (!ids.has(id)) this.#colours.delete(id);
  }

  /** @param {string} id @param {EngineState} state */
  #add(id, state) {
    if (this.#colours.has(id)) return;
    const taken = new Set(ownersIn(state).map((owner) => this.#colours.get(owner)));
    const order = Array.from({ length: NUM_COLOURS }, (_, step) => (this.#next + step) % NUM_COLOURS);
    const colour = order.find((index) => !taken.has(index)) ?? this.#next;
    this.#colours.set(id, colour);
    this.#next = (colour + 1) % NUM_COLOURS;
  }
}

/** @param {EngineState} state */
function ownersIn(state) {
  return [...state.running.keys(), ...state.blocks.keys()];
}
