/**
 * The steps that can be looked at: the state before the oldest, the records since, and so the state
 * after any of them. Positions count the records ever added, so that one stays true while the oldest
 * are dropped.
 */

import { Owners } from "./engine-owners.js";

/** @typedef {import("./engine-state.js").EngineState} EngineState */
/** @typedef {import("./engine-state.js").StepRecord} StepRecord */

/**
 * @typedef {object} Entry
 * @property {StepRecord} record
 * @property {number} numTokens run in the step, for all sequences
 * @property {Set<string>} ended sequences that had ended before and were computed all the same
 */

const CAPACITY = 4096; // steps, as many as the server keeps

export class History {
  #first; // before the oldest record
  #last; // after the newest
  /** @type {Entry[]} */
  #entries = [];
  #cursor; // the state that was asked for last: most often the next one is asked for then
  /** Position of the oldest record. */
  begin = 0;
  /**
   * What has occurred, and so needs a legend.
   * @type {Set<"preempted" | "vain" | "reserved" | "ended" | "cached" | "shared">}
   */
  seen = new Set();

  /** @param {EngineState} first @param {number} [capacity] */
  constructor(first, capacity = CAPACITY) {
    this.#first = first;
    this.#last = first.copy();
    this.#cursor = { position: -1, state: first.copy() };
    this.capacity = capacity;
    this.owners = new Owners(first);
    if (first.cached.size > 0) this.seen.add("cached");
  }

  /** The position after the newest record. */
  get end() {
    return this.begin + this.#entries.length;
  }

  /** The state after the newest record; not to be changed. */
  get last() {
    return this.#last;
  }

  /** @param {StepRecord} record */
  append(record) {
    const scheduled = Object.entries(record.scheduled);
    const ended = scheduled.flatMap(([id]) =>
      this.#last.isUnfinished(id) || Object.hasOwn(record.arrived, id) ? [] : [id],
    );
    this.owners.note(record, this.#last);
    this.#last.apply(record);
    const numTokens = scheduled.reduce((sum, [, count]) => sum + count, 0);
    if (record.preempted.length > 0) this.seen.add("preempted");
    if (ended.length > 0) this.seen.add("vain");
    if (Object.keys(record.cached).length > 0) this.seen.add("cached");
    this.#entries.push({ record, numTokens, ended: new Set(ended) });
    if (this.#entries.length > this.capacity) this.#dropOldest();
  }

  /** @param {number} position @returns {Entry | undefined} */
  entry(position) {
    return this.#entries[position - this.begin];
  }

  /** @param {number} from @param {number} to one after the last @returns {Entry[]} */
  entries(from, to) {
    return this.#entries.slice(Math.max(0, from - this.begin), Math.max(0, to - this.begin));
  }

  /**
   * @param {number} position from `begin - 1`, before the oldest, to `end - 1`
   * @returns {EngineState} the state after that step; not to be changed, and true until the next call
   */
  stateAfter(position) {
    if (position >= this.end - 1) return this.#last;
    if (this.#cursor.position > position || this.#cursor.position < this.begin - 1) {
      this.#cursor = { position: this.begin - 1, state: this.#first.copy() };
    }
    const cursor = this.#cursor;
    const missing = this.entries(cursor.position + 1, position + 1);
    for (const { record } of missing) cursor.state.apply(record);
    cursor.position = Math.max(position, cursor.position);
    return cursor.state;
  }

  /** @returns {History} another one, which stays as this one is now */
  copy() {
    const other = new History(this.#first.copy(), this.capacity);
    other.#last = this.#last.copy();
    other.#entries = [...this.#entries];
    other.begin = this.begin;
    other.seen = this.seen;
    other.owners = this.owners.copy();
    return other;
  }

  #dropOldest() {
    const [oldest] = this.#entries.splice(0, 1);
    this.#first.apply(oldest.record);
    this.begin += 1;
    if (this.owners.size > 4 * this.capacity) this.owners.keep(this.#idsKept());
  }

  #idsKept() {
    const ids = new Set([...this.#first.running.keys(), ...this.#first.blocks.keys()]);
    for (const { record } of this.#entries) {
      for (const id of Object.keys(record.allocated)) ids.add(id);
      for (const id of Object.keys(record.scheduled)) ids.add(id);
    }
    return ids;
  }
}
