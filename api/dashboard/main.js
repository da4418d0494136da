// The page: wires the connection to its parts, draws at most once per frame, and knows the keys. Called by index.html.

import {$, duration, known, make, text} from "./dom.js";
import {follow, key, Store} from "./live.js";
import {Charts, Tiles} from "./charts.js";
import {drawPromises} from "./promises.js";
import {drawEvents, Pools, summaryOf} from "./pools.js";
import {Requests} from "./requests.js";
import {Playground} from "./playground.js";

const SECTIONS = ["overview", "promises", "pools", "requests", "events", "playground"];
const THEMES = {auto: ["◐", "as the system"], light: ["☀", "light"], dark: ["☾", "dark"]};

theme(localStorage.getItem("tandem-theme") || "auto");
takeKeyFromAddress();
const store = new Store();
const tiles = new Tiles($("tiles")), charts = new Charts($("charts")), pools = new Pools($("flow"));
const requests = new Requests(), playground = new Playground(locked);
let isWaiting = false;

follow(store, {
  snapshot() {
    requests.now = store.snapshot.now;
    if (!requests.isLive) requests.start();
    if (isWaiting) return;
    isWaiting = true;
    requestAnimationFrame(() => { isWaiting = false; draw(); });
  },
  state(name, words) {
    $("live").dataset.state = name;
    text($("live").lastElementChild, words);
    document.body.classList.toggle("stale", name === "lost");
  },
  locked,
});

function draw() {
  const {snapshot, series} = store, rows = (snapshot.sla && snapshot.sla.rows) || [], events = snapshot.events || [];
  document.body.classList.add("drawn");
  text($("model"), (snapshot.models || []).join(", "));
  text($("version"), `Tandem ${snapshot.version}`);
  tiles.draw(snapshot, series);
  charts.draw(series, snapshot.promise);
  drawPromises($("sla"), rows);
  text($("sla-window"), snapshot.sla ? `over the last ${duration(snapshot.sla.window_s)}` : "");
  pools.draw(snapshot.pools || {});
  text($("pools-sum"), summaryOf(snapshot.pools || {}));
  drawEvents($("event-list"), events, id => requests.open(id));
  text($("events-sum"), events.length ? `${events.length} kept` : "");
  requests.tenants([...new Set(rows.map(row => row.tenant))].sort());
  playground.models(snapshot.models || []);
  notice(snapshot);
  empty(snapshot, series, rows);
}

function notice(snapshot) {
  const words = snapshot.error ? `The scheduler does not answer: ${snapshot.error}` : snapshot.ready ? "" : `Not ready: ${snapshot.reason || "starting"}`;
  $("notice").hidden = !words;
  text($("notice"), words);
}

/** Nothing was ever asked here: say what to do. */
function empty(snapshot, series, rows) {
  const served = rows.some(row => row.requests > 0) || (series.requests_per_s || []).some(value => value > 0);
  const nobody = !(snapshot.pools && snapshot.pools.workers && snapshot.pools.workers.length);
  $("empty").hidden = served;
  if (served) return;
  text($("empty-title"), nobody ? "No worker is here yet" : snapshot.ready ? "Ready, and nobody has asked yet" : "Starting");
  text($("empty-text"), nobody ? "Workers register by themselves when they have loaded the model. If none comes, `tandem doctor` on the server says what is missing."
    : "Send a request and this page comes alive. Any OpenAI client works; so does this line:");
  const base = new URL(".", location.href).href.replace(/\/$/, ""), withKey = key.get() ? " -H \"Authorization: Bearer $TANDEM_API_KEY\"" : "";
  text($("empty-curl"), `curl ${base}/v1/chat/completions -H 'Content-Type: application/json'${withKey} \\\n  -d '{"model": "${(snapshot.models || ["MODEL"])[0]}", "messages": [{"role": "user", "content": "What is a decode worker?"}]}'`);
}

// ---- the key -----------------------------------------------------------------------------------------------------------

/** /dashboard#key=... : a fragment never leaves the browser, and it is taken out of the address at once. */
function takeKeyFromAddress() {
  const found = /^#key=(.+)$/.exec(location.hash);
  if (!found) return;
  key.set(decodeURIComponent(found[1]));
  history.replaceState(null, "", location.pathname + location.search);
}

let asking = null;

/** Asks for the key once, however many parts of the page want it. `wasWrong`: the one that was tried is not good. */
function locked(wasWrong) {
  if (asking) return asking;
  key.set("");
  if (wasWrong) text($("locked-why"), "That key is not one of this server's. The key stays in this tab and is forgotten with it.");
  const dialog = $("locked");
  if (!dialog.open) dialog.showModal();
  $("key").value = "";
  $("key").focus();
  asking = new Promise(resolve => {
    dialog.addEventListener("close", () => { key.set($("key").value.trim()); asking = null; resolve(); }, {once: true});
  });
  return asking;
}

$("locked").addEventListener("cancel", event => event.preventDefault());

// ---- colours, keys, buttons --------------------------------------------------------------------------------------------

function theme(name) {
  const [sign, words] = THEMES[name] || THEMES.auto;
  if (name === "auto") delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = name;
  text($("theme"), sign);
  $("theme").setAttribute("aria-label", `Colours: ${words}`);
  $("theme").title = `Colours: ${words} (t)`;
}

function nextTheme() {
  const names = Object.keys(THEMES), now = document.documentElement.dataset.theme || "auto", next = names[(names.indexOf(now) + 1) % names.length];
  localStorage.setItem("tandem-theme", next);
  theme(next);
  charts.recolour();
}

$("theme").addEventListener("click", nextTheme);
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => charts.recolour());
$("help").addEventListener("click", () => $("keys").showModal());
$("empty-copy").addEventListener("click", async () => {
  try {
    await navigator.clipboard.writeText($("empty-curl").textContent);
    text($("empty-copy"), "Copied");
  } catch { // no right to the clipboard: select it, so that a key does it
    getSelection().selectAllChildren($("empty-curl"));
  }
});

addEventListener("keydown", event => {
  if (event.ctrlKey || event.metaKey || event.altKey || document.querySelector("dialog[open]")) return;
  if (event.target.closest("input, textarea, select")) {
    if (event.key === "Escape") event.target.blur();
    return;
  }
  const section = SECTIONS[Number(event.key) - 1];
  const does = {"/": () => $("by-id").focus(), "?": () => $("keys").showModal(), j: () => requests.step(1), k: () => requests.step(-1), h: () => requests.hold(),
    p: () => $("prompt").focus(), t: nextTheme}[event.key] || (section && (() => { $(section).scrollIntoView(); $(section).focus({preventScroll: true}); }));
  if (!does) return;
  event.preventDefault();
  does();
});

for (const name of SECTIONS) $(name).tabIndex = -1;
const spy = new IntersectionObserver(entries => {
  for (const entry of entries) {
    const link = document.querySelector(`nav a[href="#${entry.target.id}"]`);
    if (link) link.toggleAttribute("aria-current", entry.isIntersecting);
  }
}, {rootMargin: "-20% 0px -70% 0px"});
for (const name of SECTIONS) spy.observe($(name));

setInterval(() => { // a stream that says nothing more
  if (store.arrivedAt && performance.now() - store.arrivedAt > 10000 && $("live").dataset.state === "live") text($("live").lastElementChild, "quiet");
}, 2000);

// For tests: what the page holds, without a way in.
Object.defineProperty(window, "tandemPage", {value: Object.freeze({points: () => store.series.t.length, snapshot: () => store.snapshot, known})});
