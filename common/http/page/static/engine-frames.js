/**
 * Paints when there is something new and somebody can see it: at most once a frame, and not at all
 * while the element is scrolled away, hidden, or in a tab behind others.
 */

const CALM = 1000; // milliseconds between two paints for readers who want little motion

export class Frames {
  #paint;
  #isSeen = false;
  #isStale = true;
  #frame = 0;
  #timer = 0;
  #paintedAt = -CALM;
  #calm = matchMedia("(prefers-reduced-motion: reduce)");

  /** @param {HTMLElement} element @param {() => void} paint */
  constructor(element, paint) {
    this.#paint = paint;
    new IntersectionObserver((entries) => {
      this.#isSeen = entries[entries.length - 1].isIntersecting;
      if (this.#isSeen && this.#isStale) this.#request();
    }).observe(element);
  }

  /** Something changed by itself. */
  update() {
    this.#isStale = true;
    if (!this.#isSeen || this.#frame || this.#timer) return;
    const wait = this.#paintedAt + CALM - performance.now();
    if (!this.#calm.matches || wait <= 0) {
      this.#request();
      return;
    }
    this.#timer = setTimeout(() => {
      this.#timer = 0;
      this.#request();
    }, wait);
  }

  /** The reader did something, and sees at once what came of it. */
  answer() {
    this.#isStale = true;
    if (this.#isSeen) this.#request();
  }

  #request() {
    this.#frame ||= requestAnimationFrame(() => {
      this.#frame = 0;
      this.#isStale = false;
      this.#paintedAt = performance.now();
      this.#paint();
    });
  }
}
