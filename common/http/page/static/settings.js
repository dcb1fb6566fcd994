/**
 * The settings of a request. An empty field is not sent, so the server's default holds. A field that
 * is wrong says so beside itself, whether the page found it or the server did.
 */

/** @typedef {(value: number) => boolean} Check */

/** @type {Record<string, {accepts: Check, message: string}>} */
const NUMBERS = {
  temperature: { accepts: (value) => value >= 0, message: "A number, 0 or more." },
  top_p: {
    accepts: (value) => value > 0 && value <= 1,
    message: "A number above 0 and at most 1.",
  },
  max_tokens: {
    accepts: (value) => Number.isSafeInteger(value) && value >= 1,
    message: "A whole number, 1 or more.",
  },
  seed: {
    accepts: (value) => Number.isSafeInteger(value), // JSON numbers of a browser are exact up to 2^53
    message: "A whole number of at most 15 digits.",
  },
};

/** What a server may call a field that has another name here. */
const ALIASES = /** @type {Record<string, string>} */ ({ max_completion_tokens: "max_tokens" });

const NUMBER = /^[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?$/i;

export class Settings {
  #details;
  #active;

  /** @param {HTMLDetailsElement} details the disclosure that holds the fields */
  constructor(details) {
    this.#details = details;
    this.#active = /** @type {HTMLElement} */ (details.querySelector(".settings-active"));
    details.addEventListener("input", (event) => {
      this.#setError(/** @type {HTMLInputElement} */ (event.target), "");
      this.#showActive();
    });
    this.#showActive(); // a reloaded page may come with its fields filled
  }

  /** @returns {string} the system prompt, empty for none */
  get system() {
    const system = this.#field("system").value;
    return system.trim() === "" ? "" : system;
  }

  /**
   * Check the fields; mark the wrong ones and open the disclosure on the first of them.
   * @returns {Record<string, number> | null} the fields to send, or null where one is wrong
   */
  read() {
    /** @type {Record<string, number>} */
    const values = {};
    /** @type {string[]} */
    const wrong = [];
    for (const [name, { accepts, message }] of Object.entries(NUMBERS)) {
      const text = this.#field(name).value.trim();
      const isRight = text === "" || (NUMBER.test(text) && accepts(Number(text)));
      this.#setError(this.#field(name), isRight ? "" : message);
      if (!isRight) wrong.push(name);
      else if (text !== "") values[name] = Number(text);
    }
    if (wrong.length === 0) return values;
    this.#show(wrong[0]);
    return null;
  }

  /**
   * Show the server's message by the field it names.
   * @param {string | null} param
   * @param {string} message
   * @returns {boolean} false where no field here has that name
   */
  showError(param, message) {
    const name = ALIASES[param ?? ""] ?? param ?? "";
    if (!Object.hasOwn(NUMBERS, name)) return false;
    this.#setError(this.#field(name), message);
    this.#show(name);
    return true;
  }

  /** @returns {boolean} false where it was closed already */
  close() {
    const wasOpen = this.#details.open;
    this.#details.open = false;
    return wasOpen;
  }

  /** @param {string} name @returns {HTMLInputElement} */
  #field(name) {
    return /** @type {HTMLInputElement} */ (this.#details.querySelector(`[name="${name}"]`));
  }

  /** @param {string} name */
  #show(name) {
    this.#details.open = true;
    this.#field(name).focus();
  }

  /** @param {HTMLInputElement} field @param {string} message */
  #setError(field, message) {
    const place = this.#details.querySelector(`#${field.id}-error`);
    if (!place) return; // the system prompt takes any text
    place.textContent = message;
    if (message === "") field.removeAttribute("aria-invalid");
    else field.setAttribute("aria-invalid", "true");
  }

  /** A closed disclosure still says what is set. */
  #showActive() {
    const set = Object.keys(NUMBERS)
      .filter((name) => this.#field(name).value.trim() !== "")
      .map((name) => `${name} ${this.#field(name).value.trim()}`);
    if (this.system !== "") set.unshift("system prompt");
    this.#active.textContent = set.join(" · ");
  }
}
