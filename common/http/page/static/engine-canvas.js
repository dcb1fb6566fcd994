/**
 * What the two pictures share: a canvas as sharp as the screen, and the stylesheet's colours, which a
 * canvas cannot name by itself.
 */

import { NUM_COLOURS } from "./engine-owners.js";

const NAMES = ["ground", "surface", "line", "edge", "ink", "soft", "accent", "warn", "free"];

export class Colours {
  #probe;
  /** @type {string[]} */
  owners = [];
  /** @type {Record<string, string>} */
  named = {};

  /** @param {HTMLElement} probe an element that is not seen @param {() => void} onChange */
  constructor(probe, onChange) {
    this.#probe = probe;
    this.#read();
    const update = () => {
      this.#read();
      onChange();
    };
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", update);
    const theme = { attributes: true, attributeFilter: ["data-theme"] };
    new MutationObserver(update).observe(document.documentElement, theme);
  }

  #read() {
    /** @param {string} name */
    const valueOf = (name) => {
      this.#probe.style.color = `var(--${name})`;
      return getComputedStyle(this.#probe).color;
    };
    this.owners = Array.from({ length: NUM_COLOURS }, (_, index) => valueOf(`owner-${index}`));
    this.named = Object.fromEntries(NAMES.map((name) => [name, valueOf(name)]));
  }
}

/**
 * Size a canvas and clear it.
 *
 * @param {HTMLCanvasElement} canvas
 * @param {number} width in CSS pixels, as all that is drawn then
 * @param {number} height
 * @returns {CanvasRenderingContext2D}
 */
export function prepareCanvas(canvas, width, height) {
  const ratio = window.devicePixelRatio || 1;
  const [across, down] = [Math.round(width * ratio), Math.round(height * ratio)];
  if (canvas.width !== across) canvas.width = across;
  if (canvas.height !== down) canvas.height = down;
  if (canvas.style.height !== `${height}px`) canvas.style.height = `${height}px`;
  const context = /** @type {CanvasRenderingContext2D} */ (canvas.getContext("2d"));
  context.setTransform(ratio, 0, 0, ratio, 0, 0);
  context.clearRect(0, 0, width, height);
  return context;
}

/** @type {Map<string, CanvasPattern>} */
const hatchings = new Map();

/**
 * What is computed or held in vain is hatched, in its owner's colour.
 *
 * @param {CanvasRenderingContext2D} context @param {string} colour
 * @returns {CanvasPattern} one for the whole picture, so that neighbours join
 */
export function hatching(context, colour) {
  const known = hatchings.get(colour);
  if (known) return known;
  const [size, sharpness] = [4, 4]; // pixels of a tile; how much finer than those it is drawn
  const tile = document.createElement("canvas");
  tile.width = tile.height = size * sharpness;
  const lines = /** @type {CanvasRenderingContext2D} */ (tile.getContext("2d"));
  lines.scale(sharpness, sharpness);
  lines.strokeStyle = colour;
  lines.lineWidth = 1.2;
  for (const from of [0, size, 2 * size]) {
    lines.moveTo(from + 1, -1);
    lines.lineTo(from - size - 1, size + 1);
  }
  lines.stroke();
  const pattern = /** @type {CanvasPattern} */ (context.createPattern(tile, "repeat"));
  pattern.setTransform(new DOMMatrix().scale(1 / sharpness));
  hatchings.set(colour, pattern);
  return pattern;
}
