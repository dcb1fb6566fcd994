/**
 * Light or dark: the system's choice until the reader makes another, which is remembered. A classic
 * script, run before the first paint, so that the page never flashes in the wrong colours.
 */

(() => {
  const STORE = "theme";
  const root = document.documentElement;
  const systemIsDark = matchMedia("(prefers-color-scheme: dark)");

  /** @returns {string | null} `light`, `dark`, or null to follow the system */
  function remembered() {
    try {
      return localStorage.getItem(STORE);
    } catch {
      return null; // storage can be forbidden
    }
  }

  /** @param {string | null} theme */
  function remember(theme) {
    try {
      if (theme === null) localStorage.removeItem(STORE);
      else localStorage.setItem(STORE, theme);
    } catch {
      // Forbidden: the choice lasts as long as the page.
    }
  }

  function systemTheme() {
    return systemIsDark.matches ? "dark" : "light";
  }

  /** @param {string | null} choice */
  function apply(choice) {
    if (choice === "light" || choice === "dark") root.dataset.theme = choice;
    else delete root.dataset.theme;
    label();
  }

  function label() {
    const next = (root.dataset.theme ?? systemTheme()) === "dark" ? "light" : "dark";
    const button = document.getElementById("theme");
    button?.setAttribute("aria-label", `Use the ${next} theme`);
    button?.setAttribute("title", `Use the ${next} theme`);
  }

  function toggle() {
    const next = (root.dataset.theme ?? systemTheme()) === "dark" ? "light" : "dark";
    const choice = next === systemTheme() ? null : next; // back in step: follow the system again
    remember(choice);
    apply(choice);
  }

  apply(remembered());
  systemIsDark.addEventListener("change", label);
  document.addEventListener("DOMContentLoaded", () => {
    document.getElementById("theme")?.addEventListener("click", toggle);
    label();
  });
})();
