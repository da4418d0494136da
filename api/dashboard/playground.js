// A prompt whose answer streams while its waterfall appears: what the browser sees at once, the server's marks at the end.

import {$, count, known, make, ms, rate, text} from "./dom.js";
import {ask, serverSentEvents, Unauthorized} from "./live.js";
import {fromMarks, waterfall} from "./waterfall.js";

const ASK_AGAIN_MS = [100, 300, 900]; // the timeline's last marks arrive with a heartbeat
const MAX_TICKS = 4096;

export class Playground {
  constructor(locked) {
    this.locked = locked;
    this.control = null;
    $("play").addEventListener("submit", event => { event.preventDefault(); this.run(); });
    $("stop").addEventListener("click", () => this.control && this.control.abort());
    $("prompt").addEventListener("keydown", event => { if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) this.run(); });
  }

  models(names) {
    const node = $("play-model"), key = names.join("\n");
    if (node.shownKey === key) return;
    node.shownKey = key;
    node.replaceChildren(...names.map(name => make("option", {value: name}, name)));
  }

  async run() {
    if (this.control) return;
    const control = this.control = new AbortController(), seen = {ticks: [], first: null, id: `play-${crypto.getRandomValues(new Uint32Array(2)).join("-")}`, isKnown: false, sent: performance.now(), usage: null, metrics: null, end: null};
    $("send").disabled = true;
    $("stop").disabled = false;
    $("answer").replaceChildren();
    $("answer").classList.remove("failed");
    this.#draw(seen);
    const frame = setInterval(() => this.#draw(seen), 80);
    let trouble = "";
    try {
      trouble = await this.#stream(seen, control.signal);
    } catch (error) {
      if (error instanceof Unauthorized) await this.locked(true);
      trouble = error.name === "AbortError" ? "stopped" : error instanceof Unauthorized ? "a key is needed" : "the connection broke";
    }
    clearInterval(frame);
    seen.end = performance.now() - seen.sent;
    this.control = null;
    $("send").disabled = false;
    $("stop").disabled = true;
    if (trouble) {
      $("answer").append(make("p", {class: "bad"}, trouble));
      $("answer").classList.add("failed");
    }
    this.#draw(seen);
    if (seen.isKnown) await this.#timeline(seen);
  }

  async #stream(seen, signal) {
    const isChat = $("play-as").value === "chat", prompt = $("prompt").value;
    const body = {model: $("play-model").value, max_tokens: Number($("play-tokens").value) || 64, temperature: Number($("play-temperature").value) || 0,
      stream: true, stream_options: {include_usage: true}, ...(isChat ? {messages: [{role: "user", content: prompt}]} : {prompt})};
    seen.sent = performance.now();
    const answer = await ask(isChat ? "v1/chat/completions" : "v1/completions", {method: "POST", signal, headers: {"content-type": "application/json", "x-request-id": seen.id}, body: JSON.stringify(body)});
    seen.isKnown = answer.ok;
    if (!answer.ok) {
      const told = await answer.json().catch(() => null), wait = answer.headers.get("retry-after");
      return ((told && told.error && told.error.message) || `the server answered ${answer.status}`) + (wait ? ` (try again in ${wait} s)` : "");
    }
    const place = document.createTextNode("");
    $("answer").append(place);
    for await (const {event, data} of serverSentEvents(answer.body)) {
      if (data === "[DONE]") break;
      const chunk = JSON.parse(data);
      if (event === "error" || chunk.error) return (chunk.error && chunk.error.message) || "the stream failed";
      const choice = (chunk.choices || [])[0], piece = choice ? (isChat ? choice.delta && choice.delta.content : choice.text) || "" : "";
      if (piece) {
        const at = performance.now() - seen.sent;
        if (seen.first === null) seen.first = at;
        if (seen.ticks.length < MAX_TICKS) seen.ticks.push(at);
        place.data += piece;
        $("answer").scrollTop = $("answer").scrollHeight;
      }
      if (chunk.usage) { seen.usage = chunk.usage; seen.metrics = chunk.metrics || chunk.usage.metrics || null; }
    }
    return "";
  }

  /** What the browser knows by itself: waiting, then tokens. */
  #draw(seen) {
    const now = seen.end ?? performance.now() - seen.sent, segments = [];
    segments.push({phase: "wait", label: "to first token", from: 0, to: seen.first ?? now});
    if (seen.first !== null) segments.push({phase: "decode", label: "tokens", from: seen.first, to: seen.ticks.at(-1) ?? now});
    $("play-fall").replaceChildren(waterfall({segments, ticks: seen.ticks, breaks: [], end: now}, now));
    this.#facts(seen, []);
  }

  #facts(seen, more) {
    const m = seen.metrics || {}, facts = [["first token", ms(known(m.time_to_first_token_ms) ? m.time_to_first_token_ms : seen.first)]];
    const gaps = seen.ticks.length - 1, mean = known(m.mean_itl_ms) ? m.mean_itl_ms : gaps > 0 ? (seen.ticks.at(-1) - seen.ticks[0]) / gaps : null;
    facts.push(["between tokens", ms(mean)], ["tokens", seen.usage ? `${count(seen.usage.prompt_tokens)} + ${count(seen.usage.completion_tokens)}` : count(seen.ticks.length)],
      ["speed", known(m.tokens_per_second) ? `${rate(m.tokens_per_second)} tok/s` : mean ? `${rate(1000 / mean)} tok/s` : "–"], ...more);
    $("play-facts").replaceChildren(...facts.flatMap(([name, value]) => [make("dt", {}, name), make("dd", {}, value)]));
  }

  /** The server's own marks replace what the browser guessed. */
  async #timeline(seen) {
    for (const pause of ASK_AGAIN_MS) {
      await new Promise(resolve => setTimeout(resolve, pause));
      if (this.control) return; // another prompt is under way
      try {
        const answer = await ask(`dashboard/requests/${encodeURIComponent(seen.id)}`);
        if (!answer.ok) continue;
        const {request, timeline} = await answer.json();
        if (this.control || !timeline || !timeline.length) continue;
        const fall = fromMarks(timeline);
        $("play-fall").replaceChildren(waterfall(fall));
        $("play-fall").dataset.from = "server";
        const path = [request.prefill_worker, request.decode_worker].filter(Boolean).join(" → ");
        this.#facts(seen, [["path", path || "–"], ["request", make("span", {class: "mono"}, request.id)]]);
        if (timeline.some(mark => mark.name === "end")) return;
      } catch {
        return;
      }
    }
  }
}
