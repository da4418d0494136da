// The list of requests with their phases, and one request opened: waterfall, marks, and the scheduler's why.

import {$, clock, count, known, make, ms, PHASES, redraw, refusal, text} from "./dom.js";
import {ask} from "./live.js";
import {fromMarks, fromRow, strip, waterfall} from "./waterfall.js";

const EVERY_MS = 2000;
const STATES = {queued: "○ queued", prefill: "◔ prefill", transfer: "◑ transfer", decode: "◕ decode", finished: "● finished", failed: "✕ failed", cancelled: "– cancelled", refused: "⊘ refused"};
const OVER = new Set(["finished", "failed", "cancelled", "refused"]);

export class Requests {
  constructor() {
    this.rows = [];
    this.nodes = new Map(); // id -> row element
    this.opened = null;
    this.list = $("request-list");
    this.isVisible = true;
    this.now = 0; // by the server's clock
    $("phases").append(...PHASES.map(([phase, label, what]) => make("span", {title: what}, make("i", {class: `key ph ${phase}`}), label)));
    for (const [state, label] of Object.entries(STATES)) $("by-state").append(make("option", {value: state}, label.slice(2)));
    for (const id of ["by-tenant", "by-state"]) $(id).addEventListener("change", () => this.refresh());
    $("by-id").addEventListener("input", () => this.draw());
    $("by-id").addEventListener("keydown", event => { if (event.key === "Enter" && event.target.value.trim()) this.open(event.target.value.trim()); });
    $("hold").addEventListener("click", () => this.hold());
    new IntersectionObserver(entries => { this.isVisible = entries.at(-1).isIntersecting; if (this.isVisible && this.isLive) this.refresh(); }, {rootMargin: "200px"}).observe($("requests"));
    this.#say();
    this.#forever();
  }

  /** The figures may be read: from here on the list follows while it can be seen. */
  start() {
    this.isLive = true;
    this.refresh();
  }

  hold() {
    this.isHeld = !this.isHeld;
    $("hold").setAttribute("aria-pressed", String(this.isHeld));
    text($("hold"), this.isHeld ? "Held" : "Hold");
    if (!this.isHeld) this.refresh();
  }

  tenants(names) {
    redraw($("by-tenant"), names, () => [make("option", {value: ""}, "all tenants"), ...names.map(name => make("option", {value: name}, name))]);
  }

  async #forever() {
    for (;;) {
      await new Promise(resolve => setTimeout(resolve, EVERY_MS));
      if (this.isVisible && !this.isHeld && !document.hidden && this.isLive) await this.refresh();
    }
  }

  async refresh() {
    const query = new URLSearchParams({limit: "100"});
    if ($("by-tenant").value) query.set("tenant", $("by-tenant").value);
    if ($("by-state").value) query.set("state", $("by-state").value);
    try {
      const answer = await ask(`dashboard/requests?${query}`);
      if (!answer.ok) return;
      this.rows = (await answer.json()).requests;
    } catch { // the connection's own line says it
      return;
    }
    this.draw();
    const row = this.rows.find(one => one.id === this.opened);
    if (row && !this.isOver) this.open(this.opened, false);
  }

  draw() {
    const wanted = $("by-id").value.trim().toLowerCase();
    const rows = wanted ? this.rows.filter(row => row.id.toLowerCase().includes(wanted) || (row.client_id || "").toLowerCase().includes(wanted)) : this.rows;
    const longest = Math.max(1, ...rows.map(row => OVER.has(row.state) ? row.e2e_ms || 0 : 1000 * (this.now - row.received)));
    const scale = longest * 1.02, ids = new Set(rows.map(row => row.id));
    for (const [id, node] of this.nodes) if (!ids.has(id)) { node.remove(); this.nodes.delete(id); }
    let before = this.list.firstElementChild;
    for (const row of rows) {
      let node = this.nodes.get(row.id);
      if (!node) {
        node = make("button", {type: "button", class: "request", "data-id": row.id, onclick: () => this.open(row.id)});
        this.nodes.set(row.id, node);
      }
      const running = OVER.has(row.state) ? null : Math.max(0, 1000 * (this.now - row.received));
      redraw(node, [row, scale, running], () => cells(row, scale, running));
      node.setAttribute("aria-current", String(row.id === this.opened));
      if (node === before) before = before.nextElementSibling;
      else this.list.insertBefore(node, before);
    }
    while (before) { // an older note
      const next = before.nextElementSibling;
      before.remove();
      before = next;
    }
    if (!rows.length) this.list.replaceChildren(make("p", {class: "dim"}, this.rows.length ? "No request fits." : "No request yet."));
  }

  step(by) {
    const nodes = [...this.list.querySelectorAll(".request")];
    if (!nodes.length) return;
    const at = nodes.indexOf(document.activeElement);
    const next = nodes[Math.max(0, Math.min(nodes.length - 1, at < 0 ? 0 : at + by))];
    next.focus();
    next.scrollIntoView({block: "nearest"});
  }

  /** `fresh`: a person asked for it, so it is brought into view. */
  async open(id, fresh = true) {
    this.opened = id;
    let found = null, trouble = "";
    try {
      const answer = await ask(`dashboard/requests/${encodeURIComponent(id)}`);
      if (answer.ok) found = await answer.json();
      else trouble = answer.status === 404 ? `There is no request ${id} any more: only the newest are kept.` : `The server answered ${answer.status}.`;
    } catch {
      trouble = "The server was not reached.";
    }
    if (this.opened !== id) return;
    if (found) this.opened = found.request.id;
    this.isOver = !found || OVER.has(found.request.state);
    for (const [other, node] of this.nodes) node.setAttribute("aria-current", String(other === this.opened));
    redraw($("detail"), [found, trouble], () => found ? detail(found) : make("p", {class: "bad"}, trouble));
    if (fresh) {
      $("detail").scrollIntoView({block: "nearest", behavior: "auto"});
      if (matchMedia("(max-width: 70rem)").matches) $("detail").focus({preventScroll: true});
    }
  }

  #say() {
    $("detail").append(make("p", {class: "dim"}, "Choose a request: where its time went, and why the scheduler sent it where it did."));
  }
}

function cells(row, scale, now) {
  const bad = row.state === "failed" || row.state === "refused";
  return [
    make("span", {class: "when"}, clock(row.received)),
    make("span", {class: "id"}, row.client_id || row.id, make("small", {}, row.tenant === "default" ? row.class : `${row.tenant} · ${row.class}`)),
    make("span", {class: bad ? "st bad" : "st"}, STATES[row.state] || row.state, row.resumptions ? make("small", {class: "good"}, `↻ resumed${row.resumptions > 1 ? ` ×${row.resumptions}` : ""}`) : null),
    bad && !row.e2e_ms ? make("span", {class: "strip why"}, refusal(row.failure || "")) : strip(row, scale, now),
    make("span", {class: "num"}, ms(row.ttft_ms), make("small", {}, "TTFT")),
    make("span", {class: "num"}, ms(row.tpot_ms), make("small", {}, "TPOT")),
    make("span", {class: "num"}, `${count(row.prompt_tokens)} + ${count(row.output_tokens)}`, make("small", {}, "tokens")),
  ];
}

function detail({request, timeline, why}) {
  const fall = timeline && timeline.length ? fromMarks(timeline) : fromRow(request);
  const facts = [
    ["state", STATES[request.state] || request.state], ["tenant", `${request.tenant}, ${request.class}`], ["model", request.model],
    ["prompt", `${count(request.prompt_tokens)} tokens, ${count(request.cached_tokens)} cached`], ["output", `${count(request.output_tokens)} tokens`],
    ["workers", [request.prefill_worker, request.decode_worker].filter(Boolean).join(" → ") || "–"], ["end to end", ms(request.e2e_ms)],
  ];
  if (request.client_id && request.client_id !== request.id) facts.push(["x-request-id", request.client_id]);
  if (request.failure) facts.push(["reason", refusal(request.failure)]);
  return [
    make("h3", {class: "mono"}, request.id),
    waterfall(fall),
    make("dl", {class: "facts"}, facts.map(([name, value]) => [make("dt", {}, name), make("dd", {class: name === "reason" ? "bad" : null}, value)])),
    make("h3", {}, "Why there"),
    why ? explain(why) : make("p", {class: "dim"}, "The scheduler has no record of its decision any more."),
    timeline && timeline.length ? make("details", {}, make("summary", {}, `${timeline.length} marks`), make("table", {class: "marks"}, make("tbody", {},
      timeline.map(mark => make("tr", {}, make("td", {class: "num"}, ms(mark.at_ms)), make("td", {}, mark.name.replaceAll("_", " ")), make("td", {}, mark.worker || ""), make("td", {class: "dim"}, mark.detail || "")))))) : null,
  ];
}

/** Whatever the scheduler tells: lists of like things become tables, the rest names and values. */
export function explain(why) {
  const parts = [], facts = [];
  for (const [name, value] of Object.entries(why)) {
    if (!known(value) || (Array.isArray(value) && !value.length)) continue;
    if (Array.isArray(value) && typeof value[0] === "object") parts.push(make("h4", {}, name.replaceAll("_", " ")), grid(value, why));
    else if (typeof value === "object" && !Array.isArray(value)) parts.push(make("h4", {}, name.replaceAll("_", " ")), explain(value));
    else facts.push(make("dt", {}, unit(name)), make("dd", {}, said(name, value)));
  }
  return make("div", {class: "why"}, facts.length ? make("dl", {class: "facts"}, facts) : null, parts);
}

function grid(rows, why) {
  const names = [...new Set(rows.flatMap(row => Object.keys(row)))].filter(name => name !== "chosen");
  const chosen = new Set([why.chosen, why.prefill, why.decode, why.prefill_worker, why.decode_worker].filter(Boolean));
  return make("div", {class: "scroll", tabindex: "0"}, make("table", {}, make("thead", {}, make("tr", {}, names.map(name => make("th", {}, unit(name))))),
    make("tbody", {}, rows.map(row => make("tr", {class: row.chosen === true || chosen.has(row.name) || chosen.has(row.worker) ? "chosen" : null},
      names.map(name => make("td", {class: typeof row[name] === "number" ? "num" : null}, said(name, row[name]))))))));
}

const unit = name => name.replace(/_(ms|s)$/, "").replaceAll("_", " ");

function said(name, value) {
  if (!known(value)) return "–";
  if (typeof value === "number") return name.endsWith("_ms") ? ms(value) : name.endsWith("_s") && !name.endsWith("per_s") ? ms(1000 * value) : Number.isInteger(value) ? count(value) : value.toPrecision(3);
  if (typeof value === "boolean") return value ? "yes" : "no";
  return Array.isArray(value) ? value.join(", ") : typeof value === "object" ? JSON.stringify(value) : String(value);
}
