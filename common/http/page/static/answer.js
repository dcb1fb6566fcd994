/**
 * A model's text as DOM nodes: prose with its whitespace kept, fenced code as code with a copy
 * button. Text goes in as text nodes only; whatever a model writes, it is shown and never run.
 */

import { copyText } from "./clipboard.js";

/**
 * @typedef {object} Block
 * @property {"prose" | "code"} kind
 * @property {string} text without the fences
 * @property {string} language what stands after the opening fence
 * @property {number} start where the block begins in the whole text
 */

const FENCE = /^[ \t]*(`{3,}|~{3,})([^`]*)$/;

/**
 * Split text into prose and fenced code. A block of blank lines is none. A fence that nothing closes
 * runs to the end: it is what a stream looks like in the middle of a code block.
 *
 * @param {string} text
 * @returns {Block[]}
 */
export function splitBlocks(text) {
  /** @type {Block[]} */
  const blocks = [];
  let fence = ""; // the open one; empty in prose
  let block = /** @type {Block} */ ({ kind: "prose", text: "", language: "", start: 0 });
  let position = 0;

  /** @param {Block["kind"]} kind @param {string} language @param {number} start */
  function begin(kind, language, start) {
    if (block.kind === "code" || block.text.trim() !== "") blocks.push(block);
    block = { kind, text: "", language, start };
  }

  for (const line of text.split(/(?<=\n)/)) {
    const match = FENCE.exec(line.trimEnd());
    if (fence === "" && match) {
      begin("code", match[2].trim(), position);
      fence = match[1];
    } else if (fence !== "" && match && match[1].startsWith(fence) && match[2] === "") {
      begin("prose", "", position + line.length);
      fence = "";
    } else {
      block.text += line;
    }
    position += line.length;
  }
  begin("prose", "", position);
  return blocks;
}

/** One block on the page. Growing text is appended, so that a reader's selection stays. */
class BlockView {
  /** @param {Block} block */
  constructor(block) {
    this.kind = block.kind;
    this.start = block.start;
    this.element = block.kind === "code" ? makeCode() : makeProse();
    this.language = this.element.querySelector(".code-language");
    this.text = new Text();
    (this.element.querySelector("code") ?? this.element).append(this.text);
    this.update(block);
  }

  /** @param {Block} block */
  update(block) {
    this.start = block.start;
    if (this.language) this.language.textContent = block.language || "code";
    const text =
      block.kind === "code" ? block.text.replace(/\n$/, "") : trimBlankLines(block.text);
    if (text.startsWith(this.text.data)) this.text.appendData(text.slice(this.text.length));
    else this.text.data = text;
  }
}

export class AnswerText {
  #root;
  /** @type {BlockView[]} */
  #views = [];

  /** @param {HTMLElement} root an empty element */
  constructor(root) {
    this.#root = root;
  }

  /**
   * Show a longer text. What comes next can change the last block, and the one before it when the
   * last line turns out to be no fence; all earlier blocks are left alone.
   *
   * @param {string} text the whole text so far
   */
  update(text) {
    const first = Math.max(0, this.#views.length - 2);
    const start = this.#views[first]?.start ?? 0;
    const blocks = splitBlocks(text.slice(start));
    blocks.forEach((block, index) => this.#show(first + index, { ...block, start: start + block.start }));
    for (const view of this.#views.splice(first + blocks.length)) view.element.remove();
  }

  /** @param {number} index @param {Block} block */
  #show(index, block) {
    const view = this.#views[index];
    if (view?.kind === block.kind) {
      view.update(block);
      return;
    }
    const fresh = new BlockView(block);
    if (view) view.element.replaceWith(fresh.element);
    else this.#root.append(fresh.element);
    this.#views[index] = fresh;
  }
}

function makeProse() {
  const element = document.createElement("p");
  element.className = "prose";
  element.dir = "auto";
  return element;
}

function makeCode() {
  const template = /** @type {HTMLTemplateElement} */ (document.getElementById("code-template"));
  const element = /** @type {HTMLElement} */ (
    template.content.firstElementChild?.cloneNode(true)
  );
  const button = /** @type {HTMLButtonElement} */ (element.querySelector("button"));
  const code = /** @type {HTMLElement} */ (element.querySelector("code"));
  button.addEventListener("click", async () => {
    button.textContent = (await copyText(code.textContent ?? "")) ? "Copied" : "Copy failed";
    setTimeout(() => (button.textContent = "Copy"), 1500);
  });
  return element;
}

/** @param {string} text */
function trimBlankLines(text) {
  return text.replace(/^(?:[ \t]*\r?\n)+/, "").trimEnd();
}
