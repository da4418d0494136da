// Time series: six charts by uPlot (served out of its installed wheel, see api/page.py) and the sparklines of the tiles.

import {$, bytes, count, duration, known, make, percent, rate, svg, text} from "./dom.js";

const css = name => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

// Lines differ in dash and width as well as in colour.
const LINES = {
  p50: {label: "p50", color: "--sky", width: 1.5},
  p95: {label: "p95", color: "--blue", width: 2, fill: "--blue-wash"},
  p99: {label: "p99", color: "--ink-2", width: 1.25, dash: [2, 3]},
  promise: {label: "promise", color: "--bad", width: 1.5, dash: [7, 4]},
};

const CHARTS = [
  {id: "ttft", title: "Time to first token", format: duration, big: true, lines: quantiles("ttft"), promise: "ttft_s"},
  {id: "tpot", title: "Time per output token", format: duration, big: true, lines: quantiles("tpot"), promise: "tpot_s"},
  {id: "rates", title: "Requests per second", format: rate, lines: [
    {name: "goodput_per_s", label: "promise kept", color: "--blue", width: 2, fill: "--blue-wash"},
    {name: "requests_per_s", label: "all", color: "--ink-2", width: 1.25},
    {name: "refused_per_s", label: "refused", color: "--amber", width: 1.75, dash: [6, 3]},
    {name: "failed_per_s", label: "failed", color: "--bad", width: 1.75, dash: [2, 3]},
  ]},
  {id: "tokens", title: "Tokens per second", format: rate, lines: [
    {name: "output_tokens_per_s", label: "written", color: "--blue", width: 2, fill: "--blue-wash"},
    {name: "input_tokens_per_s", label: "read", color: "--amber", width: 1.5, dash: [6, 3]},
  ]},
  {id: "busy", title: "Requests inside", format: count, lines: [
    {name: "running", label: "running", color: "--blue", width: 2, fill: "--blue-wash"},
    {name: "queue", label: "queued", color: "--amber", width: 1.75, dash: [6, 3]},
  ]},
  {id: "kv", title: "KV cache", format: value => percent(value, 0), max: 1, lines: [
    {name: "kv_used_share", label: "full", color: "--blue", width: 2, fill: "--blue-wash"},
    {name: "kv_bytes_per_s", label: "travelling", color: "--amber", width: 1.5, dash: [6, 3], scale: "bytes", format: value => known(value) ? bytes(value) + "/s" : "–"},
  ]},
];

function quantiles(kind) {
  return [...["p50", "p95", "p99"].map(name => ({name: `${kind}_${name}`, ...LINES[name]})), {name: "promise", ...LINES.promise}];
}

const LEAST = 120; // seconds

export class Charts {
  constructor(root) {
    this.range = 900;
    this.figures = CHARTS.map(chart => new Figure(chart));
    root.append(...this.figures.map(figure => figure.node));
    new ResizeObserver(() => this.figures.forEach(figure => figure.resize())).observe(root);
    for (const radio of document.querySelectorAll("#range input")) {
      radio.addEventListener("change", () => { this.range = Number(radio.value); this.draw(); });
    }
  }

  draw(series = this.series, promise = this.promise) {
    if (!series) return;
    this.series = series;
    this.promise = promise;
    const t = series.t, end = t.length ? t[t.length - 1] : Date.now() / 1000, start = Math.max(end - this.range, Math.min(t.length ? t[0] : end, end - LEAST)); // a young server has a short past
    let from = 0;
    while (from < t.length && t[from] < start) from++;
    for (const figure of this.figures) figure.draw(series, from, start, end, promise || {});
  }

  recolour() {
    for (const figure of this.figures) figure.rebuild();
    this.draw();
  }
}

class Figure {
  constructor(chart) {
    this.chart = chart;
    this.values = chart.lines.map(line => make("b", {}, "–"));
    this.canvas = make("div", {class: "plot"});
    const keys = chart.lines.map((line, i) => make("span", {}, stroke(line), line.label + " ", this.values[i]));
    this.node = make("figure", {class: chart.big ? "chart big" : "chart", id: `chart-${chart.id}`, role: "group", "aria-label": chart.title},
      make("figcaption", {}, make("h3", {}, chart.title), make("p", {class: "keys"}, keys)), this.canvas);
  }

  draw(series, from, start, end, promise) {
    const {chart} = this, t = series.t.slice(from);
    const promised = chart.promise ? promise[chart.promise] : null;
    const lines = chart.lines.map(({name}) => name === "promise" ? t.map(() => promised) : (series[name] || []).slice(from));
    this.data = [t, ...lines.map(line => line.length === t.length ? line : t.map(() => null))];
    this.start = start;
    this.end = end;
    this.promised = promised;
    if (!this.plot) this.rebuild();
    else this.plot.setData(this.data, true);
    if (!this.plot || this.plot.cursor.idx === null || this.plot.cursor.idx === undefined) this.say(t.length - 1);
  }

  say(i) {
    this.chart.lines.forEach((line, n) => {
      const format = line.format || this.chart.format;
      text(this.values[n], line.name === "promise" ? format(this.promised) : format(this.data[n + 1][i]));
    });
  }

  rebuild() {
    if (this.plot) this.plot.destroy();
    this.plot = null;
    if (!this.data || !window.uPlot || !this.canvas.clientWidth) {
      if (this.data && !window.uPlot) text(this.canvas, "The chart library is missing from this server: reinstall tandem-serve.");
      return;
    }
    this.plot = new uPlot(this.#options(), this.data, this.canvas);
  }

  resize() {
    const width = this.canvas.clientWidth;
    if (this.plot && width && width !== this.plot.width) this.plot.setSize({width, height: this.#height()});
    else if (!this.plot) this.rebuild();
  }

  #height() {
    return this.chart.big ? 190 : 132;
  }

  #options() {
    const {chart} = this, dim = css("--dim"), line = css("--line"), font = `11px ${css("--font")}`;
    const axis = {stroke: dim, font, ticks: {show: false}, grid: {stroke: line, width: 1}};
    const top = max => {
      if (chart.max) return chart.max;
      const least = this.promised ? this.promised * 1.15 : 0;
      return Math.max(known(max) ? max * 1.1 : 0, least) || 1;
    };
    const options = {
      width: this.canvas.clientWidth, height: this.#height(), padding: [8, 6, 0, 0],
      cursor: {sync: {key: "tandem", setSeries: false}, drag: {x: false, y: false}, points: {size: 6}, y: false},
      legend: {show: false},
      scales: {x: {range: () => [this.start, this.end]}, y: {range: (u, min, max) => [0, top(max)]}, bytes: {range: (u, min, max) => [0, Math.max(max || 0, 1) * 1.1]}},
      axes: [
        {...axis, size: 26, grid: {show: false}, space: 70, values: (u, ticks) => ticks.map(t => clockOf(t, this.end - this.start))},
        {...axis, size: 52, gap: 4, space: 34, values: (u, ticks) => ticks.map(value => chart.format(value))},
      ],
      series: [{}, ...chart.lines.map(one => ({
        label: one.label, stroke: css(one.color), width: one.width, dash: one.dash, scale: one.scale || "y",
        fill: one.fill ? css(one.fill) : undefined, points: {show: false}, spanGaps: false,
      }))],
      hooks: {setCursor: [u => this.data && this.say(known(u.cursor.idx) ? u.cursor.idx : this.data[0].length - 1)]},
    };
    return options;
  }
}

function clockOf(t, span) {
  const at = new Date(t * 1000).toLocaleTimeString("en-GB");
  return span > 600 ? at.slice(0, 5) : at;
}

function stroke(line) {
  const [a, b] = line.dash || [1, 0];
  return svg("svg", {viewBox: "0 0 18 6", width: 18, height: 6, "aria-hidden": "true"},
    svg("line", {x1: 0, x2: 18, y1: 3, y2: 3, "stroke-width": line.width + .4, "stroke-dasharray": b ? `${a} ${b}` : null, style: {stroke: `var(${line.color})`}}));
}

// ---- the tiles -------------------------------------------------------------------------------------------------------

const SPARK = 60; // points: five minutes

/** The figures that a person looks at first. One per entry: id, label, then (snapshot, series) -> what it shows. */
const TILES = [
  ["kept", "Promise kept", view => ({value: percent(view.attainment), note: view.budget === null ? "no request yet" : `${percent(view.budget, 0)} of the error budget left`,
    bad: known(view.attainment) && view.attainment < view.promised, line: "attainment"})],
  ["ttft", "TTFT p95", view => ({value: duration(view.last("ttft_p95")), note: `promise ${duration(view.promise.ttft_s)}`, bad: view.last("ttft_p95") > view.promise.ttft_s, line: "ttft_p95"})],
  ["tpot", "TPOT p95", view => ({value: duration(view.last("tpot_p95")), note: `promise ${duration(view.promise.tpot_s)}`, bad: view.last("tpot_p95") > view.promise.tpot_s, line: "tpot_p95"})],
  ["goodput", "Goodput", view => ({value: rate(view.last("goodput_per_s")), unit: "req/s", note: `of ${rate(view.last("requests_per_s"))} ended per second`, line: "goodput_per_s"})],
  ["output", "Output", view => ({value: rate(view.last("output_tokens_per_s")), unit: "tok/s", note: `${rate(view.last("input_tokens_per_s"))} tok/s read`, line: "output_tokens_per_s"})],
  ["inside", "Running", view => ({value: count(view.running), note: `${count(view.queued)} queued`, line: "running"})],
];

export class Tiles {
  constructor(root) {
    this.tiles = TILES.map(([id, label, show]) => {
      const value = make("b", {id: `tile-${id}`}), unit = make("span", {class: "unit"}), note = make("p", {class: "dim"});
      const path = svg("path", {}), area = svg("path", {class: "area"});
      const node = make("article", {class: "tile"}, make("h3", {}, label), make("p", {class: "big"}, value, unit),
        note, svg("svg", {viewBox: `0 0 ${SPARK - 1} 20`, preserveAspectRatio: "none", "aria-hidden": "true"}, area, path));
      root.append(node);
      return {show, value, unit, note, path, area, node};
    });
  }

  draw(snapshot, series) {
    const view = viewOf(snapshot, series);
    for (const tile of this.tiles) {
      const {value, unit, note, bad, line} = tile.show(view);
      text(tile.value, (bad ? "▲ " : "") + value);
      text(tile.unit, unit ? " " + unit : "");
      text(tile.note, note);
      tile.node.classList.toggle("bad", Boolean(bad));
      const points = (series[line] || []).slice(-SPARK), offset = SPARK - points.length, top = Math.max(...points.filter(known), 1e-12);
      let d = "", gap = true, first = 0, last = 0;
      points.forEach((point, i) => {
        if (!known(point)) { gap = true; return; }
        if (!d) first = i + offset;
        last = i + offset;
        d += `${gap ? "M" : "L"}${i + offset} ${(19 - 17 * point / top).toFixed(2)}`;
        gap = false;
      });
      tile.path.setAttribute("d", d);
      tile.area.setAttribute("d", d && !d.slice(1).includes("M") ? `${d}L${last} 20L${first} 20Z` : "");
    }
  }
}

/** Sums over the rows of the report, and the newest known point of a series. */
function viewOf(snapshot, series) {
  const rows = (snapshot.sla && snapshot.sla.rows) || [], rated = rows.filter(row => known(row.attainment) && row.finished + row.failed > 0);
  const weight = rated.reduce((sum, row) => sum + row.finished + row.failed, 0);
  const mean = pick => weight ? rated.reduce((sum, row) => sum + pick(row) * (row.finished + row.failed), 0) / weight : null;
  const in_flight = (snapshot.status && snapshot.status.in_flight) || {}, queue = (snapshot.pools && snapshot.pools.queue) || (snapshot.status && snapshot.status.queue) || {};
  return {
    attainment: mean(row => row.attainment),
    promised: mean(row => row.promise.attainment),
    budget: rated.length ? Math.min(...rated.map(row => known(row.budget_left) ? row.budget_left : 1)) : null,
    promise: snapshot.promise || {},
    running: known(in_flight.total) ? in_flight.total : (series.running || []).at(-1),
    queued: known(queue.requests) ? queue.requests : (series.queue || []).at(-1),
    last: name => {
      const values = series[name] || [];
      for (let i = values.length - 1; i >= Math.max(0, values.length - 12); i--) if (known(values[i])) return values[i];
      return null;
    },
  };
}
