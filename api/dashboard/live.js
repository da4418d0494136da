// The connection: one stream of server-sent events, read with fetch because EventSource cannot carry a key. It keeps the last
// snapshot and one hour of series, and nothing else, however long the page stays open.

const MAX_POINTS = 720; // of 5 s: one hour
const RETRY_MS = [500, 1000, 2000, 5000];
const POLL_MS = 1000;
const SILENT_MS = 20000; // the server says something at least this often

const KEY = "tandem-api-key";

export class Unauthorized extends Error {}

export const key = {
  get: () => sessionStorage.getItem(KEY) || "",
  set: value => (value ? sessionStorage.setItem(KEY, value) : sessionStorage.removeItem(KEY)),
};

/** fetch with the key of this tab. Throws Unauthorized at 401 and 403. */
export async function ask(path, options = {}) {
  const headers = {...options.headers};
  if (key.get()) headers.authorization = `Bearer ${key.get()}`;
  const answer = await fetch(path, {cache: "no-store", credentials: "same-origin", ...options, headers});
  if (answer.status === 401 || (answer.status === 403 && path.startsWith("dashboard/"))) throw new Unauthorized(String(answer.status));
  return answer;
}

/** Every event of a text/event-stream body as {event, data}; ends when the body ends. `onBytes` at every sign of life. */
export async function* serverSentEvents(body, onBytes = () => {}) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const {value, done} = await reader.read();
      if (done) return;
      onBytes();
      rest += value.includes("\r") ? value.replaceAll("\r\n", "\n") : value;
      let end;
      while ((end = rest.indexOf("\n\n")) >= 0) {
        const frame = rest.slice(0, end);
        rest = rest.slice(end + 2);
        let event = "message", data = "";
        for (const line of frame.split("\n")) {
          if (line.startsWith("event:")) event = line.slice(6).trim();
          else if (line.startsWith("data:")) data += (data ? "\n" : "") + line.slice(line[5] === " " ? 6 : 5);
        }
        if (data) yield {event, data};
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

/** Snapshots in, one hour of numbers kept. `series.t` and one array per name, all of one length. */
export class Store {
  snapshot = null;
  series = {t: []};
  arrivedAt = 0;

  take(snapshot) {
    const series = snapshot.series || {};
    if (series.history) this.#replace(series.history);
    else if (series.point) this.#append(series.point, series.step_s || 5);
    const {series: _, ...rest} = snapshot;
    this.snapshot = rest;
    this.arrivedAt = performance.now();
  }

  #replace(history) {
    const from = Math.max(0, history.t.length - MAX_POINTS);
    this.series = Object.fromEntries(Object.entries(history).map(([name, values]) => [name, values.slice(from)]));
  }

  #append(point, step) {
    const {series} = this, last = series.t.length - 1;
    const slot = t => Math.floor(t / step);
    const again = last >= 0 && slot(series.t[last]) >= slot(point.t); // the same step, still growing
    if (again && slot(series.t[last]) > slot(point.t)) return; // a clock set back: its past is not ours to rewrite
    for (const name of Object.keys(point)) {
      if (!series[name]) series[name] = series.t.map(() => null);
    }
    const length = series.t.length;
    for (const name of Object.keys(series)) {
      const values = series[name];
      if (again) values[last] = name in point ? point[name] : values[last];
      else values[length] = name in point ? point[name] : null;
      if (values.length > MAX_POINTS) values.shift();
    }
  }
}

/** Runs for the page's life. `on` has snapshot(), state(name, text), locked(). */
export async function follow(store, on) {
  let failures = 0, hasStream = true;
  for (;;) {
    const started = performance.now();
    try {
      if (hasStream) hasStream = await stream(store, on);
      else await poll(store, on);
      failures = performance.now() - started > 5000 ? 0 : failures + 1;
      if (!hasStream) failures = 0;
    } catch (error) {
      if (error instanceof Unauthorized) {
        on.state("wait", "key needed");
        await on.locked(Boolean(key.get()));
        failures = 0;
        continue;
      }
      failures++;
      on.state("lost", "not reached; trying again");
    }
    const pause = hasStream ? RETRY_MS[Math.min(failures, RETRY_MS.length - 1)] : POLL_MS;
    await new Promise(resolve => setTimeout(resolve, pause));
  }
}

/** -> false when this server has no stream to offer (the page polls then). */
async function stream(store, on) {
  const control = new AbortController();
  let timer = 0;
  const alive = () => {
    clearTimeout(timer);
    timer = setTimeout(() => control.abort(), SILENT_MS);
  };
  alive();
  try {
    const answer = await ask("dashboard/live", {signal: control.signal, headers: {accept: "text/event-stream"}});
    if (answer.status === 404 || answer.status === 503) return false; // 503: as many listeners as it takes
    if (!answer.ok) throw new Error(String(answer.status));
    for await (const {event, data} of serverSentEvents(answer.body, alive)) {
      if (event !== "snapshot" && event !== "tick") continue;
      store.take(JSON.parse(data));
      on.state("live", "live");
      on.snapshot();
    }
    on.state("lost", "connection ended; trying again");
    return true;
  } finally {
    clearTimeout(timer);
    control.abort();
  }
}

async function poll(store, on) {
  const answer = await ask("dashboard/data");
  if (!answer.ok) throw new Error(String(answer.status));
  store.take(await answer.json());
  on.state("live", "live, polling");
  on.snapshot();
}
