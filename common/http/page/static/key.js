/**
 * The API key: asked for when the server answers 401, kept for this tab only.
 */

const STORE = "api-key";
const HEADER_TEXT = /^[\x21-\x7e]+$/; // what an Authorization header can carry

export class KeyPrompt {
  #form;
  #input;
  #message;
  #key = "";

  /** @param {HTMLFormElement} form @param {() => void} onKey called when a key has been entered */
  constructor(form, onKey) {
    this.#form = form;
    this.#input = /** @type {HTMLInputElement} */ (form.querySelector("input"));
    this.#message = /** @type {HTMLElement} */ (form.querySelector("#key-message"));
    try {
      this.#key = sessionStorage.getItem(STORE) ?? "";
    } catch {
      // Storage can be forbidden: the key then lasts as long as the page.
    }
    form.addEventListener("submit", (event) => {
      event.preventDefault();
      if (this.#accept(this.#input.value.trim())) onKey();
    });
  }

  /** @returns {string} empty where none has been given */
  get key() {
    return this.#key;
  }

  /** The server wants a key, or another one. */
  show() {
    this.#say(this.#key === "" ? "This server asks for an API key." : "The server refused this key.");
    this.#form.hidden = false;
    this.#input.select();
    this.#input.focus();
  }

  hide() {
    this.#form.hidden = true;
    this.#input.value = "";
  }

  /** @param {string} key */
  #accept(key) {
    if (!HEADER_TEXT.test(key)) {
      this.#say("A key is made of letters, digits and signs, without spaces.");
      this.#input.focus();
      return false;
    }
    this.#key = key;
    try {
      sessionStorage.setItem(STORE, key);
    } catch {
      // As above.
    }
    return true;
  }

  /** @param {string} text */
  #say(text) {
    this.#message.textContent = text;
  }
}
