// The pools as a living picture (queue, prefill workers, links, decode workers), and the list of events.

import {ago, bytes, clock, count, known, make, percent, rate, redraw, svg, text} from "./dom.js";

const STATES = {ready: "●", loading: "○", draining: "◐", lost: "✕"};
const MAX_DOTS = 24;
const MAX_LABELS = 6;

export class Pools {
  constructor(root) {
    this.root = root;
    this.cards = new Map(); // worker name -> Card
    this.queue = make("div", {class: "queue"});
    this.columns = {prefill: make("div", {class: "column", "aria-label": "Prefill workers"}), decode: make("div", {class: "column", "aria-label": "Decode workers"})};
    this.wires = svg("svg", {class: "wires", "aria-hidden": "true"});
    this.links = make("ul", {class: "links"});
    root.append(this.wires, column("Queue", this.queue), column("Prefill", this.columns.prefill), make("div", {class: "gap"}), column("Decode", this.columns.decode));
    root.after(this.links);
    new ResizeObserver(() => this.drawWires()).observe(root);
  }

  draw(pools) {
    const workers = pools.workers || [], names = new Set(workers.map(worker => worker.name));
    for (const [name, card] of this.cards) {
      if (!names.has(name)) { card.node.remove(); this.cards.delete(name); }
    }
    for (const worker of workers) {
      let card = this.cards.get(worker.name);
      if (!card) this.cards.set(worker.name, card = new Card(worker.name));
      const place = this.columns[worker.role] || this.columns.decode;
      if (card.node.parentNode !== place) place.append(card.node);
      card.draw(worker);
    }
    for (const [role, place] of Object.entries(this.columns)) {
      const any = workers.some(worker => worker.role === role);
      redraw(emptyOf(place), any, () => any ? [] : make("p", {class: "dim"}, role === "prefill" ? "none: decode workers read the prompts" : "none: nobody can answer"));
    }
    this.#drawQueue(pools.queue || {});
    this.pools = pools;
    this.drawWires();
  }

  #drawQueue(queue) {
    const n = queue.requests || 0;
    redraw(this.queue, [n, queue.tokens], () => [
      make("b", {class: "qn"}, count(n)), make("small", {}, n === 1 ? "request waits" : "requests wait"), dots(0, n),
      make("small", {class: "dim"}, n ? `${count(queue.tokens)} prompt tokens` : "")]);
  }

  /** Lines from the queue to prefill and from prefill to decode; as thick as they are busy, moving while bytes travel. */
  drawWires() {
    if (!this.pools) return;
    const links = (this.pools.links || []).filter(link => this.cards.has(link.from) && this.cards.has(link.to));
    const shown = links.map(link => `${link.from} → ${link.to}  ${link.transport}  ${bytes(link.bytes_per_s)}/s, ${count(link.transfers)} transfers` + (link.failures ? `, ${count(link.failures)} failed` : ""));
    redraw(this.links, shown, () => shown.map(line => make("li", {}, line)));
    const box = this.root.getBoundingClientRect();
    const isStacked = getComputedStyle(this.columns.prefill.parentNode).gridColumnStart === "1";
    if (isStacked || !box.width) { this.wires.replaceChildren(); return; }
    const edge = (node, side) => {
      const rect = node.getBoundingClientRect();
      return [(side === "left" ? rect.left : rect.right) - box.left, rect.top + rect.height / 2 - box.top];
    };
    const wires = [];
    const inlets = [...this.columns.prefill.querySelectorAll(".worker")];
    for (const node of inlets.length ? inlets : this.columns.decode.querySelectorAll(".worker")) {
      wires.push({path: curve(edge(this.queue, "right"), edge(node, "left")), width: 1.25, busy: (this.pools.queue || {}).requests > 0});
    }
    const most = Math.max(...links.map(link => link.bytes_per_s || 0), 1);
    const labelled = new Set([...links].sort((a, b) => b.bytes_per_s - a.bytes_per_s).slice(0, MAX_LABELS).filter(link => links.length <= 2 || link.bytes_per_s > 0));
    for (const link of links) {
      const a = edge(this.cards.get(link.from).node, "right"), b = edge(this.cards.get(link.to).node, "left");
      const t = labelled.size > 2 ? 0.3 : 0.5; // away from where they cross
      wires.push({path: curve(a, b), width: 1.25 + 4 * (link.bytes_per_s || 0) / most, busy: link.bytes_per_s > 0, failed: link.failures > 0,
        label: labelled.has(link) ? `${bytes(link.bytes_per_s)}/s` : null, at: bezier(a, b, t)});
    }
    redraw(this.wires, [box.width, box.height, wires], () => wires.flatMap(wire => [
      svg("path", {d: wire.path, class: `wire${wire.busy ? " busy" : ""}${wire.failed ? " failed" : ""}`, "stroke-width": wire.width}),
      wire.label ? svg("g", {transform: `translate(${wire.at[0]} ${wire.at[1]})`}, svg("rect", {x: -33, y: -10, width: 66, height: 20, rx: 10}), svg("text", {"text-anchor": "middle", y: 4}, wire.label)) : null]));
    this.wires.setAttribute("viewBox", `0 0 ${box.width} ${box.height}`);
  }
}

function emptyOf(place) {
  let node = place.querySelector(":scope > .nobody");
  if (!node) place.prepend(node = make("div", {class: "nobody"}));
  return node;
}

const column = (title, node) => make("div", {class: `col ${title.toLowerCase()}`}, make("h3", {}, title), node);
const curve = ([x1, y1], [x2, y2]) => `M${x1} ${y1}C${(x1 + x2) / 2} ${y1} ${(x1 + x2) / 2} ${y2} ${x2} ${y2}`;

function bezier([x1, y1], [x2, y2], t) {
  const m = (x1 + x2) / 2, u = 1 - t, mix = (a, b, c, d) => u * u * u * a + 3 * u * u * t * b + 3 * u * t * t * c + t * t * t * d;
  return [mix(x1, m, m, x2), mix(y1, y1, y2, y2)];
}

function dots(running, waiting) {
  const node = make("span", {class: "dots", role: "img", "aria-label": `${running} running, ${waiting} waiting`});
  const on = Math.min(running, MAX_DOTS), off = Math.min(waiting, MAX_DOTS - on);
  for (let i = 0; i < on + off; i++) node.append(make("i", {class: i < on ? "dot on" : "dot"}));
  if (running + waiting > on + off) node.append(make("small", {}, `+${count(running + waiting - on - off)}`));
  return node;
}

class Card {
  constructor(name) {
    this.state = make("span", {class: "state"});
    this.bars = ["used", "cached"].map(kind => make("i", {class: kind}));
    this.kv = make("span", {class: "kv", role: "img"}, this.bars);
    [this.rate, this.kvText, this.more] = [make("b"), make("small"), make("small", {class: "dim"})];
    this.dots = make("div", {class: "seqs"});
    this.node = make("article", {class: "worker", "data-worker": name}, make("header", {}, make("h4", {}, name), this.state),
      make("p", {class: "speed"}, this.rate, make("small", {}, " tok/s")), this.dots, this.kv, this.kvText, this.more);
  }

  draw(worker) {
    const total = worker.alive ? worker.blocks_total || 0 : 0, share = n => total ? (n || 0) / total : 0;
    this.node.dataset.state = worker.alive ? worker.state : "lost";
    text(this.state, `${STATES[worker.alive ? worker.state : "lost"] || "●"} ${worker.alive ? worker.state : "lost"}`);
    text(this.rate, worker.alive ? rate(worker.tokens_per_s) : "–");
    redraw(this.dots, [worker.running, worker.waiting], () => dots(worker.running || 0, worker.waiting || 0));
    this.bars[0].style.width = `${100 * share(worker.blocks_used)}%`;
    this.bars[1].style.width = `${100 * share(worker.blocks_cached)}%`;
    this.kv.setAttribute("aria-label", `KV ${percent(share(worker.blocks_used), 0)} in use`);
    text(this.kvText, total ? `KV ${percent(share(worker.blocks_used), 0)} of ${count(total)} blocks` : worker.alive ? "no KV pool yet" : "its KV is gone with it");
    const pids = worker.pids || [], [tp, pp] = (worker.parallel || "1 x 1").split(" x ");
    const parallel = tp * pp > 1 ? `tp ${tp} × pp ${pp} · ` : "";
    text(this.more, worker.alive ? `${parallel}last token ${ago(worker.last_token_age_s)}${worker.rss_bytes ? ` · ${bytes(worker.rss_bytes)}` : ""}` : "its successor is being started");
    this.node.title = `${worker.name}: ${count(worker.running)} running, ${count(worker.waiting)} waiting, ${rate(worker.steps_per_s)} steps/s, incarnation ${worker.incarnation}`
      + (pids.length ? `, ${worker.device}, pid ${pids.join(" ")} on ${worker.host}` : "");
  }
}

// ---- events ----------------------------------------------------------------------------------------------------------

const KINDS = { // sign and how it looks; the sign alone tells them apart
  worker_up: ["▲", "good"], worker_lost: ["✕", "bad"], worker_draining: ["◐", "warn"], resumed: ["↻", "good"], refused: ["⊘", "warn"],
  digest_failure: ["≠", "bad"], scheduler_restarted: ["⟳", "warn"], role_switch: ["⇄", "note"],
};

export function drawEvents(node, events, open) {
  redraw(node, events, () => events.length ? [...events].sort((a, b) => b.t - a.t).map(event => {
    const [sign, look] = KINDS[event.kind] || ["·", "note"];
    const words = [event.text, event.count > 1 ? make("span", {class: "times"}, ` ×${count(event.count)}`) : null];
    return make("li", {class: look, "data-kind": event.kind, title: event.text},
      make("span", {class: "sign", "aria-hidden": "true"}, sign), make("time", {}, clock(event.t)),
      event.request_id ? make("p", {}, make("a", {class: "link", href: "#requests", onclick: () => open(event.request_id)}, words)) : make("p", {}, words));
  }) : make("li", {class: "note"}, make("p", {class: "dim"}, "Nothing has happened: no worker came or went, nothing was refused.")));
}

export function summaryOf(pools) {
  const workers = pools.workers || [], alive = workers.filter(worker => worker.alive);
  const role = name => alive.filter(worker => worker.role === name).length;
  const travelling = (pools.links || []).reduce((sum, link) => sum + (link.bytes_per_s || 0), 0);
  if (!workers.length) return "no worker yet";
  const lost = workers.length - alive.length;
  return `${role("prefill")} prefill, ${role("decode")} decode${lost ? `, ${lost} lost` : ""}` + (known(travelling) ? ` · ${bytes(travelling)}/s between them` : "");
}
