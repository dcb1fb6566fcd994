/**
 * Which engine the panel shows, where a router has several. The page's address may name one, and says
 * which was chosen: `/?engine=1`.
 */

export class EngineChoice {
  #select;

  /** Empty for any. @type {string} */
  engine = new URLSearchParams(location.search).get("engine") ?? "";

  /** @param {HTMLSelectElement} select @param {() => void} onChange */
  constructor(select, onChange) {
    this.#select = select;
    select.addEventListener("change", () => {
      this.engine = select.value;
      const address = new URL(location.href);
      address.searchParams.set("engine", this.engine);
      history.replaceState(null, "", address);
      onChange();
    });
  }

  /** @param {string[]} engines that there are @param {string} engine that is shown */
  show(engines, engine) {
    this.#select.hidden = engines.length < 2;
    const options = engines.map((name) => new Option(`engine ${name}`, name));
    this.#select.replaceChildren(...options);
    this.#select.value = engine;
  }
}
