// The report per tenant and class: latencies against the promise, attainment, error budget, goodput, refusals, tokens, cost.

import {count, duration, known, make, money, percent, rate, redraw, refusal} from "./dom.js";

const HEAD = ["Tenant, class", "TTFT", "TPOT", "Promise kept", "Error budget left", "Goodput", "Requests", "Refused", "Tokens", "Cost"];

export function drawPromises(node, rows) {
  redraw(node, rows, () => rows.length ? table(rows) : make("p", {class: "dim"}, "Nobody has asked for anything yet. As soon as somebody does, each tenant has a row here."));
}

function table(rows) {
  return make("table", {class: "sla cards"},
    make("thead", {}, make("tr", {}, HEAD.map((name, i) => make("th", {scope: "col", class: i > 4 ? "num" : null}, name, hint(name))))),
    make("tbody", {}, rows.map(row)));
}

function hint(name) {
  return name === "TTFT" || name === "TPOT" ? make("small", {}, "p50 · p95 · p99") : null;
}

function row(r) {
  const total = r.requests;
  const kept = known(r.attainment) && r.attainment >= r.promise.attainment;
  return make("tr", {"data-tenant": r.tenant},
    make("th", {scope: "row"}, r.tenant, make("small", {}, r.class)),
    latency("TTFT", r.ttft, r.promise.ttft_s),
    latency("TPOT", r.tpot, r.promise.tpot_s),
    make("td", {"data-name": "Promise kept", class: known(r.attainment) ? (kept ? "good" : "bad") : null},
      make("b", {}, (known(r.attainment) && !kept ? "▲ " : "") + percent(r.attainment)), make("small", {}, `of ${percent(r.promise.attainment)} promised`)),
    budget(r.budget_left),
    make("td", {"data-name": "Goodput", class: "num"}, rate(r.goodput_per_s), make("small", {}, "req/s")),
    make("td", {"data-name": "Requests", class: "num"}, count(total), make("small", {}, others(r))),
    refused(r.refused || {}),
    make("td", {"data-name": "Tokens", class: "num"}, `${count(r.tokens.input)} in, ${count(r.tokens.output)} out`,
      make("small", {}, r.tokens.input ? `${percent(r.tokens.cached / r.tokens.input, 0)} of the input cached` : "")),
    make("td", {"data-name": "Cost", class: "num"}, money(r.cost)));
}

function others(r) {
  const parts = [];
  if (r.failed) parts.push(`${count(r.failed)} failed`);
  if (r.cancelled) parts.push(`${count(r.cancelled)} cancelled`);
  return parts.join(", ") || "none failed";
}

/** Three numbers and a bar of p95: the mark is the promise, at two thirds of the bar. */
function latency(name, summary, promise) {
  const value = summary ? summary.p95 : null, over = known(value) && value > promise;
  const numbers = ["p50", "p95", "p99"].map(quantile => {
    const one = summary ? summary[quantile] : null, late = known(one) && one > promise;
    return make("span", {class: late ? "bad" : null, title: quantile}, (late ? "▲" : "") + duration(one));
  });
  const bar = make("i", {class: over ? "over" : null, style: {width: known(value) ? Math.min(100, 66.7 * value / promise) + "%" : "0"}});
  return make("td", {"data-name": name, class: "lat"}, make("span", {class: "three"}, numbers),
    make("span", {class: "bullet", role: "img", "aria-label": `p95 ${duration(value)}, promise ${duration(promise)}`}, bar),
    make("small", {}, `promise ${duration(promise)}`));
}

function budget(left) {
  const low = known(left) && left < 0.25;
  return make("td", {"data-name": "Error budget left", class: low ? "bad" : null}, make("b", {}, (low ? "▲ " : "") + percent(left, 0)),
    make("span", {class: "meter", role: "img", "aria-label": `${percent(left, 0)} left`},
      make("i", {class: low ? "over" : null, style: {width: `${100 * Math.max(0, Math.min(1, left || 0))}%`}})));
}

function refused(reasons) {
  const named = Object.entries(reasons).filter(([, n]) => n > 0).sort((a, b) => b[1] - a[1]);
  const total = named.reduce((sum, [, n]) => sum + n, 0);
  return make("td", {"data-name": "Refused", class: total ? "num refused some" : "num refused"}, count(total),
    named.slice(0, 3).map(([reason, n]) => make("small", {}, `${count(n)} ${refusal(reason)}`)));
}
