// One request's time: marks or durations in, lanes of segments out, drawn as a waterfall with the phase's name on each.

import {duration, known, make, ms} from "./dom.js";

// From which marks (the latest of them) to which mark a segment runs, and in which phase it counts.
const SEGMENTS = {
  tokenized: {phase: "queue", label: "tokenize", from: ["received"]},
  admitted: {phase: "queue", label: "queue", from: ["tokenized", "received", "resumed"]},
  reserved: {phase: "queue", label: "reserve", from: ["admitted"]},
  prefill_start: {phase: "wait", label: "to prefill", from: ["reserved", "admitted"]},
  prefill_end: {phase: "prefill", label: "prefill", from: ["prefill_start"]},
  transfer_end: {phase: "transfer", label: "KV transfer", from: ["prefill_end"]},
};

/** -> {segments: [{phase, label, from, to, worker, detail}], ticks: [ms], breaks: [{at, detail}], end, failed}; times in ms since received. */
export function fromMarks(marks) {
  const last = {}, segments = [], ticks = [], breaks = [];
  let decoding = null;
  const close = (at, label) => {
    if (decoding && at > decoding.at) segments.push({phase: "decode", label: label || "decode", from: decoding.at, to: at, worker: decoding.worker, detail: null});
    decoding = null;
  };
  for (const mark of [...marks].sort((a, b) => a.at_ms - b.at_ms)) {
    const rule = SEGMENTS[mark.name];
    if (rule) {
      const from = rule.from.map(name => last[name]).filter(known).sort((a, b) => b - a)[0];
      if (known(from) && mark.at_ms >= from) segments.push({phase: rule.phase, label: rule.label, from, to: mark.at_ms, worker: mark.worker, detail: mark.detail});
    }
    if (mark.name === "first_token" || mark.name === "token") {
      ticks.push(mark.at_ms);
      if (!decoding) decoding = {at: mark.at_ms, worker: mark.worker};
      decoding.worker = mark.worker || decoding.worker;
    }
    if (mark.name === "resumed") {
      close(mark.at_ms);
      breaks.push({at: mark.at_ms, detail: mark.detail || "another worker took over"});
      for (const name of Object.keys(last)) delete last[name];
    }
    if (mark.name === "end") close(mark.at_ms);
    last[mark.name] = mark.at_ms;
  }
  const end = Math.max(0, ...marks.map(mark => mark.at_ms));
  if (decoding) close(end);
  return {segments, ticks, breaks, end};
}

/** A row of the list knows durations alone. */
export function fromRow(row) {
  const segments = [];
  let at = 0;
  for (const phase of ["queue", "prefill", "transfer", "decode"]) {
    const length = row[`${phase}_ms`];
    if (!known(length) || length <= 0) continue;
    segments.push({phase, label: phase === "transfer" ? "KV transfer" : phase, from: at, to: at + length, worker: null, detail: null});
    at += length;
  }
  return {segments, ticks: [], breaks: [], end: Math.max(at, row.e2e_ms || 0)};
}

/** One line, all segments in a row, scaled to `scale` ms. running: ms since it came, for one that has not ended. */
export function strip(row, scale, running = null) {
  const fall = fromRow(row);
  if (running !== null && !fall.segments.length) fall.segments.push({phase: row.state === "decode" ? "decode going" : "wait", label: "so far", from: 0, to: running});
  const width = Math.max(scale, fall.end, 1e-3);
  const told = fall.segments.map(segment => `${segment.label} ${ms(segment.to - segment.from)}`).join(", ");
  return make("span", {class: "strip", role: "img", "aria-label": told || "no phase yet", title: told},
    fall.segments.map(segment => make("i", {class: `ph ${segment.phase}`, style: place(segment, width)})));
}

function place(segment, width) {
  return {left: `${100 * segment.from / width}%`, width: `max(2px, ${100 * (segment.to - segment.from) / width}%)`};
}

/** One lane per segment, an axis below. `now` (ms): the request still runs, and the axis ends there. */
export function waterfall(fall, now = 0) {
  const width = Math.max(fall.end, now, 1), node = make("div", {class: "fall"});
  for (const segment of fall.segments) {
    const length = segment.to - segment.from, inside = fall.ticks.filter(t => t >= segment.from && t <= segment.to);
    node.append(make("div", {class: "lane"},
      make("span", {class: "who"}, segment.label, segment.worker ? make("small", {}, segment.worker) : null),
      make("span", {class: "track"}, make("i", {class: `ph ${segment.phase}`, style: place(segment, width), title: segment.detail}),
        segment.phase === "decode" ? thin(inside).map(t => make("i", {class: "tick", style: {left: `${100 * t / width}%`}})) : null,
        fall.breaks.map(one => make("i", {class: "break", style: {left: `${100 * one.at / width}%`}, title: one.detail}))), make("span", {class: "said"}, ms(length))));
  }
  node.append(make("div", {class: "lane axis"}, make("span", {class: "who"}), make("span", {class: "track"},
    scaleOf(width).map(t => make("span", {class: "mark", style: {left: `${100 * t / width}%`}}, duration(t / 1000)))), make("span", {})));
  for (const one of fall.breaks) node.append(make("p", {class: "resumed"}, "↻ ", `resumed after ${ms(one.at)}: ${one.detail}`));
  return node;
}

const MAX_TICKS = 160;

function thin(ticks) {
  const step = Math.max(1, Math.ceil(ticks.length / MAX_TICKS));
  return ticks.filter((_, i) => i % step === 0);
}

function scaleOf(width) {
  const rough = width / 4, power = 10 ** Math.floor(Math.log10(rough)), step = [1, 2, 5, 10].map(n => n * power).find(n => n >= rough);
  const marks = [];
  for (let t = 0; t <= width * 0.93; t += step) marks.push(t);
  return marks;
}
