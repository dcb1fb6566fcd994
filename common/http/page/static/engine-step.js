/**
 * One step in words: how many tokens, how long each phase took, what changed, who was run.
 */

/** @typedef {import("./engine-history.js").Entry} Entry */

const MOST_NAMES = 24; // of a list, before the rest is a number

/** @param {Entry | undefined} entry @returns {string[]} lines, some of them empty */
export function describeStep(entry) {
  if (!entry) return ["No step yet: ask something, and the engine runs.", "", "", ""];
  const { record, numTokens, ended } = entry;
  const phases = record.phases.map(([name, begin, end]) => `${name} ${milliseconds(end - begin)}`);
  /** @param {string} id */
  const name = (id) => (ended.has(id) ? `${id} (ended)` : id);
  const shares = Object.entries(record.scheduled);
  const many = shares.filter(([, count]) => count !== 1);
  const ones = shares.filter(([, count]) => count === 1); // most are, after their prompt
  const runs = [
    many.length > 0 ? listed(many.map(([id, count]) => `${name(id)} ${grouped(count)}`)) : [],
    ones.length > 0 ? `1 each for ${listed(ones.map(([id]) => name(id)))}` : [],
  ].flat();
  const time = milliseconds(record.end - record.begin);
  return [
    `Step ${record.step} · ${plural(numTokens, "token")} · ${time} ms`,
    phases.length > 0 ? `${phases.join(" · ")} ms` : "",
    changes(record),
    runs.length > 0 ? `Tokens: ${runs.join("; ")}` : "Nothing was run.",
  ];
}

/** @param {Entry["record"]} record */
function changes(record) {
  const prompts = Object.entries(record.arrived);
  const arrived = prompts.map(([id, count]) => `${id} (${plural(count, "token")})`);
  const finished = Object.entries(record.finished).map(([id, reason]) => `${id} (${reason})`);
  const hits = Object.entries(record.cached).filter(([, count]) => count > 0);
  const cached = hits.map(([id, count]) => `${id} (${plural(count, "token")})`);
  const rejected = Object.entries(record.rejected).map(([id, count]) => `${id} (${grouped(count)})`);
  const kinds = {
    Arrived: arrived,
    Cached: cached,
    "Drafts rejected": rejected,
    Finished: finished,
    Preempted: record.preempted,
  };
  const said = Object.entries(kinds).filter(([, names]) => names.length > 0);
  return said.map(([kind, names]) => `${kind}: ${listed(names)}`).join(". ");
}

/** @param {string[]} names */
export function listed(names) {
  const rest = names.length - MOST_NAMES;
  return names.slice(0, MOST_NAMES).join(", ") + (rest > 0 ? ` and ${rest} more` : "");
}

/** @param {number} seconds */
function milliseconds(seconds) {
  const value = 1000 * seconds;
  return value.toLocaleString("en", { maximumFractionDigits: value < 10 ? 2 : 1 });
}

/** @param {number} count @param {string} noun */
export function plural(count, noun) {
  return `${grouped(count)} ${noun}${count === 1 ? "" : "s"}`;
}

/** @param {number} count @returns {string} 1,234 */
export function grouped(count) {
  return count.toLocaleString("en");
}
