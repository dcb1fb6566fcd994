/**
 * The engine beside the chat: follows the server's trace, or replays a saved one, and hands what
 * there is to the view.
 */

import { fetchTrace } from "./api.js";
import { Colours } from "./engine-canvas.js";
import { EngineChoice } from "./engine-choice.js";
import { Drawer } from "./engine-drawer.js";
import { Feed } from "./engine-feed.js";
import { Frames } from "./engine-frames.js";
import { History } from "./engine-history.js";
import { Player } from "./engine-player.js";
import { emptyState, readTrace } from "./engine-records.js";
import { EngineView } from "./engine-view.js";

// Milliseconds that a page behind others keeps its connection: a browser has six for one server.
const PATIENCE = 60000;
const QUIET = 5000; // milliseconds between two announcements

/** In words. @type {Record<import("./engine-feed.js").FeedStatus, string>} */
const STATUS = {
  connecting: "connecting…",
  live: "live",
  away: "no connection",
  locked: "locked",
  none: "no trace",
};

/** @param {string} id @returns {any} */
const byId = (id) => document.getElementById(id);

export class EnginePanel {
  #root = byId("engine");
  #player = new Player(new History(emptyState()));
  #frames = new Frames(this.#root, () => this.#paint());
  #view;
  #drawer;
  #feed;
  /** @type {string | null} the API key; null until the server has accepted one, or none */
  #key = null;
  /** @type {import("./engine-feed.js").FeedStatus} */
  #status = "connecting";
  #choice = new EngineChoice(byId("engine-choice"), () => this.#restartFeed());
  #fileName = "";
  #said = "";
  #quiet = 0; // the timer that runs until something may be said again
  #absence = 0; // the timer that ends the connection

  constructor() {
    const colours = new Colours(byId("engine-probe"), () => this.#frames.answer());
    this.#view = new EngineView(this.#player, colours, () => this.#frames.answer());
    this.#feed = new Feed({
      onState: (state) => this.#restart(state),
      onRecord: (record) => {
        this.#player.live.append(record);
        this.#frames.update();
      },
      onExperts: (experts) => {
        this.#view.experts = experts;
        this.#frames.update();
      },
      onStatus: (status) => this.#setStatus(status),
      onEngines: (engines, engine) => this.#choice.show(engines, engine),
    });
    this.#drawer = new Drawer(this.#root, byId("room"), byId("engine-toggle"), () => this.#follow());
    new ResizeObserver(() => this.#frames.answer()).observe(this.#root);
    document.addEventListener("visibilitychange", () => this.#onVisibility());
    this.#listen();
  }

  /** The server answers. @param {string} key the API key, empty for none */
  start(key) {
    this.#key = key;
    this.#drawer.setAvailable(true);
    this.#feed.stop();
    this.#follow();
  }

  /** Connected exactly while the reader wants the panel. */
  #follow() {
    if (this.#key === null) return;
    if (!this.#drawer.isWanted) this.#feed.stop();
    else if (!this.#feed.isRunning) this.#feed.start(this.#key, this.#choice.engine);
  }

  /** Another engine is wanted. */
  #restartFeed() {
    this.#feed.stop();
    this.#follow();
  }

  #onVisibility() {
    clearTimeout(this.#absence);
    if (document.visibilityState === "visible") this.#follow();
    else this.#absence = setTimeout(() => this.#feed.stop(), PATIENCE);
  }

  /** @param {import("./engine-state.js").EngineState} state */
  #restart(state) {
    // After a pause in which nothing happened the steps before are still those before.
    if (JSON.stringify(state) === JSON.stringify(this.#player.live.last)) return;
    this.#player.restart(new History(state));
    this.#frames.update();
  }

  /** @param {import("./engine-feed.js").FeedStatus} status */
  #setStatus(status) {
    this.#status = status;
    this.#drawer.setAvailable(status !== "none" || this.#player.isFile);
    this.#frames.update();
  }

  #paint() {
    this.#player.tick();
    this.#view.paint();
    this.#showControls();
    this.#announce();
    if (this.#player.isFile && this.#player.isPlaying) this.#frames.update();
  }

  #showControls() {
    const { isFile, isPlaying } = this.#player;
    const play = byId("engine-play");
    play.dataset.state = isPlaying ? "playing" : "paused";
    play.setAttribute("aria-label", isPlaying ? "Pause" : isFile ? "Play" : "Back to the newest step");
    play.title = play.getAttribute("aria-label");
    byId("engine-speed-field").hidden = !isFile;
    byId("engine-save").hidden = isFile;
    byId("engine-live").hidden = !isFile;
    const text = isFile ? this.#fileName : isPlaying ? STATUS[this.#status] : "paused";
    const status = byId("engine-status");
    if (status.textContent !== text) status.textContent = text;
    status.dataset.state = isFile ? "file" : isPlaying ? this.#status : "paused";
  }

  /** Only to who is here: beside a chat that is spoken, counts would be noise. */
  #announce() {
    if (this.#quiet || !this.#root.contains(document.activeElement)) return;
    const { summary } = this.#view;
    if (summary === this.#said) return;
    this.#said = summary;
    byId("engine-announcer").textContent = summary;
    this.#quiet = setTimeout(() => {
      this.#quiet = 0;
      this.#announce();
    }, QUIET);
  }

  #listen() {
    const player = this.#player;
    /** @param {string} id @param {string} type @param {() => void} act */
    const on = (id, type, act) =>
      byId(id).addEventListener(type, () => {
        this.#say("");
        act();
        this.#frames.answer();
      });
    on("engine-play", "click", () => (player.isPlaying ? player.pause() : player.play()));
    on("engine-back", "click", () => player.seek(player.position - 1));
    on("engine-forward", "click", () => player.seek(player.position + 1));
    on("engine-slider", "input", () => player.seek(Number(byId("engine-slider").value)));
    on("engine-speed", "change", () => (player.speed = Number(byId("engine-speed").value)));
    on("engine-save", "click", () => this.#save());
    on("engine-open", "click", () => byId("engine-file").click());
    on("engine-file", "change", () => this.#open());
    on("engine-live", "click", () => this.#backToLive());
  }

  async #save() {
    try {
      const url = URL.createObjectURL(await fetchTrace(this.#key ?? "", this.#choice.engine));
      const link = document.createElement("a");
      link.href = url;
      link.download = "trace.jsonl";
      link.click();
      setTimeout(() => URL.revokeObjectURL(url), 10000); // the browser may still read it
    } catch (error) {
      this.#say(`The trace was not saved. ${/** @type {Error} */ (error).message}`);
    }
  }

  async #open() {
    const input = byId("engine-file");
    const [file] = input.files;
    input.value = ""; // so that the same file can be chosen again
    if (!file) return;
    try {
      const { first, records } = readTrace(await file.text());
      const history = new History(first, Infinity);
      for (const record of records) history.append(record);
      this.#player.open(history);
      this.#fileName = file.name;
    } catch (error) {
      this.#say(`${file.name} is no saved trace: ${/** @type {Error} */ (error).message}`);
    }
    this.#frames.answer();
  }

  #backToLive() {
    this.#player.backToLive();
    byId("engine-open").focus(); // the button that was pressed goes
  }

  /** @param {string} message empty to take it away */
  #say(message) {
    const notice = byId("engine-notice");
    notice.textContent = message;
    notice.hidden = message === "";
  }
}
