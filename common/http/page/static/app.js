/**
 * The page's wiring: the box and its keys, what happens on each outcome of a turn, the API key.
 */

import { Announcer } from "./announcer.js";
import { ApiError, listModels } from "./api.js";
import { Chat, Turn } from "./chat.js";
import { EnginePanel } from "./engine-panel.js";
import { KeyPrompt } from "./key.js";
import { Settings } from "./settings.js";
import { Transcript } from "./transcript.js";

/** @param {string} id @returns {any} */
const byId = (id) => document.getElementById(id);

/** @type {HTMLTextAreaElement} */
const box = byId("prompt");
const chat = new Chat();
const transcript = new Transcript(byId("transcript"), byId("turns"), byId("jump"));
const settings = new Settings(byId("settings"));
const announcer = new Announcer(byId("announcer"));
const engine = new EnginePanel();
const keyPrompt = new KeyPrompt(byId("key-form"), async () => {
  if (await connect()) box.focus();
});

/** @type {string | null} the model's name, once the server has told it */
let model = null;

/** @returns {Promise<boolean>} whether the server answered with a model's name */
async function connect() {
  showModel("connecting", "connecting…");
  try {
    model = (await listModels(keyPrompt.key))[0].id;
  } catch (error) {
    model = null;
    showModel("away", "not ready");
    showError(/** @type {ApiError} */ (error));
    return false;
  }
  showModel("here", model);
  showNotice("");
  keyPrompt.hide();
  engine.start(keyPrompt.key);
  return true;
}

async function send() {
  const question = box.value;
  if (chat.isRunning || question.trim() === "") return;
  const options = settings.read();
  if (options === null) return;
  showNotice("");
  if ((model === null && !(await connect())) || chat.isRunning) return;

  const turn = new Turn(question);
  const view = transcript.add(turn);
  const running = chat.run(turn, { model, ...options }, settings.system, keyPrompt.key, () => {
    view.update();
    announcer.follow(turn.answer);
  });
  setBox("");
  announcer.start();
  showRunning();
  try {
    await running;
  } finally {
    showRunning();
    if (view.isShown) endTurn(turn, view);
  }
}

/**
 * @param {Turn} turn
 * @param {import("./transcript.js").TurnView} view
 */
function endTurn(turn, view) {
  const summary = view.finish();
  if (turn.answer !== "" || turn.ending === "complete") {
    announcer.finish(turn.answer, summary);
    return;
  }
  // Nothing came: the question goes back to the box, before whatever has been typed since.
  view.remove();
  setBox(box.value === "" ? turn.question : `${turn.question}\n\n${box.value}`);
  if (turn.error) showError(turn.error);
  else showNotice("Stopped before the first token. Your text is back in the box.");
}

/** @param {ApiError} error */
function showError(error) {
  if ([0, 401, 404].includes(error.status)) model = null; // ask for it again before the next turn
  if (error.status === 0) showModel("away", "no connection");
  if (error.status === 401) {
    showModel("locked", "locked");
    keyPrompt.show();
    return;
  }
  if (!settings.showError(error.param, error.message)) showNotice(error.message, true);
}

/** @param {string} message empty to take it away @param {boolean} [isError] */
function showNotice(message, isError = false) {
  const notice = byId("notice");
  notice.textContent = message;
  notice.classList.toggle("is-error", isError);
  notice.hidden = message === "";
}

/** @param {"connecting" | "here" | "away" | "locked"} state @param {string} text */
function showModel(state, text) {
  byId("model").dataset.state = state;
  byId("model-name").textContent = text;
  byId("retry").hidden = state !== "away";
  if (state === "here") document.title = `${text} · Fifteen Engines`;
}

/** The send button and the stop button share a place; the focus must not vanish with one of them. */
function showRunning() {
  const hadFocus = byId("send") === document.activeElement || byId("stop") === document.activeElement;
  byId("send").hidden = chat.isRunning;
  byId("stop").hidden = !chat.isRunning;
  if (hadFocus) box.focus();
}

/** @param {string} text */
function setBox(text) {
  box.value = text;
  growBox();
}

function growBox() {
  box.style.height = "auto";
  box.style.height = `${box.scrollHeight}px`; // the stylesheet sets the limit
}

function newChat() {
  chat.clear();
  transcript.clear();
  showNotice("");
  showRunning();
  announcer.say("New chat.");
  box.focus();
}

/** @param {KeyboardEvent} event */
function onBoxKey(event) {
  const isPlainEnter =
    event.key === "Enter" && !(event.shiftKey || event.altKey || event.ctrlKey || event.metaKey);
  // Enter also accepts a word of an input method; Safari says so by the key code alone.
  if (!isPlainEnter || event.isComposing || event.keyCode === 229) return;
  event.preventDefault();
  send();
}

/** @param {KeyboardEvent} event */
function onAnyKey(event) {
  if (event.key !== "Escape" || event.isComposing) return;
  if (chat.isRunning) chat.stop();
  else if (settings.close()) box.focus();
}

box.addEventListener("input", growBox);
box.addEventListener("keydown", onBoxKey);
document.addEventListener("keydown", onAnyKey);
byId("composer").addEventListener("submit", (/** @type {SubmitEvent} */ event) => {
  event.preventDefault();
  send();
});
byId("stop").addEventListener("click", (/** @type {MouseEvent} */ event) => {
  if (event.detail < 2) chat.stop(); // the second click of a double click on Send is no stop
});
byId("new-chat").addEventListener("click", newChat);
byId("retry").addEventListener("click", connect);
for (const button of document.querySelectorAll(".suggestion")) {
  button.addEventListener("click", () => {
    setBox(button.textContent?.trim() ?? "");
    box.focus();
    send();
  });
}

growBox();
connect();
