/**
 * Checks of what comes from outside, the server or a file that somebody opens, so that the rest of the
 * page can rely on it. Fields that are missing are empty, and fields that a later part adds are let be.
 */

import { EngineState } from "./engine-state.js";

/** @typedef {import("./engine-state.js").StepRecord} StepRecord */
/** @typedef {(value: any) => boolean} Check */

const MOST_BLOCKS = 1 << 24; // what a map of them can be made of

/** @type {Check} */
const isNumber = (value) => Number.isFinite(value);
/** @type {Check} */
const isCount = (value) => Number.isSafeInteger(value) && value >= 0;
/** @type {Check} */
const isText = (value) => typeof value === "string";
/** @type {Check} */
const isBlock = (value) => isCount(value) && value < MOST_BLOCKS;
/** @param {Check} check @returns {Check} */
const listOf = (check) => (value) => Array.isArray(value) && value.every(check);
/** @param {Check} check @returns {Check} */
const recordOf = (check) => (value) => isObject(value) && Object.values(value).every(check);
/** @type {Check} */
const isPhase = (value) =>
  Array.isArray(value) && value.length === 3 && isText(value[0]) && value.slice(1).every(isNumber);

/** @param {any} value */
function isObject(value) {
  return typeof value === "object" && value !== null && !Array.isArray(value);
}

/** @type {Record<string, Check>} */
const STATE = {
  num_blocks: (value) => isCount(value) && value <= MOST_BLOCKS,
  block_size: isCount,
  step: (value) => Number.isSafeInteger(value),
  waiting: recordOf(isCount),
  running: recordOf(isCount),
  blocks: recordOf(listOf(isBlock)),
  cached: recordOf(isCount),
};

/** @type {Record<string, Check>} */
const RECORD = {
  step: isCount,
  begin: isNumber,
  end: isNumber,
  scheduled: recordOf(isCount),
  phases: listOf(isPhase),
  finished: recordOf(isText),
  arrived: recordOf(isCount),
  allocated: recordOf(listOf(isBlock)),
  freed: recordOf(listOf(isBlock)),
  preempted: listOf(isText),
  cached: recordOf(isCount),
  rejected: recordOf(isCount),
};

/** @type {Record<string, Check>} */
const EXPERTS = {
  expert_layers: listOf(isCount),
  expert_load: (value) => isTable(value),
  expert_copies: (value) => isTable(value),
  expert_balancedness: isNumber,
  num_expert_moves: isCount,
};

/** @type {Check} counts of equally many layers and experts, one of each at least */
const isTable = (value) =>
  listOf(listOf(isCount))(value) &&
  value.length > 0 &&
  value[0].length > 0 &&
  value.every((/** @type {number[]} */ row) => row.length === value[0].length);

/** @type {StepRecord} */
const EMPTY_RECORD = {
  step: 0,
  begin: 0,
  end: 0,
  scheduled: {},
  phases: [],
  finished: {},
  arrived: {},
  allocated: {},
  freed: {},
  preempted: [],
  cached: {},
  rejected: {},
};

/** @type {import("./engine-state.js").SavedState} */
const EMPTY_STATE = {
  num_blocks: 0,
  block_size: 0,
  step: -1,
  waiting: {},
  running: {},
  blocks: {},
  cached: {},
};

/** @returns {EngineState} of an engine that has done nothing */
export function emptyState() {
  return new EngineState(EMPTY_STATE);
}

/**
 * @param {string} text JSON
 * @param {Record<string, Check>} checks
 * @param {string[]} needed fields that must be there
 * @returns {any} the object
 */
function read(text, checks, needed) {
  const value = JSON.parse(text);
  if (!isObject(value)) throw new TypeError("it is no JSON object");
  for (const name of needed) {
    if (!Object.hasOwn(value, name)) throw new TypeError(`it has no ${name}`);
  }
  for (const [name, check] of Object.entries(checks)) {
    if (Object.hasOwn(value, name) && !check(value[name])) throw new TypeError(`its ${name} is wrong`);
  }
  return value;
}

/** @param {string} text JSON @returns {EngineState} Throws where it is none. */
export function readState(text) {
  return new EngineState({ ...EMPTY_STATE, ...read(text, STATE, ["num_blocks", "step"]) });
}

/** @param {string} text JSON @returns {StepRecord} Throws where it is none. */
export function readRecord(text) {
  return { ...EMPTY_RECORD, ...read(text, RECORD, ["step", "begin", "end"]) };
}

/**
 * @param {string} text JSON
 * @returns {import("./engine-experts.js").Experts} Throws where it is none.
 */
export function readExperts(text) {
  const value = read(text, EXPERTS, Object.keys(EXPERTS));
  const [load, copies] = [value.expert_load, value.expert_copies];
  const numRows = value.expert_layers.length;
  if (load.length !== numRows || copies.length !== numRows || copies[0].length !== load[0].length) {
    throw new TypeError("its tables differ in size");
  }
  return value;
}

/**
 * A saved trace: a line with the state before the steps, then one a step.
 *
 * @param {string} text
 * @returns {{first: EngineState, records: StepRecord[]}} Throws an Error that names the line.
 */
export function readTrace(text) {
  const lines = text.split("\n");
  if (lines.at(-1) === "") lines.pop();
  /** @param {number} index @param {string} what @param {(text: string) => any} readLine */
  const readAt = (index, what, readLine) => {
    try {
      return readLine(lines[index] ?? "");
    } catch (error) {
      const isSyntax = error instanceof SyntaxError; // whose words differ from browser to browser
      const reason = isSyntax ? "it is not JSON" : /** @type {Error} */ (error).message;
      throw new Error(`line ${index + 1} is not ${what}: ${reason}.`);
    }
  };
  const first = readAt(0, "an engine's state", readState);
  const records = lines.slice(1).map((_, index) => readAt(index + 1, "a step", readRecord));
  return { first, records };
}
