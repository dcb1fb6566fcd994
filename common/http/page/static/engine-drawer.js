/**
 * Whether the engine is shown: beside the chat where there is room, which is remembered, and in its
 * place where there is not.
 */

const STORE = "engine";
const CLOSED = "closed";

export class Drawer {
  #panel;
  #room;
  #button;
  #onChange;
  #narrow = matchMedia("(max-width: 64rem)"); // as in the stylesheet
  #isAvailable = false;
  #isOpenBeside = remembered() !== CLOSED;
  #isOpenInstead = false;

  /**
   * @param {HTMLElement} panel @param {HTMLElement} room holds the panel and the chat
   * @param {HTMLButtonElement} button @param {() => void} onChange
   */
  constructor(panel, room, button, onChange) {
    this.#panel = panel;
    this.#room = room;
    this.#button = button;
    this.#onChange = onChange;
    button.addEventListener("click", () => this.#toggle());
    this.#narrow.addEventListener("change", () => this.#show());
    // In a narrow window it stands where the message box would be.
    document.querySelector(".skip")?.addEventListener("click", () => this.#closeIfNarrow());
    this.#show();
  }

  /** Whether the panel is shown. */
  get isOpen() {
    return this.#isAvailable && (this.#narrow.matches ? this.#isOpenInstead : this.#isOpenBeside);
  }

  /** Whether the panel is to know what happens: behind the chat of a narrow window too. */
  get isWanted() {
    return this.#isAvailable && (this.#narrow.matches || this.#isOpenBeside);
  }

  /** @param {boolean} isAvailable whether there is anything to show */
  setAvailable(isAvailable) {
    if (this.#isAvailable === isAvailable) return;
    this.#isAvailable = isAvailable;
    this.#show();
  }

  #toggle() {
    if (this.#narrow.matches) {
      this.#isOpenInstead = !this.#isOpenInstead;
    } else {
      this.#isOpenBeside = !this.#isOpenBeside;
      remember(this.#isOpenBeside ? null : CLOSED);
    }
    this.#show();
  }

  #closeIfNarrow() {
    if (this.#narrow.matches && this.#isOpenInstead) this.#toggle();
  }

  #show() {
    this.#button.hidden = !this.#isAvailable;
    this.#button.setAttribute("aria-expanded", String(this.isOpen));
    this.#panel.hidden = !this.isOpen;
    this.#room.classList.toggle("has-engine", this.isOpen);
    this.#onChange();
  }
}

function remembered() {
  try {
    return localStorage.getItem(STORE);
  } catch {
    return null; // storage can be forbidden
  }
}

/** @param {string | null} choice */
function remember(choice) {
  try {
    if (choice === null) localStorage.removeItem(STORE);
    else localStorage.setItem(STORE, choice);
  } catch {
    // Forbidden: the choice lasts as long as the page.
  }
}
