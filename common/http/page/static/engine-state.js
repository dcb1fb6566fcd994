/**
 * The engine's state as the sum of its steps: the rules of `EngineState` in common/trace.py, which a
 * test holds against these, and the shapes of what the server sends.
 */

/**
 * @typedef {object} StepRecord one step, with what happened since the step before
 * @property {number} step
 * @property {number} begin seconds, as all times here
 * @property {number} end
 * @property {Record<string, number>} scheduled request id -> tokens run for it in this step
 * @property {[name: string, begin: number, end: number][]} phases
 * @property {Record<string, string>} finished request id -> reason
 * @property {Record<string, number>} arrived request id -> tokens of its prompt
 * @property {Record<string, number[]>} allocated request id -> blocks that it took
 * @property {Record<string, number[]>} freed request id -> blocks that it gave up
 * @property {string[]} preempted requests that went back to waiting
 * @property {Record<string, number>} cached request id -> tokens found for it when it joined or came back
 * @property {Record<string, number>} rejected request id -> drafts run for it that did not stay
 */

/**
 * @typedef {object} SavedState a state as the server writes it
 * @property {number} num_blocks 0 where the engine has none
 * @property {number} block_size tokens in a block
 * @property {number} step
 * @property {Record<string, number>} waiting request id -> tokens found or run for it so far
 * @property {Record<string, number>} running the same
 * @property {Record<string, number[]>} blocks request id -> the blocks it holds
 * @property {Record<string, number>} cached request id -> how many of its tokens were found, while it runs
 */

export class EngineState {
  /** @param {SavedState} saved */
  constructor(saved) {
    this.numBlocks = saved.num_blocks;
    this.blockSize = saved.block_size;
    this.step = saved.step;
    this.waiting = new Map(Object.entries(saved.waiting));
    this.running = new Map(Object.entries(saved.running));
    /** @type {Map<string, number[]>} */
    this.blocks = new Map(Object.entries(saved.blocks).map(([id, owned]) => [id, [...owned]]));
    this.cached = new Map(Object.entries(saved.cached));
  }

  /** @param {string} id whether it waits or runs; one that has ended may still hold blocks */
  isUnfinished(id) {
    return this.waiting.has(id) || this.running.has(id);
  }

  /** Go on by one step. @param {StepRecord} record */
  apply(record) {
    this.step = record.step;
    for (const id of Object.keys(record.arrived)) this.waiting.set(id, 0);
    for (const id of record.preempted) {
      this.running.delete(id);
      this.cached.delete(id);
      this.waiting = new Map([[id, 0], ...this.waiting]);
    }
    for (const [id, count] of Object.entries(record.cached)) {
      if (!this.waiting.delete(id)) continue;
      this.running.set(id, count);
      this.cached.set(id, count);
    }
    for (const [id, count] of Object.entries(record.scheduled)) {
      if (!this.isUnfinished(id)) continue; // a batch may compute a sequence that has ended
      this.waiting.delete(id);
      this.running.set(id, (this.running.get(id) ?? 0) + count);
    }
    for (const [id, count] of Object.entries(record.rejected)) {
      const tokens = this.running.get(id);
      if (tokens !== undefined) this.running.set(id, tokens - count);
    }
    for (const id of Object.keys(record.finished)) {
      this.waiting.delete(id);
      this.running.delete(id);
      this.cached.delete(id);
    }
    for (const [id, taken] of Object.entries(record.allocated)) {
      this.blocks.set(id, [...(this.blocks.get(id) ?? []), ...taken]);
    }
    for (const [id, freed] of Object.entries(record.freed)) this.#free(id, freed);
  }

  /**
   * One step may take a block and give it up, or the other way round: so they are counted.
   * @param {string} id @param {number[]} freed
   */
  #free(id, freed) {
    /** @type {Map<number, number>} */
    const gone = new Map();
    for (const block of freed) gone.set(block, (gone.get(block) ?? 0) + 1);
    const kept = (this.blocks.get(id) ?? []).filter((block) => {
      const count = gone.get(block) ?? 0;
      gone.set(block, count - 1);
      return count <= 0;
    });
    this.blocks.delete(id);
    if (kept.length > 0) this.blocks.set(id, kept);
  }

  /** @returns {EngineState} another one, which changes by itself */
  copy() {
    return new EngineState(this.toJSON());
  }

  /** @returns {SavedState} */
  toJSON() {
    return {
      num_blocks: this.numBlocks,
      block_size: this.blockSize,
      step: this.step,
      waiting: Object.fromEntries(this.waiting),
      running: Object.fromEntries(this.running),
      blocks: Object.fromEntries(this.blocks),
      cached: Object.fromEntries(this.cached),
    };
  }
}
