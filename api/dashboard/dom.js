// Making elements, and saying numbers. Nothing here knows of the network or of the page's parts.

export const $ = id => document.getElementById(id);
const SVG = "http://www.w3.org/2000/svg";

/** make("td", {class: "num", title: "x"}, "text", node, null): null children are left out, text is never parsed. */
export function make(tag, props, ...children) {
  const node = document.createElement(tag);
  set(node, props);
  node.append(...children.flat(Infinity).filter(child => child !== null && child !== undefined));
  return node;
}

export function svg(tag, props, ...children) {
  const node = document.createElementNS(SVG, tag);
  set(node, props);
  node.append(...children.flat(Infinity).filter(Boolean));
  return node;
}

function set(node, props) {
  for (const [name, value] of Object.entries(props || {})) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (name === "style") Object.assign(node.style, value); // through the CSSOM: style attributes are not allowed here
    else node.setAttribute(name, value === true ? "" : value);
  }
}

/** Writes only what changed, so that a selection in it and a screen reader's place survive. */
export function text(node, value) {
  if (node.textContent !== value) node.textContent = value;
}

/** Rebuilds `node` only when what it shows is another. */
export function redraw(node, shown, build) {
  const key = JSON.stringify(shown);
  if (node.shownKey === key) return false;
  node.shownKey = key;
  node.replaceChildren(...[build()].flat(Infinity).filter(Boolean));
  return true;
}

export const known = value => value !== null && value !== undefined && !Number.isNaN(value);

export function duration(seconds) {
  if (!known(seconds)) return "–";
  if (seconds === 0) return "0";
  if (seconds < 0.0995) return trim(seconds * 1000, seconds < 0.00995 ? 1 : 0) + " ms";
  if (seconds < 0.9995) return Math.round(seconds * 1000) + " ms";
  if (seconds < 100) return trim(seconds, seconds < 10 ? 2 : 1) + " s";
  return Math.floor(seconds / 60) + " min";
}
export const ms = value => duration(known(value) ? value / 1000 : null);

function trim(value, digits) {
  return value.toFixed(digits).replace(/(\.\d*?)0+$/, "$1").replace(/\.$/, "");
}

export function count(value) {
  if (!known(value)) return "–";
  for (const [size, unit] of [[1e12, " T"], [1e9, " G"], [1e6, " M"], [1e4, " k"]]) {
    if (Math.abs(value) >= size) return trim(value / (unit === " k" ? 1e3 : size), 1) + unit;
  }
  return Math.round(value).toLocaleString("en");
}

export function rate(value) {
  if (!known(value)) return "–";
  if (value >= 100) return count(value);
  return value === 0 ? "0" : trim(value, value < 10 ? 2 : 1);
}

export function bytes(value) {
  if (!known(value)) return "–";
  let unit = 0;
  while (value >= 999.5 && unit < 5) { value /= 1000; unit++; }
  return (unit ? trim(value, value < 10 ? 2 : value < 100 ? 1 : 0) : Math.round(value)) + " " + ["B", "kB", "MB", "GB", "TB", "PB"][unit];
}

/** A share is never rounded up to 100 %. */
export function percent(share, digits = 1) {
  if (!known(share)) return "–";
  const scale = 10 ** digits;
  return (Math.floor(share * 100 * scale + 1e-9) / scale).toFixed(digits).replace(/\.0+$/, "") + " %";
}

export function money(value) {
  if (!known(value)) return "–";
  return value < 0.01 && value > 0 ? value.toPrecision(2) : value.toFixed(2);
}

export const clock = unix => new Date(unix * 1000).toLocaleTimeString("en-GB");

export function ago(seconds) {
  if (!known(seconds)) return "–";
  if (seconds < 1.5) return "now";
  if (seconds < 90) return Math.round(seconds) + " s ago";
  if (seconds < 5400) return Math.round(seconds / 60) + " min ago";
  return Math.round(seconds / 3600) + " h ago";
}

export const REFUSALS = { // scheduler.status: rejections
  queue_requests: "queue full (requests)", queue_tokens: "queue full (tokens)", queue_bytes: "queue full (bytes)",
  tenant_share: "over its share of the queue", would_time_out: "would have waited too long", queue_timeout: "waited too long",
  no_worker: "no decode worker", too_long: "longer than a KV pool", rate_limit: "over its rate", slo: "its promise would be missed",
};
export const refusal = reason => REFUSALS[reason] || reason.replaceAll("_", " ");

export const PHASES = [ // key, label, what it is
  ["queue", "queue", "received until a worker was chosen"],
  ["prefill", "prefill", "the prompt is read"],
  ["transfer", "KV transfer", "what prefill made travels to decode"],
  ["decode", "decode", "first to last token"],
];
